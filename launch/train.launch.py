"""Train from a launch file: `ros2 launch flow_policy_rl train.launch.py algorithm:=score_flow checkpoint:=...`.

A thin layer over `flow-policy train`: the same code, the same run folder; `args` passes any further flags. With
`as_node:=true` a node starts it, publishes its progress and serves `~/start`, `~/stop` and `~/export`.
"""

import shlex
import sys

from launch.actions import DeclareLaunchArgument, EmitEvent, ExecuteProcess, OpaqueFunction
from launch.events import Shutdown
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue

from launch import LaunchContext, LaunchDescription

OPTIONAL = ("demos", "checkpoint", "run_dir", "seed")
OF_NODE = ("algorithm", "task", "demos", "checkpoint", "run_dir", "args")


def command(context: LaunchContext) -> list:
    """The command line, with the arguments that were given; or the node that runs it."""
    get = lambda name: LaunchConfiguration(name).perform(context)  # noqa: E731
    if get("as_node") == "true":
        texts = {name: get(name) for name in OF_NODE}
        texts["args"] += f" --seed {get('seed')}" if get("seed") else ""
        return [
            Node(
                name="trainer_node",
                exec_name="trainer_node",
                executable=sys.executable,
                arguments=["-m", "flow_policy_ros.trainer_node"],
                parameters=[
                    {name: ParameterValue(text, value_type=str) for name, text in texts.items()},
                    {"autostart": True},
                ],
                output="screen",
            )
        ]
    line = [
        sys.executable,
        "-m",
        "flow_policy_rl.cli",
        "train",
        get("algorithm"),
        "--task",
        get("task"),
    ]
    for name in OPTIONAL:
        if get(name):
            line += [f"--{name.replace('_', '-')}", get(name)]
    line += shlex.split(get("args"))
    return [
        ExecuteProcess(
            name="train",
            cmd=line,
            output="screen",
            on_exit=EmitEvent(event=Shutdown(reason="training ended")),
        )
    ]


def generate_launch_description() -> LaunchDescription:
    """Arguments and one process."""
    return LaunchDescription(
        [
            DeclareLaunchArgument(
                "algorithm",
                default_value="bc",
                description="flow-policy list algorithms names them",
            ),
            DeclareLaunchArgument("task", default_value="lift", description="name of the task"),
            DeclareLaunchArgument(
                "demos", default_value="", description="HDF5 demonstrations (bc)"
            ),
            DeclareLaunchArgument(
                "checkpoint", default_value="", description="policy to fine-tune (RL)"
            ),
            DeclareLaunchArgument("run_dir", default_value="", description="folder to write"),
            DeclareLaunchArgument("seed", default_value="", description="random seed"),
            DeclareLaunchArgument(
                "args", default_value="", description="further flags, as on the command line"
            ),
            DeclareLaunchArgument(
                "as_node",
                default_value="false",
                choices=["true", "false"],
                description="run it under trainer_node (needs run_dir)",
            ),
            OpaqueFunction(function=command),
        ]
    )

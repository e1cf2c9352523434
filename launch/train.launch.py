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

from launch import LaunchContext, LaunchDescription

OPTIONAL = ("demos", "checkpoint", "run_dir", "seed")


def command(context: LaunchContext) -> list:
    """The command line, with the arguments that were given; or the node that runs it."""
    get = lambda name: LaunchConfiguration(name).perform(context)  # noqa: E731
    if get("as_node").lower() == "true":
        seed = f" --seed {get('seed')}" if get("seed") else ""
        return [
            Node(
                name="trainer_node",
                executable=sys.executable,
                arguments=["-m", "flow_policy_ros.trainer_node"],
                parameters=[
                    {
                        "algorithm": get("algorithm"),
                        "task": get("task"),
                        "demos": get("demos"),
                        "checkpoint": get("checkpoint"),
                        "run_dir": get("run_dir"),
                        "args": get("args") + seed,
                        "autostart": True,
                    }
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
            cmd=line, output="screen", on_exit=EmitEvent(event=Shutdown(reason="training ended"))
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
                description="run it under trainer_node (needs run_dir)",
            ),
            OpaqueFunction(function=command),
        ]
    )

"""Judge a policy on a bag: `ros2 launch flow_policy_rl replay.launch.py bag:=/path/bag policy:=/path/policy.onnx`."""

import shlex
import sys

from launch.actions import DeclareLaunchArgument, EmitEvent, ExecuteProcess, OpaqueFunction
from launch.events import Shutdown
from launch.substitutions import LaunchConfiguration

from launch import LaunchContext, LaunchDescription


def command(context: LaunchContext) -> list:
    """The command line."""
    get = lambda name: LaunchConfiguration(name).perform(context)  # noqa: E731
    line = [sys.executable, "-m", "flow_policy_rl.cli", "replay"]
    for name in ("bag", "policy", "out"):
        line += [f"--{name}", get(name)]
    line += shlex.split(get("args"))
    return [
        ExecuteProcess(
            name="replay",
            cmd=line,
            output="screen",
            on_exit=EmitEvent(event=Shutdown(reason="replay ended")),
        )
    ]


def generate_launch_description() -> LaunchDescription:
    """Arguments and one process."""
    return LaunchDescription(
        [
            DeclareLaunchArgument("bag", description="rosbag2 folder"),
            DeclareLaunchArgument("policy", description="path of a policy.onnx"),
            DeclareLaunchArgument(
                "out", default_value="replay", description="folder for the report"
            ),
            DeclareLaunchArgument(
                "args", default_value="", description="further flags, as on the command line"
            ),
            OpaqueFunction(function=command),
        ]
    )

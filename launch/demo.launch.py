"""Simulated arm and policy together: `ros2 launch flow_policy_rl demo.launch.py` lifts a cube with the shipped policy.

The same two launch files drive a real robot: leave out sim.launch.py, and use_sim_time. Set off an episode with
`ros2 service call /sim_node/reset std_srvs/srv/Trigger`.
"""

from pathlib import Path

from launch.actions import DeclareLaunchArgument, IncludeLaunchDescription
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import LaunchConfiguration

from launch import LaunchDescription

HERE = Path(__file__).resolve().parent


def generate_launch_description() -> LaunchDescription:
    """Both launch files, on simulated time, armed. Their other arguments can be given, too."""

    def include(name: str, *arguments: str) -> IncludeLaunchDescription:
        source = PythonLaunchDescriptionSource(str(HERE / f"{name}.launch.py"))
        values = {argument: LaunchConfiguration(argument) for argument in arguments}
        return IncludeLaunchDescription(source, launch_arguments=values.items())

    return LaunchDescription(
        [
            DeclareLaunchArgument(
                "policy",
                default_value="lift",
                description="a policy.onnx, or the name of a shipped one",
            ),
            DeclareLaunchArgument("task", default_value="lift", description="name of the task"),
            DeclareLaunchArgument(
                "robot", default_value="panda", description="robot name or robot file"
            ),
            DeclareLaunchArgument(
                "dry_run",
                default_value="false",
                choices=["true", "false"],
                description="compute and show chunks, but do not command the arm",
            ),
            DeclareLaunchArgument(
                "use_sim_time",
                default_value="true",
                choices=["true", "false"],
                description="time from /clock",
            ),
            # What refuses an argument comes first: launch leaves processes behind that it started before an exception.
            include("deploy", "policy", "robot", "dry_run", "use_sim_time"),
            include("sim", "task", "robot"),
        ]
    )

"""Simulated arm and policy together: `ros2 launch flow_policy_rl demo.launch.py policy:=/path/policy.onnx`.

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
    """Both launch files, on simulated time, armed."""

    def include(name: str, **arguments) -> IncludeLaunchDescription:
        source = PythonLaunchDescriptionSource(str(HERE / f"{name}.launch.py"))
        return IncludeLaunchDescription(source, launch_arguments=arguments.items())

    task, policy, robot, factor = (
        LaunchConfiguration(name) for name in ("task", "policy", "robot", "real_time_factor")
    )
    return LaunchDescription(
        [
            DeclareLaunchArgument("policy", description="absolute path of a policy.onnx"),
            DeclareLaunchArgument("task", default_value="lift", description="name of the task"),
            DeclareLaunchArgument(
                "robot", default_value="panda", description="robot name or robot file"
            ),
            DeclareLaunchArgument(
                "real_time_factor", default_value="1.0", description="simulated seconds per second"
            ),
            include("sim", task=task, robot=robot, real_time_factor=factor),
            include("deploy", policy=policy, robot=robot, dry_run="false", use_sim_time="true"),
        ]
    )

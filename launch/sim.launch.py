"""A task as a simulated robot: `ros2 launch flow_policy_rl sim.launch.py task:=lift`."""

import sys

from launch.actions import DeclareLaunchArgument, OpaqueFunction
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue

from launch import LaunchContext, LaunchDescription


def node(context: LaunchContext) -> list:
    """The node, started by module: that works pip-installed and colcon-installed."""

    def value(name: str, kind: type) -> ParameterValue:
        return ParameterValue(LaunchConfiguration(name), value_type=kind)

    params_file = LaunchConfiguration("params_file").perform(context)
    return [
        Node(
            name="sim_node",
            namespace=LaunchConfiguration("namespace"),
            executable=sys.executable,
            arguments=["-m", "flow_policy_ros.sim_node"],
            ros_arguments=["--log-level", LaunchConfiguration("log_level")],
            parameters=[
                *([params_file] if params_file else []),
                {
                    "task": value("task", str),
                    "robot": value("robot", str),
                    "first_seed": value("seed", int),
                    "real_time_factor": value("real_time_factor", float),
                    "state_rate_hz": value("state_rate_hz", float),
                    "image_rate_hz": value("image_rate_hz", float),
                    "randomization": value("randomization", str),
                },
            ],
            output="screen",
        )
    ]


def generate_launch_description() -> LaunchDescription:
    """Arguments and one node."""
    return LaunchDescription(
        [
            DeclareLaunchArgument("task", default_value="lift", description="name of the task"),
            DeclareLaunchArgument(
                "robot", default_value="panda", description="robot name or robot file"
            ),
            DeclareLaunchArgument(
                "seed", default_value="10000", description="seed of the first episode"
            ),
            DeclareLaunchArgument(
                "real_time_factor", default_value="1.0", description="simulated seconds per second"
            ),
            DeclareLaunchArgument(
                "state_rate_hz",
                default_value="100.0",
                description="joint states per simulated second",
            ),
            DeclareLaunchArgument(
                "image_rate_hz",
                default_value="10.0",
                description="camera images per simulated second",
            ),
            DeclareLaunchArgument(
                "randomization",
                default_value="none",
                description="none, mild, or another preset of sim.randomize",
            ),
            DeclareLaunchArgument(
                "params_file",
                default_value="",
                description="YAML file with further parameters of sim_node, faults for example",
            ),
            DeclareLaunchArgument(
                "namespace", default_value="", description="namespace of the node"
            ),
            DeclareLaunchArgument(
                "log_level", default_value="info", description="debug, info, warn, error"
            ),
            OpaqueFunction(function=node),
        ]
    )

"""Serve a policy to a robot: `ros2 launch flow_policy_rl deploy.launch.py policy:=/path/policy.onnx armed:=true`.

A dry run unless armed: chunks are computed and shown on `~/planned_chunk`, and the arm is not commanded.
"""

import sys

from launch.actions import DeclareLaunchArgument, OpaqueFunction
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue

from launch import LaunchContext, LaunchDescription


def node(context: LaunchContext) -> list:
    """The lifecycle node, started by module: that works pip-installed and colcon-installed."""

    def value(name: str, kind: type) -> ParameterValue:
        return ParameterValue(LaunchConfiguration(name), value_type=kind)

    params_file = LaunchConfiguration("params_file").perform(context)
    return [
        Node(
            name="policy_node",
            namespace=LaunchConfiguration("namespace"),
            executable=sys.executable,
            arguments=["-m", "flow_policy_ros.policy_node"],
            ros_arguments=["--log-level", LaunchConfiguration("log_level")],
            parameters=[
                *([params_file] if params_file else []),
                {
                    "policy": value("policy", str),
                    "robot": value("robot", str),
                    "armed": value("armed", bool),
                    "autostart": value("autostart", bool),
                    "use_sim_time": value("use_sim_time", bool),
                },
            ],
            output="screen",
        )
    ]


def generate_launch_description() -> LaunchDescription:
    """Arguments and one node."""
    return LaunchDescription(
        [
            DeclareLaunchArgument("policy", description="absolute path of a policy.onnx"),
            DeclareLaunchArgument(
                "robot", default_value="panda", description="robot name or robot file"
            ),
            DeclareLaunchArgument("armed", default_value="false", description="command the arm"),
            DeclareLaunchArgument(
                "autostart", default_value="true", description="configure and activate at once"
            ),
            DeclareLaunchArgument(
                "use_sim_time", default_value="false", description="time from /clock"
            ),
            DeclareLaunchArgument(
                "params_file",
                default_value="",
                description="YAML file with further parameters of policy_node",
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

"""Serve a policy to a robot: `ros2 launch flow_policy_rl deploy.launch.py policy:=/path/policy.onnx dry_run:=false`.

A dry run unless told otherwise: chunks are computed and shown on `~/planned_chunk`, and the arm is not commanded.
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
    dry_run = LaunchConfiguration("dry_run").perform(context).lower()
    if dry_run not in ("true", "false"):
        raise ValueError(f"dry_run must be true or false, not '{dry_run}'")
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
                    "armed": dry_run == "false",
                    "autostart": value("autostart", bool),
                    "joining": value("joining", str),
                    "output": value("output", str),
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
            DeclareLaunchArgument(
                "dry_run",
                default_value="true",
                description="compute and show chunks, but do not command the arm",
            ),
            DeclareLaunchArgument(
                "joining",
                default_value="auto",
                description="auto, replace, crossfade, ensemble, rtc or sync",
            ),
            DeclareLaunchArgument(
                "output",
                default_value="trajectory",
                description="trajectory (JointTrajectory) or per_tick (Float64MultiArray)",
            ),
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

"""Serve a policy to a robot: `ros2 launch flow_policy_rl deploy.launch.py policy:=/path/policy.onnx dry_run:=false`.

A dry run unless told otherwise: chunks are computed and shown on `~/planned_chunk`, and the arm is not commanded.
What is not given here comes from params_file, and what is not there from the node.
"""

import sys

from launch.actions import DeclareLaunchArgument, OpaqueFunction
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue

from flow_policy_rl.ros import namespaced_topics
from flow_policy_rl.serving import shipped
from launch import LaunchContext, LaunchDescription

OPTIONAL = {"joining": str, "output": str, "autostart": bool, "use_sim_time": bool}


def node(context: LaunchContext) -> list:
    """The lifecycle node, started by module: that works pip-installed and colcon-installed."""
    get = lambda name: LaunchConfiguration(name).perform(context)  # noqa: E731
    file = get("params_file")
    given = {
        name: ParameterValue(LaunchConfiguration(name), value_type=kind)
        for name, kind in OPTIONAL.items()
        if get(name)
    }
    return [
        Node(
            name="policy_node",
            exec_name="policy_node",
            namespace=get("namespace"),
            executable=sys.executable,
            arguments=["-m", "flow_policy_ros.policy_node"],
            ros_arguments=["--log-level", get("log_level")],
            remappings=namespaced_topics(get("robot"), get("namespace")),
            parameters=[
                *([file] if file else []),
                {
                    "policy": ParameterValue(
                        str(shipped.find(get("policy")).absolute()), value_type=str
                    ),
                    "robot": ParameterValue(LaunchConfiguration("robot"), value_type=str),
                    "armed": get("dry_run") == "false",
                },
                given,
            ],
            output="screen",
        )
    ]


def generate_launch_description() -> LaunchDescription:
    """Arguments and one node."""
    return LaunchDescription(
        [
            DeclareLaunchArgument(
                "policy", description="a policy.onnx, or the name of a shipped one"
            ),
            DeclareLaunchArgument(
                "robot", default_value="panda", description="robot name or robot file"
            ),
            DeclareLaunchArgument(
                "dry_run",
                default_value="true",
                choices=["true", "false"],
                description="compute and show chunks, but do not command the arm; overrules params_file",
            ),
            DeclareLaunchArgument(
                "joining",
                default_value="",
                description="auto, replace, crossfade, ensemble, rtc or sync; auto if not given",
            ),
            DeclareLaunchArgument(
                "output",
                default_value="",
                description="trajectory (JointTrajectory, if not given) or per_tick (Float64MultiArray)",
            ),
            DeclareLaunchArgument(
                "autostart",
                default_value="",
                choices=["", "true", "false"],
                description="configure and activate at once; true if not given",
            ),
            DeclareLaunchArgument(
                "use_sim_time",
                default_value="",
                choices=["", "true", "false"],
                description="time from /clock; false if not given",
            ),
            DeclareLaunchArgument(
                "params_file",
                default_value="",
                description="YAML file with parameters of policy_node",
            ),
            DeclareLaunchArgument(
                "namespace",
                default_value="",
                description="namespace of the node, and of the topics in the robot file",
            ),
            DeclareLaunchArgument(
                "log_level", default_value="info", description="debug, info, warn, error"
            ),
            OpaqueFunction(function=node),
        ]
    )

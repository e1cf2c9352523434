"""A task as a simulated robot: `ros2 launch flow_policy_rl sim.launch.py task:=lift`.

What is not given here comes from params_file, and what is not there from the node.
"""

import sys

from launch.actions import DeclareLaunchArgument, OpaqueFunction
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue

from flow_policy_rl.ros import namespaced_topics
from launch import LaunchContext, LaunchDescription

OPTIONAL = {  # argument: parameter and its type
    "task_options": ("task_options", str),
    "seed": ("first_seed", int),
    "real_time_factor": ("real_time_factor", float),
    "state_rate_hz": ("state_rate_hz", float),
    "image_rate_hz": ("image_rate_hz", float),
    "randomization": ("randomization", str),
}


def node(context: LaunchContext) -> list:
    """The node, started by module: that works pip-installed and colcon-installed."""
    get = lambda name: LaunchConfiguration(name).perform(context)  # noqa: E731
    file = get("params_file")
    given = {
        parameter: ParameterValue(LaunchConfiguration(name), value_type=kind)
        for name, (parameter, kind) in OPTIONAL.items()
        if get(name)
    }
    return [
        Node(
            name="sim_node",
            exec_name="sim_node",
            namespace=get("namespace"),
            executable=sys.executable,
            arguments=["-m", "flow_policy_ros.sim_node"],
            ros_arguments=["--log-level", get("log_level")],
            remappings=namespaced_topics(get("robot"), get("namespace")),
            parameters=[
                *([file] if file else []),
                {
                    "task": ParameterValue(LaunchConfiguration("task"), value_type=str),
                    "robot": ParameterValue(LaunchConfiguration("robot"), value_type=str),
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
            DeclareLaunchArgument("task", default_value="lift", description="name of the task"),
            DeclareLaunchArgument(
                "task_options",
                default_value="",
                description="names and values of the task's own options, as 'randomness med'",
            ),
            DeclareLaunchArgument(
                "robot", default_value="panda", description="robot name or robot file"
            ),
            DeclareLaunchArgument(
                "seed",
                default_value="",
                description="seed of the first episode; 10000 if not given",
            ),
            DeclareLaunchArgument(
                "real_time_factor",
                default_value="",
                description="simulated seconds per second; 1 if not given",
            ),
            DeclareLaunchArgument(
                "state_rate_hz",
                default_value="",
                description="joint states per simulated second; 100 if not given",
            ),
            DeclareLaunchArgument(
                "image_rate_hz",
                default_value="",
                description="camera images per simulated second; 10 if not given",
            ),
            DeclareLaunchArgument(
                "randomization",
                default_value="",
                description="none (if not given), mild, or another preset of sim.randomize",
            ),
            DeclareLaunchArgument(
                "params_file",
                default_value="",
                description="YAML file with parameters of sim_node, faults for example",
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

"""What differs from one distribution of ROS to the next, played on the one that is here."""

import os
import subprocess
import sys

import numpy as np
import pytest
import rclpy
from flow_policy_ros import graph, gripper, messages
from flow_policy_ros.sim_controller import SimController
from rclpy.context import Context
from robot_peer import NAMES
from std_msgs.msg import Float64MultiArray
from trajectory_msgs.msg import JointTrajectory

from flow_policy_rl.ros import private_environment
from flow_policy_rl.serving.robot import GripperAction, load_robot

PROFILES = ("FASTRTPS_DEFAULT_PROFILES_FILE", "FASTDDS_DEFAULT_PROFILES_FILE")


def python(code: str, **environment: str) -> str:
    """What a process prints that has these variables, and no profile of Fast DDS."""
    clean = {k: v for k, v in os.environ.items() if k not in (*PROFILES, "ROS_LOCALHOST_ONLY")}
    line = [sys.executable, "-c", code]
    return subprocess.run(
        line, env=clean | environment, capture_output=True, text=True, check=True
    ).stdout.strip()


def test_the_compiled_part_of_rclpy_may_have_another_name():
    """As with bindings by nanobind in place of pybind11."""
    hide = "import sys, rclpy.node; sys.modules['rclpy._rclpy_pybind11'] = None"
    assert python(f"{hide}; import flow_policy_ros.policy_node; print('well')") == "well"


@pytest.mark.parametrize("numbered", [True, False])
def test_commands_arrive_with_and_without_numbers_of_messages(
    ros_environment, monkeypatch, numbered
):
    """Humble calls with the message alone."""
    monkeypatch.setattr(graph, "NUMBERED", numbered)
    called = []

    def create_subscription(self, kind, topic, callback, qos, **kwargs):
        called.append((kind, callback))

    monkeypatch.setattr(SimController, "create_subscription", create_subscription)
    context = Context()
    rclpy.init(context=context)
    monkeypatch.setattr("rclpy.node.get_default_context", lambda: context)
    robot = load_robot("panda")
    names, heard = list(robot.limits), []
    controller = SimController(
        robot,
        robot.topics.command,
        names,
        np.zeros(len(names)),
        lambda: 0.0,
        lambda: True,
        lambda number, received: heard.append(number),
    )
    goal = np.full(len(names), 0.1)
    commands = {
        JointTrajectory: messages.joint_trajectory(names, np.ones(1), goal[None], None),
        Float64MultiArray: Float64MultiArray(data=messages.doubles(goal)),
    }
    for kind, callback in called:
        if kind in commands:
            callback(commands[kind], *([{"publication_sequence_number": 7}] if numbered else []))
            assert controller.reference(2.0) == pytest.approx(goal)
            controller.hold(np.zeros(len(names)))
    assert heard == ([7, 7] if numbered else [None, None])
    controller.destroy_node()
    rclpy.shutdown(context=context)


@pytest.mark.parametrize(
    ("parameters", "warned"),
    [
        ({"open_loop_control": True}, False),
        ({"open_loop_control": False}, True),
        ({"interpolate_from_desired_state": True}, False),
        ({"interpolate_from_desired_state": False, "open_loop_control": False}, True),
        ({"interpolate_from_desired_state": False, "allow_trajectory_replacement": True}, False),
        ({"interpolate_from_desired_state": False, "allow_trajectory_replacement": False}, True),
    ],
    ids=("Humble", "Humble, default", "Jazzy", "Jazzy, default", "Lyrical, default", "Lyrical"),
)
def test_a_controller_is_warned_of_where_it_begins_every_trajectory_at_the_measured_state(
    peer, parameters, warned
):
    controller = peer.second_node("arm_controller")
    for name, value in {"joints": NAMES[:8], **parameters}.items():
        controller.declare_parameter(name, value)
    outlet = graph.Outlet(peer.node, JointTrajectory, "/arm_controller/joint_trajectory", NAMES[:8])

    def asked() -> bool:
        outlet.problem()
        return len(outlet._answers) == len(graph.CONTROLLER_PARAMETERS)

    peer.until(asked, "its parameters")
    assert bool(outlet.caution) == warned
    outlet.close()


@pytest.mark.parametrize(
    ("serves", "says"),
    [
        ([], "no action server at /hand/gripper_cmd"),
        (["control_msgs/action/GripperCommand"], "no action server at /hand/gripper_cmd"),
        (
            ["control_msgs/action/GripperCommand", "control_msgs/action/ParallelGripperCommand"],
            "/hand/gripper_cmd takes goals of control_msgs/action/ParallelGripperCommand, not GripperCommand",
        ),
    ],
    ids=("nobody", "our own client", "Kilted"),
)
def test_a_gripper_of_the_other_kind_is_named(peer, monkeypatch, serves, says):
    """ros2_controllers of Kilted and later has ParallelGripperCommand only, of Humble GripperCommand only."""

    class Client:
        def __init__(self, *args):
            pass

        def server_is_ready(self):
            return False

    monkeypatch.setattr(gripper, "ActionClient", Client)
    monkeypatch.setattr(gripper, "action_class", lambda action: None)
    found = [("/hand/gripper_cmd", serves)] if serves else []
    monkeypatch.setattr(gripper, "get_action_names_and_types", lambda node: found)
    client = gripper.GripperClient(peer.node, GripperAction("/hand/gripper_cmd"), ["finger"], [0])
    assert client.problem().startswith(says)


@pytest.mark.parametrize(
    ("order", "says"),
    [
        (NAMES[:8], ""),
        (NAMES[7::-1], "/forward_position_controller takes its joints in another order"),
        (NAMES[:7], "drives other joints"),
    ],
    ids=("the same", "another", "fewer"),
)
def test_a_forward_controller_is_sent_numbers_only_in_its_own_order(peer, order, says):
    """They have no names. Until the controller has said its order nothing is sent."""
    controller = peer.second_node("forward_position_controller")
    controller.declare_parameter("joints", order)
    controller.create_subscription(Float64MultiArray, "~/commands", lambda msg: None, 1)
    outlet = graph.Outlet(
        peer.node, Float64MultiArray, "/forward_position_controller/commands", NAMES[:8]
    )
    waited = ("nobody listens", "/forward_position_controller has not said yet")
    problems = []

    def known() -> bool:
        problems.append(outlet.problem())
        return not problems[-1].startswith(waited)

    peer.until(known, "its order")
    assert says in problems[-1]
    assert bool(says) == bool(problems[-1])
    assert any(p.startswith(waited[1]) for p in problems)
    outlet.close()


def test_processes_of_ours_keep_to_this_machine_by_the_name_that_the_distribution_knows(
    tmp_path, monkeypatch
):
    monkeypatch.delenv("ROS_LOCALHOST_ONLY", raising=False)
    for distribution, local in (("humble", "1"), ("jazzy", None), ("", None)):
        monkeypatch.setenv("ROS_DISTRO", distribution)
        environment = private_environment(tmp_path)
        assert environment.get("ROS_LOCALHOST_ONLY") == local
        assert environment["ROS_AUTOMATIC_DISCOVERY_RANGE"] == "LOCALHOST"


def test_our_profile_opens_no_network_where_only_this_machine_is_wanted():
    show = f"import os, flow_policy_ros.process; print(*(n in os.environ for n in {PROFILES}))"
    assert python(show) == "True True"
    assert python(show, ROS_LOCALHOST_ONLY="1") == "False False"

"""The policy node alone, against a peer that plays the robot: what it commands, when it holds, how it ends."""

import signal
import time
from array import array

import pytest
from lifecycle_msgs.msg import State, Transition
from lifecycle_msgs.srv import ChangeState, GetState
from robot_peer import NAMES, change_state, is_hold
from sensor_msgs.msg import JointState
from trajectory_msgs.msg import JointTrajectory


def test_dry_run_plans_and_commands_nothing(
    start, peer, robot, policy_file, weak_robot, commands, status
):
    """Also beside an arm that does not follow, with plans that are all limited."""
    planned = peer.listen(JointTrajectory, "/policy_node/planned_chunk")
    weak = {"robot": str(weak_robot), "max_limited_in_a_row": 1, "joining": "ensemble"}
    nodes = start(policy_node={"policy": str(policy_file), **weak})
    peer.until(lambda: len(planned) >= 8, "planned chunks")
    assert "dry run, nothing is commanded" in nodes["policy_node"].log.read_text()
    assert "emergency" not in status()
    assert commands == []
    assert len(planned[0].points) == 12


def test_commands_at_the_pace_of_its_chunks(start, peer, robot, policy_file, commands):
    nodes = start(policy_node={"policy": str(policy_file), "armed": True})
    peer.until(lambda: len(commands) >= 1, "the first command")
    assert "ARMED, commands go to /" in nodes["policy_node"].log.read_text()
    begin, before = time.monotonic(), len(commands)
    peer.until(lambda: len(commands) >= before + 5, "five more commands")
    assert (time.monotonic() - begin) / 5 == pytest.approx(8 * 0.05, abs=0.1)
    assert sorted(commands[0].joint_names) == sorted(NAMES[:8])


def test_missing_topic_is_named_and_nothing_is_commanded(
    start, peer, policy_file, commands, status
):
    start(policy_node={"policy": str(policy_file), "armed": True, "max_silence_s": 0.3})
    peer.until(lambda: "holding: " in status() and "no message" in status(), "what it lacks")
    assert commands == []


def test_joint_states_of_a_base_beside_the_arm_do_no_harm(
    start, peer, robot, policy_file, commands
):
    """robot_state_publisher and rviz take both from one topic as well."""
    node = start(policy_node={"policy": str(policy_file), "armed": True})["policy_node"]
    base = peer.node.create_publisher(JointState, "/joint_states", 10)
    wheels = JointState(name=["left_wheel", "right_wheel"], position=array("d", [1.0, 2.0]))
    peer.node.create_timer(0.02, lambda: base.publish(wheels))
    peer.until(lambda: len(commands) >= 8, "commands")
    assert "joint state lacks" not in node.log.read_text()


def test_an_arm_and_a_hand_with_a_driver_each_run_and_each_may_fail(
    start, peer, robot, policy_file, commands, status
):
    arm, hand = slice(0, 7), slice(7, None)
    robot.parts = (arm, hand)
    start(policy_node={"policy": str(policy_file), "armed": True})
    peer.until(lambda: len(commands) >= 3, "commands")
    assert sorted(commands[0].joint_names) == sorted(NAMES[:8])
    robot.parts = (arm,)
    says = "/joint_states: joint state lacks panda_finger_joint1"
    peer.until(lambda: says in status(), "the joint by name")
    before = len(commands)
    robot.parts = (arm, hand)
    peer.until(lambda: len(commands) >= before + 2, "commands again")


@pytest.mark.parametrize("fault", ["silence", "nan", "renamed", "short"])
def test_bad_input_means_hold_then_recovery(
    start, peer, robot, policy_file, commands, status, fault
):
    start(policy_node={"policy": str(policy_file), "armed": True})
    peer.until(lambda: len(commands) >= 2, "commands")
    says = {
        "silence": "newest message is",
        "nan": "not a finite number in panda_joint3",
        "renamed": "lacks panda_joint3; it has",
        "short": "9 names but 8 values",
    }[fault]
    if fault == "silence":
        robot.silent = True
    elif fault == "nan":
        robot.broken[2] = float("nan")
    elif fault == "renamed":
        robot.names[2] = "panda_joint_three"
    else:
        robot.broken[8] = None
    peer.until(lambda: "holding" in status() and says in status(), f"holding because of {fault}")
    peer.until_quiet(commands, "a hold, and then silence")
    assert is_hold(commands[-1])
    held = len(commands)
    robot.names, robot.broken, robot.silent = list(NAMES), {}, False
    peer.until(lambda: len(commands) > held, "commands again")
    peer.until(lambda: status().startswith("active"), "diagnostics that say active")


def test_an_arm_that_does_not_follow_is_noticed(start, peer, robot, policy_file, commands, status):
    """A controller that was restarted, or never listened: it says so, and goes on when told to start from here."""
    start(policy_node={"policy": str(policy_file), "armed": True, "max_tracking_error": 0.02})
    robot.follows = False
    peer.until(lambda: "from where it was commanded to be" in status(), "diagnostics say so")
    peer.until_quiet(commands, "silence")
    # Nobody knows where the controller would have to start a hold from.
    assert not is_hold(commands[-1])
    robot.follows = True
    assert change_state(peer, "deactivate")
    assert change_state(peer, "activate")
    held = len(commands)
    peer.until(lambda: len(commands) >= held + 2, "commands again")


def test_sigint_ends_with_a_hold(start, peer, robot, policy_file, commands):
    nodes = start(policy_node={"policy": str(policy_file), "armed": True})
    peer.until(lambda: len(commands) >= 2, "commands")
    nodes["policy_node"].signal(signal.SIGINT)
    nodes["policy_node"].signal(signal.SIGINT)  # a launch file's Ctrl-C comes twice
    peer.until(lambda: not nodes["policy_node"].running, "the end of the node")
    assert nodes["policy_node"].wait(60.0) == 0
    peer.until(lambda: is_hold(commands[-1]), "a hold")


def test_lifecycle_deactivate_holds_and_impossible_requests_are_survived(
    start, peer, robot, policy_file, commands
):
    start(policy_node={"policy": str(policy_file), "armed": True})
    peer.until(lambda: len(commands) >= 1, "commands")

    assert change_state(peer, "deactivate")
    peer.until_quiet(commands, "a hold, and then silence")
    assert is_hold(commands[-1])
    count = len(commands)
    client = peer.node.create_client(ChangeState, "/policy_node/change_state")
    client.call_async(
        ChangeState.Request(transition=Transition(id=Transition.TRANSITION_DEACTIVATE))
    )
    peer.spin(0.5)
    state = peer.call(GetState, "/policy_node/get_state", GetState.Request()).current_state
    assert state.id == State.PRIMARY_STATE_INACTIVE
    assert change_state(peer, "activate")
    peer.until(lambda: len(commands) > count, "commands again")


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({"policy": "/nowhere/policy.onnx"}, "does not exist"),
        ({"policy": __file__}, "cannot be loaded"),
        ({"robot": "pnada"}, "did you mean 'panda'"),
        ({"noise": "loud"}, "noise must be one of zero, random"),
    ],
)
def test_a_node_that_cannot_work_says_why_in_one_line_and_exits_with_2(
    start, policy_file, parameters, says
):
    nodes = start(policy_node={"policy": str(policy_file), **parameters})
    assert nodes["policy_node"].wait(60.0) == 2
    log = nodes["policy_node"].log.read_text()
    (line,) = (line for line in log.splitlines() if says in line)
    assert line.startswith("error: ")
    assert "Traceback" not in log

"""The policy node alone, against a peer that plays the robot: what it commands, when it holds, how it ends."""

import signal
import time
from array import array

import pytest
from geometry_msgs.msg import PoseStamped
from lifecycle_msgs.msg import State, Transition
from lifecycle_msgs.srv import ChangeState, GetState
from sensor_msgs.msg import JointState
from trajectory_msgs.msg import JointTrajectory

HOME = [0.0, -0.785, 0.0, -2.356, 0.0, 1.571, 0.785, 0.04, 0.04]
NAMES = [f"panda_joint{i}" for i in range(1, 8)] + ["panda_finger_joint1", "panda_finger_joint2"]
RATE_S = 0.02


class Robot:
    """Publishes joint states and a cube at 50 Hz, standing still at home."""

    def __init__(self, peer):
        self._joints = peer.node.create_publisher(JointState, "/joint_states", 10)
        self._pose = peer.node.create_publisher(PoseStamped, "/cube/pose", 10)
        self._clock = peer.node.get_clock()
        self.names, self.position, self.silent = list(NAMES), list(HOME), False
        peer.node.create_timer(RATE_S, self._publish)

    def _publish(self) -> None:
        if self.silent:
            return
        now = self._clock.now().to_msg()
        pose = PoseStamped()
        pose.header.stamp = now
        pose.pose.position.x, pose.pose.position.z = 0.5, 0.0225
        pose.pose.orientation.w = 1.0
        self._pose.publish(pose)
        msg = JointState(
            name=self.names, position=array("d", self.position), velocity=array("d", [0.0] * 9)
        )
        msg.header.stamp = now
        self._joints.publish(msg)


@pytest.fixture
def robot(peer) -> Robot:
    return Robot(peer)


def is_hold(msg: JointTrajectory) -> bool:
    """One point, at rest."""
    return len(msg.points) == 1 and not any(msg.points[0].velocities)


def test_dry_run_plans_and_commands_nothing(start, peer, robot, policy_file, commands):
    planned = peer.listen(JointTrajectory, "/policy_node/planned_chunk")
    start(policy_node={"policy": str(policy_file)})
    peer.until(lambda: len(planned) >= 3, "three planned chunks")
    assert commands == []
    assert len(planned[0].points) == 12


def test_commands_at_the_pace_of_its_chunks(start, peer, robot, policy_file, commands):
    start(policy_node={"policy": str(policy_file), "armed": True})
    peer.until(lambda: len(commands) >= 1, "the first command")
    begin, before = time.monotonic(), len(commands)
    peer.until(lambda: len(commands) >= before + 5, "five more commands")
    assert (time.monotonic() - begin) / 5 == pytest.approx(8 * 0.05, abs=0.1)
    assert sorted(commands[0].joint_names) == sorted(NAMES[:8])


def test_missing_topic_is_named_and_nothing_is_commanded(
    start, peer, policy_file, commands, status
):
    start(policy_node={"policy": str(policy_file), "armed": True, "max_silence_s": 0.3})
    peer.until(lambda: "holding" in status(), "diagnostics that say holding")
    assert "no message" in status()
    assert commands == []


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
        robot.position[2] = float("nan")
    elif fault == "renamed":
        robot.names[2] = "panda_joint_three"
    else:
        robot.position.pop()
    peer.until(
        lambda: "holding" in status() and says in status(), f"holding because of {fault}", 5.0
    )
    peer.spin(0.2)
    held = len(commands)
    assert is_hold(commands[-1])
    peer.spin(1.0)
    assert len(commands) == held  # and then silence
    robot.names, robot.position, robot.silent = list(NAMES), list(HOME), False
    peer.until(lambda: len(commands) > held, "commands again")
    peer.until(lambda: status().startswith("active"), "diagnostics that say active")


def test_sigint_ends_with_a_hold(start, peer, robot, policy_file, commands):
    nodes = start(policy_node={"policy": str(policy_file), "armed": True})
    peer.until(lambda: len(commands) >= 2, "commands")
    nodes["policy_node"].signal(signal.SIGINT)
    nodes["policy_node"].signal(signal.SIGINT)  # a launch file's Ctrl-C comes twice
    peer.until(lambda: not nodes["policy_node"].running, "the end of the node", 5.0)
    peer.spin(0.3)
    assert nodes["policy_node"].wait(1.0) == 0
    assert is_hold(commands[-1])


def test_lifecycle_deactivate_holds_and_impossible_requests_are_survived(
    start, peer, robot, policy_file, commands
):
    start(policy_node={"policy": str(policy_file), "armed": True})
    peer.until(lambda: len(commands) >= 1, "commands")

    def change(number: int) -> bool:
        request = ChangeState.Request(transition=Transition(id=number))
        return peer.call(ChangeState, "/policy_node/change_state", request).success

    assert change(Transition.TRANSITION_DEACTIVATE)
    peer.spin(0.3)
    count = len(commands)
    assert is_hold(commands[-1])
    peer.spin(0.8)
    assert len(commands) == count
    client = peer.node.create_client(ChangeState, "/policy_node/change_state")
    client.call_async(
        ChangeState.Request(transition=Transition(id=Transition.TRANSITION_DEACTIVATE))
    )
    peer.spin(0.5)
    state = peer.call(GetState, "/policy_node/get_state", GetState.Request()).current_state
    assert state.id == State.PRIMARY_STATE_INACTIVE
    assert change(Transition.TRANSITION_ACTIVATE)
    peer.until(lambda: len(commands) > count, "commands again")


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({"policy": "/nowhere/policy.onnx"}, "does not exist"),
        ({"policy": __file__}, "cannot be loaded"),
        ({"robot": "pnada"}, "did you mean 'panda'"),
        ({"noise": "loud"}, "noise must be zero or random"),
    ],
)
def test_a_node_that_cannot_work_says_why_in_one_line_and_exits_with_2(
    start, policy_file, parameters, says
):
    nodes = start(policy_node={"policy": str(policy_file), **parameters})
    assert nodes["policy_node"].wait(20.0) == 2
    log = nodes["policy_node"].log.read_text()
    assert says in log
    assert "Traceback" not in log
    assert sum(line.startswith("error: ") for line in log.splitlines()) == 1

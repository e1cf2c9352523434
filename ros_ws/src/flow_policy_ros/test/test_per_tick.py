"""`output: per_tick`: positions for a forward_command_controller, which nobody joins to a motion but the node."""

import dataclasses
import signal

import numpy as np
import pytest
from robot_peer import Robot, change_state
from std_msgs.msg import Float64MultiArray

FULL_SPEED = 2.61  # rad/s, of the fastest joint


LONGEST_S = 0.015  # that a plan advances from one tick to the next, at 100 Hz


@dataclasses.dataclass
class Ticks:
    """What a forward_command_controller gets: values, and their numbers, for a busy machine loses some."""

    values: list = dataclasses.field(default_factory=list)
    numbers: list = dataclasses.field(default_factory=list)

    def receive(self, msg: Float64MultiArray, info: dict) -> None:
        self.values.append(msg.data)
        self.numbers.append(info["publication_sequence_number"])

    def steps(self, last: int = 0) -> np.ndarray:
        """(n - 1,) rad that the arm is sent at once, from tick to tick; of the `last` ticks or of all."""
        way = np.abs(np.diff(np.array(self.values[-last:])[:, :7], axis=0)).max(axis=1)
        return way / np.diff(self.numbers[-last:])


@pytest.fixture
def ticks(peer) -> Ticks:
    found = Ticks()
    peer.node.create_subscription(
        Float64MultiArray, "/forward_position_controller/commands", found.receive, 500
    )
    return found


def test_per_tick_output_ramps_down(start, peer, robot, policy_file, ticks):
    options = {"output": "per_tick", "max_tracking_error": 0.0}
    nodes = start(policy_node={"policy": str(policy_file), "armed": True, **options})
    peer.until(lambda: len(ticks.values) >= 100, "a second of ticks")
    nodes["policy_node"].signal(signal.SIGINT)
    peer.until(lambda: not nodes["policy_node"].running, "the end")
    peer.until(lambda: ticks.steps(3)[-1] < 0.01, "rest")
    peer.spin(0.3)
    assert len(ticks.values[0]) == 8
    steps = ticks.steps()
    assert 0.004 < steps.max() <= FULL_SPEED * LONGEST_S + 1e-6
    assert steps[-1] < 0.01


def test_per_tick_output_does_not_jump_after_a_stall(start, peer, robot, policy_file, ticks):
    """Whatever the node missed while it was stopped, what it sends then is a tick's way from what it sent last."""
    options = {"output": "per_tick", "max_tracking_error": 0.0, "soft_start_s": 0.0}
    node = start(policy_node={"policy": str(policy_file), "armed": True, **options})["policy_node"]
    peer.until(lambda: len(ticks.values) >= 100, "a second of ticks")
    moving = lambda: ticks.steps(3).max() > 0.004  # noqa: E731
    for stalled_s in (0.05, 0.1, 0.5):
        peer.until(moving, "motion")
        node.signal(signal.SIGSTOP)
        peer.spin(stalled_s)
        node.signal(signal.SIGCONT)
        before = len(ticks.values)
        peer.until(lambda before=before: len(ticks.values) >= before + 50, "ticks again")
    assert "goes on from where it was sent last" in node.log.read_text()
    steps = ticks.steps()
    assert steps.max() <= FULL_SPEED * LONGEST_S + 1e-6


def test_per_tick_output_does_not_jump_when_it_is_activated_while_it_stops(
    start, peer, policy_file, ticks
):
    """The arm lags behind: where it is seen is not where it was sent."""
    robot = Robot(peer)

    def follow() -> None:
        if len(ticks.values) > 8:
            robot.controller.hold(np.array([*ticks.values[-8]]))

    peer.node.create_timer(0.01, follow)
    options = {"output": "per_tick", "max_tracking_error": 0.0, "soft_start_s": 0.0}
    start(policy_node={"policy": str(policy_file), "armed": True, **options})
    moving = lambda since: len(ticks.values) > since + 50 and ticks.steps(3).max() > 0.008  # noqa: E731
    for _ in range(3):
        before = len(ticks.values)
        peer.until(lambda before=before: moving(before), "motion")
        assert change_state(peer, "deactivate")
        assert change_state(peer, "activate")
    before = len(ticks.values)
    peer.until(lambda: len(ticks.values) >= before + 50, "ticks again")
    assert ticks.steps().max() <= FULL_SPEED * LONGEST_S + 1e-6


@pytest.mark.parametrize("end", ["cleanup", "sigint"])
def test_per_tick_output_comes_to_rest_whatever_ends_it(
    start, peer, robot, policy_file, ticks, end
):
    """Right after `deactivate`, which only begins the stop."""
    options = {"output": "per_tick", "max_tracking_error": 0.0, "soft_start_s": 0.0}
    node = start(policy_node={"policy": str(policy_file), "armed": True, **options})["policy_node"]
    peer.until(lambda: len(ticks.values) >= 50 and ticks.steps(3).max() > 0.008, "motion")
    assert change_state(peer, "deactivate")
    if end == "cleanup":
        assert change_state(peer, "cleanup")
    else:
        node.signal(signal.SIGINT)
        peer.until(lambda: not node.running, "the end")
    peer.spin(0.5)
    assert ticks.steps(3).max() < 0.002

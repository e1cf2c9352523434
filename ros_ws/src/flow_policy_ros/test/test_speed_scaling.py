"""A robot whose speed was turned down: its controller executes trajectories in slowed time."""

import time
from pathlib import Path

import pytest
from robot_peer import Robot
from std_msgs.msg import Float64

import robots
from flow_policy_rl.serving import shipped

SPEED = "/speed_scaling_state_broadcaster/speed_scaling"
NO_JUMP = 0.04  # rad in a cycle of 10 ms: the limit of speed, and a half


@pytest.fixture
def robot_file(tmp_path) -> str:
    """The Panda, with a slider."""
    text = (Path(robots.__file__).parent / "panda.yaml").read_text()
    path = tmp_path / "panda_slider.yaml"
    path.write_text(text.replace("topics:\n", f"topics:\n  speed_scaling: {SPEED}\n", 1))
    return str(path)


class Slider:
    """Publishes the speed (percent) 50 times per second, and is the controller's clock.

    Attributes:
        percent: None says nothing.
    """

    def __init__(self, peer, percent: float | None):
        self.percent = percent
        self._publisher = peer.node.create_publisher(Float64, SPEED, 10)
        self._time, self._seen = 0.0, time.monotonic()
        peer.node.create_timer(0.02, self._publish)

    def _publish(self) -> None:
        if self.percent is not None:
            self._publisher.publish(Float64(data=float(self.percent)))

    def set(self, percent: float) -> None:
        self.now()
        self.percent = percent

    def now(self) -> int:
        """The controller's time, ns."""
        moment = time.monotonic()
        self._time += (moment - self._seen) * (self.percent or 0.0) / 100
        self._seen = moment
        return round(self._time * 1e9)


def test_in_slowed_time_nothing_is_sent_and_then_it_begins_anew(
    start, peer, robot_file, commands, status
):
    """Not even a hold: it would begin with a jump, for the controller's reference is behind the plan."""
    slider = Slider(peer, 100.0)
    robot = Robot(peer, clock=slider.now)
    options = {"robot": robot_file, "armed": True}
    start(policy_node={"policy": str(shipped.find("lift")), **options})
    for percent in (30.0, 0.0):
        before = len(commands)
        peer.until(lambda before=before: len(commands) >= before + 15, "commands at full speed")
        slider.set(percent)
        says = f"holding: the robot is at {percent:.0f} % of its speed ({SPEED})"
        peer.until(lambda says=says: says in status(), "diagnostics say so")
        peer.spin(0.3)  # what was on its way
        before, ends = len(commands), robot.controller.end
        peer.spin(0.5)
        assert len(commands) == before
        robot.jump = 0.0
        slider.set(100.0)
        peer.until(lambda before=before: len(commands) > before, "commands again")
        assert slider.now() / 1e9 > ends  # of what it was told before
        assert robot.jump < NO_JUMP
    peer.until(lambda: status().startswith("active, armed"), "active")


def test_a_speed_that_nobody_says_is_not_taken_for_full(start, peer, robot_file, commands, status):
    slider = Slider(peer, None)
    Robot(peer)
    start(policy_node={"policy": str(shipped.find("lift")), "robot": robot_file, "armed": True})
    says = f"holding: nobody says on {SPEED} how fast the robot executes"
    peer.until(lambda: says in status(), "diagnostics say so")
    peer.spin(1.0)
    assert commands == []
    slider.set(100.0)
    peer.until(lambda: len(commands) >= 2, "commands")
    slider.percent = None
    peer.until(lambda: says in status(), "diagnostics say so")
    peer.until_quiet(commands, "silence")


def test_a_dry_run_does_not_need_it(start, peer, robot_file, status):
    Robot(peer)
    start(policy_node={"policy": str(shipped.find("lift")), "robot": robot_file})
    peer.until(lambda: status().startswith("active, dry run"), "active")


def test_a_simulated_robot_with_a_slider_is_at_full_speed(start, peer, robot_file):
    said = peer.listen(Float64, SPEED)
    start(sim_node={"image_rate_hz": 0.0, "robot": robot_file})
    peer.until(lambda: said, "its speed")
    assert said[0].data == 100.0

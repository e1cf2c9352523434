"""Clocks that jump, that are set, that nobody publishes and that two do: when a plan is in time, and when not."""

import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from flow_policy_ros.messages import to_time
from robot_peer import NO_JUMP, Robot, change_state, is_hold, moves, way_of
from rosgraph_msgs.msg import Clock


def middle(peer, robot, commands, now) -> int:
    """Wait for 150 ms after the next command; how many there were until then, and with it."""
    before = len(commands)
    peer.until(lambda: robot.heard == len(commands) > before, "another one")
    count, then = len(commands), now[0]
    peer.until(lambda: now[0] >= then + 150_000_000, "the middle of it")
    return count


@pytest.mark.parametrize("back_ms", [60, 95_000])
def test_a_clock_that_jumps_back_starts_again(start, peer, policy_file, commands, status, back_ms):
    """A bag that loops: time and stamps go back together. By less than its last trajectory the controller is still in
    that, and can be stopped."""
    clock = peer.node.create_publisher(Clock, "/clock", 10)
    now = [100_000_000_000]
    robot = Robot(peer, stamp=lambda: now[0])

    def tick() -> None:
        now[0] += 20_000_000
        clock.publish(Clock(clock=to_time(now[0])))

    peer.node.create_timer(0.02, tick)
    given = {"policy": str(policy_file), "armed": True, "use_sim_time": True}
    log = start(policy_node=given)["policy_node"].log
    peer.until(lambda: robot.heard == len(commands) >= 3, "commands, and the controller has them")
    while (before := middle(peer, robot, commands, now)) < len(commands):
        pass  # a busy machine held
    held, robot.fastest = log.read_text().count("holding:"), 0.0
    now[0] -= back_ms * 1_000_000
    if back_ms > 100:
        robot.silent = True
        peer.spin(0.12)  # the watchdog looks meanwhile
        robot.silent = False
    peer.until(lambda: len(commands) >= before + 3, "commands after the jump")
    assert is_hold(commands[before]) == (back_ms < 100)
    if back_ms < 100:
        # What the controller makes of a stop depends on how late it comes; what it is sent does not.
        begins = np.array(commands[before].points[0].positions)
        assert np.abs(way_of(commands[before - 1]) - begins).max(axis=1).min() < 0.005
        assert moves(commands[before]) <= 2.62
    else:
        assert log.read_text().count("holding:") == held  # the first messages may take a moment
        assert robot.fastest <= 2.62
    peer.until(lambda: status().startswith("active"), "active")


def test_no_run_begins_on_what_was_seen_before_it_was_asked_for(start, peer, policy_file, commands):
    """States that are still on their way when a simulation was reset. The clock stands meanwhile."""
    clock, now, stands = peer.node.create_publisher(Clock, "/clock", 10), [100_000_000_000], [False]
    robot = Robot(peer, stamp=lambda: now[0] - 60_000_000, clock=lambda: now[0])

    def tick() -> None:
        now[0] += 0 if stands[0] else 20_000_000
        clock.publish(Clock(clock=to_time(now[0])))

    peer.node.create_timer(0.02, tick)
    start(policy_node={"policy": str(policy_file), "armed": True, "use_sim_time": True})
    peer.until(lambda: robot.heard == len(commands) >= 3, "commands, and the controller has them")
    stands[0] = True
    peer.spin(0.3)
    assert change_state(peer, "deactivate")
    peer.spin(0.3)
    before = len(commands)
    assert change_state(peer, "activate")
    peer.spin(0.5)
    assert len(commands) == before
    stands[0] = False
    peer.until(lambda: len(commands) > before, "commands again")


def test_a_clock_that_nobody_publishes_is_named(start, peer, policy_file, commands, status):
    """`use_sim_time` beside a real robot."""
    Robot(peer)
    start(policy_node={"policy": str(policy_file), "armed": True, "use_sim_time": True})
    peer.until(lambda: "nobody publishes /clock" in status(), "diagnostics name it")
    assert not commands


def test_a_second_clock_is_named(start, peer, policy_file, commands, status):
    """Two simulations at once: time goes back and forth, and nothing is commanded until there is one of them."""
    other = peer.second_node("sim")
    clocks = [node.create_publisher(Clock, "/clock", 10) for node in (peer.node, other)]
    now = [100_000_000_000, 900_000_000_000]
    Robot(peer, stamp=lambda: now[0])
    both = [False]

    def tick() -> None:
        for k, clock in enumerate(clocks):
            now[k] += 20_000_000
            if k == 0 or both[0]:
                clock.publish(Clock(clock=to_time(now[k])))

    peer.node.create_timer(0.02, tick)
    start(policy_node={"policy": str(policy_file), "armed": True, "use_sim_time": True})
    peer.until(lambda: len(commands) >= 2, "commands")  # a second clock that is silent does no harm
    both[0] = True
    says = "holding: 2 publishers on /clock, one too many: /peer, /sim"
    peer.until(lambda: says in status(), "diagnostics name both")
    peer.until_quiet(commands, "silence between two clocks")
    held = len(commands)
    both[0] = False
    other.destroy_publisher(clocks.pop())
    peer.until(lambda: len(commands) >= held + 2, "commands again")


SET_CLOCK = """
import sys
from pathlib import Path
from flow_policy_ros import policy_node
real, offset = policy_node.PolicyNode._now, Path(sys.argv.pop(1))
policy_node.PolicyNode._now = lambda self: real(self) + int(offset.read_text() or 0)
sys.exit(policy_node.main())
"""


@pytest.mark.parametrize("step_s", [-0.15, 0.3])
def test_a_system_clock_that_is_set_moves_nobody(peer, policy_file, commands, tmp_path, step_s):
    """The controller has a clock of its own; stamps of the robot are of the one that was set."""
    offset = tmp_path / "offset"
    offset.write_text("0")
    steps = [0]
    wall = lambda: time.time_ns() + steps[0]  # noqa: E731
    robot = Robot(peer, stamp=wall, clock=time.monotonic_ns)
    parameters = ["-p", f"policy:={policy_file}", "-p", "armed:=true", "-p", "soft_start_s:=0.0"]
    command = [sys.executable, "-c", SET_CLOCK, str(offset), "--ros-args", *parameters]
    with (tmp_path / "node.log").open("wb") as log:
        node = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        peer.until(lambda: len(commands) >= 3, "commands")
        moving = lambda: np.abs(robot.controller.sample(time.monotonic())[1][:7]).max() > 0.3  # noqa: E731
        peer.until(moving, "motion")
        robot.jump, steps[0] = 0.0, round(step_s * 1e9)
        written = tmp_path / "new"
        written.write_text(str(steps[0]))
        written.replace(offset)
        before = len(commands)
        peer.until(lambda: len(commands) >= before + 3, "commands after the step")
        assert "the system clock was set by" in (tmp_path / "node.log").read_text()
        assert robot.jump < NO_JUMP
    finally:
        node.send_signal(signal.SIGINT)
        assert node.wait(60.0) == 0

"""Where the arm was sent, or where it is: a run begins without a jump, whatever happened since the last one."""

import numpy as np
from robot_peer import HOME, NAMES, NO_JUMP, Robot, change_state, trigger


def end_of(robot: Robot) -> np.ndarray:
    """Where the controller's reference comes to rest."""
    return robot.controller.sample(robot.controller.end)[0]


def test_a_robot_that_is_reset_while_it_stops_begins_where_it_is_then(
    start, peer, robot, policy_file, commands, status
):
    """As between episodes in simulation: what it was sent before has nothing to do with where it is."""
    # Its targets stay where the arm was.
    options = {"soft_start_s": 0.0, "max_limited_in_a_row": 0, "max_start_distance": 10.0}
    start(policy_node={"policy": str(policy_file), "armed": True, **options})
    for side in (-1, 1, -1, 1):
        before = len(commands)
        peer.until(lambda before=before: robot.heard == len(commands) > before + 3, "motion")
        assert change_state(peer, "deactivate")
        peer.until(lambda: robot.heard == len(commands), "the stop")
        robot.restart_at(np.array(HOME[:8]) + 0.2 * side * np.array([1] * 7 + [0]))
        assert change_state(peer, "activate")
    before = len(commands)
    peer.until(lambda: len(commands) > before + 3, "commands where it is")
    assert robot.jump < NO_JUMP
    peer.until(lambda: status().startswith("active"), "active")


def test_after_an_emergency_stop_it_begins_where_the_arm_was_moved_to(
    start, peer, robot, policy_file, commands, status
):
    start(policy_node={"policy": str(policy_file), "armed": True})
    peer.until(lambda: len(commands) >= 2, "commands")
    assert trigger(peer, "emergency_stop").success
    peer.until_quiet(commands, "an arm that is stopped")
    moved = end_of(robot) + [0.3, 0, 0, 0.3, 0, 0, 0, 0]
    robot.restart_at(moved)
    peer.spin(0.5)
    before, robot.jump = len(commands), 0.0
    assert trigger(peer, "reset_emergency_stop").success
    peer.until(lambda: len(commands) >= before + 2, "commands again")
    assert robot.jump < NO_JUMP


def test_without_a_controller_it_waits_and_begins_when_there_is_one(
    start, peer, policy_file, status
):
    robot = Robot(peer, listens=False)
    start(policy_node={"policy": str(policy_file), "armed": True})
    says = "nobody listens to /arm_controller/joint_trajectory"
    peer.until(lambda: says in status(), "its obstacle")
    peer.spin(1.0)
    assert says in status()
    robot.listen()
    peer.until(lambda: robot.controller.end > 0, "a command")
    peer.until(lambda: status() == "active, armed", "active")
    assert robot.jump < NO_JUMP


def test_a_controller_that_does_not_continue_its_reference_is_warned_of(
    start, peer, robot, policy_file, status
):
    controller = peer.second_node("arm_controller")
    controller.declare_parameter("joints", NAMES[:8])
    controller.declare_parameter("interpolate_from_desired_state", False)
    start(policy_node={"policy": str(policy_file), "armed": True})
    says = "set its interpolate_from_desired_state (on Humble open_loop_control) to true"
    peer.until(lambda: status().startswith("active, armed") and says in status(), "a warning")

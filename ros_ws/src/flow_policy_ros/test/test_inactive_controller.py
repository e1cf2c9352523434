"""A controller that is loaded and configured and not active: it subscribes to commands, and drops them. control_msgs,
by which this is seen, is not on PyPI: a ROS installation has it, or `scripts/gripper_actions.py`."""

import pytest
from robot_peer import Robot

from flow_policy_rl.serving import shipped

messages = pytest.importorskip("control_msgs.msg", reason="control_msgs is not installed")


class Controller:
    """Offers its state as joint_trajectory_controller does, and publishes it while it is active.

    Attributes:
        active: change it to switch.
    """

    def __init__(self, peer):
        kind = messages.JointTrajectoryControllerState
        node = peer.second_node("arm_controller")
        self.active, self._message = False, kind()
        self._publisher = node.create_publisher(kind, "~/controller_state", 10)
        node.create_timer(0.02, self._publish)

    def _publish(self) -> None:
        if self.active:
            self._publisher.publish(self._message)


SAYS = "/arm_controller is silent on /arm_controller/controller_state: is it active"


def test_an_inactive_controller_is_not_commanded(start, peer, commands, status):
    controller, robot = Controller(peer), Robot(peer)
    start(policy_node={"policy": str(shipped.find("lift")), "armed": True})
    peer.until(lambda: f"holding: {SAYS}" in status(), "diagnostics say so")
    peer.spin(1.0)
    assert commands == []
    controller.active = True
    peer.until(lambda: robot.heard >= 3, "commands")
    peer.until(lambda: status() == "active, armed", "active")


def test_a_controller_that_was_switched_off_and_on_is_commanded_again(
    start, peer, commands, status
):
    """Without deactivating the node: what is activated holds where the arm is."""
    controller, robot = Controller(peer), Robot(peer)
    controller.active = True
    start(policy_node={"policy": str(shipped.find("lift")), "armed": True})
    peer.until(lambda: len(commands) >= 15, "commands")
    controller.active = robot.follows = False
    peer.until(lambda: f"holding: {SAYS}" in status(), "diagnostics say so")
    peer.until_quiet(commands, "silence")
    robot.jump, heard = 0.0, robot.heard
    controller.active = robot.follows = True
    peer.until(lambda: robot.heard >= heard + 1, "commands again")
    assert robot.jump < 0.04

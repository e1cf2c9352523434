"""Where the policy node's commands go: the arm's topic, and a topic or an action for the gripper."""

import time
from collections.abc import Callable, Sequence

import numpy as np
from rclpy.duration import Duration
from rclpy.node import Node
from std_msgs.msg import Float64MultiArray
from trajectory_msgs.msg import JointTrajectory

from flow_policy_rl.serving.commander import Plan
from flow_policy_rl.serving.governor import selection
from flow_policy_rl.serving.robot import Robot
from flow_policy_ros import messages
from flow_policy_ros.fast_trajectory import TrajectoryWriter
from flow_policy_ros.graph import Outlet
from flow_policy_ros.gripper import GripperClient
from flow_policy_ros.speed import SpeedListener

LAST_WORDS_S = 0.2


class Outputs:
    """Sends plans.

    Args:
        joint_names: the joints of a plan.
        per_tick: positions on the topic of a forward_command_controller, not whole trajectories.
        on_slowed: called with the reason when the robot's own speed is reduced; nothing may be sent from then on.
    """

    def __init__(
        self,
        node: Node,
        joint_names: Sequence[str],
        robot: Robot,
        per_tick: bool,
        on_slowed: Callable[[str], None],
    ):
        topics, arm = robot.topics, tuple(joint_names)
        hand = tuple(n for n in joint_names if n in robot.gripper)
        apart = tuple(n for n in joint_names if n not in hand)
        self._gripper: GripperClient | None = None
        if robot.gripper_action is not None and hand:
            columns = [joint_names.index(n) for n in hand]
            self._gripper, arm = GripperClient(node, robot.gripper_action, hand, columns), apart
        kind = Float64MultiArray if per_tick else JointTrajectory
        places = {arm: topics.forward_command if per_tick else topics.command}
        if topics.gripper_command and hand and not per_tick:
            places = {apart: topics.command, hand: topics.gripper_command}
        self._outlets = [
            (
                joints,
                selection([joint_names.index(n) for n in joints]),
                Outlet(node, kind, topic, joints),
            )
            for joints, topic in places.items()
        ]
        self._writers = {joints: TrajectoryWriter(joints) for joints in places}
        said = topics.speed_scaling
        self._speed = SpeedListener(node, said, on_slowed) if said else None

    def send(self, plan: Plan, now: int) -> None:
        """The rest of a plan from a time (ns) on, as trajectories."""
        times, positions, velocities = plan.points(now)
        for joints, columns, outlet in self._outlets:
            write = self._writers[joints].write
            outlet.publisher.publish(write(times, positions[:, columns], velocities[:, columns]))
        if self._speed is not None:
            self._speed.told(float(times[-1]))

    def tick(self, position: np.ndarray) -> None:
        """Where the joints (A,) should be now."""
        for _, columns, outlet in self._outlets:
            values = messages.doubles(position[columns])
            outlet.publisher.publish(Float64MultiArray(data=values))

    def tend_gripper(self, plan: Plan | None, now: int, at_once: bool = False) -> None:
        """A goal for the gripper action, when the plan has a new one."""
        if self._gripper is not None:
            self._gripper.follow(plan, now, at_once)

    def problem(self) -> str:
        """Why nothing may be commanded now; empty when it may."""
        neighbours = [outlet for _, _, outlet in self._outlets]
        problems = [n.problem() for n in (*neighbours, self._gripper, self._speed) if n is not None]
        return next((p for p in problems if p), "")

    def doubt(self) -> None:
        """A controller may have become inactive; `problem` looks. From any thread."""
        for _, _, outlet in self._outlets:
            outlet.doubt()

    @property
    def caution(self) -> str:
        """What a controller might do better; empty when nothing."""
        neighbours = (*(outlet for _, _, outlet in self._outlets), self._gripper)
        return "; ".join(n.caution for n in neighbours if n is not None and n.caution)

    @property
    def heard(self) -> bool:
        """Whether somebody listens to every command."""
        return not any(outlet.deaf for _, _, outlet in self._outlets)

    def last_words(self, plan: Plan | None, now: int) -> None:
        """Send the gripper where the plan ends, and wait until the last messages are acknowledged."""
        self.tend_gripper(plan, now, at_once=True)
        for _, _, outlet in self._outlets:
            if hasattr(outlet.publisher, "wait_for_all_acked"):  # not in Humble
                outlet.publisher.wait_for_all_acked(Duration(seconds=LAST_WORDS_S))
            else:
                time.sleep(LAST_WORDS_S)

    def close(self) -> None:
        """End publishers and clients."""
        for _, _, outlet in self._outlets:
            outlet.close()
        for neighbour in (self._gripper, self._speed):
            if neighbour is not None:
                neighbour.close()

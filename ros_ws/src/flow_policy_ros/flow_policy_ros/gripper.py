"""A gripper controller that takes goals: GripperCommand or ParallelGripperCommand of control_msgs, which only a ROS
installation has."""

import time
from array import array
from collections.abc import Sequence

from action_msgs.msg import GoalStatus
from rclpy.action import ActionClient, get_action_names_and_types
from rclpy.node import Node

from flow_policy_rl.errors import InputError
from flow_policy_rl.serving.commander import Plan
from flow_policy_rl.serving.gripper import GripperGoals, wanted
from flow_policy_rl.serving.robot import GripperAction
from flow_policy_ros import messages

SELDOM_S = 5.0  # a warning that comes with every try is logged no more often


def action_class(action: GripperAction) -> type:
    """The class of a robot's gripper action.

    Raises:
        InputError: control_msgs is not installed, or has no such action.
    """
    name = f"control_msgs/action/{action.type}"
    kind = messages.message_class(name)
    if kind is None:
        raise InputError(
            f"gripper_action {action.name} needs {name}, which cannot be imported here: "
            "apt install ros-$ROS_DISTRO-control-msgs, or give topics.gripper_command"
        )
    return kind


def goal(kind: type, action: GripperAction, joints: Sequence[str], position: Sequence[float]):
    """The goal that sends joints to a position each."""
    result = kind.Goal()
    command = result.command
    if action.type == "GripperCommand":
        command.position, command.max_effort = float(position[0]), float(action.max_effort)
        return result
    command.name, command.position = list(joints), array("d", map(float, position))
    if action.max_effort:
        command.effort = array("d", [float(action.max_effort)] * len(joints))
    return result


def server_name(node: Node, action: str) -> str:
    """Where an action is asked for after remapping, which is said of its parts."""
    return node.resolve_service_name(f"{action}/_action/send_goal").rpartition("/_action/")[0]


class GripperClient:
    """Sends the gripper where the plan leads it, and again where a goal was refused or given up.

    Args:
        columns: of its joints in a plan.

    Attributes:
        caution: what the server does to our goals; empty while all is well.
    """

    def __init__(
        self, node: Node, action: GripperAction, joints: Sequence[str], columns: Sequence[int]
    ):
        self._node, self._action, self._joints = node, action, tuple(joints)
        self._columns = list(columns)
        self._kind = action_class(action)
        self._goals = GripperGoals(action)
        self._client = ActionClient(node, self._kind, action.name)
        self._name = server_name(node, action.name)
        self._number = 0  # of goals sent
        self.caution = ""

    def follow(self, plan: Plan | None, now: int, at_once: bool = False) -> None:
        """Send a goal if the plan has a new one."""
        if plan is None:
            self._goals.forget()
            return
        t = (now - plan.start) / 1e9
        there = wanted(plan.spline, t)[self._columns]
        position = self._goals.next(there, time.monotonic(), at_once)
        if position is None:
            return
        sent = goal(self._kind, self._action, self._joints, position)
        self._number += 1
        number = self._number
        answer = self._client.send_goal_async(sent)
        answer.add_done_callback(lambda future: self._answered(number, future.result()))

    def _answered(self, number: int, handle) -> None:
        if number != self._number:
            return
        if not handle.accepted:
            self._refused("refuses")
            return
        result = handle.get_result_async()
        result.add_done_callback(lambda future: self._ended(number, future.result()))

    def _ended(self, number: int, answer) -> None:
        """The newest goal is over; one before ends because of it."""
        if number != self._number:
            return
        # A hand that closes on something stalls, and many controllers abort then: there is nothing to do again.
        if answer.status == GoalStatus.STATUS_SUCCEEDED or answer.result.stalled:
            self.caution = ""
        else:
            self._refused("gives up")

    def _refused(self, how: str) -> None:
        self._goals.refused()
        self.caution = f"{self._name} {how} goals: the gripper may not be where it is sent"
        self._node.get_logger().warning(self.caution, throttle_duration_sec=SELDOM_S)

    def problem(self) -> str:
        """Why the gripper cannot be commanded; empty when it can."""
        if self._client.server_is_ready():
            return ""
        self._goals.forget()  # what comes to serve it knows of no goal
        # One type is that of our own client.
        types = set(dict(get_action_names_and_types(self._node)).get(self._name, ()))
        others = sorted(types - {f"control_msgs/action/{self._action.type}"})
        if others:
            return (
                f"{self._name} takes goals of {', '.join(others)}, not {self._action.type}: "
                "say so in gripper_action of the robot file (type)"
            )
        return f"no action server at {self._name}"

    def close(self) -> None:
        """End the client."""
        self._client.destroy()

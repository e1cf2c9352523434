"""What ros2_control puts between commands and a simulated arm, as a node of its own with the names and parameters of
the real one: joint_trajectory_controller (`<controller>/joint_trajectory`) and forward_command_controller
(`<forward>/commands`). The one that was commanded last has the joints. A gripper with a topic or an action of its own
has a controller of its own."""

import time
from collections.abc import Callable, Sequence

import numpy as np
from rcl_interfaces.msg import ParameterDescriptor
from rclpy.action import ActionServer
from rclpy.node import Node
from rclpy.qos import QoSProfile
from sensor_msgs.msg import JointState
from std_msgs.msg import Float64MultiArray
from trajectory_msgs.msg import JointTrajectory

from flow_policy_rl.serving.decode import stamp_ns
from flow_policy_rl.serving.robot import GripperAction, Robot
from flow_policy_rl.serving.trajectory_controller import (
    ForwardController,
    TrajectoryController,
    TrajectoryRejected,
)
from flow_policy_ros import messages
from flow_policy_ros.graph import numbered


class SimController(Node):
    """Follows commands; `reference` gives what the arm must do.

    Args:
        command: the command topic as it is after remapping; the controller's name and namespace are part of it.
        clock: simulated time in s.
        hears: whether a command gets through (a fault says no).
        on_command: called with the DDS sequence number and the steady time (ns) of every command.

    Attributes:
        rejected: number of messages that were dropped as the real controller drops them.
    """

    def __init__(
        self,
        robot: Robot,
        command: str,
        joint_names: Sequence[str],
        position: np.ndarray,
        clock: Callable[[], float],
        hears: Callable[[], bool],
        on_command: Callable[[int | None, int], None],
    ):
        topics, self._robot = robot.topics, robot
        self._names = tuple(joint_names)
        apart = bool(topics.gripper_command or robot.gripper_action)
        in_hand = np.array([apart and name in robot.gripper for name in joint_names], dtype=bool)
        self._parts = np.flatnonzero(~in_hand), np.flatnonzero(in_hand)  # columns: arm, hand
        arm, hand = ([joint_names[i] for i in columns] for columns in self._parts)
        namespace, _, name = command.rpartition("/")[0].rpartition("/")
        name, namespace = name or "arm_controller", namespace or "/"
        # Names of its own come before those that the process was given (ros2 launch names the simulation node).
        own = ["--ros-args", "-r", f"__node:={name}", "-r", f"__ns:={namespace}"]
        super().__init__(name, namespace=namespace, cli_args=own)
        for key, value, text in (
            ("joints", arm, "the joints it drives"),
            ("allow_partial_joints_goal", False, "accept trajectories of some joints"),
            ("allow_nonzero_velocity_at_trajectory_end", False, "as in Jazzy"),
            (
                "interpolate_from_desired_state",
                True,
                "start from the reference, not from the measured state",
            ),
        ):
            self.declare_parameter(key, value, ParameterDescriptor(description=text))
        self._sim_time, self._hears, self._on_command = clock, hears, on_command
        self._trajectory = TrajectoryController(arm, position[~in_hand])
        self._forward = ForwardController(arm, position[~in_hand])
        self._hand = TrajectoryController(hand, position[in_hand])
        self._in_charge = self._trajectory
        self.rejected = 0
        listen = self.create_subscription
        hear = numbered(self._on_trajectory)
        listen(JointTrajectory, topics.command, hear, QoSProfile(depth=10))
        if topics.gripper_command:
            listen(JointTrajectory, topics.gripper_command, self._on_gripper, QoSProfile(depth=10))
        if robot.gripper_action is not None:
            self._serve_gripper(robot.gripper_action)
        hear = numbered(self._on_forward)
        listen(Float64MultiArray, topics.forward_command, hear, QoSProfile(depth=10))
        # control_msgs exists on a ROS installation only; the reference is told as a JointState in any case.
        self._reference_pub = self.create_publisher(JointState, "~/reference", 10)
        kind = messages.message_class(messages.CONTROLLER_STATE)
        self._state_pub = self.create_publisher(kind, "~/controller_state", 10) if kind else None

    def _serve_gripper(self, action: GripperAction) -> None:
        kind = messages.message_class(f"control_msgs/action/{action.type}")
        if kind is None:
            self.get_logger().warning(f"no {action.name}: control_msgs cannot be imported")
            return
        self._gripper_action = kind
        self._server = ActionServer(self, kind, action.name, self._on_goal)

    def hold(self, position: np.ndarray) -> None:
        """Forget everything and stay at (A,)."""
        arm, hand = (position[columns] for columns in self._parts)
        self._trajectory.hold(arm)
        self._forward.hold(arm)
        self._hand.hold(hand)

    def _sample(self, at: float) -> tuple[np.ndarray, np.ndarray]:
        """Commanded positions and velocities (A,) at a time (s)."""
        both = np.zeros((2, len(self._names)))
        for columns, controller in zip(self._parts, (self._in_charge, self._hand), strict=True):
            both[:, columns] = controller.sample(at)[:2]
        return both[0], both[1]

    def reference(self, at: float) -> np.ndarray:
        """Commanded position (A,) at a time (s)."""
        return self._sample(at)[0]

    def publish_state(self, stamp: int) -> None:
        """What it follows."""
        position, velocity = self._sample(self._sim_time())
        names = self._names
        self._reference_pub.publish(messages.joint_state(names, position, velocity, stamp))
        if self._state_pub is not None:
            msg = self._state_pub.msg_type()
            msg.header.stamp, msg.joint_names = messages.to_time(stamp), list(names)
            msg.reference.positions = messages.doubles(position)
            msg.reference.velocities = messages.doubles(velocity)
            self._state_pub.publish(msg)

    def _take_over(self, controller) -> None:
        if controller is not self._in_charge:
            controller.hold(self._in_charge.sample(self._sim_time())[0])
            self._in_charge = controller

    def _note(self, number: int | None) -> bool:
        received = time.perf_counter_ns()
        if not self._hears():
            return False
        self._on_command(number, received)
        return True

    def _on_trajectory(self, msg: JointTrajectory, number: int | None) -> None:
        if self._note(number):
            self._take_over(self._trajectory)
            partial = self.get_parameter("allow_partial_joints_goal").value
            self._trajectory.allow_partial = partial
            self._follow(self._trajectory, msg)

    def _on_gripper(self, msg: JointTrajectory) -> None:
        if self._hears():
            self._follow(self._hand, msg)

    def _on_goal(self, handle):
        """Goes there at full speed. The answer comes at once, not when it is there."""
        command, names = handle.request.command, self._hand.joint_names
        if hasattr(command, "max_effort"):
            wanted = dict.fromkeys(names, command.position)
        else:
            wanted = dict(zip(command.name, command.position, strict=True))
        now = self._sim_time()
        here = self._hand.sample(now)[0]
        goal = np.array([wanted.get(name, x) for name, x in zip(names, here, strict=True)])
        speed = self._robot.limit_array(names, "velocity")
        seconds = max(float((np.abs(goal - here) / speed).max()), 1e-3)
        self._hand.accept(names, np.array([seconds]), goal[None], None, now)
        handle.succeed()
        result = self._gripper_action.Result()
        result.reached_goal = True
        return result

    def _follow(self, controller: TrajectoryController, msg: JointTrajectory) -> None:
        points = msg.points

        def column(name: str) -> np.ndarray | None:
            rows = [getattr(p, name) for p in points]
            return np.array(rows) if any(len(row) for row in rows) else None

        start = stamp_ns(msg) / 1e9 or None
        times = np.array([messages.seconds(p.time_from_start) for p in points])
        try:
            controller.accept(
                msg.joint_names,
                times,
                np.array([p.positions for p in points]),
                column("velocities"),
                self._sim_time(),
                column("accelerations"),
                start,
            )
        except (TrajectoryRejected, ValueError) as error:
            self.rejected += 1
            self.get_logger().warning(f"trajectory rejected: {error}")

    def _on_forward(self, msg: Float64MultiArray, number: int | None) -> None:
        if not self._note(number):
            return
        self._take_over(self._forward)
        try:
            self._forward.accept(msg.data)
        except TrajectoryRejected as error:
            self.rejected += 1
            self.get_logger().warning(f"command rejected: {error}")

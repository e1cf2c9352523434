"""What ros2_control puts between commands and a simulated arm, as a node of its own with the names and parameters of
the real
one: joint_trajectory_controller (`<controller>/joint_trajectory`) and forward_command_controller
(`<forward>/commands`). The one that was commanded last has the arm."""

import time
from collections.abc import Callable, Sequence

import numpy as np
from rcl_interfaces.msg import ParameterDescriptor
from rclpy.node import Node
from rclpy.qos import QoSProfile
from sensor_msgs.msg import JointState
from std_msgs.msg import Float64MultiArray
from trajectory_msgs.msg import JointTrajectory

from flow_policy_rl.serving.decode import stamp_ns
from flow_policy_rl.serving.robot import Topics
from flow_policy_rl.serving.trajectory_controller import (
    ForwardController,
    TrajectoryController,
    TrajectoryRejected,
)
from flow_policy_ros import messages

STATE = "control_msgs/msg/JointTrajectoryControllerState"


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
        topics: Topics,
        command: str,
        joint_names: Sequence[str],
        position: np.ndarray,
        clock: Callable[[], float],
        hears: Callable[[], bool],
        on_command: Callable[[int | None, int], None],
    ):
        namespace, _, name = command.rpartition("/")[0].rpartition("/")
        name, namespace = name or "arm_controller", namespace or "/"
        # Names of its own come before those that the process was given (ros2 launch names the simulation node).
        own = ["--ros-args", "-r", f"__node:={name}", "-r", f"__ns:={namespace}"]
        super().__init__(name, namespace=namespace, cli_args=own)
        for key, value, text in (
            ("joints", list(joint_names), "the joints it drives"),
            ("allow_partial_joints_goal", False, "accept trajectories of some joints"),
            ("allow_nonzero_velocity_at_trajectory_end", False, "as in Jazzy"),
            (
                "interpolate_from_desired_state",
                True,
                "start from the reference, not from the measured state",
            ),
        ):
            self.declare_parameter(key, value, ParameterDescriptor(description=text))
        self._clock, self._hears, self._on_command = clock, hears, on_command
        self._trajectory = TrajectoryController(joint_names, position)
        self._forward = ForwardController(joint_names, position)
        self._in_charge = self._trajectory
        self.rejected = 0
        listen = self.create_subscription
        listen(JointTrajectory, topics.command, self._on_trajectory, QoSProfile(depth=10))
        if topics.gripper_command:
            listen(JointTrajectory, topics.gripper_command, self._on_gripper, QoSProfile(depth=10))
        listen(Float64MultiArray, topics.forward_command, self._on_forward, QoSProfile(depth=10))
        # control_msgs exists on a ROS installation only; the reference is told as a JointState in any case.
        self._reference_pub = self.create_publisher(JointState, "~/reference", 10)
        kind = messages.message_class(STATE)
        self._state_pub = self.create_publisher(kind, "~/controller_state", 10) if kind else None

    def hold(self, position: np.ndarray) -> None:
        """Forget everything and stay at (A,)."""
        self._trajectory.hold(position)
        self._forward.hold(position)

    def reference(self, at: float) -> np.ndarray:
        """Commanded position (A,) at a time (s)."""
        return self._in_charge.sample(at)[0]

    def publish_state(self, stamp: int) -> None:
        """What it follows."""
        position, velocity, _ = self._in_charge.sample(self._clock())
        names = self._trajectory.joint_names
        self._reference_pub.publish(messages.joint_state(names, position, velocity, stamp))
        if self._state_pub is not None:
            msg = self._state_pub.msg_type()
            msg.header.stamp, msg.joint_names = messages.to_time(stamp), list(names)
            msg.reference.positions = messages.doubles(position)
            msg.reference.velocities = messages.doubles(velocity)
            self._state_pub.publish(msg)

    def _take_over(self, controller) -> None:
        if controller is not self._in_charge:
            controller.hold(self._in_charge.sample(self._clock())[0])
            self._in_charge = controller

    def _note(self, info: dict) -> bool:
        # NOTE: Humble's info has no sequence number; there the latency is not measured.
        received = time.perf_counter_ns()
        if not self._hears():
            return False
        self._on_command(info.get("publication_sequence_number"), received)
        return True

    def _on_trajectory(self, msg: JointTrajectory, info: dict) -> None:
        if self._note(info):
            self._follow(msg, self.get_parameter("allow_partial_joints_goal").value)

    def _on_gripper(self, msg: JointTrajectory) -> None:
        if self._hears():
            self._follow(msg, True)

    def _follow(self, msg: JointTrajectory, partial: bool) -> None:
        points = msg.points

        def column(name: str) -> np.ndarray | None:
            rows = [getattr(p, name) for p in points]
            return np.array(rows) if any(len(row) for row in rows) else None

        start = stamp_ns(msg) / 1e9 or None
        times = np.array([messages.seconds(p.time_from_start) for p in points])
        self._take_over(self._trajectory)
        self._trajectory.allow_partial = partial
        try:
            self._trajectory.accept(
                msg.joint_names,
                times,
                np.array([p.positions for p in points]),
                column("velocities"),
                self._clock(),
                column("accelerations"),
                start,
            )
        except (TrajectoryRejected, ValueError) as error:
            self.rejected += 1
            self.get_logger().warning(f"trajectory rejected: {error}")

    def _on_forward(self, msg: Float64MultiArray, info: dict) -> None:
        if not self._note(info):
            return
        self._take_over(self._forward)
        try:
            self._forward.accept(msg.data)
        except TrajectoryRejected as error:
            self.rejected += 1
            self.get_logger().warning(f"command rejected: {error}")

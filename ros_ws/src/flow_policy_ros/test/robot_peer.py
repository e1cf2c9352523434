"""A robot that stands still, and what tests say about commands to it."""

import time
from array import array
from collections.abc import Callable

import numpy as np
from flow_policy_ros.graph import NUMBERED
from flow_policy_ros.messages import to_time
from geometry_msgs.msg import PoseStamped
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState
from sensor_msgs.msg import JointState
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory

from flow_policy_rl.serving.trajectory_controller import TrajectoryController

HOME = [0.0, -0.785, 0.0, -2.356, 0.0, 1.571, 0.785, 0.04, 0.04]
NAMES = [f"panda_joint{i}" for i in range(1, 8)] + ["panda_finger_joint1", "panda_finger_joint2"]
RATE_S = 0.02
CYCLE_S = 0.01  # of the controller
NO_JUMP = 0.04  # rad in a cycle: the limit of speed, and a half


class Robot:
    """Publishes joint states and a cube at 50 Hz, standing still at home.

    Where its time is real, a command counts from when it was sent: a busy machine is late with it, and a robot's
    controller is not.

    Attributes:
        names, position, silent: change them to be a broken robot.
        parts: of the joints, a message each, as of a driver each.
        fastest, jump: speed of the controller's reference, and its way in the first cycle of any command (rad).
        heard: how many commands it has taken.
    """

    def __init__(
        self,
        peer,
        qos=10,
        stamp: Callable[[], int] | None = None,
        rate_s: float = RATE_S,
        clock: Callable[[], int] | None = None,
        listens: bool = True,
    ):
        self._joints = peer.node.create_publisher(JointState, "/joint_states", qos)
        self._pose = peer.node.create_publisher(PoseStamped, "/cube/pose", qos)
        own_clock, clock = clock, peer.node.get_clock()
        self._stamp = stamp or (lambda: clock.now().nanoseconds)
        self._time = own_clock or self._stamp
        self._real_time = own_clock is time.monotonic_ns or (own_clock is None and stamp is None)
        self.names, self.broken, self.silent, self.follows = list(NAMES), {}, False, True
        self.parts = (slice(None),)
        self.controller = TrajectoryController(NAMES[:8], np.array(HOME[:8]))
        self.fastest, self.jump, self.heard = 0.0, 0.0, 0
        self._peer, self._subscription = peer, None
        if listens:
            self.listen()
        peer.node.create_timer(rate_s, self.publish)

    def _on_command(self, msg: JointTrajectory, late: int = 0) -> None:
        if not self.follows:
            return
        times = np.array([seconds(p.time_from_start) for p in msg.points])
        positions = np.array([p.positions for p in msg.points])
        velocities = np.array([p.velocities for p in msg.points])
        now = (self._time() - late) / 1e9
        before = self.controller.sample(now)[0]
        self.controller.accept(msg.joint_names, times, positions, velocities, now)
        after = self.controller.sample(now + CYCLE_S)[0]
        self.heard += 1
        self.jump = max(self.jump, float(np.abs(after - before)[:7].max()))

    def listen(self) -> None:
        """The controller starts: it holds where the arm is."""
        hear = self._on_command
        if NUMBERED and self._real_time:
            hear = lambda msg, info: self._on_command(  # noqa: E731
                msg, time.time_ns() - info["source_timestamp"]
            )
        self._subscription = self._peer.node.create_subscription(
            JointTrajectory, "/arm_controller/joint_trajectory", hear, 10
        )

    def restart_at(self, position: np.ndarray) -> None:
        """Somebody moved the arm (A,) by hand, and started the controller again: it holds there."""
        self.controller.hold(position)

    def publish(self) -> None:
        """One state of everything."""
        if self.silent:
            return
        now = to_time(self._stamp())
        pose = PoseStamped()
        pose.header.stamp = now
        pose.pose.position.x, pose.pose.position.z = 0.5, 0.0225
        pose.pose.orientation.w = 1.0
        self._pose.publish(pose)
        reference, velocity, _ = self.controller.sample(self._time() / 1e9)
        self.fastest = max(self.fastest, float(np.abs(velocity[:7]).max()))
        position = [*reference, reference[7]]
        for index, value in self.broken.items():
            position[index] = value
        position = position[: len(position) if None not in position else position.index(None)]
        velocity = [*velocity, 0.0]
        for part in self.parts:
            msg = JointState(name=self.names[part])
            msg.position, msg.velocity = array("d", position[part]), array("d", velocity[part])
            msg.header.stamp = now
            self._joints.publish(msg)


def seconds(duration) -> float:
    return duration.sec + duration.nanosec * 1e-9


def is_hold(msg: JointTrajectory) -> bool:
    """Comes to rest sooner than any chunk does."""
    return not any(msg.points[-1].velocities) and seconds(msg.points[-1].time_from_start) < 0.4


def moves(msg: JointTrajectory) -> float:
    """Largest mean speed (rad/s) between two points of the arm."""
    times = np.array([seconds(p.time_from_start) for p in msg.points])
    positions = np.array([p.positions for p in msg.points])[:, :7]
    if len(times) < 2:
        return 0.0
    return float((np.abs(np.diff(positions, axis=0)) / np.diff(times)[:, None]).max())


def way_of(msg: JointTrajectory) -> np.ndarray:
    """Where a trajectory leads from its first point on: (n, 8), every millisecond."""
    times, positions, velocities = (
        np.array(values)
        for values in zip(
            *((seconds(p.time_from_start), p.positions, p.velocities) for p in msg.points),
            strict=True,
        )
    )
    controller = TrajectoryController(msg.joint_names, positions[0])
    controller.accept(msg.joint_names, times, positions, velocities, 0.0)
    return np.array([controller.sample(t)[0] for t in np.arange(times[0], times[-1], 1e-3)])


def change_state(peer, name: str) -> bool:
    """A lifecycle transition by name."""
    number = getattr(Transition, f"TRANSITION_{name.upper()}")
    request = ChangeState.Request(transition=Transition(id=number))
    return peer.call(ChangeState, "/policy_node/change_state", request).success


def trigger(peer, name: str):
    """Call a service of the node that takes nothing."""
    return peer.call(Trigger, f"/policy_node/{name}", Trigger.Request())

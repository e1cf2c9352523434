"""What a policy's actions are compared with, chosen by the user and named in every report.

    command      what the robot's controller was really told on the command topic: trajectories, arrays or joint states
    controller   the reference that the controller published (`controller_state`)
    state        the measured joints at the time an action was due: what the robot did next

Each is a function of time that becomes known as the bag is read. Values are asked for once the bag has
passed them, so memory does not grow with its length.
"""

from collections.abc import Callable

import numpy as np

from flow_policy_rl.errors import InputError
from flow_policy_rl.serving.decode import DecodeError, joint_values, stamp_ns
from flow_policy_rl.serving.robot import Robot
from flow_policy_rl.serving.trajectory_controller import TrajectoryController, TrajectoryRejected

KINDS = ("command", "controller", "state")
GAP_S = 0.5  # a longer silence ends a segment
COMMAND_TYPES = (
    "trajectory_msgs/msg/JointTrajectory",
    "std_msgs/msg/Float64MultiArray",
    "sensor_msgs/msg/JointState",
)
CONTROLLER_TYPES = (
    "control_msgs/msg/JointTrajectoryControllerState",
    "sensor_msgs/msg/JointState",
)


class CommandTruth:
    """The reference of a controller that receives what is on the command topic."""

    def __init__(self, joint_names: tuple[str, ...]):
        self.joint_names = joint_names
        self.reset()

    def reset(self) -> None:
        """A new segment: nothing was commanded yet."""
        self._controller: TrajectoryController | None = None
        self._held: np.ndarray | None = None

    def push(self, msg, now: float, measured: np.ndarray) -> None:
        """A command received at `now` (s) by a robot that was at `measured` (A,).

        Raises:
            DecodeError, TrajectoryRejected: as the controller would refuse it.
        """
        if hasattr(msg, "points"):
            if self._controller is None:
                self._controller = TrajectoryController(
                    self.joint_names, measured, allow_partial=True
                )
            accept_trajectory(self._controller, msg, now)
        elif hasattr(msg, "position"):
            self._held = joint_values(msg, self.joint_names, "position")
        else:
            values = np.asarray(msg.data, float)
            if values.shape != (len(self.joint_names),):
                raise DecodeError(
                    f"command has {values.size} values for {len(self.joint_names)} joints"
                )
            self._held = values

    def at(self, time: float) -> np.ndarray | None:
        """Commanded position (A,) at a time not before the last push; None before the first command."""
        if self._held is not None:
            return self._held
        return None if self._controller is None else self._controller.sample(time)[0]


def accept_trajectory(controller: TrajectoryController, msg, now: float) -> None:
    """Hand a JointTrajectory to a controller.

    Raises:
        TrajectoryRejected: the controller drops it.
    """
    times = np.array([p.time_from_start.sec + p.time_from_start.nanosec * 1e-9 for p in msg.points])
    try:
        positions = np.array([p.positions for p in msg.points], float)
        velocities = (
            np.array([p.velocities for p in msg.points], float)
            if any(len(p.velocities) for p in msg.points)
            else None
        )
    except ValueError:
        raise TrajectoryRejected("points have different numbers of values") from None
    start = stamp_ns(msg) / 1e9 or None  # a stamp of 0: on reception
    controller.accept(list(msg.joint_names), times, positions, velocities, now=now, start=start)


class SampledTruth:
    """Samples with straight lines between them: measured states, or a controller's published reference.

    Args:
        max_gap: seconds between two samples that still belong together.
    """

    def __init__(self, max_gap: float):
        self.max_gap = max_gap
        self.reset()

    def reset(self) -> None:
        """A new segment."""
        self._before: tuple[float, np.ndarray] | None = None
        self._newest: tuple[float, np.ndarray] | None = None

    def push(self, time: float, values: np.ndarray) -> None:
        """A sample (A,) later than the last one."""
        self._before, self._newest = self._newest, (time, values)

    def at(self, time: float) -> np.ndarray | None:
        """Value (A,) at a time not after the newest sample; None where it is not known."""
        if self._newest is None or time > self._newest[0]:
            return None
        if self._before is None or time < self._before[0]:
            return self._newest[1] if time == self._newest[0] else None
        (t0, before), (t1, after) = self._before, self._newest
        if t1 - t0 > self.max_gap:
            return None
        return before + (after - before) * ((time - t0) / (t1 - t0))


def controller_reference(msg, joint_names: tuple[str, ...]) -> np.ndarray:
    """Reference position (A,) of a controller state: `reference` or `desired` (Humble and before), or a JointState.

    Raises:
        DecodeError: another message, or a joint is missing.
    """
    if hasattr(msg, "position"):
        return joint_values(msg, joint_names, "position")
    for part in ("reference", "desired"):
        if hasattr(msg, part) and hasattr(msg, "joint_names"):
            return joint_values(
                _Named(msg.joint_names, getattr(msg, part).positions), joint_names, "position"
            )
    raise DecodeError(f"{type(msg).__name__} has no reference or desired positions by joint name")


class _Named:
    def __init__(self, name, position):
        self.name, self.position = list(name), position


class Pending:
    """Actions whose truth is not known yet.

    Args:
        store: called with (row, step, values) once it is.
    """

    def __init__(self, store: Callable[[int, int, np.ndarray], None]):
        self._store = store
        self._open: list[list] = []  # row, due times (H,), next step
        self._next = np.inf

    def add(self, row: int, due: np.ndarray) -> None:
        """The actions of inference `row` are due at these times (H,)."""
        self._open.append([row, due, 0])
        self._next = min(self._next, due[0])

    def resolve(self, until: float, at: Callable[[float], np.ndarray | None]) -> None:
        """Ask for everything that is due up to a time (s)."""
        if until < self._next:
            return
        for entry in self._open:
            row, due, step = entry
            while step < len(due) and due[step] <= until:
                values = at(float(due[step]))
                if values is not None:
                    self._store(row, step, values)
                step += 1
            entry[2] = step
        self._open = [e for e in self._open if e[2] < len(e[1])]
        self._next = min((e[1][e[2]] for e in self._open), default=np.inf)

    def drop(self) -> None:
        """What is open will never be known."""
        self._open, self._next = [], np.inf


def choose(
    kind: str, topic: str, robot: Robot, joint_names: tuple[str, ...]
) -> tuple[CommandTruth | SampledTruth, dict[str, tuple[str, ...]]]:
    """The truth of a kind, and the types that each of its topics may have: the main one first, for `state` none.

    Args:
        topic: the main one (default: that of the robot file).

    Raises:
        InputError: unknown kind, no topic, or that of the joint states.
    """
    topics = robot.topics
    if kind == "state":
        return SampledTruth(GAP_S), {}
    if kind == "command":
        sources = {topic or topics.command: COMMAND_TYPES}
        if topics.gripper_command:  # a controller of its own
            sources[topics.gripper_command] = COMMAND_TYPES
        truth: CommandTruth | SampledTruth = CommandTruth(joint_names)
    elif kind == "controller":
        sources = {topic or topics.controller_state: CONTROLLER_TYPES}
        truth = SampledTruth(GAP_S)
        if "" in sources:
            raise InputError("'controller' needs the topic of the controller state: --truth-topic")
    else:
        raise InputError(f"unknown ground truth '{kind}'; valid: {', '.join(KINDS)}")
    if topics.joint_states in sources:
        raise InputError(
            f"topic {topics.joint_states} cannot be both the joint states and the ground truth"
        )
    return truth, sources

"""What a policy's actions are compared with, chosen by the user and named in every report.

    command      what the robot's controller was really told on the command topic: trajectories, arrays or joint states
    controller   the reference that the controller published (`controller_state`)
    state        the measured joints at the time an action was due: what the robot did next

Each is a function of time that becomes known as the bag is read. Values are asked for once the bag has passed them, and
after the slowest stream has arrived: what was in force is kept for so long, and memory does not grow with the bag.
"""

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Collection, Mapping
from operator import itemgetter

import numpy as np

from flow_policy_rl.data.bags import Bag
from flow_policy_rl.errors import InputError
from flow_policy_rl.serving.decode import DecodeError, joint_values, stamp_ns
from flow_policy_rl.serving.robot import Robot
from flow_policy_rl.serving.spline import Spline
from flow_policy_rl.serving.trajectory_controller import TrajectoryController, TrajectoryRejected

KINDS = ("command", "controller", "state")
GAP_S = 0.5  # a longer silence ends a segment
KEPT_S = 2.0  # for so long the past is remembered: more than any stream may be late
SAME_S = 1e-6  # seconds since 1970 are no finer
COMMAND_TYPES = (
    "trajectory_msgs/msg/JointTrajectory",
    "std_msgs/msg/Float64MultiArray",
    "sensor_msgs/msg/JointState",
)
CONTROLLER_TYPES = (
    "control_msgs/msg/JointTrajectoryControllerState",
    "sensor_msgs/msg/JointState",
)


class Past:
    """What happened in the last seconds, in the order of time.

    Args:
        kept_s: what is older by the newest time is forgotten, but for the last of it.
    """

    def __init__(self, kept_s: float):
        self.kept_s = kept_s
        self.entries: deque[tuple] = deque()  # (time in s, what)

    def add(self, time: float, what) -> None:
        """From here on; what was noted for this time or later is replaced."""
        while self.entries and self.entries[-1][0] >= time:
            self.entries.pop()
        self.entries.append((time, what))
        while len(self.entries) > 1 and self.entries[1][0] <= time - self.kept_s:
            self.entries.popleft()

    def before(self, time: float) -> int:
        """Number of the last entry before a time; -1 where there is none."""
        return bisect_left(self.entries, time - SAME_S, key=itemgetter(0)) - 1


class CommandTruth:
    """The reference of controllers that receive what is on the command topics, one of each.

    Args:
        kept_s: seconds that one may look back.
        parts: the joints by topic, where the gripper has one of its own; else one topic has all of them.

    Attributes:
        accepted, refused: commands since the beginning of the bag.
    """

    def __init__(
        self,
        joint_names: tuple[str, ...],
        kept_s: float = KEPT_S,
        parts: Mapping[str, tuple[str, ...]] | None = None,
    ):
        self.joint_names, self.kept_s = joint_names, kept_s
        self._parts = dict(parts or {"": joint_names})
        self._columns = {
            topic: [joint_names.index(name) for name in names]
            for topic, names in self._parts.items()
        }
        self.accepted = self.refused = 0
        self.reset()

    def reset(self) -> None:
        """A new segment: nothing was commanded yet."""
        self._controllers: dict[str, TrajectoryController] = {}
        self._motions: dict[str, Spline] = {}  # by topic; a part that was told nothing yet stands
        self._past = Past(self.kept_s)

    def push(self, msg, now: float, measured: np.ndarray, topic: str = "") -> None:
        """A command received on a topic at `now` (s) by a robot that was at `measured` (A,).

        Raises:
            DecodeError, TrajectoryRejected: as the controller would refuse it.
        """
        self.refused += 1  # until it is accepted
        motion = self._followed(msg, now, measured[self._columns[topic]], topic)
        if not self._motions:
            self._motions = {t: standing(measured[c]) for t, c in self._columns.items()}
        self._motions = self._motions | {topic: motion}
        self._past.add(now, self._motions)
        self.refused -= 1
        self.accepted += 1

    def _followed(self, msg, now: float, measured: np.ndarray, topic: str) -> Spline:
        """The motion of a topic's joints that a command starts; they were at `measured`."""
        names = self._parts[topic]
        if hasattr(msg, "points"):
            if topic not in self._controllers:
                self._controllers[topic] = TrajectoryController(
                    names, measured, allow_partial=True, allow_end_velocity=True
                )
            accept_trajectory(self._controllers[topic], msg, now)
            return self._controllers[topic].motion
        named = hasattr(msg, "position")
        values = joint_values(msg, names, "position") if named else np.asarray(msg.data, float)
        if values.shape != (len(names),):
            raise DecodeError(f"command has {values.size} values for {len(names)} joints")
        return standing(_finite(values, "command"))

    def at(self, time: float) -> np.ndarray | None:
        """Commanded position (A,) at a time not long past, by what was received before it; None without a command."""
        k = self._past.before(time)
        if k < 0:
            return None
        position = np.empty(len(self.joint_names))
        for topic, motion in self._past.entries[k][1].items():
            position[self._columns[topic]] = motion.sample(time)[0]
        return position

    def known_until(self, now: float) -> float:
        """A command holds until the next one."""
        return now


def standing(position: np.ndarray) -> Spline:
    """No motion: at (A,) for ever."""
    return Spline(np.zeros(1), np.array(position, float)[None])


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
        kept_s: seconds that one may look back, and that a sample may be late.
    """

    def __init__(self, max_gap: float, kept_s: float = KEPT_S):
        self.max_gap, self.kept_s = max_gap, kept_s
        self.reset()

    def reset(self) -> None:
        """A new segment."""
        self._past = Past(self.kept_s)

    def push(self, time: float, values: np.ndarray) -> None:
        """A sample (A,)."""
        self._past.add(time, values)

    def at(self, time: float) -> np.ndarray | None:
        """Value (A,) at a time not long past; None where it is not known."""
        samples = self._past.entries
        k = self._past.before(time)
        if k + 1 == len(samples):
            return None
        t1, after = samples[k + 1]
        if abs(t1 - time) <= SAME_S:
            return after
        if k < 0 or t1 - samples[k][0] > self.max_gap:
            return None
        t0, before = samples[k]
        return before + (after - before) * ((time - t0) / (t1 - t0))

    def known_until(self, now: float) -> float:
        """Up to the newest sample; what is not there long after will not come."""
        samples = self._past.entries
        return max(samples[-1][0] if samples else -np.inf, now - self.kept_s)


def controller_reference(msg, joint_names: tuple[str, ...]) -> np.ndarray:
    """Reference position (A,) of a controller state: `reference`, or `desired` (Humble and before), or a JointState.

    Raises:
        DecodeError: another message, a joint is missing, or a number not finite.
    """
    if hasattr(msg, "position"):
        return _finite(joint_values(msg, joint_names, "position"), "reference")
    for part in ("reference", "desired"):  # Humble has both, and fills one of them
        if hasattr(msg, "joint_names") and len(getattr(getattr(msg, part, None), "positions", ())):
            named = _Named(msg.joint_names, getattr(msg, part).positions)
            return _finite(joint_values(named, joint_names, "position"), "reference")
    raise DecodeError(f"{type(msg).__name__} has no reference or desired positions by joint name")


def _finite(values: np.ndarray, what: str) -> np.ndarray:
    if not np.isfinite(values).all():
        raise DecodeError(f"{what} has numbers that are not finite")
    return values


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
    kind: str, topic: str, robot: Robot, joint_names: tuple[str, ...], kept_s: float = KEPT_S
) -> tuple[CommandTruth | SampledTruth, dict[str, tuple[str, ...]]]:
    """The truth of a kind, and the types that each of its topics may have: the main one first, for `state` none.

    Args:
        topic: the main one (default: that of the robot file).
        kept_s: seconds that one may look back.

    Raises:
        InputError: unknown kind, no topic, or that of the joint states.
    """
    topics = robot.topics
    if kind == "state":
        return SampledTruth(GAP_S, kept_s), {}
    if kind == "command":
        main = topic or topics.command
        apart = topics.gripper_command not in ("", main)
        hand = tuple(n for n in joint_names if apart and n in robot.gripper)
        parts = {main: tuple(n for n in joint_names if n not in hand)}
        if hand:  # a controller of its own
            parts[topics.gripper_command] = hand
        sources = dict.fromkeys(parts, COMMAND_TYPES)
        truth: CommandTruth | SampledTruth = CommandTruth(joint_names, kept_s, parts)
    elif kind == "controller":
        sources = {topic or topics.controller_state: CONTROLLER_TYPES}
        truth = SampledTruth(GAP_S, kept_s)
        if "" in sources:
            raise InputError("'controller' needs the topic of the controller state: --truth-topic")
    else:
        raise InputError(f"unknown ground truth '{kind}'; valid: {', '.join(KINDS)}")
    if topics.joint_states in sources:
        raise InputError(
            f"topic {topics.joint_states} cannot be both the joint states and the ground truth"
        )
    return truth, sources


def refuse_unfollowed(
    truth: CommandTruth | SampledTruth, bag: Bag, topics: Collection[str], option: str
) -> None:
    """Where most commands were refused, what the robot was told is not known.

    Args:
        truth: after all of the bag.
        topics: those of the commands.
        option: of the command line, by which another truth is chosen.

    Raises:
        InputError: how many were refused and why, and what else can be taken.
    """
    if not isinstance(truth, CommandTruth) or truth.refused <= truth.accepted:
        return
    reasons = [f"{p.reason} ({p.count}x)" for p in bag.problems if p.topic in topics]
    raise InputError(
        f"bag '{bag.path}': {truth.refused} of {truth.refused + truth.accepted} commands on "
        f"{', '.join(topics)} cannot be followed: {'; '.join(reasons)}. Choose {option} controller or state"
    )

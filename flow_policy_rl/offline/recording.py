"""One pass over a bag: the observations at which the live node would have inferred, what was commanded, what was wrong.

The same `Streams` and `ChunkScheduler` as in the node decide what an observation is and when one is due. A
message that a newer one replaces before the next inference is due cannot be in any observation: it is checked,
but images are not unpacked for nothing. Images go to `sink` and are not kept: memory grows by a few kilobytes
per inference, whatever the length of the bag.
"""

import bisect
import contextlib
import math
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from flow_policy_rl.data.bags import BadMessage, Bag, Message
from flow_policy_rl.data.problems import Problems
from flow_policy_rl.errors import InputError
from flow_policy_rl.offline.truth import (
    CommandTruth,
    Pending,
    SampledTruth,
    controller_reference,
)
from flow_policy_rl.serving.chunk_scheduler import ChunkScheduler
from flow_policy_rl.serving.decode import DecodeError, image, joint_values
from flow_policy_rl.serving.robot import Robot
from flow_policy_rl.serving.streams import NotReady, Streams, topics_of
from flow_policy_rl.serving.trajectory_controller import TrajectoryRejected
from flow_policy_rl.spec import ObservationField, PolicySpec

MEASURED = "measured_joint_pos"
GAP_S = 0.5  # a longer silence ends a segment
JUMP_MARGIN = 0.05  # rad or m beyond what the velocity limits allow: the robot was put elsewhere
LATENCY_TOPIC = "/sim_node/end_to_end_latency"
INFERENCE_TOPIC = "/policy_node/inference"
STAMPED = (
    "sensor_msgs/msg/JointState",
    "sensor_msgs/msg/Image",
    "sensor_msgs/msg/CompressedImage",
    "geometry_msgs/msg/PoseStamped",
)
COMMAND_TYPES = (
    "trajectory_msgs/msg/JointTrajectory",
    "std_msgs/msg/Float64MultiArray",
    "sensor_msgs/msg/JointState",
)
FIELD_TYPES = {
    "joint_position": ("sensor_msgs/msg/JointState",),
    "joint_velocity": ("sensor_msgs/msg/JointState",),
    "pose": ("geometry_msgs/msg/PoseStamped",),
    "image": ("sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage"),
}
BINS_PER_DECADE = 40
BLOCK = 4096  # durations that are sorted in at once


class Durations:
    """Percentiles of any number of durations in constant memory: a histogram of bins 6 % wide."""

    def __init__(self):
        self._new: list[tuple[float, float]] = []
        self._bins: Counter = Counter()
        self._max = (0.0, 0.0)
        self._count = 0

    def add(self, seconds: float, at: float = 0.0) -> None:
        """One duration, met at a time in the bag."""
        self._new.append((seconds, at))
        if len(self._new) >= BLOCK:
            self._sort_in()

    def _sort_in(self) -> None:
        if not self._new:
            return
        seconds = np.array(self._new)[:, 0]
        bins = np.rint(np.log10(np.maximum(seconds, 1e-7)) * BINS_PER_DECADE).astype(int)
        self._bins.update(bins.tolist())
        self._max = max(self._max, self._new[int(seconds.argmax())], key=lambda pair: pair[0])
        self._count += len(self._new)
        self._new = []

    @property
    def count(self) -> int:
        """How many."""
        return self._count + len(self._new)

    @property
    def max(self) -> float:
        """The longest, s."""
        self._sort_in()
        return self._max[0]

    @property
    def max_at(self) -> float:
        """When the longest was met."""
        self._sort_in()
        return self._max[1]

    def percentile(self, share: float) -> float:
        """Seconds; nan without any."""
        self._sort_in()
        left = share * self._count
        for index in sorted(self._bins):
            left -= self._bins[index]
            if left <= 0:
                return min(10 ** (index / BINS_PER_DECADE), self._max[0])
        return math.nan

    def summary_ms(self) -> dict[str, float | None]:
        """p50, p95, p99 and max in ms; None without any."""
        if not self.count:
            return dict.fromkeys(("p50", "p95", "p99", "max"))
        found = {f"p{p}": self.percentile(p / 100) * 1e3 for p in (50, 95, 99)}
        return found | {"max": self.max * 1e3}


@dataclass
class StreamFacts:
    """What was seen of one topic.

    Attributes:
        type: message type in the bag.
        count, bad: messages, and how many of them could not be decoded.
        periods: time from stamp to stamp.
        delays: time from stamp to reception.
        backward: how often the stamp went back.
        shapes: image sizes and encodings, or names of joints, and how often each.
    """

    type: str = ""
    count: int = 0
    bad: int = 0
    backward: int = 0
    first: int = 0
    last: int | None = None
    periods: Durations = field(default_factory=Durations)
    delays: Durations = field(default_factory=Durations)
    shapes: Counter = field(default_factory=Counter)

    def rate_hz(self) -> float:
        """From the median period."""
        period = self.periods.percentile(0.5)
        return 1 / period if period > 0 else math.nan


@dataclass
class Recording:
    """What a bag holds for one policy: n inferences of H actions of A joints.

    Attributes:
        obs: observation fields that are not images, (n, size).
        stamps, times: (n,) stamp of each observation, ns and s.
        segment: (n,) number of the uninterrupted piece.
        measured: (n, A) joints.
        before: (n, A) truth at the time of the observation; nan where not known.
        truth: (n, H, A) truth when each action is due; nan where not known.
        latencies_s, latency_times: end-to-end latencies that the bag recorded, and when (s; nan where not known).
        stages: latencies by stage that the policy node recorded, ms.
        skew: at an observation, between the newest stamps of its streams.
        streams: facts by topic.
        duration: s from the first to the last stamp.
    """

    obs: dict[str, np.ndarray]
    stamps: list[int]
    times: np.ndarray
    segment: np.ndarray
    measured: np.ndarray
    before: np.ndarray
    truth: np.ndarray
    truth_kind: str
    latencies_s: np.ndarray
    latency_times: np.ndarray
    stages: dict[str, Durations]
    skew: Durations
    streams: dict[str, StreamFacts]
    duration: float
    problems: Problems


@dataclass(frozen=True)
class Inference:
    """Where the live node would infer: number, stamp (ns), segment, observation by field, measured joints (A,)."""

    row: int
    stamp: int
    segment: int
    obs: Mapping[str, np.ndarray]
    measured: np.ndarray


Sink = Callable[[Inference], None]


def read_recording(
    bag: Bag,
    spec: PolicySpec,
    robot: Robot,
    truth_kind: str = "command",
    truth_topic: str = "",
    sink: Sink | None = None,
    stamps: Iterable[int] | None = None,
) -> Recording:
    """Read a bag once.

    Args:
        truth_topic: of the command or the controller state (default: that of the robot file).
        sink: gets each inference as the bag is read.
        stamps: infer at observations of these times (ns) instead of where the scheduler would.

    Raises:
        InputError: topics that the policy needs are not in the bag, or are of another type.
    """
    return _Reader(bag, spec, robot, truth_kind, truth_topic, sink, stamps).read()


def check_topics(bag: Bag, needed: Mapping[str, tuple[str, ...]]) -> None:
    """Refuse a bag that lacks topics, or has them with other types.

    Raises:
        InputError: lists what is wrong, and what the bag has.
    """
    there = bag.topics()
    wrong = []
    for topic, types in needed.items():
        if topic not in there:
            wrong.append(f"no topic {topic}")
        elif there[topic] not in types:
            wrong.append(f"{topic} is a {there[topic]}, not a {' or '.join(types)}")
    if wrong:
        listed = ", ".join(f"{t} ({k})" for t, k in sorted(there.items())) or "none"
        raise InputError(
            f"bag '{bag.path}': {'; '.join(wrong)}. It has: {listed}. Map topics with --topics NAME=TOPIC"
        )


def header_stamp(message: Message) -> int:
    """Stamp (ns) straight from the bytes: two integers after the encoding; reception where it is 0.

    Raises:
        BadMessage: too short.
    """
    if len(message.data) < 12:
        raise BadMessage(f"not a {message.type}: {len(message.data)} bytes")
    order = "<iI" if message.data[1] & 1 else ">iI"
    sec, nanosec = struct.unpack_from(order, message.data, 4)
    return sec * 1_000_000_000 + nanosec or message.log_time


class JointPositions:
    """Positions (A,) of raw JointState messages; one whose names are the last one's is not taken apart again."""

    def __init__(self, bag: Bag, names: tuple[str, ...]):
        self._bag, self._names = bag, names
        self._prefix, self._offset, self._length = b"", 0, -1
        self._index = np.zeros(0, int)
        self.seen: tuple[str, ...] = ()

    def __call__(self, message: Message) -> np.ndarray:
        """Positions in the order of the names.

        Raises:
            BadMessage, DecodeError: unreadable, or a joint is missing.
        """
        data = message.data
        if len(data) == self._length and data[12 : self._offset] == self._prefix:
            positions = np.frombuffer(data, "<f8", len(self.seen), self._offset)
            return positions[self._index]
        msg = self._bag.deserialize(message)
        values = joint_values(msg, self._names, "position")
        self._remember(message.data, list(msg.name), np.asarray(msg.position))
        return values

    def _remember(self, data: bytes | memoryview, names: list[str], positions: np.ndarray) -> None:
        """Where the positions begin: after the names, a count, and padding to eight bytes (XCDR1, little endian)."""
        self.seen, self._length = tuple(names), -1
        if bytes(data[:4]) != b"\x00\x01\x00\x00":
            return
        (frame,) = struct.unpack_from("<I", data, 12)
        at = 16 + frame
        at += -at % 4 + 4
        for name in names:
            at += -at % 4 + 4 + len(name.encode()) + 1
        at += -at % 4 + 4
        at += -(at - 4) % 8
        found = (
            np.frombuffer(data, "<f8", len(positions), at)
            if at + 8 * len(positions) <= len(data)
            else None
        )
        if found is not None and np.array_equal(found, positions):
            self._prefix, self._offset, self._length = bytes(data[12:at]), at, len(data)
            self._index = np.array([names.index(name) for name in self._names])


def read_stages(msg, into: dict[str, Durations]) -> None:
    """Add the latencies (keys that end in `_ms`) of a record that the policy node published."""
    for status in msg.status:
        for pair in status.values:
            if pair.key.endswith("_ms"):
                with contextlib.suppress(ValueError):
                    into.setdefault(pair.key[:-3], Durations()).add(float(pair.value) / 1e3)


class _Given:
    """In the place of the scheduler: inferences at stamps that are given."""

    def __init__(self, stamps: Iterable[int]):
        self._stamps = sorted(stamps)

    def due(self, stamp: int) -> bool:
        k = bisect.bisect_left(self._stamps, stamp)
        return k < len(self._stamps) and self._stamps[k] == stamp

    def next(self, stamp: int) -> int:
        k = bisect.bisect_right(self._stamps, stamp)
        return self._stamps[k] if k < len(self._stamps) else 1 << 62

    def started(self, stamp: int) -> None:
        pass

    def reset(self) -> None:
        pass


class _Reader:
    """State of the pass. Times are those of message headers; a command counts from the newest header before it."""

    def __init__(self, bag, spec, robot, truth_kind, truth_topic, sink, stamps):
        self.bag, self.spec, self.robot, self.sink = bag, spec, robot, sink
        self.problems = bag.problems
        fields = topics_of(spec, robot.topics)
        needed = {
            topic: tuple(dict.fromkeys(t for f in own for t in FIELD_TYPES[f.kind]))
            for topic, own in fields.items()
        }
        joints = robot.topics.joint_states
        needed[joints] = FIELD_TYPES["joint_position"]
        measured = ObservationField(MEASURED, "joint_position", spec.joint_names, "")
        fields.setdefault(joints, []).append(measured)
        self.streams = Streams(fields, max_age_s=GAP_S)
        self.given = None if stamps is None else _Given(stamps)
        self.scheduler = self.given or ChunkScheduler(spec)
        self.period = int(spec.execute_horizon * spec.control_dt * 1e9)
        self.velocity_limit = robot.limit_array(spec.joint_names, "velocity")
        self.positions = JointPositions(bag, spec.joint_names)
        self.facts = {topic: StreamFacts() for topic in fields}
        self.waiting: dict[str, tuple[int, Message]] = {}
        self.next_due: int | None = None
        self.now = 0
        self.last_joints: tuple[int, np.ndarray] | None = None
        self.segment = 0
        self.begin = 0  # of the segment
        self.jumped = False
        self.names: tuple[str, ...] = ()
        self.names_count = 0
        self.handlers = {topic: self._observation for topic in fields}
        self.handlers[joints] = self._joints
        self._choose_truth(truth_kind, truth_topic, needed)
        self.handlers |= {LATENCY_TOPIC: self._latency, INFERENCE_TOPIC: self._stages}
        check_topics(bag, needed)
        self.pending = Pending(self._store)
        self.rows: list[tuple[int, int]] = []
        self.kept: dict[str, list[np.ndarray]] = {
            f.name: [] for f in (*spec.observations, measured) if f.kind != "image"
        }
        self.truths: list[np.ndarray] = []
        self.befores: list[np.ndarray] = []
        self.latencies: list[tuple[float, float]] = []  # when, and how long, s
        self.stages: dict[str, Durations] = {}
        self.skew = Durations()

    def _choose_truth(self, kind: str, topic: str, needed: dict) -> None:
        self.truth_kind = kind
        if kind == "command":
            self.truth = CommandTruth(self.spec.joint_names)
            topic = topic or self.robot.topics.command
            needed[topic] = COMMAND_TYPES
            self.handlers[topic] = self._command
            if self.robot.topics.gripper_command:  # a controller of its own
                needed[self.robot.topics.gripper_command] = COMMAND_TYPES
                self.handlers[self.robot.topics.gripper_command] = self._command
        elif kind == "controller":
            self.truth = SampledTruth(GAP_S)
            topic = topic or self.robot.topics.controller_state
            if not topic:
                raise InputError(
                    "ground truth 'controller' needs the topic of the controller state: --truth-topic"
                )
            needed[topic] = (
                "control_msgs/msg/JointTrajectoryControllerState",
                "sensor_msgs/msg/JointState",
            )
            self.handlers[topic] = self._controller
        elif kind == "state":
            self.truth = SampledTruth(GAP_S)
        else:
            raise InputError(f"unknown ground truth '{kind}'; valid: command, controller, state")
        if kind != "state" and topic in (self.robot.topics.joint_states,):
            raise InputError(f"topic {topic} cannot be both the joint states and the ground truth")
        self.truth_topic = topic

    # --- the pass ---

    def read(self) -> Recording:
        """All of it."""
        for message in self.bag.messages(self.handlers):
            try:
                self.handlers[message.topic](message)
            except (BadMessage, DecodeError, TrajectoryRejected) as error:
                self.problems.add(message.topic, str(error), self.now or message.log_time)
                if message.topic in self.facts:
                    self.facts[message.topic].bad += 1
        return self._finish()

    def _arrived(self, message: Message) -> int:
        """Take note of a message on an observation topic; its stamp."""
        facts = self.facts[message.topic]
        facts.type = message.type
        facts.count += 1
        stamp = header_stamp(message)
        if facts.last is None:
            facts.first = stamp
        elif stamp < facts.last:
            facts.backward += 1
            self.problems.add(message.topic, "stamp goes back", facts.last)
        else:
            facts.periods.add((stamp - facts.last) / 1e9, stamp / 1e9)
        facts.delays.add(max(0.0, (message.log_time - stamp) / 1e9), stamp / 1e9)
        facts.last = stamp
        self.now = max(self.now, stamp) if stamp > self.now - 1e9 else stamp
        return stamp

    def _observation(self, message: Message) -> None:
        """A pose or an image. Kept raw while nothing is due, because a newer one may replace it."""
        stamp = self._arrived(message)
        before = self.waiting.get(message.topic)
        if message.type.endswith("Image"):
            self._look_at(message)
        elif not math.isfinite(
            sum(struct.unpack_from("<7d", message.data, len(message.data) - 56))
        ):
            raise DecodeError("pose has numbers that are not finite")
        if self.next_due is None or stamp > self.next_due or (before and stamp < before[0]):
            self._deliver(message.topic)
            self._push(message.topic, stamp, message)
            self._try(stamp)
        else:
            self.waiting[message.topic] = (stamp, message)

    def _look_at(self, message: Message) -> None:
        """Size and encoding of an image, without touching its pixels."""
        msg = self.bag.deserialize(message)
        if hasattr(msg, "encoding"):
            self.facts[message.topic].shapes[f"{msg.height}x{msg.width} {msg.encoding}"] += 1
            image(msg)
        else:
            self.facts[message.topic].shapes[str(msg.format)] += 1
            if not len(msg.data):
                raise DecodeError("compressed image of 0 bytes")

    def _joints(self, message: Message) -> None:
        stamp = self._arrived(message)
        here = self.positions(message)
        self._count_names(message.topic)
        if self.last_joints is None:
            self.begin = stamp
            if not np.isfinite(here).all():
                raise DecodeError("joint position is not a finite number")
        else:
            elapsed, far = (stamp - self.last_joints[0]) / 1e9, False
            moved = np.abs(here - self.last_joints[1])
            if not moved.max() <= JUMP_MARGIN:  # a finer look; also where something is not a number
                if not np.isfinite(here).all():
                    raise DecodeError("joint position is not a finite number")
                reach = self.velocity_limit * max(elapsed, 0) * 1.5 + JUMP_MARGIN
                far = bool((moved > reach).any())
            # One jump: the robot was put elsewhere. Jump after jump: another unit or bad limits, see `wiring`.
            if not 0 <= elapsed <= GAP_S or (far and not self.jumped):
                self._new_segment(stamp)
            self.jumped = far
        self.last_joints = (stamp, here)
        if self.truth_kind == "state":
            self.truth.push(stamp / 1e9, here)
            self.pending.resolve(stamp / 1e9, self.truth.at)
        if self.next_due is None or stamp > self.next_due:
            self._deliver(message.topic)
            self._push(message.topic, stamp, message)
            self._try(stamp)
        else:
            self.waiting[message.topic] = (stamp, message)

    def _count_names(self, topic: str) -> None:
        if self.positions.seen is self.names:
            self.names_count += 1
            return
        self._flush_names(topic)
        self.names, self.names_count = self.positions.seen, 1

    def _flush_names(self, topic: str) -> None:
        if self.names_count:
            self.facts[topic].shapes[self.names] += self.names_count
            self.names_count = 0

    def _new_segment(self, stamp: int) -> None:
        self.segment += 1
        self.begin = stamp
        if self.truth_kind == "command":
            self.pending.resolve(self.last_joints[0] / 1e9, self.truth.at)
        self.pending.drop()
        self.truth.reset()
        self.scheduler.reset()
        self.streams.clear()
        self.waiting.clear()
        self.next_due = None

    def _deliver(self, topic: str) -> None:
        """Push what waits on a topic."""
        if topic in self.waiting:
            stamp, message = self.waiting.pop(topic)
            self._push(topic, stamp, message)

    def _push(self, topic: str, stamp: int, message: Message) -> None:
        try:
            self.streams.push(topic, stamp, self.bag.deserialize(message))
        except BadMessage as error:
            self.problems.add(topic, str(error), stamp)
            self.facts[topic].bad += 1

    def _try(self, stamp: int) -> None:
        """Infer where the live node would."""
        if self.next_due is not None:
            if stamp < self.next_due:
                return
            for topic in list(self.waiting):
                self._deliver(topic)
        try:
            snapshot = self.streams.snapshot(stamp)
        except NotReady as error:
            if stamp - self.begin > GAP_S * 1e9:  # before that, streams are still starting
                self.problems.add("observation", f"not complete: {error}", stamp)
            return
        if not self.scheduler.due(snapshot.stamp):
            return
        self.scheduler.started(snapshot.stamp)
        later = self.given.next(snapshot.stamp) if self.given else snapshot.stamp + self.period
        self.next_due = later
        self._infer(snapshot.stamp, snapshot.obs)

    def _infer(self, stamp: int, obs: Mapping[str, np.ndarray]) -> None:
        row, at, spec = len(self.rows), stamp / 1e9, self.spec
        self.rows.append((stamp, self.segment))
        for name, values in self.kept.items():
            values.append(np.asarray(obs[name], np.float32 if name != MEASURED else np.float64))
        self.truths.append(np.full((spec.action_horizon, spec.num_joints), np.nan, np.float32))
        now = self.truth.at(at)
        self.befores.append(np.full(spec.num_joints, np.nan) if now is None else np.array(now))
        self.pending.add(row, at + (np.arange(spec.action_horizon) + 1) * spec.control_dt)
        stamps = [f.last for f in self.facts.values() if f.last is not None]
        self.skew.add((max(stamps) - min(stamps)) / 1e9, at)
        if self.sink is not None:
            fields = {f.name: obs[f.name] for f in spec.observations}
            self.sink(Inference(row, stamp, self.segment, fields, obs[MEASURED]))

    def _store(self, row: int, step: int, values: np.ndarray) -> None:
        self.truths[row][step] = values

    # --- commands and what else the bag tells ---

    def _command(self, message: Message) -> None:
        if self.last_joints is None:
            raise DecodeError("command before the first joint state")
        msg, now = self.bag.deserialize(message), self.now / 1e9
        self.pending.resolve(now, self.truth.at)
        self.truth.push(msg, now, self.last_joints[1])

    def _controller(self, message: Message) -> None:
        values = controller_reference(self.bag.deserialize(message), self.spec.joint_names)
        at = header_stamp(message) / 1e9
        self.truth.push(at, values)
        self.pending.resolve(at, self.truth.at)

    def _latency(self, message: Message) -> None:
        now = self.now / 1e9 if self.now else math.nan
        self.latencies.append((now, float(self.bag.deserialize(message).data)))

    def _stages(self, message: Message) -> None:
        read_stages(self.bag.deserialize(message), self.stages)

    def _finish(self) -> Recording:
        self._flush_names(self.robot.topics.joint_states)
        if self.last_joints is not None and self.truth_kind == "command":
            self.pending.resolve(self.last_joints[0] / 1e9, self.truth.at)
        spec, n = self.spec, len(self.rows)
        stamps = [(f.first, f.last) for f in self.facts.values() if f.last is not None]
        duration = (max(s[1] for s in stamps) - min(s[0] for s in stamps)) / 1e9 if stamps else 0.0
        obs = {name: np.array(values) for name, values in self.kept.items()}
        measured = obs.pop(MEASURED)
        return Recording(
            obs=obs,
            stamps=[stamp for stamp, _ in self.rows],
            times=np.array([stamp / 1e9 for stamp, _ in self.rows]),
            segment=np.array([s for _, s in self.rows], int),
            measured=measured.reshape(n, spec.num_joints),
            before=np.array(self.befores).reshape(n, spec.num_joints),
            truth=np.array(self.truths, float).reshape(n, spec.action_horizon, spec.num_joints),
            truth_kind=self.truth_kind,
            latencies_s=np.array([seconds for _, seconds in self.latencies]),
            latency_times=np.array([at for at, _ in self.latencies]),
            stages=self.stages,
            skew=self.skew,
            streams=self.facts,
            duration=duration,
            problems=self.problems,
        )

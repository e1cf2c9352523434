"""One pass over a bag: the observations at which the live node would have inferred, what was commanded, what was wrong.

The same `Streams` and `ChunkScheduler` as in the node decide what an observation is and when one is due. A
message that a newer one replaces before the next inference is due cannot be in any observation: it is checked,
but images are not unpacked for nothing. Images go to `sink` and are not kept: memory grows by a few kilobytes
per inference, whatever the length of the bag.
"""

import bisect
import math
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from flow_policy_rl.data.bags import BadMessage, Bag, Message
from flow_policy_rl.data.problems import Problems
from flow_policy_rl.errors import InputError
from flow_policy_rl.offline.durations import Durations, StreamFacts, read_stages
from flow_policy_rl.offline.raw_messages import JointPositions, header_stamp
from flow_policy_rl.offline.truth import (
    GAP_S,
    Pending,
    choose,
    controller_reference,
    refuse_unfollowed,
)
from flow_policy_rl.serving.chunk_scheduler import ChunkScheduler
from flow_policy_rl.serving.decode import DecodeError, image
from flow_policy_rl.serving.robot import Robot
from flow_policy_rl.serving.streams import MEASURED, NotReady, Streams, with_measured
from flow_policy_rl.serving.trajectory_controller import TrajectoryRejected
from flow_policy_rl.spec import PolicySpec

JUMP_MARGIN = 0.05  # rad or m beyond what the velocity limits allow: the robot was put elsewhere
POSE_BYTES = 56  # at the end of a message: seven numbers
LATENCY_TOPIC = "/sim_node/end_to_end_latency"
INFERENCE_TOPIC = "/policy_node/inference"
STAMPED = (
    "sensor_msgs/msg/JointState",
    "sensor_msgs/msg/Image",
    "sensor_msgs/msg/CompressedImage",
    "geometry_msgs/msg/PoseStamped",
)
FIELD_TYPES = {
    "joint_position": ("sensor_msgs/msg/JointState",),
    "joint_velocity": ("sensor_msgs/msg/JointState",),
    "pose": ("geometry_msgs/msg/PoseStamped",),
    "image": ("sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage"),
}


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
        InputError: topics that the policy needs are not in the bag, or are of another type; most commands were refused.
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
        fields = with_measured(spec, robot.topics)
        needed = {
            topic: tuple(dict.fromkeys(t for f in own for t in FIELD_TYPES[f.kind]))
            for topic, own in fields.items()
        }
        joints = robot.topics.joint_states
        needed[joints] = FIELD_TYPES["joint_position"]
        self.streams = Streams(fields, max_age_s=GAP_S)
        self.given = None if stamps is None else _Given(stamps)
        self.scheduler = self.given or ChunkScheduler(spec)
        self.period = int(spec.execute_horizon * spec.control_dt * 1e9)
        self.velocity_limit = robot.limit_array(spec.joint_names, "velocity")
        read = [name for f in fields[joints] for name in f.elements]
        self.positions = JointPositions(bag, spec.joint_names, GAP_S, read)
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
        numbers = (f.name for f in spec.observations if f.kind != "image")
        self.kept: dict[str, list[np.ndarray]] = {name: [] for name in (*numbers, MEASURED)}
        self.truths: list[np.ndarray] = []
        self.befores: list[np.ndarray] = []
        self.latencies: list[tuple[float, float]] = []  # when, and how long, s
        self.stages: dict[str, Durations] = {}
        self.skew = Durations()

    def _choose_truth(self, kind: str, topic: str, needed: dict) -> None:
        self.truth_kind = kind
        self.truth, sources = choose(kind, topic, self.robot, self.spec.joint_names)
        needed |= sources
        self.handlers |= dict.fromkeys(sources, getattr(self, f"_{kind}", None))
        self.truth_topics = tuple(sources)

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
            self._resolve()
        return self._finish()

    def _arrived(self, message: Message, stamp: int | None = None) -> int:
        """Take note of a message on an observation topic; its stamp, unless it is given."""
        facts = self.facts[message.topic]
        facts.type = message.type
        facts.count += 1
        stamp = header_stamp(message) if stamp is None else stamp
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
        elif len(message.data) < POSE_BYTES:
            raise BadMessage(f"not a {message.type}: {len(message.data)} bytes")
        elif not math.isfinite(sum(struct.unpack("<7d", message.data[-POSE_BYTES:]))):
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
        if self.last_joints is not None and not self.positions.concern(message):
            return  # of something else on the same topic
        try:
            here = self.positions(message)
        finally:
            stamp = self._arrived(message, self.positions.stamp)
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
        if self.next_due is None or stamp > self.next_due or self.positions.part is not None:
            self._deliver(message.topic)
            self._push(message.topic, header_stamp(message), message)
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
        self._resolve(self.last_joints[0])
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

    def _resolve(self, until: int | None = None) -> None:
        """Take note of what is known of the truth by now, or was by a time (ns)."""
        now = (self.now if until is None else until) / 1e9
        self.pending.resolve(self.truth.known_until(now), self.truth.at)

    def _store(self, row: int, step: int, values: np.ndarray) -> None:
        self.truths[row][step] = values

    # --- commands and what else the bag tells ---

    def _command(self, message: Message) -> None:
        if self.last_joints is None:
            raise DecodeError("command before the first joint state")
        msg, here = self.bag.deserialize(message), self.last_joints[1]
        self.truth.push(msg, self.now / 1e9, here, message.topic)

    def _controller(self, message: Message) -> None:
        values = controller_reference(self.bag.deserialize(message), self.spec.joint_names)
        self.truth.push(header_stamp(message) / 1e9, values)

    def _latency(self, message: Message) -> None:
        now = self.now / 1e9 if self.now else math.nan
        seconds = float(self.bag.deserialize(message).data)
        if not math.isfinite(seconds):
            raise DecodeError("latency is not a finite number")
        self.latencies.append((now, seconds))

    def _stages(self, message: Message) -> None:
        read_stages(self.bag.deserialize(message), self.stages)

    def _finish(self) -> Recording:
        self._flush_names(self.robot.topics.joint_states)
        refuse_unfollowed(self.truth, self.bag, self.truth_topics, "--ground-truth")
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

"""Input streams sampled as of one reference time, with a limit on age. Missing or stale input is never made up."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from flow_policy_rl.errors import InputError
from flow_policy_rl.serving.decode import DecodeError, decode
from flow_policy_rl.serving.joint_states import JointStates, Whole
from flow_policy_rl.serving.robot import Topics
from flow_policy_rl.spec import ObservationField, PolicySpec

KEPT = 256  # samples per stream: more than two seconds at 100 Hz
KEPT_IMAGES = 32
OTHER_CLOCK_S = 3600.0  # an age beyond this is no delay but another clock
MEASURED = "measured_joint_pos"
JOINT_KINDS = ("joint_position", "joint_velocity")


class NotReady(Exception):
    """No usable observation now. The text names the stream and what is wrong with it."""


@dataclass(frozen=True)
class Snapshot:
    """One observation: values by field (size,), the time (ns) as of which they were sampled, and the stamp (ns) of
    the message of each topic."""

    obs: dict[str, np.ndarray]
    stamp: int
    stamps: dict[str, int]


def topics_of(spec: PolicySpec, topics: Topics) -> dict[str, list[ObservationField]]:
    """Which fields of the policy come from which topic.

    Raises:
        InputError: the robot has no topic for a pose or an image that the policy needs.
    """
    result: dict[str, list[ObservationField]] = {}
    for f in spec.observations:
        if f.kind in JOINT_KINDS:
            topic = topics.joint_states
        else:
            known = topics.poses if f.kind == "pose" else topics.images
            if f.source not in known:
                raise InputError(
                    f"observation '{f.name}' needs the {f.kind} of '{f.source}'; the robot file has "
                    f"{', '.join(known) or 'none'}"
                )
            topic = known[f.source]
        result.setdefault(topic, []).append(f)
    return result


def with_measured(spec: PolicySpec, topics: Topics) -> dict[str, list[ObservationField]]:
    """`topics_of`, and from the joint states `MEASURED`: where the commanded joints are."""
    fields = topics_of(spec, topics)
    measured = ObservationField(MEASURED, "joint_position", spec.joint_names, "")
    fields.setdefault(topics.joint_states, []).append(measured)
    return fields


class Sample(NamedTuple):
    """One message, decoded: its stamp (ns), values by field, and of joint states what they were put together from."""

    stamp: int
    values: Mapping[str, np.ndarray]
    whole: Whole | None


class Streams:
    """The newest samples of each topic a policy reads. Joint states may come from several publishers: each joint is
    what was last said about it, and has an age of its own."""

    def __init__(self, fields: Mapping[str, Sequence[ObservationField]], max_age_s: float):
        self.fields = fields
        self.max_age = int(max_age_s * 1e9)
        self._samples: dict[str, deque[Sample]] = {
            topic: deque(maxlen=KEPT_IMAGES if any(f.kind == "image" for f in wanted) else KEPT)
            for topic, wanted in fields.items()
        }
        self._joints = {
            topic: JointStates(list(dict.fromkeys(name for f in wanted for name in f.elements)))
            for topic, wanted in fields.items()
            if all(f.kind in JOINT_KINDS for f in wanted)
        }
        self._problem: dict[str, str] = {}
        # By topic: why what comes there is not to be used; empty when it is.
        self.doubts: dict[str, str] = {}
        self.used = dict.fromkeys(fields, 0)  # messages that went into an observation
        self._last_used: dict[str, int] = {}

    def push(self, topic: str, stamp: int, msg) -> None:
        """Decode a message and keep it. One that cannot be decoded makes its stream not ready until the next good one.

        A stamp far behind the last one (a clock that jumped back, a bag that started again) empties all streams; one a
        little behind is a message that came out of order, and is dropped, and so is a joint state of other joints.
        """
        samples, joints = self._samples[topic], self._joints.get(topic)
        last = samples[-1].stamp if samples else None
        if joints is not None:
            last = joints.last(msg)
        if last is not None and last - stamp > self.max_age:
            self.clear()
        try:
            whole = None
            if joints is not None:
                whole = joints.put(stamp, msg)
                if whole is None:
                    return
                stamp, msg = whole.stamp, whole.msg
            elif samples and stamp < samples[-1].stamp:
                return
            values = {f.name: decode(f, msg) for f in self.fields[topic]}
        except DecodeError as error:
            self._problem[topic] = str(error)
            return
        self._problem.pop(topic, None)
        samples.append(Sample(stamp, values, whole))

    @property
    def reference(self) -> int | None:
        """The newest time that every stream has reached; None while one is empty."""
        newest = [samples[-1].stamp for samples in self._samples.values() if samples]
        return min(newest) if len(newest) == len(self._samples) else None

    def ages(self, now: int) -> dict[str, float]:
        """Age (s) of the newest message by topic; nan where there is none."""
        return {
            topic: (now - samples[-1].stamp) / 1e9 if samples else float("nan")
            for topic, samples in self._samples.items()
        }

    def clear(self) -> None:
        """Forget everything."""
        for samples in self._samples.values():
            samples.clear()
        for joints in self._joints.values():
            joints.clear()

    def snapshot(self, now: int) -> Snapshot:
        """The observation as of the newest time that every stream has reached.

        Raises:
            NotReady: a stream is missing or broken, or what would be taken of it is older than the limit.
        """
        for doubt in filter(None, self.doubts.values()):
            raise NotReady(doubt)
        limit = f"limit {self.max_age / 1e9:.3f} s"
        for topic, problem in self._problem.items():
            raise NotReady(f"{topic}: {problem}")
        for topic, samples in self._samples.items():
            if not samples:
                raise NotReady(f"{topic}: no message yet")
            age = now - samples[-1].stamp
            if age > self.max_age:
                why = (
                    ": another clock? play bags with --clock and use_sim_time"
                    if age > OTHER_CLOCK_S * 1e9
                    else ""
                )
                raise NotReady(f"{topic}: newest message is {age / 1e9:.3f} s old, {limit}{why}")
            if -age > self.max_age:
                why = (
                    "another clock? use_sim_time is set beside real time, or nobody publishes /clock"
                    if -age > OTHER_CLOCK_S * 1e9
                    else "do the clocks agree?"
                )
                raise NotReady(
                    f"{topic}: newest message is stamped {-age / 1e9:.3f} s in the future: {why}"
                )
        reference = min(samples[-1].stamp for samples in self._samples.values())
        taken: dict[str, Sample] = {}
        for topic, samples in self._samples.items():
            sample = next((s for s in reversed(samples) if s.stamp <= reference), None)
            if sample is None:
                raise NotReady(f"{topic}: no message as old as the other streams yet")
            age = now - sample.stamp
            if age > self.max_age:  # its stream has younger ones, which the others have not reached
                raise NotReady(
                    f"{topic}: the message in time for the other streams is {age / 1e9:.3f} s old, {limit}"
                )
            try:
                if sample.whole is not None:
                    sample.whole.refuse_old(now - self.max_age)
            except DecodeError as error:
                raise NotReady(f"{topic}: {error} ({limit})") from None
            taken[topic] = sample
        obs = {name: value for sample in taken.values() for name, value in sample.values.items()}
        return Snapshot(obs, reference, {topic: sample.stamp for topic, sample in taken.items()})

    def take(self, now: int) -> Snapshot:
        """A snapshot that is used: its messages are counted, each once."""
        snapshot = self.snapshot(now)
        for topic, stamp in snapshot.stamps.items():
            self.used[topic] += self._last_used.get(topic) != stamp
            self._last_used[topic] = stamp
        return snapshot

"""A bag as episodes of frames at a stated rate: every stream as of the same time, and the action that followed.

Frame t holds the newest sample of each stream that is not later than t; the action is the ground truth one control
step later, as in simulation. A stream that is older than the tolerance ends the episode: nothing is made up.
Memory does not grow with the length of the bag.
"""

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flow_policy_rl.data.bags import BadMessage, Bag, Message
from flow_policy_rl.data.robomimic import DemoLayout
from flow_policy_rl.errors import InputError
from flow_policy_rl.offline.raw_messages import JointPositions, header_stamp
from flow_policy_rl.offline.recording import (
    FIELD_TYPES,
    JUMP_MARGIN,
    check_topics,
)
from flow_policy_rl.offline.truth import GAP_S, KEPT_S, choose, controller_reference
from flow_policy_rl.serving.decode import POSE_ELEMENTS, DecodeError, decode, rgb
from flow_policy_rl.serving.robot import Robot
from flow_policy_rl.serving.streams import topics_of
from flow_policy_rl.serving.trajectory_controller import TrajectoryRejected
from flow_policy_rl.spec import ObservationField, PolicySpec

SAME_CALL_S = 0.1  # the two request events of one service call are closer than this
REQUESTS = (0, 1)  # event types of service introspection: request sent, request received


@dataclass(frozen=True)
class Splitting:
    """Where episodes begin and end. A gap, a jump of the robot, or a stale stream always ends one.

    Attributes:
        end_topic: a message ends the episode; a Bool says whether it was a success. With it, only episodes that
            such a message ended are kept.
        start_topic: an episode begins with a message here, and not before.
        start_service: the same for calls of a service (its `_service_event` topic must be in the bag).
        only_success: keep only episodes whose end message was true.
        min_steps: shorter episodes are left out.
    """

    end_topic: str = ""
    start_topic: str = ""
    start_service: str = ""
    only_success: bool = False
    min_steps: int = 10


@dataclass(frozen=True)
class Frame:
    """One step: time (s), observation by field, action (A,), and which cameras show the picture of the step before."""

    time: float
    obs: dict[str, np.ndarray]
    action: np.ndarray
    repeated: tuple[str, ...]


@dataclass(frozen=True)
class End:
    """The episode ended: why, whether to keep it, and whether it was a success (None: not said)."""

    time: float
    reason: str
    steps: int
    keep: bool
    success: bool | None


@dataclass
class FrameFacts:
    """Counted on the way: frames without action, stale streams by topic, episodes by how they ended."""

    without_action: int = 0
    stale: Counter = field(default_factory=Counter)
    repeated: Counter = field(default_factory=Counter)
    ends: Counter = field(default_factory=Counter)
    discarded: Counter = field(default_factory=Counter)
    messages: Counter = field(default_factory=Counter)
    used: Counter = field(default_factory=Counter)


class FrameReader:
    """Reads a bag once.

    Args:
        max_age: s; an older sample is stale.
        truth_kind, truth_topic: where actions come from, as in replay.

    Raises:
        InputError: topics are missing or of another type.
    """

    def __init__(
        self,
        bag: Bag,
        layout: DemoLayout,
        robot: Robot,
        splitting: Splitting,
        truth_kind: str = "command",
        truth_topic: str = "",
        max_age: float = 0.2,
    ):
        self.bag, self.layout, self.robot, self.splitting = bag, layout, robot, splitting
        self.problems, self.facts = bag.problems, FrameFacts()
        self.step, self.max_age = round(layout.control_dt * 1e9), round(max_age * 1e9)
        # A frame waits so long (ns) for its slowest stream.
        self.kept = round(KEPT_S * 1e9) + self.max_age
        self.fields = topics_of(_spec_of(layout), robot.topics)
        self.joints = robot.topics.joint_states
        needed = {
            topic: tuple(dict.fromkeys(t for f in own for t in FIELD_TYPES[f.kind]))
            for topic, own in self.fields.items()
        }
        needed[self.joints] = FIELD_TYPES["joint_position"]
        read = [name for f in self.fields.get(self.joints, ()) for name in f.elements]
        self.positions = JointPositions(bag, layout.joint_names, max_age, read)
        self.velocity_limit = robot.limit_array(layout.joint_names, "velocity")
        self.handlers = {topic: self._sample for topic in self.fields}
        self.handlers[self.joints] = self._joint_state
        self._choose_truth(truth_kind, truth_topic, needed)
        self._choose_marks(needed)
        check_topics(bag, needed)
        self.samples: dict[str, deque] = {topic: deque() for topic in self.fields}
        self.newest: dict[str, int] = {}
        self.pictures: dict[str, tuple[int, dict[str, np.ndarray]]] = {}
        self.waiting: deque[tuple[int, dict, tuple[str, ...]]] = deque()
        self.out: list[Frame | End] = []
        self.next: int | None = None  # time of the next frame
        self.not_before = 0
        self.running = not (splitting.start_topic or splitting.start_service)
        self.steps = 0
        self.now = 0
        self.last_joints: tuple[int, np.ndarray] | None = None
        self.jumped = False
        self.last_mark = -(10**18)

    def _choose_truth(self, kind: str, topic: str, needed: dict) -> None:
        self.truth_kind = kind
        joints = self.layout.joint_names
        self.truth, sources = choose(kind, topic, self.robot, joints, self.kept / 1e9)
        needed |= sources
        self.handlers |= dict.fromkeys(sources, getattr(self, f"_{kind}", None))
        self.truth_topics = tuple(sources) or (topic or self.joints,)

    def _choose_marks(self, needed: dict) -> None:
        there = self.bag.topics()
        marks = {
            self.splitting.end_topic: self._end_mark,
            self.splitting.start_topic: self._start_mark,
        }
        if self.splitting.start_service:
            marks[self.splitting.start_service.rstrip("/") + "/_service_event"] = self._service_mark
        for topic, handler in marks.items():
            if topic:
                needed[topic] = (there.get(topic, "any type"),)
                self.handlers[topic] = handler

    def read(self) -> Iterator[Frame | End]:
        """Frames of an episode, then its End, and so on."""
        for message in self.bag.messages(self.handlers):
            self.facts.messages[message.topic] += 1
            try:
                self.handlers[message.topic](message)
            except (BadMessage, DecodeError, TrajectoryRejected) as error:
                self.problems.add(message.topic, str(error), self.now or message.log_time)
            self._advance()
            self._resolve()
            yield from self.out
            self.out.clear()
        late = self._without_action()
        self._end("no action" if late else "end of the bag", self.now)
        yield from self.out
        self.out.clear()

    # --- messages ---

    def _arrived(self, message: Message, stamp: int | None = None) -> int:
        stamp = header_stamp(message) if stamp is None else stamp
        if stamp < self.newest.get(message.topic, stamp):
            self.problems.add(message.topic, "stamp goes back", self.newest[message.topic])
            self._break("stamp goes back", stamp)
            self.now = stamp
        self.newest[message.topic] = stamp
        self.now = max(self.now, stamp)
        return stamp

    def _sample(self, message: Message) -> None:
        """Numbers are decoded at once, pictures when a frame takes them."""
        stamp = self._arrived(message)
        if message.type.endswith("Image"):
            self.samples[message.topic].append((stamp, message))
            return
        self._keep(message.topic, stamp, self.bag.deserialize(message))

    def _keep(self, topic: str, stamp: int, msg: Any) -> None:
        values = {f.name: decode(f, msg) for f in self.fields[topic]}
        self.samples[topic].append((stamp, values))

    def _joint_state(self, message: Message) -> None:
        if self.last_joints is not None and not self.positions.concern(message):
            return  # of something else on the same topic
        here = self.positions(message)
        if not np.isfinite(here).all():
            raise DecodeError("joint position is not a finite number")
        stamp = self.positions.stamp
        if self.last_joints is not None:
            elapsed = (stamp - self.last_joints[0]) / 1e9
            reach = self.velocity_limit * max(elapsed, 0) * 1.5 + JUMP_MARGIN
            far = bool((np.abs(here - self.last_joints[1]) > reach).any())
            if elapsed > GAP_S or (far and not self.jumped):
                self._break("gap" if elapsed > GAP_S else "jump", stamp)
            self.jumped = far
        self._arrived(message, stamp)
        if self.joints in self.fields:
            whole = self.positions.part or self.bag.deserialize(message)
            self._keep(self.joints, stamp, whole)
        self.last_joints = (stamp, here)
        if self.truth_kind == "state":
            self.truth.push(stamp / 1e9, here)

    def _command(self, message: Message) -> None:
        if self.last_joints is None:
            raise DecodeError("command before the first joint state")
        msg, here = self.bag.deserialize(message), self.last_joints[1]
        self.truth.push(msg, self.now / 1e9, here, message.topic)

    def _controller(self, message: Message) -> None:
        values = controller_reference(self.bag.deserialize(message), self.layout.joint_names)
        self.truth.push(header_stamp(message) / 1e9, values)

    # --- episodes ---

    def _start_mark(self, message: Message) -> None:
        self._resolve()
        self._end("next start", self.now)
        self.running = True

    def _service_mark(self, message: Message) -> None:
        if message.data[4] in REQUESTS and message.log_time - self.last_mark > SAME_CALL_S * 1e9:
            self.last_mark = message.log_time
            self._start_mark(message)

    def _end_mark(self, message: Message) -> None:
        msg = self.bag.deserialize(message)
        said = getattr(msg, "data", None)
        self._resolve()
        self._end("mark", self.now, bool(said) if isinstance(said, bool | np.bool_) else None)
        self.running = not (self.splitting.start_topic or self.splitting.start_service)

    def _break(self, reason: str, stamp: int) -> None:
        """Time or the robot jumped: nothing from before belongs to what follows."""
        self._resolve()
        self._end(reason, self.now)
        self.not_before = stamp
        self.truth.reset()
        for queue in self.samples.values():
            queue.clear()
        self.newest.clear()
        self.pictures.clear()
        self.last_joints = None

    def _without_action(self) -> int:
        """How many frames wait for an action that should have been heard of by now."""
        due = self.now - self.max_age - self.step
        return sum(time < due for time, _, _ in self.waiting)

    def _end(self, reason: str, at: int, success: bool | None = None) -> None:
        self.facts.without_action += self._without_action()
        self.waiting.clear()
        self.next, self.not_before = None, at
        if not self.steps:
            return
        why = ""
        if self.steps < self.splitting.min_steps:
            why = f"shorter than {self.splitting.min_steps} steps"
        elif self.splitting.end_topic and reason != "mark":
            why = f"no message on {self.splitting.end_topic} ended it ({reason})"
        elif self.splitting.only_success and not success:
            why = "not a success"
        self.facts.ends[reason] += 1
        if why:
            self.facts.discarded[why] += 1
        self.out.append(End(at / 1e9, reason, self.steps, not why, success))
        self.steps = 0

    # --- frames ---

    def _advance(self) -> None:
        if not self.running or not all(self.samples.values()):
            return self._forget()
        if self.next is None:
            begin = max(queue[0][0] for queue in self.samples.values())
            self.next = max(begin, self.not_before)
        while self.next is not None and self._ready(self.next):
            self._take(self.next)

    def _forget(self) -> None:
        """What is too old for a frame, while none is begun: a stream that is silent lets the others pile up."""
        for queue in self.samples.values():
            while len(queue) > 1 and queue[1][0] <= self.now - self.kept:
                queue.popleft()

    def _ready(self, time: int) -> bool:
        """Every stream has reached a time, or one of them is so late that it is stale."""
        slowest = min(self.newest[topic] for topic in self.samples)
        return slowest >= time or self.now - self.max_age > time

    def _take(self, time: int) -> None:
        obs, repeated = {}, []
        for topic, queue in self.samples.items():
            while len(queue) > 1 and queue[1][0] <= time:
                queue.popleft()
            if not queue or queue[0][0] > time or time - queue[0][0] > self.max_age:
                return self._stale(topic, time)
            stamp, content = queue[0]
            if isinstance(content, dict):
                obs |= content
                continue
            before = self.pictures.get(topic)
            if before is None or before[0] != stamp:
                try:
                    self._unpack(topic, stamp, content)
                except (BadMessage, DecodeError) as error:
                    self.problems.add(topic, str(error), stamp)
                    queue.popleft()
                    if before is None or time - before[0] > self.max_age:
                        return self._stale(topic, time)
                    queue.appendleft((before[0], content))
            if before is not None and self.pictures[topic][0] == before[0]:
                repeated.append(topic)
            obs |= self.pictures[topic][1]
        self.waiting.append((time, obs, tuple(repeated)))
        self.next = time + self.step

    def _unpack(self, topic: str, stamp: int, message: Message) -> None:
        msg = self.bag.deserialize(message)
        self.pictures[topic] = (stamp, {f.name: decode(f, msg) for f in self.fields[topic]})
        self.facts.used[topic] += 1

    def _stale(self, topic: str, time: int) -> None:
        self.facts.stale[topic] += 1
        self.problems.add(topic, "stale: episode ends, frames are left out", time)
        self._resolve()
        self._end(f"stale {topic}", time)
        for queue in self.samples.values():  # begin again when every stream has something new
            while queue and queue[0][0] <= time:
                queue.popleft()

    def _resolve(self) -> None:
        """Hand out the frames whose action is known by now."""
        known = self.truth.known_until(self.now / 1e9)
        while self.waiting and (due := (self.waiting[0][0] + self.step) / 1e9) <= known:
            time, obs, repeated = self.waiting.popleft()
            action = self.truth.at(due)
            if action is None:
                self.facts.without_action += 1
                if self.steps:
                    self._end("no action", time)
                    return
                continue
            for topic in repeated:
                self.facts.repeated[topic] += 1
            self.steps += 1
            self.out.append(Frame(time / 1e9, obs, np.array(action, float), repeated))


def _spec_of(layout: DemoLayout) -> PolicySpec:
    """Enough of a spec to look topics up."""
    count = len(layout.joint_names)
    return PolicySpec(
        task=layout.task,
        robot=layout.robot,
        joint_names=layout.joint_names,
        action_low=(-1.0,) * count,
        action_high=(1.0,) * count,
        observations=layout.observations,
        control_dt=layout.control_dt,
        action_horizon=1,
        execute_horizon=1,
    )


def layout_from_robot(
    bag: Bag, robot: Robot, task: str, control_dt: float, resolution: tuple[int, int] | None
) -> DemoLayout:
    """All that a robot file and a bag offer: joint positions and velocities, gripper, poses and cameras.

    Raises:
        InputError: a camera has no usable picture.
    """
    there = bag.topics()
    arm, gripper = tuple(robot.arm), tuple(robot.gripper)
    fields = [
        ObservationField("joint_pos", "joint_position", arm, "rad"),
        ObservationField("joint_vel", "joint_velocity", arm, "rad/s"),
    ]
    if gripper:
        fields.append(ObservationField("gripper_pos", "joint_position", gripper, "m"))
    for name, topic in robot.topics.poses.items():
        if topic in there:
            fields.append(ObservationField(f"{name}_pose", "pose", POSE_ELEMENTS, "m", name))
    for name, topic in robot.topics.images.items():
        if topic in there:
            size = resolution or picture_size(bag, topic)
            fields.append(ObservationField(f"{name}_image", "image", (), "", name, resolution=size))
    return DemoLayout(task, robot.name, (*arm, *gripper), control_dt, tuple(fields))


def picture_size(bag: Bag, topic: str) -> tuple[int, int]:
    """Height and width of the first usable picture of a topic, made even as films need it.

    Raises:
        InputError: there is none.
    """
    own = Bag(bag.path)
    for message in own.messages([topic]):
        try:
            height, width, _ = rgb(own.deserialize(message)).shape
        except (BadMessage, DecodeError):
            continue
        return height - height % 2, width - width % 2
    raise InputError(f"bag '{bag.path}': no usable picture on {topic}")

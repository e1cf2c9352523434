"""What the policy node tells about itself: one line of `/diagnostics`, and a record of every inference."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from rclpy.node import Node
from std_msgs.msg import Float64MultiArray
from trajectory_msgs.msg import JointTrajectory

from flow_policy_rl.serving.commander import Outcome
from flow_policy_rl.serving.monitor import Latencies
from flow_policy_rl.serving.safety import KINDS
from flow_policy_rl.serving.streams import Snapshot, Streams
from flow_policy_ros import messages
from flow_policy_ros.graph import Input
from flow_policy_ros.served import Served


@dataclass(frozen=True)
class Order:
    """An inference to make: the observation, for which run, when its last message came (steady ns), the ROS time (ns)
    then."""

    snapshot: Snapshot
    run: int
    received: int
    received_at: int
    decoded: int


@dataclass(frozen=True)
class Inference:
    """An inference that was made, and what became of it; moments in steady ns.

    Attributes:
        inputs, noise, chunk: what went into the graph and came out, (H, A).
        begin, done: of the inference itself.
        limited, published: when the plan was there, and when it was sent.
    """

    order: Order
    inputs: dict[str, np.ndarray]
    noise: np.ndarray
    chunk: np.ndarray
    outcome: Outcome
    begin: int
    done: int
    limited: int
    published: int

    def stages(self) -> dict[str, float]:
        """Latencies in ms."""
        order, inference = self.order, self.done - self.begin
        in_node = self.published - order.received
        age = order.received_at - order.snapshot.stamp
        stages = {
            "observation_age_ms": age,
            "decode_ms": order.decoded - order.received,
            "wait_ms": self.begin - order.decoded,
            "inference_ms": inference,
            "safety_ms": self.limited - self.done,
            "publish_ms": self.published - self.limited,
            "overhead_ms": in_node - inference,
            "end_to_end_ms": in_node + age,
        }
        return {name: ns / 1e6 for name, ns in stages.items()}


def arrival(topic: str, transport: int, decode: int) -> dict[str, float]:
    """Latencies (ms) of a frame: from its stamp until it is here, and then until it is decoded (ns)."""
    return {f"transport_ms of {topic}": transport / 1e6, f"decode_ms of {topic}": decode / 1e6}


class InferenceReport:
    """`~/inference`, `~/planned_chunk`, and on request `~/debug_inference`."""

    def __init__(self, node: Node):
        self._name = node.get_fully_qualified_name()
        self._records = node.create_publisher(DiagnosticArray, "~/inference", 50)
        self._chunks = node.create_publisher(JointTrajectory, "~/planned_chunk", 10)
        self._debug = node.create_publisher(Float64MultiArray, "~/debug_inference", 10)

    def publish(
        self, made: Inference, stages: dict, served: Served, command_sequence: int, debug: bool
    ) -> None:
        """Tell what was done, after it was done."""
        stamp, outcome = made.order.snapshot.stamp, made.outcome
        jump = outcome.targets.seam_jump
        record = {
            "observation_stamp": stamp,
            "command_sequence": command_sequence,
            **stages,
            "points": len(outcome.targets.due),
            "limited_actions": outcome.checked.num_changed,
            "beyond": ", ".join(outcome.checked.beyond),
            "seam_jump": float(np.abs(jump).max()) if jump is not None else 0.0,
            "joining": served.commander.scheduler.joining,
        }
        self._records.publish(
            messages.diagnostics(f"{self._name}: inference", DiagnosticStatus.OK, "", record, stamp)
        )
        spec = served.policy.spec
        times = (np.arange(len(made.chunk)) + 1) * spec.control_dt
        self._chunks.publish(
            messages.joint_trajectory(spec.joint_names, times, made.chunk, None, stamp)
        )
        if debug:
            arrays = {**made.inputs, "noise": made.noise, "action_chunk": made.chunk[None]}
            self._debug.publish(messages.debug_record(stamp, arrays))


class StatusReport:
    """The node's status in `/diagnostics`, by its full name, so that those of two arms are told apart.

    Attributes:
        state: level and text, together: two threads change them.
        counts: of what happened since the node started.
    """

    def __init__(self, node: Node):
        self._name, self._space = node.get_fully_qualified_name(), node.get_namespace()
        self._publisher = node.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self.state = DiagnosticStatus.WARN, "not configured"
        self.latencies = Latencies()
        self.counts = dict.fromkeys(
            ("commands", "deadline_misses", "limited_plans", "rejected_chunks"), 0
        )
        self._beyond = dict.fromkeys(KINDS, 0)

    def count(self, outcome: Outcome) -> None:
        """One more plan."""
        self.counts["limited_plans"] += bool(outcome.checked.num_changed)
        for kind in outcome.checked.beyond:
            self._beyond[kind] += 1

    def change(self, level: bytes, text: str) -> bool:
        """Whether this is something new."""
        before, self.state = self.state, (level, text)
        return before != self.state

    def publish(self, facts: dict[str, object], robot: str, stamp: int) -> None:
        """The state, facts (those of the moment first), counts and latencies."""
        values = facts | self.counts
        values |= {f"chunks beyond {kind}": n for kind, n in self._beyond.items()}
        values |= self.latencies.summary()
        hardware = f"{self._space.rstrip('/')}/{robot}"
        self._publisher.publish(
            messages.diagnostics(self._name, *self.state, values, stamp, hardware)
        )


class Reasons:
    """Which reasons to hold are news for the log: their numbers change with every message."""

    def __init__(self):
        self._kind, self._since = "", -math.inf

    def news(self, reason: str, now: float, begins: bool) -> bool:
        """Whether to log it: a hold begins, or goes on for another reason than was logged at least a second ago.

        Args:
            now: s, steady.
        """
        kind = re.sub(r"\b[\d.]+", "", reason)  # the digits of joint3 stay
        if not begins and (kind == self._kind or now - self._since < 1.0):
            return False
        self._kind, self._since = kind, now
        return True


def input_facts(inputs: Iterable[Input], streams: Streams, now: int) -> dict[str, object]:
    """Age, QoS and messages of every input."""
    facts: dict[str, object] = {
        f"age of {topic}": f"{age:.3f} s" for topic, age in streams.ages(now).items()
    }
    for one in inputs:
        facts |= {
            f"qos of {one.topic}": one.mismatch or "fits",
            f"received of {one.topic}": one.arrivals.received,
            f"lost of {one.topic}": one.arrivals.lost,
            f"used of {one.topic}": streams.used[one.topic],
        }
    return facts

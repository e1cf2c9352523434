"""Joint states of one robot from several publishers: an arm and its gripper may have a driver each."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from flow_policy_rl.serving.decode import joint_index, joints_missing


class _Said(NamedTuple):
    """Of one joint: when (stamp, ns), and what; nan where it was not."""

    stamp: int
    position: float
    velocity: float


@dataclass(frozen=True)
class JointState:
    """Shaped like the message, of all joints: (J,) each. What was not said is nan, which `decode` refuses."""

    name: Sequence[str]
    position: np.ndarray
    velocity: np.ndarray


@dataclass(frozen=True)
class Whole:
    """A state of all joints.

    Attributes:
        stamp: of the newest message that is in it, ns.
        msg: a JointState, or shaped like one.
        parts: stamp (ns) of every joint, where it was put together from several messages; else empty.
        there: names in the message that came last.
    """

    stamp: int
    msg: Any
    parts: Mapping[str, int] = field(default_factory=dict)
    there: Sequence[str] = ()

    def refuse_old(self, oldest: int) -> None:
        """
        Raises:
            DecodeError: a joint was last heard of before a stamp (ns).
        """
        if old := [name for name, stamp in self.parts.items() if stamp < oldest]:
            raise joints_missing(old, self.there)


class JointStates:
    """Makes whole states of messages that may have some of the joints only, or none.

    A joint is what was last said about it, whoever said it. How old that may be is for the reader to say.
    """

    def __init__(self, names: Sequence[str]):
        self.names = tuple(names)
        self._said: dict[str, _Said] = {}

    def clear(self) -> None:
        """Forget what was said."""
        self._said.clear()

    def of(self, msg: Any) -> list[str]:
        """Which of the joints a message has."""
        there = set(msg.name)
        return [name for name in self.names if name in there]

    def last(self, msg: Any) -> int | None:
        """Stamp (ns) of what was said the longest ago about a joint of a message; None where nothing was."""
        return min((self._said[n].stamp for n in self.of(msg) if n in self._said), default=None)

    def put(self, stamp: int, msg: Any) -> Whole | None:
        """The state of all joints after a message; None where it says nothing new about any of them.

        Raises:
            DecodeError: a joint is there more than once, or nothing was said about one yet.
        """
        position, velocity = (_values(msg, what) for what in ("position", "velocity"))
        index = joint_index(msg.name, self.names)
        new = [n for n in self.of(msg) if n not in self._said or stamp >= self._said[n].stamp]
        for name in new:
            self._said[name] = _Said(stamp, position[index[name]], velocity[index[name]])
        missing = [name for name in self.names if name not in self._said]
        if missing:
            raise joints_missing(missing, msg.name)
        if len(new) == len(self.names):
            return Whole(stamp, msg)
        if not new:
            return None
        said = [self._said[name] for name in self.names]
        whole = JointState(
            self.names, np.array([s.position for s in said]), np.array([s.velocity for s in said])
        )
        parts = {name: s.stamp for name, s in zip(self.names, said, strict=True)}
        return Whole(max(parts.values()), whole, parts, tuple(msg.name))


def _values(msg: Any, what: str) -> Sequence[float]:
    """One by name; nan where there are none, or not as many as names."""
    values = getattr(msg, what)
    return values if len(values) == len(msg.name) else [math.nan] * len(msg.name)

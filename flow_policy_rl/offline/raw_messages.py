"""What the bytes of a message tell without taking it apart: its stamp, and the positions of the usual joints."""

import struct
from collections.abc import Iterable
from typing import Any

import numpy as np

from flow_policy_rl.data.bags import BadMessage, Bag, Message
from flow_policy_rl.serving.decode import DecodeError, joint_values
from flow_policy_rl.serving.joint_states import JointState, JointStates


def header_stamp(message: Message) -> int:
    """Stamp (ns) straight from the bytes: two integers after the encoding; reception where it is 0.

    Raises:
        BadMessage: too short, or of a time that there is not.
    """
    if len(message.data) < 12:
        raise BadMessage(f"not a {message.type}: {len(message.data)} bytes")
    order = "<iI" if message.data[1] & 1 else ">iI"
    sec, nanosec = struct.unpack_from(order, message.data, 4)
    if sec < 0:
        raise BadMessage("stamp is before 1970")
    return sec * 1_000_000_000 + nanosec or message.log_time


class JointPositions:
    """Positions (A,) of raw JointState messages; one whose names are the last one's is not taken apart again. Messages
    that have some of the joints are put together as in the live node.

    Args:
        names: whose positions are wanted.
        also: other joints that a state must have.

    Attributes:
        seen: names of the state last read.
        stamp: of it, ns.
        part: what a message with some of the joints made of it, shaped like one with all; None of one that has all.
    """

    def __init__(
        self, bag: Bag, names: tuple[str, ...], max_age_s: float, also: Iterable[str] = ()
    ):
        self._bag, self._names, self._max_age = bag, names, int(max_age_s * 1e9)
        self._prefix, self._offset, self._length = b"", 0, -1
        self._index = np.zeros(0, int)
        self._states = JointStates(tuple(dict.fromkeys((*names, *also))))
        self._unread: Message | None = None  # with all joints, of which the states do not know yet
        self.seen: tuple[str, ...] = ()
        self.stamp = 0
        self.part: JointState | None = None

    def concern(self, message: Message) -> bool:
        """Whether a message has any of the joints: others may publish theirs on the same topic.

        Raises:
            BadMessage: unreadable.
        """
        return self._known(message.data) or bool(self._states.of(self._bag.deserialize(message)))

    def _known(self, data: bytes | memoryview) -> bool:
        return len(data) == self._length and data[12 : self._offset] == self._prefix

    def __call__(self, message: Message) -> np.ndarray:
        """Positions in the order of the names.

        Raises:
            BadMessage, DecodeError: unreadable, or a joint is missing, or was not heard of for too long.
        """
        data = message.data
        self.stamp, self.part = header_stamp(message), None
        if self._known(data):
            self._unread = message
            positions = np.frombuffer(data, "<f8", len(self.seen), self._offset)
            return positions[self._index]
        msg = self._bag.deserialize(message)
        if 0 < len(self._states.of(msg)) < len(self._states.names):
            return self._put_together(msg)
        values = joint_values(msg, self._names, "position")
        self._unread = message
        self._remember(message.data, list(msg.name), np.asarray(msg.position))
        return values

    def _put_together(self, msg: Any) -> np.ndarray:
        if self._unread is not None:
            self._states.put(header_stamp(self._unread), self._bag.deserialize(self._unread))
            self._unread = None
        last = self._states.last(msg)
        if last is not None and last - self.stamp > self._max_age:  # time went back
            self._states.clear()
        whole = self._states.put(self.stamp, msg)
        if whole is None:
            raise DecodeError("joint state is older than what was said of its joints before")
        whole.refuse_old(whole.stamp - self._max_age)
        self.stamp, self.part, self.seen = whole.stamp, whole.msg, self._states.names
        self._length = -1
        return joint_values(whole.msg, self._names, "position")

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

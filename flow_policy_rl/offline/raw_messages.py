"""What the bytes of a message tell without taking it apart: its stamp, and the positions of the usual joints."""

import struct

import numpy as np

from flow_policy_rl.data.bags import BadMessage, Bag, Message
from flow_policy_rl.serving.decode import joint_values


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

"""JointTrajectory as bytes: to build twenty points as messages and to read them again costs a tenth of a millisecond,
and several times as much where the caches are cold.

The bytes are CDR version 1, little endian, as every DDS of ROS 2 reads it: numbers aligned to their size, texts and
sequences preceded by their length.
"""

import struct
from collections.abc import Sequence

import numpy as np
from rclpy.serialization import deserialize_message
from trajectory_msgs.msg import JointTrajectory

from flow_policy_ros import messages

HEADER = bytes([0, 1, 0, 0])  # CDR 1, little endian; alignment counts from after it


class TrajectoryWriter:
    """Writes trajectories of some joints, with stamp 0 and velocities: as bytes where the middleware reads them back as
    they were meant, which is tried once, else as a message."""

    def __init__(self, joint_names: Sequence[str]):
        self._names = tuple(joint_names)
        body = struct.pack("<iI", 0, 0) + _text("")  # header: stamp and frame
        body += bytes(-len(body) % 4) + struct.pack("<I", len(joint_names))
        for name in joint_names:
            body += bytes(-len(body) % 4) + _text(name)
        self._begin = HEADER + body + bytes(-len(body) % 4)
        # A point begins where the number of points ends. Its first doubles are aligned to 8, all else follows.
        self._early = (len(self._begin) - len(HEADER) + 4) % 8 == 4
        self.as_bytes = self._reads_back()

    def write(
        self, times: np.ndarray, positions: np.ndarray, velocities: np.ndarray
    ) -> bytes | JointTrajectory:
        """What `publish` takes: points (n,) s from reception, (n, A), (n, A)."""
        form = self._bytes if self.as_bytes else self._message
        return form(times, positions, velocities)

    def _message(self, times, positions, velocities) -> JointTrajectory:
        return messages.joint_trajectory(self._names, times, positions, velocities)

    def _bytes(self, times: np.ndarray, positions: np.ndarray, velocities: np.ndarray) -> bytes:
        n = len(self._names)
        # A point in words of 8 bytes: two lengths with their numbers, two lengths of nothing, and the time.
        points = np.zeros((len(times), 2 * n + 4), "<f8")
        points[:, 1 : n + 1], points[:, n + 2 : -2] = positions, velocities
        words = points.view("<i8")
        words[:, 0] = words[:, n + 1] = n
        moments = [divmod(round(time * 1e9), 1_000_000_000) for time in times.tolist()]
        words[:, -1] = [seconds | nanoseconds << 32 for seconds, nanoseconds in moments]
        body = points.tobytes()
        if self._early:  # the first length stands right before its numbers
            body = body[:4] + body[8:]
        return self._begin + struct.pack("<I", len(times)) + body

    def _reads_back(self) -> bool:
        """Whether this middleware reads what is written here."""
        n = len(self._names)
        times, positions = np.array([0.25, 1.5]), np.arange(2.0 * n).reshape(2, n)
        points = times, positions, -positions
        try:
            read = deserialize_message(self._bytes(*points), JointTrajectory)
            return read == self._message(*points)
        except Exception:  # whatever a middleware raises at bytes that it does not know
            return False


def _text(value: str) -> bytes:
    data = value.encode() + b"\0"
    return struct.pack("<I", len(data)) + data

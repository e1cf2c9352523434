"""ROS messages to arrays, by duck typing: one decoder for the live node (rclpy messages) and for
bags (rosbags messages)."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from flow_policy_rl.errors import InputError
from flow_policy_rl.spec import ObservationField

POSE_ELEMENTS = ("x", "y", "z", "qx", "qy", "qz", "qw")


class DecodeError(InputError):
    """A message that cannot be used: the text names what is wrong with it."""


def stamp_ns(msg: Any) -> int:
    """Header stamp in nanoseconds."""
    stamp = msg.header.stamp
    return stamp.sec * 1_000_000_000 + stamp.nanosec


def decode(field: ObservationField, msg: Any) -> np.ndarray:
    """The values (size,) float64 of one observation field.

    Raises:
        DecodeError: a joint is missing, an array too short, or a number not finite.
    """
    if field.kind == "joint_position":
        values = joint_values(msg, field.elements, "position")
    elif field.kind == "joint_velocity":
        values = joint_values(msg, field.elements, "velocity")
    elif field.kind == "pose":
        values = pose(msg)
    else:
        raise DecodeError(f"observation '{field.name}': kind '{field.kind}' cannot be decoded")
    if not np.isfinite(values).all():
        bad = [
            name
            for name, value in zip(field.elements, values, strict=True)
            if not np.isfinite(value)
        ]
        raise DecodeError(f"observation '{field.name}': not a finite number in {', '.join(bad)}")
    return values


def joint_values(msg: Any, names: Sequence[str], what: str) -> np.ndarray:
    """Values of a JointState by joint name, whatever order they come in."""
    index = {name: i for i, name in enumerate(msg.name)}
    missing = [name for name in names if name not in index]
    if missing:
        raise DecodeError(
            f"joint state lacks {', '.join(missing)}; it has {', '.join(msg.name) or 'no joints'}"
        )
    values = np.asarray(getattr(msg, what), dtype=np.float64)
    if len(values) != len(msg.name):
        raise DecodeError(
            f"joint state has {len(msg.name)} names but {len(values)} values of {what}"
        )
    return values[[index[name] for name in names]]


def pose(msg: Any) -> np.ndarray:
    """`POSE_ELEMENTS` of a PoseStamped, with qw >= 0 so that a pose has one form."""
    p, q = msg.pose.position, msg.pose.orientation
    quat = np.array([q.x, q.y, q.z, q.w])
    norm = np.linalg.norm(quat)
    if np.isfinite(norm) and abs(norm - 1) > 0.01:
        raise DecodeError(f"pose has a quaternion of length {norm:.3f}")
    return np.concatenate([[p.x, p.y, p.z], -quat if q.w < 0 else quat])


def image(msg: Any) -> np.ndarray:
    """(height, width, channels) uint8 view of an Image; RGB for rgb8 and bgr8, one channel for mono8.

    Raises:
        DecodeError: another encoding, or a buffer of the wrong size.
    """
    channels = {"rgb8": 3, "bgr8": 3, "mono8": 1}.get(msg.encoding)
    if channels is None:
        raise DecodeError(f"image encoding '{msg.encoding}' is not one of rgb8, bgr8, mono8")
    buffer = np.frombuffer(msg.data, np.uint8)
    if msg.step < msg.width * channels or len(buffer) != msg.step * msg.height:
        raise DecodeError(
            f"image of {msg.height}x{msg.width} {msg.encoding} has {len(buffer)} bytes, step {msg.step}"
        )
    pixels = buffer.reshape(msg.height, msg.step)[:, : msg.width * channels]
    pixels = pixels.reshape(msg.height, msg.width, channels)
    return pixels[..., ::-1] if msg.encoding == "bgr8" else pixels

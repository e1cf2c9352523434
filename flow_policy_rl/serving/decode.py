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
    """The values of one observation field: (size,) float64, or (height, width, 3) uint8 RGB of an image.

    Raises:
        DecodeError: a joint is missing, an array too short, a number not finite, or an image unreadable.
    """
    if field.kind == "image":
        return fit(rgb(msg), field.resolution)
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
    index = joint_index(msg.name, names)
    missing = [name for name in names if name not in index]
    if missing:
        raise joints_missing(missing, msg.name)
    values = np.asarray(getattr(msg, what), dtype=np.float64)
    if len(values) != len(msg.name):
        raise DecodeError(
            f"joint state has {len(msg.name)} names but {len(values)} values of {what}"
        )
    return values[[index[name] for name in names]]


def joint_index(there: Sequence[str], wanted: Sequence[str]) -> dict[str, int]:
    """Where every joint is among the names of a joint state.

    Raises:
        DecodeError: one that is wanted is there more than once.
    """
    index = {name: i for i, name in enumerate(there)}
    if len(index) < len(there):
        names = list(there)
        if again := [name for name in wanted if names.count(name) > 1]:
            raise DecodeError(f"joint state has {', '.join(again)} more than once")
    return index


def joints_missing(missing: Sequence[str], there: Sequence[str]) -> DecodeError:
    """An error for joints that a state should have, and what it has."""
    return DecodeError(
        f"joint state lacks {', '.join(missing)}; it has {', '.join(there) or 'no joints'}"
    )


def pose(msg: Any) -> np.ndarray:
    """`POSE_ELEMENTS` of a PoseStamped, with qw >= 0 so that a pose has one form."""
    p, q = msg.pose.position, msg.pose.orientation
    quat = np.array([q.x, q.y, q.z, q.w])
    norm = np.linalg.norm(quat)
    if np.isfinite(norm) and abs(norm - 1) > 0.01:
        raise DecodeError(f"pose has a quaternion of length {norm:.3f}")
    return np.concatenate([[p.x, p.y, p.z], -quat if q.w < 0 else quat])


CHANNELS = {"rgb8": 3, "bgr8": 3, "8UC3": 3, "rgba8": 4, "bgra8": 4, "mono8": 1, "8UC1": 1}


def image(msg: Any) -> np.ndarray:
    """(height, width, channels) uint8 view of an Image: RGB in this order, or one channel.

    Raises:
        DecodeError: another encoding, or a buffer of the wrong size.
    """
    channels = CHANNELS.get(msg.encoding)
    if channels is None:
        raise DecodeError(
            f"image encoding '{msg.encoding}' is not one of {', '.join(CHANNELS)}: nothing else is 8 bits per channel"
        )
    buffer = np.frombuffer(msg.data, np.uint8)
    if min(msg.height, msg.width) < 1 or msg.step < msg.width * channels:
        raise DecodeError(f"image of {msg.height}x{msg.width} {msg.encoding} has step {msg.step}")
    if len(buffer) != msg.step * msg.height:
        raise DecodeError(
            f"image of {msg.height}x{msg.width} {msg.encoding} has {len(buffer)} bytes, step {msg.step}"
        )
    pixels = buffer.reshape(msg.height, msg.step)[:, : msg.width * channels]
    pixels = pixels.reshape(msg.height, msg.width, channels)[..., :3]
    return pixels[..., ::-1] if msg.encoding.startswith("bgr") else pixels


def compressed_image(msg: Any) -> np.ndarray:
    """(height, width, 3) uint8 RGB of a CompressedImage (JPEG, PNG, ...).

    Raises:
        DecodeError: not such a picture, or OpenCV is not installed.
    """
    data = np.frombuffer(msg.data, np.uint8)
    try:
        import cv2

        # NOTE: IMREAD_COLOR_RGB came with OpenCV 4.11.
        pixels = cv2.imdecode(data, cv2.IMREAD_COLOR) if len(data) else None
    except ImportError:
        raise DecodeError("compressed images need opencv-python-headless") from None
    except cv2.error as error:
        raise DecodeError(f"compressed image: {' '.join(str(error).split())[:80]}") from None
    if pixels is None:
        raise DecodeError(f"compressed image of {len(data)} bytes ('{msg.format}') is unreadable")
    return pixels[..., ::-1]


def rgb(msg: Any) -> np.ndarray:
    """(height, width, 3) uint8 RGB of an Image or a CompressedImage; one channel becomes three equal ones."""
    pixels = image(msg) if hasattr(msg, "encoding") else compressed_image(msg)
    return np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels


def fit(pixels: np.ndarray, resolution: tuple[int, ...]) -> np.ndarray:
    """An image brought to the size that the policy was trained on, by area averages."""
    if pixels.shape[:2] == tuple(resolution):
        return pixels
    import cv2

    return cv2.resize(
        np.ascontiguousarray(pixels), tuple(resolution[::-1]), interpolation=cv2.INTER_AREA
    )


def debug_record(msg: Any) -> tuple[int, dict[str, np.ndarray]]:
    """What `~/debug_inference` of the policy node carries: time of the observation (ns), and every input of the graph
    and its output by name, in their own shapes.

    Each dimension of the layout is one array: its label is `name:rows,columns,...`, its size the count of numbers.
    """
    arrays, start = {}, 0
    data = np.asarray(msg.data, dtype=np.float64)
    for dim in msg.layout.dim:
        name, _, shape = dim.label.partition(":")
        values = data[start : start + dim.size]
        arrays[name] = values.reshape([int(n) for n in shape.split(",") if n])
        start += dim.size
    seconds, nanoseconds = (int(v) for v in arrays.pop("stamp"))
    return seconds * 1_000_000_000 + nanoseconds, arrays

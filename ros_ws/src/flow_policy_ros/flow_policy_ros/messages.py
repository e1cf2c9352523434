"""Arrays to messages. Big fields are always `array.array`: the only form that is fast on every distribution."""

import importlib
from array import array
from collections.abc import Mapping, Sequence

import numpy as np
from builtin_interfaces.msg import Duration, Time
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from geometry_msgs.msg import PoseStamped, TransformStamped
from sensor_msgs.msg import CameraInfo, Image, JointState
from std_msgs.msg import Float64MultiArray, MultiArrayDimension, MultiArrayLayout
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

# What joint_trajectory_controller publishes as `~/controller_state`.
CONTROLLER_STATE = "control_msgs/msg/JointTrajectoryControllerState"


def to_time(ns: int) -> Time:
    """Nanoseconds to a stamp."""
    return Time(sec=int(ns // 1_000_000_000), nanosec=int(ns % 1_000_000_000))


def to_duration(seconds: float) -> Duration:
    """Seconds to a duration."""
    ns = round(seconds * 1e9)
    return Duration(sec=int(ns // 1_000_000_000), nanosec=int(ns % 1_000_000_000))


def seconds(duration: Duration) -> float:
    """A duration in seconds."""
    return duration.sec + duration.nanosec * 1e-9


def doubles(values: np.ndarray) -> array:
    """(n,) to array('d')."""
    return array("d", np.ascontiguousarray(values, np.float64).tobytes())


def joint_state(
    names: Sequence[str], position: np.ndarray, velocity: np.ndarray, stamp: int
) -> JointState:
    """Positions and velocities (n,) by name."""
    msg = JointState(name=list(names), position=doubles(position), velocity=doubles(velocity))
    msg.header.stamp = to_time(stamp)
    return msg


def pose_stamped(pose: np.ndarray, frame: str, stamp: int) -> PoseStamped:
    """(x, y, z, qx, qy, qz, qw)."""
    msg = PoseStamped()
    msg.header.stamp, msg.header.frame_id = to_time(stamp), frame
    p, q = msg.pose.position, msg.pose.orientation
    p.x, p.y, p.z, q.x, q.y, q.z, q.w = (float(v) for v in pose)
    return msg


def image(pixels: np.ndarray, frame: str, stamp: int) -> Image:
    """(height, width, 3) uint8 RGB."""
    height, width, channels = pixels.shape
    msg = Image(height=height, width=width, encoding="rgb8", step=width * channels)
    msg.header.stamp, msg.header.frame_id = to_time(stamp), frame
    msg.data = array("B", np.ascontiguousarray(pixels).tobytes())
    return msg


def camera_info(height: int, width: int, fovy: float, frame: str, stamp: int) -> CameraInfo:
    """A pinhole without distortion; `fovy` is the vertical field of view in rad."""
    focal = height / 2 / float(np.tan(fovy / 2))
    k = np.array([focal, 0, width / 2, 0, focal, height / 2, 0, 0, 1.0])
    msg = CameraInfo(
        height=height, width=width, distortion_model="plumb_bob", d=doubles(np.zeros(5))
    )
    msg.header.stamp, msg.header.frame_id = to_time(stamp), frame
    msg.k, msg.r = k, np.eye(3).ravel()
    msg.p = np.insert(k.reshape(3, 3), 3, 0.0, axis=1).ravel()
    return msg


def transforms(kind: type, poses: Mapping[str, np.ndarray], frame: str, stamp: int):
    """A TFMessage (its class is given: tf2_msgs is not everywhere) of poses (x, y, z, qx, qy, qz, qw) by child
    frame."""
    msg = kind()
    for child, pose in poses.items():
        t = TransformStamped(child_frame_id=child)
        t.header.stamp, t.header.frame_id = to_time(stamp), frame
        p, q = t.transform.translation, t.transform.rotation
        p.x, p.y, p.z, q.x, q.y, q.z, q.w = (float(v) for v in pose)
        msg.transforms.append(t)
    return msg


def joint_trajectory(
    names: Sequence[str],
    times: np.ndarray,
    positions: np.ndarray,
    velocities: np.ndarray | None,
    stamp: int = 0,
) -> JointTrajectory:
    """Points (n,), (n, A), (n, A). Stamp 0 means: start on reception."""
    msg = JointTrajectory(joint_names=list(names))
    msg.header.stamp = to_time(stamp)
    for k, time in enumerate(times):
        point = JointTrajectoryPoint(time_from_start=to_duration(float(time)))
        point.positions = doubles(positions[k])
        if velocities is not None:
            point.velocities = doubles(velocities[k])
        msg.points.append(point)
    return msg


def diagnostics(
    name: str, level: bytes, text: str, values: Mapping[str, object], stamp: int, hardware: str = ""
) -> DiagnosticArray:
    """One status."""
    pairs = [KeyValue(key=key, value=str(value)) for key, value in values.items()]
    status = DiagnosticStatus(
        name=name, level=level, message=text, values=pairs, hardware_id=hardware
    )
    msg = DiagnosticArray(status=[status])
    msg.header.stamp = to_time(stamp)
    return msg


def message_class(name: str) -> type | None:
    """The class of a type such as sensor_msgs/msg/Image; None where its package is not installed."""
    package, kind, message = name.split("/")
    try:
        return getattr(importlib.import_module(f"{package}.{kind}"), message)
    except (ImportError, AttributeError):
        return None


def debug_record(stamp: int, arrays: Mapping[str, np.ndarray]) -> Float64MultiArray:
    """Named arrays in one message; `flow_policy_rl.serving.decode.debug_record` reads it."""
    parts = {"stamp": np.array([stamp // 1_000_000_000, stamp % 1_000_000_000]), **arrays}
    dims = [
        MultiArrayDimension(
            label=f"{name}:{','.join(str(n) for n in values.shape)}",
            size=int(values.size),
            stride=int(values.size),
        )
        for name, values in parts.items()
    ]
    data = np.concatenate([np.asarray(v, np.float64).ravel() for v in parts.values()])
    return Float64MultiArray(layout=MultiArrayLayout(dim=dims), data=doubles(data))

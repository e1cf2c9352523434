"""Rigid poses in batches, in MuJoCo's own form: (..., 7) as x, y, z, qw, qx, qy, qz."""

import numpy as np

from sim.arrays import constant, namespace


def multiply(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Quaternion product (..., 4): first turn by b, then by a."""
    aw, ax, ay, az = (a[..., i] for i in range(4))
    bw, bx, by, bz = (b[..., i] for i in range(4))
    return namespace(a).stack(
        [
            aw * bw - ax * bx - ay * by - az * bz,
            aw * bx + ax * bw + ay * bz - az * by,
            aw * by - ax * bz + ay * bw + az * bx,
            aw * bz + ax * by - ay * bx + az * bw,
        ],
        axis=-1,
    )


def conjugate(quat: np.ndarray) -> np.ndarray:
    """The turn back, (..., 4)."""
    return quat * constant(quat, [1.0, -1.0, -1.0, -1.0])


def cross(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Vector product (..., 3)."""
    ax, ay, az = (a[..., i] for i in range(3))
    bx, by, bz = (b[..., i] for i in range(3))
    parts = [ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx]
    return namespace(a).stack(parts, axis=-1)


def rotate(quat: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """Vectors (..., 3) turned by quaternions (..., 4)."""
    axis = quat[..., 1:]
    twice = 2 * cross(axis, vector)
    return vector + quat[..., :1] * twice + cross(axis, twice)


def pose(position, quat=(1.0, 0.0, 0.0, 0.0)) -> np.ndarray:
    """A pose from its parts; batch dimensions broadcast."""
    like = quat if namespace(position) is np else position
    xp, position, quat = namespace(like), constant(like, position), constant(like, quat)
    shape = np.broadcast_shapes(position.shape[:-1], quat.shape[:-1])
    parts = xp.broadcast_to(position, (*shape, 3)), xp.broadcast_to(quat, (*shape, 4))
    return xp.concatenate(parts, axis=-1)


def compose(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Pose b, given in the frame of a, in the frame in which a is given, (..., 7)."""
    return pose(a[..., :3] + rotate(a[..., 3:], b[..., :3]), multiply(a[..., 3:], b[..., 3:]))


def relative(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Pose b as seen from a, (..., 7): compose(a, relative(a, b)) is b."""
    back = conjugate(a[..., 3:])
    return pose(rotate(back, b[..., :3] - a[..., :3]), multiply(back, b[..., 3:]))


def about_z(angle) -> np.ndarray:
    """Quaternion of a turn about the vertical, (..., 4)."""
    half = np.asarray(angle, dtype=float) / 2
    zero = np.zeros_like(half)
    return np.stack([np.cos(half), zero, zero, np.sin(half)], axis=-1)


def yaw(quat: np.ndarray) -> np.ndarray:
    """Angle of the body's x axis about the vertical, (...,), in (-pi, pi]."""
    forward = rotate(quat, constant(quat, [1.0, 0.0, 0.0]))
    return namespace(quat).arctan2(forward[..., 1], forward[..., 0])


def tilt(quat: np.ndarray) -> np.ndarray:
    """Angle between the body's z axis and the vertical, (...,), 0 to pi."""
    xp, up = namespace(quat), rotate(quat, constant(quat, [0.0, 0.0, 1.0]))
    return xp.arccos(xp.clip(up[..., 2], -1.0, 1.0))


def wrap(angle, period: float = 2 * np.pi):
    """The equal angle nearest to zero, for a shape that looks the same every `period`."""
    return (np.asarray(angle) + period / 2) % period - period / 2


def nearest_yaw(pose: np.ndarray, period: float = np.pi / 2) -> float:
    """How far a hand turns from straight to meet a body (7,) whose sides repeat every `period`, rad."""
    return float(wrap(yaw(pose[3:]), period))


def nearest_multiple(angle: float, period: float) -> float:
    """Of `period`, to an angle, rad."""
    return float(period * np.round(angle / period))

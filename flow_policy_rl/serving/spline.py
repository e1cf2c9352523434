"""Piecewise polynomials through timed points: the one curve behind trajectories, per-tick commands,
the controller's mock and the safety checks."""

from bisect import bisect_left, bisect_right
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

SAME_S = 1e-9  # times nearer than this differ by rounding to ns


@dataclass(frozen=True)
class Spline:
    """A motion from its first knot to its last; before and after it stands still.

    Straight lines through positions alone, cubics where velocities are given, quintics where accelerations are too:
    what joint_trajectory_controller does.

    Attributes:
        times: (n,) s, strictly increasing.
        positions: (n, A) rad or m.
        velocities, accelerations: (n, A), or None.
    """

    times: np.ndarray
    positions: np.ndarray
    velocities: np.ndarray | None = None
    accelerations: np.ndarray | None = None

    @property
    def end(self) -> float:
        """Time of the last knot."""
        return float(self.times[-1])

    @cached_property
    def coefficients(self) -> list[np.ndarray]:
        """c_i, (n - 1, A) each: position = sum of c_i (t - t_k)^i within segment k."""
        return self._between(slice(None, -1), slice(1, None))

    def _between(self, here: int | slice, there: int | slice) -> list[np.ndarray]:
        """Coefficients of the segments from some knots, (A,) or (m, A) each, to others."""
        times = self.times[:, None]
        h = times[there] - times[here]
        p0 = self.positions[here]
        change = self.positions[there] - p0
        if self.velocities is None:
            return [p0, change / h]
        v0, v1 = self.velocities[here], self.velocities[there]
        if self.accelerations is None:
            slope = change / h
            return [p0, v0, (3 * slope - 2 * v0 - v1) / h, (v0 + v1 - 2 * slope) / (h * h)]
        a0, a1 = self.accelerations[here], self.accelerations[there]
        c3 = (20 * change - (8 * v1 + 12 * v0) * h - (3 * a0 - a1) * h**2) / (2 * h**3)
        c4 = (-30 * change + (14 * v1 + 16 * v0) * h + (3 * a0 - 2 * a1) * h**2) / (2 * h**4)
        c5 = (12 * change - 6 * (v1 + v0) * h + (a1 - a0) * h**2) / (2 * h**5)
        return [p0, v0, a0 / 2, c3, c4, c5]

    def sample(self, t: float, before: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Position, velocity and acceleration (A,) at a time: where acceleration jumps, what it is after, or `before`
        that."""
        still = np.zeros(self.positions.shape[1])
        k = (bisect_left(self.times, t - SAME_S) if before else bisect_right(self.times, t)) - 1
        if k in (-1, len(self.times) - 1):
            return self.positions[max(k, 0)].copy(), still, still.copy()
        begin, end = self.times[k : k + 2].tolist()
        u = min(t, end) - begin
        position = velocity = half = still
        for c in reversed(self._between(k, k + 1)):  # Horner, with both derivatives
            half = half * u + velocity
            velocity = velocity * u + position
            position = position * u + c
        return position, velocity, 2 * half

    def position(self, times: np.ndarray) -> np.ndarray:
        """Positions (m, A) at times (m,)."""
        if len(self.times) == 1:
            return np.repeat(self.positions, len(times), axis=0)
        times = np.clip(times, self.times[0], self.times[-1])
        k = np.clip(np.searchsorted(self.times, times, side="right") - 1, 0, len(self.times) - 2)
        u, result = (times - self.times[k])[:, None], 0.0
        for c in reversed(self.coefficients):
            result = result * u + c[k]
        return result


@dataclass(frozen=True)
class Extremes:
    """What a cubic spline does between its knots, per joint (A,).

    Attributes:
        low, high: of position.
        speed: largest absolute velocity.
        acceleration: largest absolute acceleration.
        jerk_step: largest change between consecutive one-sided accelerations at the knots.
    """

    low: np.ndarray
    high: np.ndarray
    speed: np.ndarray
    acceleration: np.ndarray
    jerk_step: np.ndarray


def derivatives(spline: Spline, acceleration_before: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of a cubic spline of n segments: velocity's Bezier control points (2 n + 1, A), which are at the knots and in
    the middle between; accelerations (2 n + 2, A) before and after each knot, from the one given to rest."""
    p, v = spline.positions, spline.velocities
    h = (spline.times[1:] - spline.times[:-1])[:, None]
    n, width = len(h), p.shape[1]
    velocity, acceleration = np.empty((2 * n + 1, width)), np.empty((2 * n + 2, width))
    velocity[::2] = v
    velocity[1::2] = 3 * (p[1:] - p[:-1]) / h - v[:-1] - v[1:]
    change = (velocity[1:] - velocity[:-1]).reshape(n, 2, width)
    acceleration[0], acceleration[-1] = acceleration_before, 0.0
    acceleration[1:-1] = (change / (h[:, None] / 2)).reshape(2 * n, width)
    return velocity, acceleration


def hull(spline: Spline, acceleration_before: np.ndarray) -> Extremes:
    """Bounds of a cubic spline that comes from `acceleration_before` (A,) and ends at rest: what it never leaves.

    Position and speed stay between their Bezier control points, which may lie further out than the spline goes;
    acceleration and jerk are exact.
    """
    p, v = spline.positions, spline.velocities
    third = (spline.times[1:] - spline.times[:-1])[:, None] / 3
    points = np.concatenate([p, p[:-1] + v[:-1] * third, p[1:] - v[1:] * third])
    velocity, acceleration = derivatives(spline, acceleration_before)
    return Extremes(
        low=points.min(axis=0),
        high=points.max(axis=0),
        speed=np.abs(velocity).max(axis=0),
        acceleration=np.abs(acceleration[1:]).max(axis=0),
        jerk_step=np.abs(acceleration[1:] - acceleration[:-1]).max(axis=0),
    )


def extremes(spline: Spline, wide: Extremes) -> Extremes:
    """As `hull` (its result is given), exactly: closed forms over every segment."""
    c0, c1, c2, c3 = spline.coefficients
    h = (spline.times[1:] - spline.times[:-1])[:, None]
    with np.errstate(all="ignore"):
        root = np.sqrt(np.maximum(c2 * c2 - 3 * c1 * c3, 0.0))
        t = np.array([-c2, -c2 + root, -c2 - root, -c1]) / np.array([3 * c3] * 3 + [2 * c2])
    t = np.fmin(np.fmax(t, 0.0), h)  # within the segment; nan becomes 0
    fastest, turns = t[0], t[1:]
    between = c0 + turns * (c1 + turns * (c2 + turns * c3))
    speed = np.abs(c1 + fastest * (2 * c2 + 3 * fastest * c3)).max(axis=0)
    return replace(
        wide,
        low=np.minimum(spline.positions.min(axis=0), between.min(axis=(0, 1))),
        high=np.maximum(spline.positions.max(axis=0), between.max(axis=(0, 1))),
        speed=np.maximum(np.abs(spline.velocities).max(axis=0), speed),
    )

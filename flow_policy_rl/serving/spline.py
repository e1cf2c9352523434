"""Piecewise polynomials through timed points: the one curve behind trajectories, per-tick commands,
the controller's mock and the safety checks."""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

# Coefficients of a segment of length 1, of as many powers as rows, from its start, its change, and its velocities and
# accelerations at both ends.
FROM_ENDS = {
    2: np.eye(2),
    4: np.array([[1.0, 0, 0, 0], [0, 0, 1, 0], [0, 3, -2, -1], [0, -2, 1, 1]]),
    6: np.array(
        [
            [1, 0, 0, 0, 0, 0],
            [0, 0, 1, 0, 0, 0],
            [0, 0, 0, 0, 0.5, 0],
            [0, 10, -6, -4, -1.5, 0.5],
            [0, -15, 8, 7, 1.5, -1],
            [0, 6, -3, -3, -0.5, 0.5],
        ]
    ),
}


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
    def coefficients(self) -> np.ndarray:
        """(n - 1, degree + 1, A): position = sum of c_i (t - t_k)^i within segment k."""
        h = (self.times[1:] - self.times[:-1])[:, None]
        p, v, a = self.positions, self.velocities, self.accelerations
        ends = [p[:-1], p[1:] - p[:-1]]
        if v is not None:
            ends += [v[:-1] * h, v[1:] * h]
        if a is not None:
            ends += [a[:-1] * h**2, a[1:] * h**2]
        unit = FROM_ENDS[len(ends)] @ np.stack(ends, axis=1)
        return unit / (h ** np.arange(len(ends)))[:, :, None]

    def sample(self, t: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Position, velocity and acceleration (A,) at a time, each from the right."""
        still = np.zeros(self.positions.shape[1])
        if t >= self.times[-1] or t < self.times[0]:
            return self.positions[-1 if t >= self.times[-1] else 0].copy(), still, still.copy()
        k = int(self.times.searchsorted(t, side="right")) - 1
        segment = self.coefficients[k]
        position, velocity, acceleration = _powers(t - float(self.times[k]), len(segment)) @ segment
        return position, velocity, acceleration

    def position(self, times: np.ndarray) -> np.ndarray:
        """Positions (m, A) at times (m,)."""
        if len(self.times) == 1:
            return np.repeat(self.positions, len(times), axis=0)
        times = np.clip(times, self.times[0], self.times[-1])
        k = np.clip(np.searchsorted(self.times, times, side="right") - 1, 0, len(self.times) - 2)
        u, result = (times - self.times[k])[:, None], 0.0
        for c in np.moveaxis(self.coefficients[k], 1, 0)[::-1]:  # Horner
            result = result * u + c
        return result


def _powers(u: float, num: int) -> np.ndarray:
    """(3, num): what the coefficients c_i of a polynomial are multiplied with for its value and two derivatives."""
    powers = [1.0]
    for _ in range(num - 1):
        powers.append(powers[-1] * u)
    first = [0.0, *(i * powers[i - 1] for i in range(1, num))]
    second = [0.0, 0.0, *(i * (i - 1) * powers[i - 2] for i in range(2, num))]
    return np.array([powers, first, second[:num]])


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


def hull(spline: Spline, acceleration_before: np.ndarray) -> Extremes:
    """Bounds of a cubic spline that comes from `acceleration_before` (A,) and ends at rest: what it never leaves.

    Position and speed stay between their Bezier control points, which may lie further out than the spline goes;
    acceleration and jerk are exact.
    """
    p, v = spline.positions, spline.velocities
    h = (spline.times[1:] - spline.times[:-1])[:, None]
    n, third = len(h), h / 3
    points = np.concatenate([p, p[:-1] + v[:-1] * third, p[1:] - v[1:] * third])
    middle = (p[1:] - p[:-1]) / third - v[:-1] - v[1:]  # velocity's control point within a segment
    twice = 2 / h
    one_sided = np.zeros((2 * n + 2, p.shape[1]))
    one_sided[0] = acceleration_before
    np.multiply(middle - v[:-1], twice, out=one_sided[1:-1:2])
    np.multiply(v[1:] - middle, twice, out=one_sided[2:-1:2])
    return Extremes(
        low=points.min(axis=0),
        high=points.max(axis=0),
        speed=np.abs(np.concatenate([v, middle])).max(axis=0),
        acceleration=np.abs(one_sided[1:-1]).max(axis=0),
        jerk_step=np.abs(one_sided[1:] - one_sided[:-1]).max(axis=0),
    )


def extremes(spline: Spline, wide: Extremes) -> Extremes:
    """As `hull` (its result is given), exactly: closed forms over every segment."""
    c0, c1, c2, c3 = spline.coefficients.transpose(1, 0, 2)  # (n - 1, A) each
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

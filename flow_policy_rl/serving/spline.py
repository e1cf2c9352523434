"""Piecewise polynomials through timed points: the one curve behind trajectories, per-tick commands,
the controller's mock and the safety checks."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np


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
        p0, p1 = self.positions[:-1], self.positions[1:]
        h = (self.times[1:] - self.times[:-1])[:, None]
        change = p1 - p0
        if self.velocities is None:
            return np.stack([p0, change / h], axis=1)
        v0, v1 = self.velocities[:-1], self.velocities[1:]
        if self.accelerations is None:
            slope = change / h
            cubic = np.empty((len(h), 4, p0.shape[1]))
            cubic[:, 0], cubic[:, 1] = p0, v0
            cubic[:, 2], cubic[:, 3] = (3 * slope - 2 * v0 - v1) / h, (v0 + v1 - 2 * slope) / h**2
            return cubic
        a0, a1 = self.accelerations[:-1], self.accelerations[1:]
        c3 = (20 * change - (8 * v1 + 12 * v0) * h - (3 * a0 - a1) * h**2) / (2 * h**3)
        c4 = (-30 * change + (14 * v1 + 16 * v0) * h + (3 * a0 - 2 * a1) * h**2) / (2 * h**4)
        c5 = (12 * change - 6 * (v1 + v0) * h + (a1 - a0) * h**2) / (2 * h**5)
        return np.stack([p0, v0, a0 / 2, c3, c4, c5], axis=1)

    def sample(self, t: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Position, velocity and acceleration (A,) at a time, each from the right."""
        still = np.zeros(self.positions.shape[1])
        if t >= self.times[-1] or t < self.times[0]:
            return self.positions[-1 if t >= self.times[-1] else 0].copy(), still, still.copy()
        k = int(np.searchsorted(self.times, t, side="right")) - 1
        u = t - self.times[k]
        position, velocity, acceleration = still, still, still
        for c in self.coefficients[k][::-1]:  # Horner, with both derivatives
            acceleration = acceleration * u + 2 * velocity
            velocity = velocity * u + position
            position = position * u + c
        return position, velocity, acceleration

    def position(self, times: np.ndarray) -> np.ndarray:
        """Positions (m, A) at times (m,)."""
        return np.array([self.sample(float(t))[0] for t in times])


@dataclass(frozen=True)
class Extremes:
    """What a cubic spline does between its knots, exactly, per joint (A,).

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


def extremes(spline: Spline, acceleration_before: np.ndarray) -> Extremes:
    """Closed forms over every segment of a cubic spline that comes from `acceleration_before` (A,) and ends at rest."""
    c0, c1, c2, c3 = np.moveaxis(spline.coefficients, 1, 0)  # (n - 1, A) each
    h = (spline.times[1:] - spline.times[:-1])[:, None]

    def inside(t: np.ndarray) -> np.ndarray:
        return np.fmin(np.fmax(t, 0.0), h)  # nan becomes 0

    with np.errstate(all="ignore"):
        fastest = inside(-c2 / (3 * c3))
        root = np.sqrt(np.maximum(c2**2 - 3 * c1 * c3, 0.0))
        turns = [inside((-c2 + s * root) / (3 * c3)) for s in (1, -1)]
        turns.append(inside(-c1 / (2 * c2)))
    t = np.array(turns)
    between = c0 + t * (c1 + t * (c2 + t * c3))
    low = np.minimum(spline.positions.min(axis=0), between.min(axis=(0, 1)))
    high = np.maximum(spline.positions.max(axis=0), between.max(axis=(0, 1)))
    speed = np.abs(spline.velocities).max(axis=0)
    speed = np.maximum(speed, np.abs(c1 + fastest * (2 * c2 + 3 * fastest * c3)).max(axis=0))
    at_start, at_end = 2 * c2, 2 * c2 + 6 * c3 * h
    one_sided = np.empty((2 * len(h) + 2, c0.shape[1]))
    one_sided[0], one_sided[-1] = acceleration_before, 0.0
    one_sided[1:-1:2], one_sided[2:-1:2] = at_start, at_end
    return Extremes(
        low=low,
        high=high,
        speed=speed,
        acceleration=np.abs(one_sided[1:-1]).max(axis=0),
        jerk_step=np.abs(one_sided[1:] - one_sided[:-1]).max(axis=0),
    )

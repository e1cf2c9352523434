"""Joints that are limited together, and how they follow targets as far as they may: the part of `safety` that plans.

Vectors of a handful of joints are lists of floats here: numpy takes longer to be called than to compute them.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

TOLERANCE = 1e-6  # relative; rounding only
AT_REST = 1e-9
SCALES = (0.75, 0.5, 0.25, 0.0)  # of a step that the robot could not stop after, toward braking

Reach = list[tuple[float, float, float]]  # by joint: lowest and highest position, highest speed
Knots = tuple[np.ndarray, np.ndarray, np.ndarray]  # times (n,), positions and velocities (n, A)


@dataclass(frozen=True)
class Motion:
    """Commanded state of the joints, (A,) each. `settled` motions stand still."""

    position: np.ndarray
    velocity: np.ndarray
    acceleration: np.ndarray

    @classmethod
    def at_rest(cls, position: np.ndarray) -> "Motion":
        """Standing still."""
        still = np.zeros(len(position))
        return cls(np.asarray(position, float), still, still)

    def lists(self) -> tuple[list[float], list[float], list[float]]:
        """The same as plain numbers."""
        return self.position.tolist(), self.velocity.tolist(), self.acceleration.tolist()


@dataclass(frozen=True)
class Bounds:
    """Where joints may be and how fast, (A,) each."""

    low: np.ndarray
    high: np.ndarray
    speed: np.ndarray

    def part(self, columns: np.ndarray) -> "Bounds":
        """Those of some joints."""
        return Bounds(self.low[columns], self.high[columns], self.speed[columns])

    @property
    def too_fast(self) -> np.ndarray:
        """Beyond this speed the limit is broken, rounding aside."""
        return self.speed * (1 + TOLERANCE) + 1e-9

    def reach(self) -> Reach:
        """As plain numbers, with a little room for rounding."""
        room = TOLERANCE / 2
        sides = self.low - AT_REST, self.high + AT_REST, self.speed * (1 + room)
        return list(zip(*(side.tolist() for side in sides), strict=True))


class JointGroup:
    """Joints that are limited together: the arm, or the gripper.

    Args:
        columns: which of the robot's joints.
        limits: of all joints: position (A, 2), velocity, acceleration, jerk (A,).
    """

    def __init__(self, columns: np.ndarray, limits: dict[str, np.ndarray], control_dt: float):
        self.columns, self.control_dt = columns, control_dt
        self.velocity, self.acceleration, self.jerk = (
            limits[what][columns] for what in ("velocity", "acceleration", "jerk")
        )
        jerk_step = self.jerk * control_dt
        self.jerk_binds = bool((jerk_step < 2 * self.acceleration).any())
        ramp = np.ceil(2 * self.acceleration / jerk_step)
        steps = self.velocity / (self.acceleration * control_dt) + 2 * ramp
        # Braking together is as slow as the slowest joint; a jerk-limited one needs its ramps besides.
        self.stop_steps = int(np.ceil(steps.max())) * (2 if self.jerk_binds else 1) + 6
        self._strengths = list(
            zip(self.acceleration.tolist(), self.jerk.tolist(), strict=True)
        )  # by joint

    def part(self, motion: Motion) -> Motion:
        """The motion of these joints alone."""
        return Motion(
            motion.position[self.columns],
            motion.velocity[self.columns],
            motion.acceleration[self.columns],
        )

    # --- coming to rest ---

    def brake(self, v: list[float], before: list[float], h: float) -> list[float]:
        """Accelerations of the next step of a stop: against the velocity, so that the direction stays."""
        share, dt = 1 / h, min(h, self.control_dt)
        for speed, (acceleration, jerk) in zip(map(abs, v), self._strengths, strict=True):
            if speed > AT_REST:
                ramp = jerk * dt  # per step
                most = speed / h
                if speed >= ramp * h:  # more than one step
                    most = ramp if ramp >= acceleration else ramp * _ramp_steps(speed, ramp * h)
                share = min(share, most / speed, acceleration / speed)
        return [
            _clip(_clip(-share * x, b - jerk * dt, b + jerk * dt), -acceleration, acceleration)
            for x, b, (acceleration, jerk) in zip(v, before, self._strengths, strict=True)
        ]

    def _slow_down(
        self, q: list[float], v: list[float], a: list[float]
    ) -> Iterator[tuple[list[float], list[float]]]:
        """Positions and velocities, control step by control step, until rest (or too many steps)."""
        h = self.control_dt
        for _ in range(self.stop_steps + 1):
            if not any(abs(x) > AT_REST for x in v):
                return
            a = self.brake(v, a, h)
            q, v = _step(q, v, a, h)
            yield q, v

    def stop(self, motion: Motion) -> Knots:
        """After a motion until rest; n may be 0."""
        steps = list(self._slow_down(*motion.lists()))
        n, width = len(steps), len(self.columns)
        return (
            self.control_dt * np.arange(1, n + 1),
            np.array([q for q, _ in steps]).reshape(n, width),
            np.array([v for _, v in steps]).reshape(n, width),
        )

    def stop_seconds(self, v: list[float]) -> float:
        """How long at these velocities the joints would go as far as `stop` does, where jerk does not bind: full
        braking, then one last step."""
        steps = 1.0
        for speed, (acceleration, _) in zip(map(abs, v), self._strengths, strict=True):
            if speed > AT_REST:
                steps = max(steps, speed / (acceleration * self.control_dt))
        full = math.floor(steps) if steps > 1 else 0
        rest = 1 - full / steps
        return self.control_dt * (full * (1 + rest) / 2 + rest / 2)

    def can_stop(
        self, q: list[float], v: list[float], a: list[float], h: float, reach: Reach
    ) -> bool:
        """Whether a step of constant acceleration, and a stop after it, keep velocity and position."""
        q_after, v_after = [], []
        for x, y, z, (low, high, speed) in zip(q, v, a, reach, strict=True):
            ahead = y + z * h
            there = x + (y + ahead) / 2 * h
            if not (-speed <= ahead <= speed and low <= there <= high):
                return False
            if y * ahead < 0 and not low <= x - y * y / (2 * z) <= high:  # it turns within the step
                return False
            q_after.append(there)
            v_after.append(ahead)
        if not self.jerk_binds:
            seconds = self.stop_seconds(v_after)
            return all(
                low <= x + y * seconds <= high
                for x, y, (low, high, _) in zip(q_after, v_after, reach, strict=True)
            )
        return self._rests_within(q_after, v_after, a, reach)

    def _rests_within(self, q: list[float], v: list[float], a: list[float], reach: Reach) -> bool:
        """Whether a stop, step by step, comes to rest and keeps velocity and position."""
        before = v
        for q_after, v_after in self._slow_down(q, v, a):
            for x, y, there, ahead, (low, high, speed) in zip(
                q, before, q_after, v_after, reach, strict=True
            ):
                if not (-speed <= ahead <= speed and low <= there <= high):
                    return False
                if y * ahead < 0:  # it turns within the step
                    turn = x - y * y * self.control_dt / (2 * (ahead - y))
                    if not low <= turn <= high:
                        return False
            q, before = q_after, v_after
        return not any(abs(y) > AT_REST for y in before)

    # --- following targets ---

    def follow(
        self, start: Motion, steps: np.ndarray, targets: np.ndarray, bounds: Bounds
    ) -> Knots | None:
        """The cubic through targets (n, A), due after `steps` (n,) s each, as they are; then a stop. None where it
        would be too fast."""
        h = steps[:, None]
        slopes = np.empty_like(targets)
        slopes[0], slopes[1:] = targets[0] - start.position, targets[1:] - targets[:-1]
        slopes /= h
        velocities = np.empty((len(targets) + 1, targets.shape[1]))
        velocities[0], velocities[-1] = start.velocity, slopes[-1]
        # At a point between two steps: the slope of the parabola through it and both neighbours.
        velocities[1:-1] = (h[1:] * slopes[:-1] + h[:-1] * slopes[1:]) / (h[1:] + h[:-1])
        if (np.abs(velocities) > bounds.too_fast).any():
            return None
        arrival = (2 * velocities[-2] + 4 * velocities[-1] - 6 * slopes[-1]) / h[-1]
        due, tail = np.cumsum(steps), self.stop(Motion(targets[-1], velocities[-1], arrival))
        return _joined((due, targets, velocities[1:]), tail)

    def govern(
        self, start: Motion, steps: np.ndarray, targets: np.ndarray, bounds: Bounds
    ) -> Knots:
        """As `follow`, as far as the limits allow, with constant acceleration in each step."""
        reach, fastest = bounds.reach(), bounds.speed.tolist()
        slopes = np.zeros_like(targets)
        slopes[:-1] = (targets[1:] - targets[:-1]) / steps[1:, None]
        q, v, a = start.lists()
        positions, velocities = [], []
        for h, target, slope in zip(steps.tolist(), targets.tolist(), slopes.tolist(), strict=True):
            a = self._allowed(q, v, a, self._wanted(q, v, a, target, slope, h, fastest), h, reach)
            q, v = _step(q, v, a, h)
            positions.append(q)
            velocities.append(v)
        positions, velocities = np.array(positions), np.array(velocities)
        tail = self.stop(Motion(positions[-1], velocities[-1], np.array(a)))
        return _joined((np.cumsum(steps), positions, velocities), tail)

    def _wanted(self, q, v, before, target, slope, h: float, speed: list[float]) -> list[float]:
        """Accelerations toward a target that moves at `slope`, within the limits of velocity, acceleration, jerk."""
        errors = [t - x - (y + s) / 2 * h for t, x, y, s in zip(target, q, v, slope, strict=True)]
        # The fastest correction that can still brake before the target, the same share for every joint.
        share = None
        for error, (acceleration, _) in zip(map(abs, errors), self._strengths, strict=True):
            if error > AT_REST:
                unit = acceleration * h
                most = unit * _ramp_steps(error, unit * h) / error
                share = min(1 / h if share is None else share, most)
        share = share or 0.0
        wanted = [s + share * error for s, error in zip(slope, errors, strict=True)]
        wanted = _together(wanted, speed)
        change = [w - y for w, y in zip(wanted, v, strict=True)]
        change = _together(change, [acceleration * h for acceleration, _ in self._strengths])
        dt = min(h, self.control_dt)
        return [
            _clip(c / h, b - jerk * dt, b + jerk * dt)
            for c, b, (_, jerk) in zip(change, before, self._strengths, strict=True)
        ]

    def _allowed(self, q, v, before, wanted, h: float, reach: Reach) -> list[float]:
        """The accelerations that are wanted, or the nearest toward braking after which a stop is possible."""
        if self.can_stop(q, v, wanted, h, reach):
            return wanted
        braking = self.brake(v, before, h)
        for scale in SCALES:
            mixed = [b + scale * (w - b) for b, w in zip(braking, wanted, strict=True)]
            if self.can_stop(q, v, mixed, h, reach):
                return mixed
        return braking


def _step(
    q: list[float], v: list[float], a: list[float], h: float
) -> tuple[list[float], list[float]]:
    """Positions and velocities after a step of constant acceleration; what hardly moves rests."""
    ahead = [y + z * h for y, z in zip(v, a, strict=True)]
    ahead = [0.0 if -AT_REST < y < AT_REST else y for y in ahead]
    return [x + (y + z) / 2 * h for x, y, z in zip(q, v, ahead, strict=True)], ahead


def _joined(way: Knots, tail: Knots) -> Knots:
    """One after the other; the tail's times count from the end of the way."""
    if not len(tail[0]):
        return way
    return (
        np.concatenate([way[0], way[0][-1] + tail[0]]),
        np.concatenate([way[1], tail[1]]),
        np.concatenate([way[2], tail[2]]),
    )


def _clip(value: float, low: float, high: float) -> float:
    return low if value < low else high if value > high else value


def _together(values: list[float], most: list[float]) -> list[float]:
    """Scaled down as one, so that none is larger than its limit."""
    excess = 1.0
    for value, limit in zip(map(abs, values), most, strict=True):
        if value > excess * limit:
            excess = value / limit
    return [value / excess for value in values] if excess > 1 else values


def _ramp_steps(distance: float, unit: float) -> float:
    """Steps m that a ramp of unit height and slope needs to cover a distance: unit * m (m + 1) / 2, linear between
    whole m."""
    e = 2 * distance / unit
    if e < 2:
        return e / 2
    whole = math.floor((math.sqrt(1 + 4 * e) - 1) / 2)
    return whole + (e - whole * (whole + 1)) / (2 * whole + 2)

"""Joints that are limited together, and how they follow targets as far as they may: the part of `safety` that plans.

Vectors of a handful of joints are lists of floats here: numpy takes longer to be called than to compute them.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from operator import truediv

import numpy as np

from flow_policy_rl.serving.spline import Spline

TOLERANCE = 1e-6  # relative; rounding only
AT_REST = 1e-9
SCALES = (0.75, 0.5, 0.25)  # of a step that the robot could not stop after, toward braking

Reach = list[tuple[float, float, float]]  # by joint: lowest and highest position, highest speed
State = tuple[list[float], list[float]]  # positions and velocities
Knots = tuple[list[list[float]], list[list[float]]]  # positions and velocities, step by step


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
    """Where joints may be and how fast, (A,) each.

    Attributes:
        speed_share: (n,) share of `speed` that may be used up to each target, growing; None is all of it.
    """

    low: np.ndarray
    high: np.ndarray
    speed: np.ndarray
    speed_share: np.ndarray | None = None

    def part(self, columns: slice | list[int]) -> "Bounds":
        """Those of some joints."""
        sides = self.low[columns], self.high[columns], self.speed[columns]
        return Bounds(*sides, self.speed_share)

    def reach(self, share: float = 1.0) -> Reach:
        """As plain numbers, with a little room for rounding."""
        room = TOLERANCE / 2
        sides = self.low - AT_REST, self.high + AT_REST, self.speed * (share * (1 + room))
        return list(zip(*(side.tolist() for side in sides), strict=True))

    def by_step(self, num: int) -> list[tuple[list[float], Reach]]:
        """Highest speed and reach of the step to each of `num` targets, as plain numbers."""
        if self.speed_share is None:
            return [(self.speed.tolist(), self.reach())] * num
        return [((self.speed * x).tolist(), self.reach(x)) for x in self.speed_share.tolist()]


def course(start: Motion, due: np.ndarray, targets: np.ndarray) -> Spline:
    """The cubic spline from a motion on through targets (n, A) that are due (n,) s after it."""
    times = np.concatenate([(0.0,), due])
    positions = np.concatenate([start.position[None], targets])
    h = (times[1:] - times[:-1])[:, None]
    slopes = (positions[1:] - positions[:-1]) / h
    velocities = np.empty(positions.shape)
    velocities[0], velocities[-1] = start.velocity, slopes[-1]
    # At a point between two steps: the slope of the parabola through it and both neighbours.
    velocities[1:-1] = (h[1:] * slopes[:-1] + h[:-1] * slopes[1:]) / (h[1:] + h[:-1])
    return Spline(times, positions, velocities)


def selection(columns: list[int]) -> slice | list[int]:
    """What selects columns of an array: neighbours as a slice, which is much quicker."""
    first, last = columns[0], columns[-1] + 1
    return slice(first, last) if columns == list(range(first, last)) else columns


class JointGroup:
    """Joints that are limited together: the arm, or the gripper.

    Args:
        columns: which of the robot's joints.
        limits: of all joints: position (A, 2), velocity, acceleration, jerk (A,).
    """

    def __init__(self, columns: np.ndarray, limits: dict[str, np.ndarray], control_dt: float):
        self.columns, self.control_dt = columns, control_dt
        self._own = selection(columns.tolist())
        self._numbers = set(columns.tolist())
        velocity, acceleration, jerk = (
            limits[what][columns] for what in ("velocity", "acceleration", "jerk")
        )
        jerk_step = jerk * control_dt
        self.jerk_binds = bool((jerk_step < 2 * acceleration).any())
        ramp = np.ceil(2 * acceleration / jerk_step)
        steps = velocity / (acceleration * control_dt) + 2 * ramp
        # Braking together is as slow as the slowest joint; a jerk-limited one needs its ramps besides.
        self.stop_steps = int(np.ceil(steps.max())) * (2 if self.jerk_binds else 1) + 6
        self._acceleration, self._jerk = acceleration.tolist(), jerk.tolist()

    def part(self, motion: Motion) -> Motion:
        """The motion of these joints alone."""
        own = self._own
        return Motion(motion.position[own], motion.velocity[own], motion.acceleration[own])

    def place(self, knots: Knots, positions: np.ndarray, velocities: np.ndarray) -> None:
        """Write knots into those of all joints (n, A), from the second row on; after them these joints rest."""
        own, n = self._own, len(knots[0])
        if n:
            positions[1 : n + 1, own], velocities[1 : n + 1, own] = knots
        positions[n + 1 :, own] = positions[n, own]

    def has(self, excess: list[tuple[str, int]]) -> bool:
        """Whether one of these joints breaks a limit (limits with columns)."""
        return any(column in self._numbers for _, column in excess)

    # --- coming to rest ---

    def brake(self, v: list[float], before: list[float], h: float) -> list[float]:
        """Accelerations of the next step of a stop: against the velocity, so that the direction stays."""
        dt = min(h, self.control_dt)
        strongest = _largest_share(v, self._acceleration)  # s at full acceleration
        ramp = _largest_share(v, self._jerk) / (dt * h)  # in steps of jerk
        share = min(1 / max(h, strongest), _ramp_share(ramp) / h)
        return [
            _clip(_clip(-share * x, b - jerk * dt, b + jerk * dt), -acceleration, acceleration)
            for x, b, acceleration, jerk in zip(
                v, before, self._acceleration, self._jerk, strict=True
            )
        ]

    def _slow_down(
        self, q: list[float], v: list[float], a: list[float], h: float
    ) -> Iterator[State]:
        """Positions and velocities, in steps of `h` s, until rest (or too many steps)."""
        parts = max(1, round(self.control_dt / h))
        for _ in range(self.stop_steps * parts + 1):
            if not any(abs(x) > AT_REST for x in v):
                return
            a = self.brake(v, a, h)
            q, v = _step(q, v, a, h)
            yield q, v

    def stop(self, motion: Motion, parts: int = 1) -> Knots:
        """After a motion until rest, in steps of a part of a control step; there may be none."""
        return _columns(self._slow_down(*motion.lists(), self.control_dt / parts))

    def stop_seconds(self, v: list[float], h: float) -> float:
        """How long at these velocities the joints would go as far as a stop in steps of `h` s does, where jerk does not
        bind: full braking, then one last step."""
        steps = max(1.0, _largest_share(v, self._acceleration) / h)
        full = math.floor(steps)
        rest = 1 - full / steps
        return h * (full * (1 + rest) / 2 + rest / 2)

    def after(
        self, q: list[float], v: list[float], a: list[float], h: float, reach: Reach
    ) -> State | None:
        """Where a step of constant acceleration leads; None where it, or a stop after it, breaks velocity or
        position. The steps of that stop may be as long as this one, where a soft start slows time."""
        there, ahead = [], []
        for x, y, z, (low, high, speed) in zip(q, v, a, reach, strict=True):
            y_after = y + z * h
            x_after = x + (y + y_after) / 2 * h
            if not (-speed <= y_after <= speed and low <= x_after <= high):
                return None
            # It may turn within the step.
            if y * y_after < 0 and not low <= x - y * y / (2 * z) <= high:
                return None
            there.append(x_after)
            ahead.append(y_after if abs(y_after) > AT_REST else 0.0)
        longest = max(h, self.control_dt)
        if self.jerk_binds:
            return (there, ahead) if self._rests_within(there, ahead, a, longest, reach) else None
        seconds = self.stop_seconds(ahead, longest)
        for x, y, (low, high, _) in zip(there, ahead, reach, strict=True):
            if not low <= x + y * seconds <= high:
                return None
        return there, ahead

    def _rests_within(
        self, q: list[float], v: list[float], a: list[float], h: float, reach: Reach
    ) -> bool:
        """Whether a stop in steps of `h` s comes to rest and keeps velocity and position."""
        before = v
        for q_after, v_after in self._slow_down(q, v, a, h):
            for x, y, there, ahead, (low, high, speed) in zip(
                q, before, q_after, v_after, reach, strict=True
            ):
                if not (-speed <= ahead <= speed and low <= there <= high):
                    return False
                if y * ahead < 0:  # it turns within the step
                    turn = x - y * y * h / (2 * (ahead - y))
                    if not low <= turn <= high:
                        return False
            q, before = q_after, v_after
        return not any(abs(y) > AT_REST for y in before)

    # --- following targets ---

    def follow(self, way: Spline, arrival: np.ndarray) -> Knots:
        """A course, as it is for these joints, that ends with an acceleration (A,); then a stop."""
        end = Motion(way.positions[-1], way.velocities[-1], arrival)
        positions, velocities = self.stop(self.part(end))
        own = self._own
        return (
            way.positions[1:, own].tolist() + positions,
            way.velocities[1:, own].tolist() + velocities,
        )

    def govern(self, start: Motion, due: np.ndarray, targets: np.ndarray, bounds: Bounds) -> Knots:
        """As near to targets (n, A) that are due (n,) s after the start as the limits allow, with constant
        acceleration in each step; then a stop. The start, targets and bounds are those of all joints."""
        targets, bounds = targets[:, self._own], bounds.part(self._own)
        q, v, a = self.part(start).lists()
        steps = due.copy()
        steps[1:] -= due[:-1]
        slopes = np.zeros(targets.shape)
        slopes[:-1] = (targets[1:] - targets[:-1]) / steps[1:, None]
        way: list[State] = []
        plain = steps.tolist(), targets.tolist(), slopes.tolist(), bounds.by_step(len(steps))
        for h, target, slope, (fastest, reach) in zip(*plain, strict=True):
            wanted = self._wanted(q, v, a, target, slope, h, fastest)
            a, (q, v) = self._allowed(q, v, a, wanted, h, reach)
            way.append((q, v))
        way += self._slow_down(q, v, a, self.control_dt)
        return _columns(way)

    def _wanted(self, q, v, before, target, slope, h: float, speed: list[float]) -> list[float]:
        """Accelerations toward a target that moves at `slope`, within the limits of velocity, acceleration, jerk."""
        errors = [t - x - (y + s) / 2 * h for t, x, y, s in zip(target, q, v, slope, strict=True)]
        # The fastest correction that can still brake before the target, the same share for every joint.
        share = _ramp_share(_largest_share(errors, self._acceleration) / (h * h)) / h
        wanted = [s + share * error for s, error in zip(slope, errors, strict=True)]
        slower = max(1.0, _largest_share(wanted, speed))
        change = [w / slower - y for w, y in zip(wanted, v, strict=True)]
        seconds = max(h, _largest_share(change, self._acceleration))
        if h >= self.control_dt and not self.jerk_binds:
            return [c / seconds for c in change]
        dt = min(h, self.control_dt)
        return [
            _clip(c / seconds, b - jerk * dt, b + jerk * dt)
            for c, b, jerk in zip(change, before, self._jerk, strict=True)
        ]

    def _allowed(self, q, v, before, wanted, h: float, reach: Reach) -> tuple[list[float], State]:
        """The accelerations that are wanted, or the nearest toward braking after which a stop is possible; and where
        they lead."""
        state = self.after(q, v, wanted, h, reach)
        if state is not None:
            return wanted, state
        braking = self.brake(v, before, h)
        for scale in SCALES:
            mixed = [b + scale * (w - b) for b, w in zip(braking, wanted, strict=True)]
            state = self.after(q, v, mixed, h, reach)
            if state is not None:
                return mixed, state
        return braking, _step(q, v, braking, h)


def _step(q: list[float], v: list[float], a: list[float], h: float) -> State:
    """Positions and velocities after a step of constant acceleration; what hardly moves rests."""
    ahead = [y + z * h for y, z in zip(v, a, strict=True)]
    ahead = [0.0 if -AT_REST < y < AT_REST else y for y in ahead]
    return [x + (y + z) / 2 * h for x, y, z in zip(q, v, ahead, strict=True)], ahead


def _columns(states: Iterable[State]) -> Knots:
    """Positions apart from velocities."""
    states = list(states)
    return [q for q, _ in states], [v for _, v in states]


def _clip(value: float, low: float, high: float) -> float:
    return low if value < low else high if value > high else value


def _largest_share(values: list[float], most: list[float]) -> float:
    """Of its limit, over all."""
    return max(map(truediv, map(abs, values), most))


def _ramp_share(distance: float) -> float:
    """Share of a distance (in steps of one unit) that a ramp which gains a unit of speed per step may take first, so
    that it ends there: m / distance with m (m + 1) / 2 = distance, linear between whole m."""
    e = 2 * distance
    if e <= 2:
        return 1.0
    whole = math.floor((math.sqrt(1 + 4 * e) - 1) / 2)
    return (whole + (e - whole * (whole + 1)) / (2 * whole + 2)) / distance

"""What stands between a policy and a robot. On by default, in physical units, without ROS. Not a certified safety
function.

The rule: **a plan goes out only after the whole of it, up to rest, was checked against every limit in continuous time.
Otherwise the plan before it, which was checked in the same way, stays in force.** A plan is a cubic spline that
starts in the commanded state (position and velocity) and ends at rest, so whatever happens to the node, what the
controller has is safe.

How a plan is found, for the arm and for the gripper apart:

1. The cubic through the targets, then a stop. If it is within the limits it is taken as it is.
2. Otherwise a governor runs over the targets, with constant acceleration within each step: the wanted velocity,
   then its change, are scaled down for all joints together, so that the path keeps its direction; and a step is
   taken only if the robot could still stop after it within every limit, else it is scaled toward braking.

Limits: position (less a margin), velocity, acceleration; jerk as the change of acceleration from one control step to
the next, divided by the step; and optionally a box for the tool.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flow_policy_rl.errors import InputError
from flow_policy_rl.serving.robot import Robot
from flow_policy_rl.serving.spline import Spline, extremes

TOLERANCE = 1e-6  # relative; rounding only
AT_REST = 1e-9
LIMITED_TOO_OFTEN = "plans in a row had to be limited"
SCALES = (0.75, 0.5, 0.25, 0.0)  # of a step that the robot could not stop after, toward braking


class Rejected(Exception):
    """Targets that must not be sent; the text says why."""


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


@dataclass(frozen=True)
class Checked:
    """A plan within the limits, in seconds from the start state, and what had to be done for that.

    Attributes:
        spline: ends at rest.
        num_changed: how many targets it misses by more than `SafetyFilter.changed_tolerance`, arm only.
        largest_change: by how much the worst (rad or m, arm only).
    """

    spline: Spline
    num_changed: int
    largest_change: float


class _Group:
    """Joints that are limited together: the arm, or the gripper."""

    def __init__(self, columns: np.ndarray, limits: dict[str, np.ndarray], control_dt: float):
        self.columns, self.control_dt = columns, control_dt
        self.low, self.high = limits["position"][columns].T
        self.velocity, self.acceleration, self.jerk = (
            limits[what][columns] for what in ("velocity", "acceleration", "jerk")
        )
        jerk_step = self.jerk * control_dt
        self.jerk_binds = bool((jerk_step < 2 * self.acceleration).any())
        ramp = np.ceil(2 * self.acceleration / jerk_step)
        steps = self.velocity / (self.acceleration * control_dt) + 2 * ramp
        # Braking together is as slow as the slowest joint; a jerk-limited one needs its ramps besides.
        self.stop_steps = int(np.ceil(steps.max())) * (2 if self.jerk_binds else 1) + 6

    def brake(self, velocity: np.ndarray, before: np.ndarray, h: float) -> np.ndarray:
        """Acceleration (A,) of the next step of a stop: against the velocity, so that the direction stays."""
        speed = np.abs(velocity)
        jerk_step = self.jerk * min(h, self.control_dt)
        m = _ramp_steps(speed, jerk_step * h)
        most = np.minimum(self.acceleration, np.where(m >= 1, jerk_step * m, speed / h))
        moving = speed > AT_REST
        share = min(1 / h, float((most[moving] / speed[moving]).min())) if moving.any() else 1 / h
        wanted = np.clip(-share * velocity, before - jerk_step, before + jerk_step)
        return np.clip(wanted, -self.acceleration, self.acceleration)

    def stop(
        self, motion: Motion, h: float | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Knots after a motion until rest: times (n,) from now, positions and velocities (n, A); n may be 0."""
        q, v, a = motion.position, motion.velocity, motion.acceleration
        times, positions, velocities = [], [], []
        at, h = 0.0, h or self.control_dt
        while (np.abs(v) > AT_REST).any() and len(times) <= self.stop_steps:
            a = self.brake(v, a, h)
            ahead = v + a * h
            ahead[np.abs(ahead) < AT_REST] = 0.0
            q, v, at, h = q + (v + ahead) / 2 * h, ahead, at + h, self.control_dt
            times.append(at)
            positions.append(q)
            velocities.append(v)
        width = len(self.columns)
        return (
            np.array(times),
            np.array(positions).reshape(-1, width),
            np.array(velocities).reshape(-1, width),
        )

    def can_stop(
        self,
        before: Motion,
        acceleration: np.ndarray,
        h: float,
        low: np.ndarray,
        high: np.ndarray,
        speed: np.ndarray,
    ) -> bool:
        """Whether a step of constant acceleration, and a stop after it, keep velocity and position."""
        v = before.velocity + acceleration * h
        if (np.abs(v) > speed * (1 + TOLERANCE / 2)).any():
            return False
        q = before.position + (before.velocity + v) / 2 * h
        slope = np.where(acceleration == 0, 1.0, acceleration)
        turning = before.velocity * v < 0  # within this step
        turn = np.where(turning, before.position - before.velocity**2 / (2 * slope), q)
        if not self.jerk_binds:
            rest = q + self.stop_distance(v)
            nearest, farthest = np.minimum(np.minimum(q, turn), rest), np.maximum(q, turn)
            farthest = np.maximum(farthest, rest)
        else:
            times, positions, velocities = self.stop(Motion(q, v, acceleration))
            if len(times) and (np.abs(velocities[-1]) > AT_REST).any():
                return False
            if (np.abs(velocities) > speed * (1 + TOLERANCE / 2)).any():
                return False
            knots = np.vstack([turn, q, positions])
            v = np.vstack([v, velocities])
            slope = (v[1:] - v[:-1]) / self.control_dt
            turning = v[:-1] * v[1:] < 0
            reach = v[:-1] ** 2 / np.where(turning, 2 * slope, 1.0)
            knots = np.vstack([knots, np.where(turning, knots[1:-1] - reach, q)])
            nearest, farthest = knots.min(axis=0), knots.max(axis=0)
        return bool((nearest >= low - 1e-9).all() and (farthest <= high + 1e-9).all())

    def stop_distance(self, velocity: np.ndarray) -> np.ndarray:
        """How far `stop` goes (A,) from a velocity, where jerk does not bind: full braking, then one last step."""
        speed = np.abs(velocity)
        moving = speed > AT_REST
        if not moving.any():
            return np.zeros_like(velocity)
        steps = max(1.0, 1 / (self.control_dt * (self.acceleration[moving] / speed[moving]).min()))
        full = np.floor(steps) if steps > 1 else 0.0
        rest = 1 - full / steps
        return velocity * self.control_dt * (full * (1 + rest) / 2 + rest / 2)

    def govern(
        self,
        start: Motion,
        steps: np.ndarray,
        targets: np.ndarray,
        low: np.ndarray,
        high: np.ndarray,
        speed: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Follow targets (n, A) due after `steps` (n,) s each, as far as the limits allow; then stop. Knots as
        `stop`."""
        motion = start
        slopes = np.diff(targets, axis=0) / steps[1:, None]
        slopes = np.vstack([slopes, np.zeros(targets.shape[1])])
        positions, velocities = [], []
        for h, target, slope in zip(steps, targets, slopes, strict=True):
            q, v, before = motion.position, motion.velocity, motion.acceleration
            error = target - q - (v + slope) / 2 * h
            # The fastest correction that can still brake before the target, the same share for every joint.
            most = self.acceleration * h * _ramp_steps(np.abs(error), self.acceleration * h**2)
            off = np.abs(error) > AT_REST
            share = min(1 / h, float((most[off] / np.abs(error[off])).min())) if off.any() else 0.0
            wanted = _together(slope + share * error, speed)
            change = _together(wanted - v, self.acceleration * h)
            jerk_step = self.jerk * min(h, self.control_dt)
            a = np.clip(change / h, before - jerk_step, before + jerk_step)
            if not self.can_stop(motion, a, h, low, high, speed):
                braking = self.brake(v, before, h)
                a = next(
                    (
                        mixed
                        for mixed in (braking + s * (a - braking) for s in SCALES)
                        if self.can_stop(motion, mixed, h, low, high, speed)
                    ),
                    braking,
                )
            ahead = v + a * h
            motion = Motion(q + (v + ahead) / 2 * h, ahead, a)
            positions.append(motion.position)
            velocities.append(motion.velocity)
        times, more_positions, more_velocities = self.stop(motion)
        done = np.cumsum(steps)
        return (
            np.concatenate([done, done[-1] + times]),
            np.vstack([np.array(positions), more_positions]),
            np.vstack([np.array(velocities), more_velocities]),
        )

    def follow(
        self, start: Motion, steps: np.ndarray, targets: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The cubic through the targets as they are, then a stop. Knots as `stop`."""
        due = np.cumsum(steps)
        h = steps[:, None]
        slopes = np.vstack([targets[:1] - start.position, targets[1:] - targets[:-1]]) / h
        velocities = np.vstack([start.velocity, slopes])
        # At a point between two steps: the slope of the parabola through it and both neighbours.
        velocities[1:-1] = (h[1:] * slopes[:-1] + h[:-1] * slopes[1:]) / (h[1:] + h[:-1])
        arrival = (2 * velocities[-2] + 4 * velocities[-1] - 6 * slopes[-1]) / h[-1]
        times, more_positions, more_velocities = self.stop(
            Motion(targets[-1], velocities[-1], arrival)
        )
        return (
            np.concatenate([due, due[-1] + times]),
            np.vstack([targets, more_positions]),
            np.vstack([velocities[1:], more_velocities]),
        )

    def part(self, motion: Motion) -> Motion:
        """The motion of these joints alone."""
        return Motion(
            motion.position[self.columns],
            motion.velocity[self.columns],
            motion.acceleration[self.columns],
        )


class SafetyFilter:
    """Turns targets into plans within the limits of a robot, or refuses.

    Args:
        max_start_distance: largest distance (rad or m) of the first target of a run from where the robot is.
        position_margin: distance (rad) that arm joints keep from their limits.
        changed_tolerance: a target missed by more than this (rad or m) counts as changed.
        workspace: whether to keep the tool within the box of the robot file, where it has one.
    """

    def __init__(
        self,
        robot: Robot,
        joint_names: Sequence[str],
        control_dt: float,
        max_start_distance: float = 0.5,
        position_margin: float = 0.0,
        changed_tolerance: float = 0.25,
        workspace: bool = True,
    ):
        self.joint_names = tuple(joint_names)
        self.control_dt = control_dt
        self.max_start_distance = max_start_distance
        self.changed_tolerance = changed_tolerance
        limits = {
            what: robot.limit_array(self.joint_names, what)
            for what in ("position", "velocity", "acceleration", "jerk")
        }
        in_arm = np.array([name in robot.arm for name in self.joint_names])
        margins = np.where(in_arm, position_margin, 0.0)[:, None] * [1, -1]
        limits["position"] = limits["position"] + margins
        self.limits = limits
        self.low, self.high = limits["position"].T
        if (self.low >= self.high).any():
            name = self.joint_names[int((self.low >= self.high).argmax())]
            raise InputError(f"position_margin {position_margin} leaves {name} no range")
        self.arm = np.flatnonzero(in_arm)
        self._groups = [
            _Group(columns, limits, control_dt)
            for columns in (self.arm, np.flatnonzero(~in_arm))
            if len(columns)
        ]
        self._whole = _Group(np.arange(len(self.joint_names)), limits, control_dt)
        self._kinematics = robot.chain if workspace and robot.workspace is not None else None
        self._box = robot.workspace if workspace else None

    def check(
        self,
        start: Motion,
        due: np.ndarray,
        targets: np.ndarray,
        *,
        measured: np.ndarray | None = None,
        speed_scale: float = 1.0,
    ) -> Checked:
        """A plan through targets (n, A) that are due (n,) s after the start state, as far as the limits allow.

        Args:
            measured: (A,) where the robot is, given at the start of a run; the first target must be near.
            speed_scale: share of the velocity limits to use, for a soft start.

        Raises:
            Rejected: a number is not finite, the first target is too far away, or no plan is within the limits.
        """
        self._make_sense(due, targets, measured)
        low, high = np.minimum(self.low, start.position), np.maximum(self.high, start.position)
        speed = self.limits["velocity"] * speed_scale
        steps = np.diff(due, prepend=0.0)
        wanted = np.clip(targets, self.low, self.high)
        everything = self._whole.follow(start, steps, wanted)
        if not self._excess(self._whole, start, everything, low, high, speed):
            spline = self._merge(start, [(self._whole, everything)])
        else:
            spline = self._limited(start, steps, wanted, low, high, speed)
        spline = self._within_box(start, spline, len(due))
        reached = spline.positions[1 : len(due) + 1]
        if len(reached) < len(due):
            reached = spline.position(due)
        missed = np.abs(reached - targets)[:, self.arm].max(axis=1)
        changed = missed > self.changed_tolerance
        return Checked(spline, int(changed.sum()), float(missed.max()))

    def _limited(self, start: Motion, steps, wanted, low, high, speed) -> Spline:
        """Arm and gripper apart, each as it is where that is within the limits, else governed."""
        plans = []
        for group in self._groups:
            part, columns = group.part(start), group.columns
            bounds = low[columns], high[columns], speed[columns]
            knots = group.follow(part, steps, wanted[:, columns])
            if self._excess(group, part, knots, *bounds):
                knots = group.govern(part, steps, wanted[:, columns], *bounds)
                excess = self._excess(group, part, knots, *bounds)
                if excess:
                    raise Rejected(f"no plan within the limits: {excess}")
            plans.append((group, knots))
        return self._merge(start, plans)

    def stop(self, start: Motion) -> Spline | None:
        """The quickest plan to rest from a commanded state; None when it would break a limit (then stay with the
        plan in force)."""
        low, high = np.minimum(self.low, start.position), np.maximum(self.high, start.position)
        plans = []
        for group in self._groups:
            part, columns = group.part(start), group.columns
            times, positions, velocities = group.stop(part)
            if not len(times):  # at rest already: one step of standing still
                times = np.array([self.control_dt])
                positions, velocities = part.position[None], np.zeros((1, len(columns)))
            knots = (times, positions, velocities)
            bounds = low[columns], high[columns], self.limits["velocity"][columns]
            if self._excess(group, part, knots, *bounds):
                return None
            plans.append((group, knots))
        return self._merge(start, plans)

    def _make_sense(
        self, due: np.ndarray, targets: np.ndarray, measured: np.ndarray | None
    ) -> None:
        if targets.shape != (len(due), len(self.joint_names)) or not len(due):
            raise Rejected(
                f"targets have shape {targets.shape}, not {(len(due), len(self.joint_names))}"
            )
        finite = np.isfinite(targets).all(axis=0)
        if not finite.all():
            bad = [n for n, good in zip(self.joint_names, finite, strict=True) if not good]
            raise Rejected(f"not a finite target for {', '.join(bad)}")
        if measured is None:
            return
        distance = np.abs(targets[0] - measured)
        if not (distance <= self.max_start_distance).all():
            worst = int(distance.argmax())
            raise Rejected(
                f"first target of {self.joint_names[worst]} is {distance[worst]:.3f} away from where it is, "
                f"limit {self.max_start_distance:.3f}"
            )

    def _excess(self, group: _Group, start: Motion, knots, low, high, speed) -> str:
        """Which limit a plan breaks; empty when none."""
        times, positions, velocities = knots
        if not np.isfinite(positions).all() or (np.abs(velocities[-1]) > AT_REST).any():
            return "it does not come to rest"
        spline = Spline(
            np.concatenate([[0.0], times]),
            np.vstack([start.position, positions]),
            np.vstack([start.velocity, velocities]),
        )
        found = extremes(spline, start.acceleration)
        slack = 1 + TOLERANCE
        broken = {
            "position": (found.low < low - 1e-6) | (found.high > high + 1e-6),
            "velocity": found.speed > speed * slack + 1e-9,
            "acceleration": found.acceleration > group.acceleration * slack + 1e-6,
            "jerk": found.jerk_step > group.jerk * self.control_dt * slack + 1e-6,
        }
        names = [self.joint_names[c] for c in group.columns]
        return ", ".join(
            f"{what} of {name}"
            for what, wrong in broken.items()
            for name, bad in zip(names, wrong, strict=True)
            if bad
        )

    def _merge(self, start: Motion, plans: list[tuple[_Group, tuple]]) -> Spline:
        """The groups' knots side by side. All have the same steps; the shorter one rests at its end."""
        times = max((knots[0] for _, knots in plans), key=len)
        positions = np.empty((len(times) + 1, len(self.joint_names)))
        velocities = np.zeros_like(positions)
        positions[0], velocities[0] = start.position, start.velocity
        for group, (own, position, velocity) in plans:
            n = len(own)
            positions[1 : n + 1, group.columns], positions[n + 1 :, group.columns] = (
                position,
                position[-1],
            )
            velocities[1 : n + 1, group.columns] = velocity
        velocities[-1] = 0.0
        return Spline(np.concatenate([[0.0], times]), positions, velocities)

    # --- the tool's box ---

    def _within_box(self, start: Motion, spline: Spline, num_targets: int) -> Spline:
        """The plan up to where it can still stop with the tool inside the box.

        Raises:
            Rejected: not even an immediate stop stays inside (and the tool is not on its way in).
        """
        if self._kinematics is None:
            return spline
        outside_now = self._outside(start.position[None])[0]
        if self._stays_inside(spline, outside_now):
            return spline
        for k in range(num_targets, -1, -1):
            motion = Motion(*spline.sample(float(spline.times[k]) - 1e-12)) if k else start
            motion = (
                Motion(spline.positions[k], spline.velocities[k], motion.acceleration)
                if k
                else start
            )
            tail = self.stop(motion)
            if tail is None:
                continue
            cut = Spline(
                np.concatenate([spline.times[:k], spline.times[k] + tail.times]),
                np.vstack([spline.positions[:k], tail.positions]),
                np.vstack([spline.velocities[:k], tail.velocities]),
            )
            if self._stays_inside(cut, outside_now):
                return cut
        raise Rejected("no plan within the limits: the tool would leave the workspace box")

    def _outside(self, positions: np.ndarray) -> np.ndarray:
        """How far the tool is outside the box, (n,) m."""
        tool = self._kinematics.tool_position(self.joint_names, positions)
        low, high = self._box
        return np.maximum(np.maximum(low - tool, tool - high), 0.0).max(axis=1)

    def _stays_inside(self, spline: Spline, outside_now: float) -> bool:
        """At the knots and halfway between them; from outside, only on the way in."""
        middles = spline.position((spline.times[1:] + spline.times[:-1]) / 2)
        outside = self._outside(np.vstack([spline.positions, middles]))
        return bool((outside <= max(outside_now, 0.0) + 1e-6).all())


class EmergencyStop:
    """Latched: once tripped it stays so until it is reset, whatever happens.

    Args:
        max_consecutive_limited: trip after so many plans in a row in which an arm target had to be changed; 0 is never.
    """

    def __init__(self, max_consecutive_limited: int = 0):
        self.max_consecutive_limited = max_consecutive_limited
        self.reason = ""
        self.trips = 0
        self._in_a_row = 0

    @property
    def tripped(self) -> bool:
        """Whether the robot must stand still."""
        return bool(self.reason)

    def trip(self, reason: str) -> None:
        """Stop until reset. The first reason stays, but one from outside outweighs its own."""
        self.trips += not self.reason
        if not self.reason or tripped_by_itself(self.reason):
            self.reason = reason

    def reset(self) -> None:
        """Allow motion again."""
        self.reason, self._in_a_row = "", 0

    def count(self, checked: Checked) -> bool:
        """Take note of a plan; True when it trips."""
        self._in_a_row = self._in_a_row + 1 if checked.num_changed else 0
        if 0 < self.max_consecutive_limited <= self._in_a_row:
            self.trip(f"{self._in_a_row} {LIMITED_TOO_OFTEN}")
        return self.tripped


def tripped_by_itself(reason: str) -> bool:
    """Whether this is the reason of a stop that the limits brought about, and no person or other program."""
    return reason.endswith(LIMITED_TOO_OFTEN)


def _together(values: np.ndarray, most: np.ndarray) -> np.ndarray:
    """Scaled down as one, so that none is larger than its limit."""
    return values / max(1.0, float((np.abs(values) / most).max()))


def _ramp_steps(distance: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """Steps m that a ramp of unit height and slope needs to cover a distance: unit * m (m + 1) / 2, linear between
    whole m."""
    e = 2 * distance / unit
    whole = np.floor((np.sqrt(1 + 4 * e) - 1) / 2)
    return whole + (e - whole * (whole + 1)) / (2 * whole + 2)

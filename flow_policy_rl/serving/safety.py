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
from flow_policy_rl.serving.governor import (
    AT_REST,
    TOLERANCE,
    Bounds,
    Course,
    JointGroup,
    Knots,
    Motion,
)
from flow_policy_rl.serving.robot import LIMITS, Robot
from flow_policy_rl.serving.spline import Extremes, Spline, extremes, hull

Excess = list[tuple[str, int]]  # a limit, and the column of the joint that breaks it

KINDS = (*LIMITS, "box")
CHECKED = (*LIMITS, "rest")
STOP_PARTS = (
    1,
    4,
    16,
)  # of a control step: a gripper near its limit may be too near for a step that is long
LIMITED_TOO_OFTEN = "plans in a row had to be limited"


class Rejected(Exception):
    """Targets that must not be sent; the text says why."""


@dataclass(frozen=True)
class Checked:
    """A plan within the limits, in seconds from the start state, and what had to be done for that.

    Attributes:
        spline: ends at rest.
        num_changed: how many targets it misses by more than `SafetyFilter.changed_tolerance`, arm only.
        largest_change: by how much the worst (rad or m, arm only).
        beyond: which of `KINDS` of limits the targets go beyond, arm only: why they are not followed as they are.
    """

    spline: Spline
    num_changed: int
    largest_change: float
    beyond: tuple[str, ...]


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
        limits = {what: robot.limit_array(self.joint_names, what) for what in LIMITS}
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
            JointGroup(columns, limits, control_dt)
            for columns in (self.arm, np.flatnonzero(~in_arm))
            if len(columns)
        ]
        self._strongest = limits["acceleration"] * (1 + TOLERANCE) + 1e-6
        self._jerk_step = limits["jerk"] * control_dt * (1 + TOLERANCE) + 1e-6
        self._kinematics = robot.chain if workspace and robot.workspace is not None else None
        self._box = robot.workspace if workspace else None

    def check(
        self,
        start: Motion,
        due: np.ndarray,
        targets: np.ndarray,
        *,
        measured: np.ndarray | None = None,
        speed_share: np.ndarray | None = None,
    ) -> Checked:
        """A plan through targets (n, A) that are due (n,) s after the start state, as far as the limits allow.

        Args:
            measured: (A,) where the robot is, given at the start of a run; the first target must be near.
            speed_share: (n,) share of the velocity limits to use up to each target, growing, for a soft start.

        Raises:
            Rejected: a number is not finite, the first target is too far away, or no plan is within the limits.
        """
        self._make_sense(due, targets, measured)
        bounds = self._bounds(start, speed_share)
        steps = due.astype(float)
        steps[1:] -= due[:-1]
        wanted = np.minimum(np.maximum(targets, self.low), self.high)
        plan, beyond = self._plan(start, steps, wanted, bounds)
        if (wanted != targets)[:, self.arm].any():
            beyond.add("position")
        spline = self._within_box(start, plan, len(due))
        if spline is not plan:
            beyond.add("box")
        reached = spline.positions[1 : len(due) + 1]
        if len(reached) < len(due):
            reached = spline.position(due)
        missed = np.abs(reached - targets)[:, self.arm].max(axis=1)
        changed = missed > self.changed_tolerance
        kinds = tuple(kind for kind in KINDS if kind in beyond)
        return Checked(spline, int(changed.sum()), float(missed.max()), kinds)

    def _bounds(self, start: Motion, speed_share: np.ndarray | None = None) -> Bounds:
        """The limits of a plan. One that starts outside of a joint's range may stay there."""
        return Bounds(
            np.minimum(self.low, start.position),
            np.maximum(self.high, start.position),
            self.limits["velocity"],
            speed_share,
        )

    def _plan(
        self, start: Motion, steps: np.ndarray, wanted: np.ndarray, bounds: Bounds
    ) -> tuple[Spline, set[str]]:
        """Arm and gripper apart, each through its targets where that is within the limits, else governed; and which
        limits the arm's targets go beyond."""
        course = Course.through(start, steps, wanted)
        too_much = course.beyond(
            start.acceleration, bounds.too_fast_at, self._strongest, self._jerk_step
        )
        beyond = {KINDS[1 + k] for k in np.flatnonzero(too_much[:, self.arm].any(axis=1))}

        def governed(group: JointGroup) -> Knots:
            own = group.columns
            return group.govern(group.part(start), steps, wanted[:, own], bounds.part(own))

        follows = [not too_much[:, group.columns].any() for group in self._groups]
        plans = [
            group.follow(course) if smooth else governed(group)
            for group, smooth in zip(self._groups, follows, strict=True)
        ]
        spline = self._merge(start, plans)
        excess = self._excess(start, spline, bounds)
        broken = {column for _, column in excess}
        again = [
            smooth and not broken.isdisjoint(group.columns.tolist())
            for group, smooth in zip(self._groups, follows, strict=True)
        ]
        if any(again):
            beyond |= {what for what, column in excess if column in self.arm}
            plans = [
                governed(group) if anew else knots
                for group, anew, knots in zip(self._groups, again, plans, strict=True)
            ]
            spline = self._merge(start, plans)
            excess = self._excess(start, spline, bounds)
        if excess:
            names = (f"{what} of {self.joint_names[column]}" for what, column in excess)
            raise Rejected(f"no plan within the limits: {', '.join(names)}")
        return spline, beyond

    def stop(self, start: Motion) -> Spline | None:
        """The quickest plan to rest from a commanded state; None when it would break a limit (then stay with the
        plan in force)."""
        for parts in STOP_PARTS:
            plans = [group.stop(group.part(start), parts) for group in self._groups]
            spline = self._merge(start, plans)
            if not self._excess(start, spline, self._bounds(start)):
                return spline
        return None

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

    def _excess(self, start: Motion, spline: Spline, bounds: Bounds) -> Excess:
        """Which limits of which joints (columns) a plan breaks."""
        found = hull(spline, start.acceleration)
        broken = self._broken(spline, found, bounds)
        if not broken.any():
            return []
        if (broken[:2].any(axis=0) & ~broken[2:].any(axis=0)).any():  # the hull is wide
            broken = self._broken(spline, extremes(spline, found), bounds)
        return [(CHECKED[i], int(k)) for i, k in zip(*broken.nonzero(), strict=True)]

    def _broken(self, spline: Spline, found: Extremes, bounds: Bounds) -> np.ndarray:
        """(5, A): which of `CHECKED` are broken, rounding aside; all of them where a number is nan."""
        return ~np.array(
            [
                (found.low >= bounds.low - 1e-6) & (found.high <= bounds.high + 1e-6),
                found.speed <= bounds.too_fast,
                found.acceleration <= self._strongest,
                found.jerk_step <= self._jerk_step,
                spline.velocities[-1] == 0,
            ]
        )

    def _merge(self, start: Motion, plans: list[Knots]) -> Spline:
        """The groups' knots side by side. All have the same steps; the shorter one rests at its end. One that moves
        nowhere stands still for a step."""
        times = max((knots[0] for knots in plans), key=len)
        if not len(times):
            times = np.array([self.control_dt])
        positions = np.empty((len(times) + 1, len(self.joint_names)))
        velocities = np.zeros_like(positions)
        positions[0], velocities[0] = start.position, start.velocity
        for group, (own, position, velocity) in zip(self._groups, plans, strict=True):
            c, n = group.columns, len(own)
            positions[1 : n + 1, c], velocities[1 : n + 1, c] = position, velocity
            positions[n + 1 :, c] = positions[n, c]
        last = velocities[-1]
        last[np.abs(last) <= AT_REST] = 0.0
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

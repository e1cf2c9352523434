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
    JointGroup,
    Knots,
    Motion,
    course,
)
from flow_policy_rl.serving.robot import LIMITS, Robot
from flow_policy_rl.serving.spline import Extremes, Spline, derivatives, extremes, hull

Excess = list[tuple[str, int]]  # a limit, and the column of the joint that breaks it

KINDS = (*LIMITS, "box")
# A stop is tried in whole control steps, then in parts of one: a gripper near its limit may be too near for long ones.
STOP_PARTS = (1, 4, 16)
# Share of the robot's acceleration and jerk that plans use. A message leaves out the knot that is about to pass
# (`commander.NEAREST_S`); the controller's own spline then accelerates by up to a fiftieth more than the plan.
USABLE = 0.97
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
        for what in ("acceleration", "jerk"):
            limits[what] = USABLE * limits[what]
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
        self._in_arm = in_arm.astype(float)
        self._too_fast = limits["velocity"] * (1 + TOLERANCE) + 1e-9
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
        braked: np.ndarray | None = None,
    ) -> Checked:
        """A plan through targets (n, A) that are due (n,) s after the start state, as far as the limits allow.

        Args:
            measured: (A,) where the robot is, given at the start of a run; the first target must be near.
            speed_share: (n,) share of the velocity limits to use up to each target, growing, for a soft start.
            braked: (A,) acceleration with which it came to rest within the last control step, where it did. To stop
                and to start at once could be twice the jerk.

        Raises:
            Rejected: a number is not finite, the first target is too far away, or no plan is within the limits.
        """
        self._make_sense(due, targets, measured)
        bounds = self._bounds(start, speed_share)
        wanted = np.minimum(np.maximum(targets, self.low), self.high)
        plan, beyond = self._plan(start, due, wanted, bounds)
        if (np.abs(wanted - targets) * self._in_arm).max() > 0:
            beyond.add("position")
        spline = self._within_box(start, plan, len(due))
        if spline is not plan:
            beyond.add("box")
        if braked is not None:
            self._refuse_jolt(spline, braked)
        reached = spline.positions[1 : len(due) + 1]
        if len(reached) < len(due):
            reached = spline.position(due)
        missed = (np.abs(reached - targets) * self._in_arm).max(axis=1).tolist()
        num_changed = sum(distance > self.changed_tolerance for distance in missed)
        kinds = tuple(kind for kind in KINDS if kind in beyond)
        return Checked(spline, num_changed, max(missed), kinds)

    def _bounds(self, start: Motion, speed_share: np.ndarray | None = None) -> Bounds:
        """The limits of a plan. One that starts outside of a joint's range may stay there."""
        return Bounds(
            np.minimum(self.low, start.position),
            np.maximum(self.high, start.position),
            self.limits["velocity"],
            speed_share,
        )

    def _plan(
        self, start: Motion, due: np.ndarray, wanted: np.ndarray, bounds: Bounds
    ) -> tuple[Spline, set[str]]:
        """Arm and gripper apart, each through its targets where that is within the limits, else governed; and which
        limits the arm's targets go beyond."""
        way = course(start, due, wanted)
        _, accelerations = derivatives(way, start.acceleration)
        accelerations = accelerations[:-1]  # it does not end at rest
        over = self._beyond(way, accelerations, bounds)
        while True:
            governed = [group.has(over) for group in self._groups]
            plans = [
                group.govern(start, due, wanted, bounds)
                if must
                else group.follow(way, accelerations[-1])
                for group, must in zip(self._groups, governed, strict=True)
            ]
            spline = self._merge(start, due, plans)
            excess = self._excess(start, spline, bounds)
            if not excess:
                return spline, {what for what, column in over if self._in_arm[column]}
            if all(
                must or not group.has(excess)
                for group, must in zip(self._groups, governed, strict=True)
            ):
                names = (f"{what} of {self.joint_names[column]}" for what, column in excess)
                raise Rejected(f"no plan within the limits: {', '.join(names)}")
            over += excess  # between the targets, or in the stop after them

    def stop(self, start: Motion) -> Spline | None:
        """The quickest plan to rest from a commanded state; None when it would break a limit (then stay with the
        plan in force)."""
        for parts in STOP_PARTS:
            plans = [group.stop(group.part(start), parts) for group in self._groups]
            spline = self._merge(start, np.zeros(0), plans, self.control_dt / parts)
            if not self._excess(start, spline, self._bounds(start)):
                return spline
        return None

    def refuse_unless_finite(self, targets: np.ndarray) -> None:
        """Raises:
        Rejected: a target (n, A) is no number, or an infinite one.
        """
        if not np.abs(targets).max() < np.inf:
            finite = np.isfinite(targets).all(axis=0)
            bad = [n for n, good in zip(self.joint_names, finite, strict=True) if not good]
            raise Rejected(f"not a finite target for {', '.join(bad)}")

    def _make_sense(
        self, due: np.ndarray, targets: np.ndarray, measured: np.ndarray | None
    ) -> None:
        if targets.shape != (len(due), len(self.joint_names)) or not len(due):
            raise Rejected(
                f"targets have shape {targets.shape}, not {(len(due), len(self.joint_names))}"
            )
        self.refuse_unless_finite(targets)
        if measured is None:
            return
        distance = np.abs(targets[0] - measured)
        if not (distance <= self.max_start_distance).all():
            worst = int(distance.argmax())
            raise Rejected(
                f"first target of {self.joint_names[worst]} is {distance[worst]:.3f} away from where it is, "
                f"limit {self.max_start_distance:.3f} (max_start_distance)"
            )

    def _refuse_jolt(self, spline: Spline, braked: np.ndarray) -> None:
        change = np.abs(spline.sample(float(spline.times[0]))[2] - braked)
        for _, column in _over(("jerk", change, self._jerk_step)):
            name = self.joint_names[column]
            raise Rejected(
                f"no plan within the limits: jerk of {name}, which has only just stopped"
            )

    def _beyond(self, way: Spline, accelerations: np.ndarray, bounds: Bounds) -> Excess:
        """Which limits of which joints (columns) a course goes beyond: speed at its targets, one-sided accelerations
        (2 n + 1, A) and their changes."""
        speeds = np.abs(way.velocities[1:])
        if bounds.speed_share is not None:
            speeds /= bounds.speed_share[:, None]
        strength, roughness = accelerations[1:], accelerations[1:] - accelerations[:-1]
        return _over(
            ("velocity", speeds.max(axis=0), self._too_fast),
            ("acceleration", np.abs(strength).max(axis=0), self._strongest),
            ("jerk", np.abs(roughness).max(axis=0), self._jerk_step),
        )

    def _excess(self, start: Motion, spline: Spline, bounds: Bounds) -> Excess:
        """Which limits of which joints (columns) a plan breaks, anywhere; all of them where a number is nan."""
        found = hull(spline, start.acceleration)
        excess = self._broken(found, bounds)
        if any(what in ("position", "velocity") for what, _ in excess):  # the hull is wide
            excess = self._broken(extremes(spline, found), bounds)
        return excess + _over(("rest", np.abs(spline.velocities[-1]), 0.0))

    def _broken(self, found: Extremes, bounds: Bounds) -> Excess:
        return _over(
            ("position", np.maximum(bounds.low - found.low, found.high - bounds.high), 1e-6),
            ("velocity", found.speed, self._too_fast),
            ("acceleration", found.acceleration, self._strongest),
            ("jerk", found.jerk_step, self._jerk_step),
        )

    def _merge(
        self, start: Motion, due: np.ndarray, plans: list[Knots], stop_step: float | None = None
    ) -> Spline:
        """The groups' knots side by side: at the targets, then by control steps or those of a stop. The shorter one
        rests at its end. One that moves nowhere stands still for a step."""
        num = max(1, *(len(positions) for positions, _ in plans))
        times = np.zeros(num + 1)
        times[1 : len(due) + 1] = due
        later = np.arange(1, num - len(due) + 1) * (stop_step or self.control_dt)
        times[len(due) + 1 :] = times[len(due)] + later
        positions = np.empty((num + 1, len(self.joint_names)))
        velocities = np.zeros((num + 1, len(self.joint_names)))
        positions[0], velocities[0] = start.position, start.velocity
        for group, knots in zip(self._groups, plans, strict=True):
            group.place(knots, positions, velocities)
        velocities[-1] *= np.abs(velocities[-1]) > AT_REST
        return Spline(times, positions, velocities)

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
            motion = Motion(*spline.sample(float(spline.times[k]), before=True)) if k else start
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


def _over(*limits: tuple[str, np.ndarray, np.ndarray | float]) -> Excess:
    """What is more (A,) than it may be, by name; nan is."""
    return [
        (what, column)
        for what, found, most in limits
        for column, fine in enumerate((found <= most).tolist())
        if not fine
    ]


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

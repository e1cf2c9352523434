"""From chunks to the plan that the robot follows: joining, safety, stopping. Used by the node, and by simulation
without ROS."""

from bisect import bisect_left, bisect_right
from dataclasses import dataclass, replace

import numpy as np

from flow_policy_rl.serving.chunk_scheduler import ChunkScheduler, Targets
from flow_policy_rl.serving.pace import REAL_TIME, Pace
from flow_policy_rl.serving.safety import Checked, EmergencyStop, Motion, Rejected, SafetyFilter
from flow_policy_rl.serving.spline import Spline

SHORTEST_SEGMENT = 1_000_000  # ns
# A knot nearer than this is left out: rounded to ns, it would turn into acceleration. In segments of 10 ms that costs
# at most two hundredths of acceleration, where that turns round.
NEAREST_S = 5e-5


@dataclass(frozen=True)
class Plan:
    """A motion that is or may be commanded: a spline whose time zero is `start` (ns); what is before that is over. It
    ends at rest."""

    start: int
    spline: Spline

    def at(self, now: int) -> Motion:
        """Commanded state at a time; the acceleration is the one before it."""
        return Motion(*self.spline.sample((now - self.start) / 1e9, before=True))

    def settled(self, now: int) -> bool:
        """Whether it has come to rest."""
        return (now - self.start) / 1e9 >= self.spline.end

    def points(self, now: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Times (n,) s from now, positions, velocities (n, A): what a trajectory message needs, the last at rest."""
        times = self.spline.times - (now - self.start) / 1e9
        first = bisect_right(times, NEAREST_S)
        if first == len(times):
            first, times = len(times) - 1, times - times[-1] + 1e-3
        return times[first:], self.spline.positions[first:], self.spline.velocities[first:]


@dataclass(frozen=True)
class Outcome:
    """A new plan in force, the targets it came from, and what the safety filter did to them."""

    plan: Plan
    targets: Targets
    checked: Checked


class Commander:
    """Keeps the plan in force. Not thread safe.

    Args:
        soft_start_s: time from the first command of a run until it goes at full speed.
    """

    def __init__(
        self,
        scheduler: ChunkScheduler,
        safety: SafetyFilter,
        emergency: EmergencyStop | None = None,
        soft_start_s: float = 0.0,
    ):
        self.scheduler, self.safety = scheduler, safety
        self.emergency = emergency or EmergencyStop()
        self.soft_start_s = soft_start_s
        self.plan: Plan | None = None
        self._pace: Pace | None = None  # of the run; none before its first plan

    def forget(self) -> None:
        """Nothing is commanded: the robot may be anywhere."""
        self.plan, self._pace = None, None
        self.scheduler.reset()

    def prefix_inputs(self, stamp: int) -> dict[str, np.ndarray]:
        """`prefix` (1, P, A) and `inference_delay` (1,) for an observation of this time; empty for a policy without."""
        if not self.scheduler.prefix_horizon:
            return {}
        prefix = self.scheduler.prefix(stamp, self._pace or REAL_TIME)
        return {"prefix": prefix.actions[None], "inference_delay": np.array([prefix.delay])}

    def accept(self, chunk: np.ndarray, stamp: int, now: int, measured: np.ndarray) -> Outcome:
        """Put a chunk (H, A) observed at `stamp` in force.

        Args:
            measured: (A,) where the joints are: a run starts there when nothing is commanded yet, and its first target
                must be near.

        Raises:
            Rejected: nothing of it can be executed; the plan before stays in force.
        """
        if self.emergency.tripped:
            raise Rejected(f"emergency stop: {self.emergency.reason}")
        self.safety.refuse_unless_finite(chunk)
        first = self._pace is None
        pace = Pace(now, self.soft_start_s) if first else self._pace
        targets = self.scheduler.join(chunk, stamp, now, pace)
        if targets is None:
            raise Rejected("the chunk was late: all of its actions are past")
        since, start = self._changeable(now, measured)
        checked = self.safety.check(
            start,
            (targets.due - since) / 1e9,
            targets.positions,
            measured=measured if first else None,
            speed_share=None if pace.full(now) else pace.share(targets.due),
        )
        self.plan = self._continued(since, checked.spline, now)
        self._pace = pace
        self.emergency.count(checked)
        return Outcome(self.plan, targets, checked)

    def check_following(self, stamp: int, measured: np.ndarray, limit: float) -> None:
        """The arm must be where it was sent: no joint of it further (rad, m) from its command than a limit; 0 is none.

        Raises:
            Rejected: it is not.
        """
        if self.plan is None or limit <= 0:
            return
        arm = self.safety.arm
        error = np.abs(self.plan.at(stamp).position - measured)[arm]
        worst = int(error.argmax())
        if error[worst] > limit:
            raise Rejected(
                f"{self.safety.joint_names[arm[worst]]} is {error[worst]:.3f} from where it was commanded to be, "
                f"limit {limit:.3f}: does the controller follow? Deactivate and activate to start from where it is"
            )

    def stop(self, now: int) -> Plan | None:
        """Come to rest as quickly as the limits allow, from the commanded state; None when nothing is commanded."""
        if self.plan is None:
            return None
        since, start = self._changeable(now, None)
        tail = self.safety.stop(start)
        if tail is not None:
            self.plan = self._continued(since, tail, now)
        self.scheduler.reset()
        self._pace = None
        return self.plan

    def delay(self, time: int) -> None:
        """The plan in force goes on so much (ns) later: nobody executed it meanwhile."""
        self.plan = replace(self.plan, start=self.plan.start + time)

    def stay(self, now: int, position: np.ndarray | None = None) -> None:
        """The clock changed: the plan in force is over, and the robot stands where it was sent last: (A,), else where
        the plan ends."""
        if self.plan is not None:
            there = self.plan.spline.positions[-1] if position is None else position
            self.plan = Plan(now, _standing(there))
        self._pace = None
        self.scheduler.reset()

    def _changeable(self, now: int, measured: np.ndarray | None) -> tuple[int, Motion]:
        """From when on the plan in force can still be changed, and the commanded state then."""
        if self.plan is None:
            return now, Motion.at_rest(measured)
        since = now + self.scheduler.min_lead
        times = self.plan.spline.times
        nearest = times[np.abs(times - (since - self.plan.start) / 1e9).argmin()]
        knot = self.plan.start + round(float(nearest) * 1e9)
        if abs(knot - since) < SHORTEST_SEGMENT and knot > now:
            since = knot  # a tiny segment would turn rounding into acceleration
        return since, self.plan.at(since)

    def _continued(self, since: int, spline: Spline, now: int) -> Plan:
        """The plan in force until `since`, the new one from then on."""
        if self.plan is None or since == now:
            return Plan(since, spline)
        old = self.plan.spline
        times = old.times + (self.plan.start - now) / 1e9
        change = (since - now) / 1e9
        # From the last knot before now.
        kept = slice(max(0, bisect_left(times, 0.0) - 1), bisect_left(times, change - NEAREST_S))
        return Plan(
            now,
            Spline(
                np.concatenate([times[kept], change + spline.times]),
                np.concatenate([old.positions[kept], spline.positions]),
                np.concatenate([old.velocities[kept], spline.velocities]),
            ),
        )


def _standing(position: np.ndarray) -> Spline:
    """No motion."""
    knots = np.asarray(position, float)[None]
    return Spline(np.zeros(1), knots, np.zeros_like(knots))

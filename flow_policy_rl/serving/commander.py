"""From chunks to the plan that the robot follows: joining, safety, stopping. Used by the node, and by simulation
without ROS."""

from bisect import bisect_left, bisect_right
from dataclasses import dataclass, replace

import numpy as np

from flow_policy_rl.serving.chunk_scheduler import SHORTEST, ChunkScheduler, Targets
from flow_policy_rl.serving.pace import REAL_TIME, Pace
from flow_policy_rl.serving.safety import Checked, EmergencyStop, Motion, Rejected, SafetyFilter
from flow_policy_rl.serving.spline import Spline

SHORTEST_SEGMENT = 1_000_000  # ns; of short control steps half of what is ahead of the first target
# A knot nearer than this is left out: rounded to ns, it would turn into acceleration. In segments of 10 ms that costs
# at most two hundredths of acceleration, where that turns round.
NEAREST_S = 5e-5
LAG_S = 0.15  # an arm is where it was sent some time ago; by so much it may lag (the simulated one: 0.12)
MOVED = 0.1  # rad, m; an arm further from all that it was sent of late does not lag behind: somebody moved it
HISTORY_S = 1.0  # of a plan is remembered: an observation may be as old as its inference is slow


@dataclass(frozen=True)
class Plan:
    """A motion that is or may be commanded: a spline whose time zero is `start` (ns); what is before that is over. It
    ends at rest. What was commanded in the last `HISTORY_S` before it is part of it."""

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
        max_tracking_error: how far (rad, m) an arm joint may be from where it is commanded to be; 0 is any distance.
    """

    def __init__(
        self,
        scheduler: ChunkScheduler,
        safety: SafetyFilter,
        emergency: EmergencyStop | None = None,
        soft_start_s: float = 0.0,
        max_tracking_error: float = 0.0,
    ):
        self.scheduler, self.safety = scheduler, safety
        self.emergency = emergency or EmergencyStop()
        self.soft_start_s, self.max_tracking_error = soft_start_s, max_tracking_error
        self.plan: Plan | None = None
        self._pace: Pace | None = None  # of the run; none before its first plan
        self._anew = (
            False  # a run is to begin wherever the arm is; the plan is the stop of the one before
        )
        self._astray = False  # the arm did not follow, and was not seen where it was sent since

    def forget(self) -> None:
        """Nothing is commanded: the robot may be anywhere."""
        self.plan, self._astray, self._anew = None, False, False
        self.leave()

    def begin_anew(self, now: int) -> None:
        """Forget what was commanded. Only while the robot follows it, or did within `LAG_S`, the next run continues it,
        for the robot is behind; unless it is then seen elsewhere, as after a reset of the simulation."""
        plan, lag = self.plan, round(LAG_S * 1e9)
        if plan is None or self._astray or not plan.start <= now or plan.settled(now - lag):
            self.forget()
        else:
            self._anew = True
            self.leave()

    @property
    def idle(self) -> bool:
        """Whether nothing is commanded but, at most, the end of a run before the one that is to begin."""
        return self.plan is None or self._anew

    def leave(self) -> None:
        """The run is over; what is commanded comes to its end, which is at rest."""
        self._pace = None
        self.scheduler.reset()

    def due(self, stamp: int) -> bool:
        """Whether an observation of this time should start an inference."""
        return self.scheduler.due(stamp, self._pace or REAL_TIME)

    def prefix_inputs(self, stamp: int) -> dict[str, np.ndarray]:
        """`prefix` (1, P, A) and `inference_delay` (1,) for an observation of this time; empty for a policy without."""
        if not self.scheduler.prefix_horizon:
            return {}
        prefix = self.scheduler.prefix(stamp, self._pace or REAL_TIME)
        return {"prefix": prefix.actions[None], "inference_delay": np.array([prefix.delay])}

    def accept(self, chunk: np.ndarray, stamp: int, now: int, measured: np.ndarray) -> Outcome:
        """Put a chunk (H, A) observed at `stamp` in force.

        Args:
            measured: (A,) where the joints are: a run starts there when nothing is commanded yet, or when the arm is
                at rest elsewhere than it was sent; and its first target must be near.

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
        plan = self._in_force(stamp, now, measured)
        since, start = self._changeable(plan, now)
        checked = self.safety.check(
            start,
            (targets.due - since) / 1e9,
            targets.positions,
            measured=measured if first else None,
            speed_share=None if pace.full(now) else pace.share(targets.due),
            braked=self._braked(plan, since),
        )
        self.plan = self._continued(plan, since, checked.spline, now)
        self._pace, self._anew = pace, False
        self.emergency.count(checked)
        return Outcome(self.plan, targets, checked)

    def check_following(self, stamp: int, measured: np.ndarray) -> None:
        """The arm must be where it was sent, or come there: at (A,) as of `stamp` (ns), no joint of it may be further
        than `max_tracking_error` from all that was commanded in the last `LAG_S`. Between two runs it may be anywhere.

        Raises:
            Rejected: it is not. The run is over, and as nobody knows what the controller does, `stop` changes nothing;
                until the arm is where it was sent, or `forget`.
        """
        if self.plan is None or self.max_tracking_error <= 0:
            self._astray = False
            return
        error = self._tracking_error(stamp, measured)
        worst = int(error.argmax())
        # Passing by is not arriving.
        if error[worst] <= self.max_tracking_error and (
            not self._astray or self.plan.settled(stamp)
        ):
            self._astray = False
            return
        if not self._astray and self._between_runs(stamp):
            return
        self._astray = True
        self.leave()
        raise Rejected(
            f"{self.safety.joint_names[self.safety.arm[worst]]} is {error[worst]:.3f} from where it was commanded to "
            f"be, limit {self.max_tracking_error:.3f}: does the controller follow? Deactivate and activate to start "
            "from where it is"
        )

    def stop(self, now: int) -> Plan | None:
        """Come to rest as quickly as the limits allow, from the commanded state; None when nothing moves on command, or
        it comes to rest anyway."""
        self.leave()
        if self.idle or self.plan.settled(now) or self._astray:
            return None
        since, start = self._changeable(self.plan, now)
        tail = self.safety.stop(start)
        if tail is not None:
            self.plan = self._continued(self.plan, since, tail, now)
        return self.plan

    def delay(self, time: int) -> None:
        """The plan in force goes on so much (ns) later: nobody executed it meanwhile, or the clock was set."""
        if self.plan is not None:
            self.plan = replace(self.plan, start=self.plan.start + time)

    def stay(self, now: int, position: np.ndarray | None = None) -> None:
        """The clock changed: the plan in force is over, and the robot stands where it was sent last: (A,), else where
        the plan ends."""
        if self.plan is not None:
            there = self.plan.spline.positions[-1] if position is None else position
            self.plan = Plan(now, _standing(there))
        self.leave()

    def _between_runs(self, stamp: int) -> bool:
        """Whether at a time one run was over, its plan at rest unless another is asked for, and the next had not
        begun."""
        return self._pace is None and (self._anew or self.plan.settled(stamp))

    def _tracking_error(self, stamp: int, measured: np.ndarray) -> np.ndarray:
        """How far the arm's joints are from where they are commanded to be and were of late."""
        arm = self.safety.arm
        times = (stamp - self.plan.start) / 1e9 - np.linspace(0.0, LAG_S, 7)
        way = self.plan.spline.position(times)[:, arm]
        off = np.maximum(way.min(axis=0) - measured[arm], measured[arm] - way.max(axis=0))
        return np.maximum(off, 0.0)

    def _in_force(self, stamp: int, now: int, measured: np.ndarray) -> Plan:
        """What the next plan continues: the last one, or rest where the robot is."""
        if self.plan is None:
            return Plan(now, _standing(measured))
        far = self.max_tracking_error or (MOVED if self._anew else np.inf)
        if not self._between_runs(stamp) or (self._tracking_error(stamp, measured) <= far).all():
            return self.plan
        if self._anew:
            return Plan(now, _standing(measured))
        # A gripper may hold something: it stays as it was sent.
        there = self.plan.spline.positions[-1].copy()
        there[self.safety.arm] = measured[self.safety.arm]
        return Plan(now, _standing(there))

    def _changeable(self, plan: Plan, now: int) -> tuple[int, Motion]:
        """From when on a plan can still be changed, and the commanded state then. One that is at rest can at
        once: the controller's way from where it is to the first target is then as long as can be."""
        if plan.settled(now):
            return now, Motion.at_rest(plan.spline.positions[-1])
        since = now + self.scheduler.min_lead
        times = plan.spline.times
        nearest = times[np.abs(times - (since - plan.start) / 1e9).argmin()]
        knot = plan.start + round(float(nearest) * 1e9)
        shortest = min(SHORTEST_SEGMENT, SHORTEST * self.scheduler.step / 2)
        if abs(knot - since) < shortest and knot > now:
            since = knot  # a tiny segment would turn rounding into acceleration
        return since, plan.at(since)

    def _braked(self, plan: Plan, since: int) -> np.ndarray | None:
        """The acceleration (A,) with which a plan came to rest within the control step before a time."""
        rests = (since - plan.start) / 1e9 - plan.spline.end
        if not 0 <= rests < self.safety.control_dt:
            return None
        return plan.spline.sample(plan.spline.end, before=True)[2]

    def _continued(self, plan: Plan, since: int, spline: Spline, now: int) -> Plan:
        """A plan until `since`, the new one from then on."""
        old = plan.spline
        times = old.times + (plan.start - now) / 1e9
        change = (since - now) / 1e9
        first = max(0, bisect_left(times, -HISTORY_S) - 1)
        kept = slice(first, bisect_left(times, change - NEAREST_S))
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

"""When to infer, and how consecutive chunks become one sequence of timed targets.

Action k of a chunk is due (k + 1) * control_dt after its observation. By the time the chunk is ready some of it is
past: those actions are dropped, and the rest keep their place in time, so that the delay does not shift the motion.
Where nothing is in force the robot has waited where it was seen, and a chunk that is not over yet begins now, from its
first action. All of that is in the policy's time, which a soft start slows (`pace`).

Joining methods:

    replace     the new chunk takes over at once
    crossfade   over the first actions it takes over with growing weight
    ensemble    an inference per control step; all predictions for a moment are averaged, weights exp(-m i), oldest
                first (ACT, Zhao et al. 2023, with m = 0.01)
    rtc         training-time real-time chunking (arXiv 2512.05964): the actions that will be executed while the
                inference runs are given to the policy as a prefix, and its chunk begins with exactly these; from
                there on it takes over as with crossfade
    sync        execute, stop, look again: no overlap, at the price of pauses
"""

import math
from bisect import bisect_left, bisect_right
from collections import deque
from dataclasses import dataclass

import numpy as np

from flow_policy_rl.errors import InputError
from flow_policy_rl.serving.pace import REAL_TIME, Pace
from flow_policy_rl.spec import PolicySpec

LEAD_S = 0.03  # from when on a plan may change: what transport and the period of a controller take, and some more
METHODS = ("replace", "crossfade", "ensemble", "rtc", "sync")
CROSSFADE_STEPS = 4
SHORTEST = 0.2  # of a control step: an action due sooner is past, it would be a jerk
DELAYS_KEPT = 20
REMEMBERED = 64
JITTER = 0.02  # of a control step: a state that comes this much early is that of the step, not one to wait after
ENSEMBLE_WEIGHTS = np.exp(-0.01 * np.arange(REMEMBERED)).tolist()


@dataclass(frozen=True)
class Targets:
    """What is to be executed.

    Attributes:
        due: (n,) ns, strictly increasing.
        positions: (n, A).
        seam_jump: (A,) by how much the velocity changes at the first target that the new chunk decides, against what
        was in force; None when nothing was.
    """

    due: np.ndarray
    positions: np.ndarray
    seam_jump: np.ndarray | None = None


@dataclass(frozen=True)
class Prefix:
    """Actions that will be executed before the next chunk is ready.

    Attributes:
        actions: (P, A); rows from `delay` on repeat the last one and mean nothing.
        delay: how many of them are given, 0 to P.
    """

    actions: np.ndarray
    delay: int


class ChunkScheduler:
    """Knows the chunks so far; times are ns of one clock.

    Args:
        min_lead_s: actions due sooner than this from now are past.
        joining: one of `METHODS`.

    Raises:
        InputError: unknown method, or `rtc` for a policy that takes no prefix.
    """

    def __init__(self, spec: PolicySpec, min_lead_s: float = LEAD_S, joining: str = "replace"):
        if joining not in METHODS:
            raise InputError(f"joining must be one of {', '.join(METHODS)}, not '{joining}'")
        self.prefix_horizon = spec.prefix_horizon
        if joining == "rtc" and not self.prefix_horizon:
            others = ", ".join(m for m in METHODS if m != "rtc")
            raise InputError(
                f"joining rtc needs a policy trained with a prefix; this one has none. Others: {others}"
            )
        self.joining = joining
        self.num_joints = spec.num_joints
        self.control_dt = spec.control_dt
        self.step = round(spec.control_dt * 1e9)
        self.execute_horizon = spec.execute_horizon
        self.action_horizon = spec.action_horizon
        self._steps = self.step * np.arange(1, spec.action_horizon + 1)
        self.period = self.step * (1 if joining == "ensemble" else spec.execute_horizon)
        self.min_lead = round(min_lead_s * 1e9)
        self._delays: deque[int] = deque(maxlen=DELAYS_KEPT)
        self.reset()

    def reset(self) -> None:
        """Forget the chunks and infer at the next observation. Known delays stay."""
        self._last_stamp: int | None = None
        self._busy_until: int | None = None
        self._given_until = 0  # the policy was told what is in force up to then
        self._due: list[int] = []  # of the targets in force, and those executed of late
        self._positions: list[np.ndarray] = []  # (A,) each
        # For the ensemble: when each chunk begins, in the policy's time, and its actions, the first and the last twice.
        self._chunks: deque[tuple[int, np.ndarray]] = deque(maxlen=REMEMBERED)

    def due(self, stamp: int, pace: Pace = REAL_TIME) -> bool:
        """Whether an observation of this time should start an inference: in a soft start after as many actions as
        later, so that the policy looks where it looked in training."""
        last = self._last_stamp
        if last is None or stamp < last:
            return True
        if self.joining == "sync":
            return self._busy_until is not None and stamp >= self._busy_until
        passed = pace.progress(stamp) - pace.progress(last)
        return passed >= self.period - JITTER * self.step

    def started(self, stamp: int) -> None:
        """An inference on the observation of this time has begun."""
        self._last_stamp = stamp
        self._busy_until = None

    # --- real-time chunking ---

    @property
    def delay_steps(self) -> int:
        """Control steps until the next chunk takes over: the longest of the last delays, no more than the prefix."""
        longest = max(self._delays, default=self.min_lead)
        return min(math.ceil(longest / self.step - 1e-6), self.prefix_horizon)

    def prefix(self, stamp: int, pace: Pace = REAL_TIME) -> Prefix:
        """What will be executed after an observation of this time while its inference runs; nothing unless `rtc`."""
        if not self._due or self.joining != "rtc":
            return Prefix(np.zeros((self.prefix_horizon, self.num_joints)), 0)
        due = pace.due(stamp, self.step * np.arange(1, self.prefix_horizon + 1))
        covered = int((due <= self._due[-1] + self.step // 2).sum())
        delay = min(self.delay_steps, covered)
        self._given_until = int(due[delay - 1]) if delay else stamp
        return Prefix(np.array([self._in_force(t) for t in due.tolist()]), delay)

    # --- joining ---

    def join(
        self, chunk: np.ndarray, stamp: int, now: int, pace: Pace = REAL_TIME
    ) -> Targets | None:
        """Targets from now on, once the chunk (H, A) observed at `stamp` is there; None when all of it is past."""
        self._delays.append(now + self.min_lead - stamp)
        soonest = now + self.min_lead + round(SHORTEST * self.step)
        anew = max(now, soonest - self.step)  # when a chunk begins that continues none
        if self.joining == "sync":
            due = pace.due(anew, self.step * np.arange(1, self.execute_horizon + 1))
            self._busy_until = int(due[-1])
            return self._take_over(due, chunk[: self.execute_horizon])
        due = pace.due(stamp, self._steps)
        past = bisect_left(due, soonest)
        if past == len(due):
            return None
        if not self._due:
            stamp, due, past = anew, pace.due(anew, self._steps), 0
        due, positions = due[past:], chunk[past:]
        if self.joining in ("crossfade", "rtc") and self._due:
            positions = self._crossfaded(due, positions)
        if self.joining == "ensemble":
            begin = pace.progress(stamp)
            self._chunks.append((begin, np.concatenate([chunk[:1], chunk, chunk[-1:]])))
            positions = self._averaged(begin + past * self.step, len(due))
        return self._take_over(due, positions)

    def _take_over(self, due: np.ndarray, positions: np.ndarray) -> Targets:
        """New targets in force from their first on."""
        moments = due.tolist()
        met = self._due and moments[0] <= self._due[-1] + 1.5 * self.step
        jump = self._seam_jump(moments, positions) if met else None
        end = bisect_left(self._due, moments[0] - self.step // 2)
        kept = slice(max(0, end - REMEMBERED), end)
        self._due = self._due[kept] + moments
        self._positions = self._positions[kept] + list(positions)
        return Targets(due, positions, jump)

    def _seam_jump(self, due: list[int], positions: np.ndarray) -> np.ndarray:
        """Velocity that the first target of the new chunk's own adds to what was in force."""
        first = min(bisect_right(due, self._given_until), len(due) - 1)
        return (positions[first] - self._in_force(due[first])) / self.control_dt

    def _in_force(self, time: int) -> np.ndarray:
        """Target in force (A,) at a time; the first and the last hold beyond."""
        after = bisect_left(self._due, time)
        if after in (0, len(self._due)):
            return self._positions[0 if after == 0 else -1]
        before, gap = self._due[after - 1], self._due[after] - self._due[after - 1]
        share = (time - before) / gap
        return self._positions[after - 1] * (1 - share) + self._positions[after] * share

    def _crossfaded(self, due: np.ndarray, positions: np.ndarray) -> np.ndarray:
        begin = max(due[0] - self.step, self._given_until)
        share = np.clip((due - begin) / (self.step * (CROSSFADE_STEPS + 1)), 0.0, 1.0)
        share = np.where(due > self._due[-1], 1.0, share)[:, None]
        in_force = np.array([self._in_force(t) for t in due.tolist()])
        return (1 - share) * in_force + share * positions

    def _averaged(self, begin: int, num: int) -> np.ndarray:
        """Weighted means (num, A) of what the chunks say about the moments that follow a time of the policy's, a step
        from one to the next."""
        total, weights = np.zeros((num, self.num_joints)), np.zeros((num, 1))
        for weight, (chunk_begin, rows) in zip(ENSEMBLE_WEIGHTS, self._chunks, strict=False):
            # Linear between its actions. The last one holds for half a step.
            steps = (begin - chunk_begin) / self.step + 1
            row = int(steps)
            n = min(num, math.floor(self.action_horizon + 1.5 - steps))
            if n <= 0:
                continue
            share = weight * (steps - row)
            total[:n] += (weight - share) * rows[row : row + n] + share * rows[
                row + 1 : row + n + 1
            ]
            weights[:n] += weight
        # The next chunk may begin up to a step earlier than this one; what ends before is over.
        if begin > self._chunks[0][0] + (self.action_horizon + 0.5) * self.step:
            self._chunks.popleft()
        return total / weights

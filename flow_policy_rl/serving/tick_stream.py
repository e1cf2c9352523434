"""Positions one at a time, for a controller that knows no time: it goes at once wherever it is sent."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from flow_policy_rl.serving.commander import Commander

MOST = 1.5  # ticks that a plan advances from one to the next; a timer is not exact
STANDS_S = 0.2  # a robot that was sent nothing for so long has come to rest
FEW = 4  # ticks: a slow stream stands only after so many, and so many say where a run ended


@dataclass(frozen=True)
class Tick:
    """When (s of a steady clock, ns of the plans' clock), and where the joints (A,) were sent; None: nowhere yet."""

    steady: float
    now: int
    position: np.ndarray | None


class TickStream:
    """Samples the plan in force. Not thread safe.

    A trajectory controller follows its plan while this process is held up; here nobody does, and what was missed must
    not be made up for in one tick. So the plan waits for a late tick, and after `STANDS_S`, or when the plans' clock
    jumps, a new run begins where the robot was sent last.

    Args:
        on_stand: called when that ends a motion.
    """

    def __init__(
        self, commander: Commander, period_s: float, on_stand: Callable[[], None] = lambda: None
    ):
        self._commander, self._period_s, self._on_stand = commander, period_s, on_stand
        self._stands_s = max(STANDS_S, FEW * period_s)
        self._last: Tick | None = None

    def next(self, now: int, steady: float, active: bool) -> np.ndarray | None:
        """Where to send the joints (A,) now; None when nothing is planned, or has come to rest and the run is over."""
        self.hold_back(now, steady)
        plan = self._commander.plan
        if plan is None:
            return None
        self._last = Tick(steady, now, plan.at(now).position)
        over = plan.settled(now - round(FEW * self._period_s * 1e9))
        return self._last.position if active or not over else None

    def hold_back(self, now: int, steady: float) -> None:
        """Take from the plan's progress what nobody executed. To be called before the plan is changed, too."""
        plan, last = self._commander.plan, self._last_sent()
        if plan is None or last is None:
            self._last = Tick(steady, now, None)
            return
        gap, passed = steady - last.steady, now - last.now
        longest = MOST * self._period_s
        if gap > self._stands_s or not 0 <= passed <= self._stands_s * 1e9:
            self.stand(now, steady)
            if not plan.settled(last.now):
                self._on_stand()
        elif gap > longest:
            kept = round(passed * longest / gap)
            self._commander.delay(passed - kept)
            self._last = replace(last, steady=steady - longest, now=now - kept)

    def stand(self, now: int, steady: float) -> None:
        """The plan in force is over; the robot stands where it was sent last."""
        last = self._last_sent()
        position = None if last is None else last.position
        self._commander.stay(now, position)
        self._last = Tick(steady, now, position)

    def clock_set(self, step: int) -> None:
        """The plans' clock was set by so much (ns), and the plan in force with it."""
        if self._last is not None:
            self._last = replace(self._last, now=self._last.now + step)

    def _last_sent(self) -> Tick | None:
        """The last tick; where a plan began that no tick has seen yet."""
        plan, last = self._commander.plan, self._last
        if plan is not None and last is not None and last.position is None:
            return replace(last, position=plan.at(last.now).position)
        return last

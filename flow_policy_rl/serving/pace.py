"""How fast a run goes: slowly at first, then in real time.

A soft start does not cut velocities off a motion that is planned for full speed (the robot would fall behind its own
targets, and a policy would see what it never saw in training): it moves along the same way more slowly. Every
action keeps its place in the policy's time, and that begins at a tenth of real time.
"""

from dataclasses import dataclass

import numpy as np

SLOWEST = 0.1  # share of real time, and of the velocity limits, with which a run begins


@dataclass(frozen=True)
class Pace:
    """The policy's time against real time; both in ns of one clock, equal until the run begins.

    Attributes:
        began: when the run begins.
        soft_start_s: from then until real time; 0 is real time at once.
    """

    began: int = 0
    soft_start_s: float = 0.0

    @property
    def _ramp(self) -> float:
        return self.soft_start_s * 1e9

    def full(self, now: int) -> bool:
        """Whether the run goes at full speed from a time on."""
        return now - self.began >= self._ramp

    def share(self, times: np.ndarray) -> np.ndarray:
        """Speed of the policy's time at times (n,), which are within the run; the velocity limits shrink as much."""
        if not self._ramp:
            return np.ones(len(times))
        return np.minimum(1.0, SLOWEST + (1 - SLOWEST) * (times - self.began) / self._ramp)

    def progress(self, time: int) -> int:
        """The policy's time at a time: the integral of the share."""
        if not self._ramp:
            return time
        slow = min(max(time - self.began, 0), self._ramp)
        return time - round((1 - SLOWEST) * (slow - slow**2 / (2 * self._ramp)))

    def when(self, progress: np.ndarray) -> np.ndarray:
        """Times (n,) at which the policy's time is `progress` (n,)."""
        if not self._ramp:
            return progress
        passed = np.asarray(progress - self.began, float)
        growth = (1 - SLOWEST) / (2 * self._ramp)
        end = self._ramp * (1 + SLOWEST) / 2  # of the ramp, in the policy's time
        slow = np.clip(passed, 0.0, end)
        elapsed = (np.sqrt(SLOWEST**2 + 4 * growth * slow) - SLOWEST) / (2 * growth)
        return progress + np.rint(elapsed - slow).astype(np.int64)

    def due(self, stamp: int, steps: np.ndarray) -> np.ndarray:
        """When what comes `steps` (n,) of the policy's time after a time is due."""
        if self.full(stamp):
            return stamp + steps
        return self.when(self.progress(stamp) + steps)


REAL_TIME = Pace()

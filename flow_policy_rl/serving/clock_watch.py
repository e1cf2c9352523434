"""Notices that a clock was set (by NTP, by hand), with the help of the steady clock beside it."""

import time
from collections.abc import Callable

STEP = 10_000_000  # ns; what is less is drift, or a clock that is being slewed
NARROW = 1_000_000  # ns that reading both clocks may take if the reading is to be remembered


class ClockWatch:
    """Compares two clocks (ns). Not thread safe.

    Args:
        read: the clock that may be set.
        steady: the one that never is.
    """

    def __init__(self, read: Callable[[], int], steady: Callable[[], int] = time.monotonic_ns):
        self._read, self._steady = read, steady
        self._known: tuple[int, int] | None = None  # least and most that the clock is ahead

    def step(self) -> int:
        """By how much (ns) the clock was set since the last call; 0 where it was not, or by less than `STEP`."""
        before, now, after = self._steady(), self._read(), self._steady()
        found = now - after, now - before  # however long this thread was held up in between
        if self._known is None:
            self._known = found
        low, high = self._known
        apart = found[0] > high + STEP or found[1] < low - STEP
        if apart or found[1] - found[0] < NARROW:
            self._known = found
        return (sum(found) - low - high) // 2 if apart else 0

"""How long and how often, over any number of messages in constant memory: durations, and the facts of one topic."""

import contextlib
import math
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

BINS_PER_DECADE = 40
BLOCK = 4096  # durations that are sorted in at once


class Durations:
    """Percentiles of any number of durations in constant memory: a histogram of bins 6 % wide."""

    def __init__(self):
        self._new: list[tuple[float, float]] = []
        self._bins: Counter = Counter()
        self._max = (0.0, 0.0)
        self._count = 0

    def add(self, seconds: float, at: float = 0.0) -> None:
        """One duration, met at a time in the bag."""
        self._new.append((seconds, at))
        if len(self._new) >= BLOCK:
            self._sort_in()

    def _sort_in(self) -> None:
        if not self._new:
            return
        seconds = np.array(self._new)[:, 0]
        bins = np.rint(np.log10(np.maximum(seconds, 1e-7)) * BINS_PER_DECADE).astype(int)
        self._bins.update(bins.tolist())
        self._max = max(self._max, self._new[int(seconds.argmax())], key=lambda pair: pair[0])
        self._count += len(self._new)
        self._new = []

    @property
    def count(self) -> int:
        """How many."""
        return self._count + len(self._new)

    @property
    def max(self) -> float:
        """The longest, s."""
        self._sort_in()
        return self._max[0]

    @property
    def max_at(self) -> float:
        """When the longest was met."""
        self._sort_in()
        return self._max[1]

    def percentile(self, share: float) -> float:
        """Seconds; nan without any."""
        self._sort_in()
        left = share * self._count
        for index in sorted(self._bins):
            left -= self._bins[index]
            if left <= 0:
                return min(10 ** (index / BINS_PER_DECADE), self._max[0])
        return math.nan

    def summary_ms(self) -> dict[str, float | None]:
        """p50, p95, p99 and max in ms; None without any."""
        if not self.count:
            return dict.fromkeys(("p50", "p95", "p99", "max"))
        found = {f"p{p}": self.percentile(p / 100) * 1e3 for p in (50, 95, 99)}
        return found | {"max": self.max * 1e3}


@dataclass
class StreamFacts:
    """What was seen of one topic.

    Attributes:
        type: message type in the bag.
        count, bad: messages, and how many of them could not be decoded.
        periods: time from stamp to stamp.
        delays: time from stamp to reception.
        backward: how often the stamp went back.
        shapes: image sizes and encodings, or names of joints, and how often each.
    """

    type: str = ""
    count: int = 0
    bad: int = 0
    backward: int = 0
    first: int = 0
    last: int | None = None
    periods: Durations = field(default_factory=Durations)
    delays: Durations = field(default_factory=Durations)
    shapes: Counter = field(default_factory=Counter)

    def rate_hz(self) -> float:
        """From the median period."""
        period = self.periods.percentile(0.5)
        return 1 / period if period > 0 else math.nan


def read_stages(msg, into: dict[str, Durations]) -> None:
    """Add the latencies (keys that end in `_ms`, finite numbers) of a record that the policy node published."""
    for status in msg.status:
        for pair in status.values:
            if pair.key.endswith("_ms"):
                with contextlib.suppress(ValueError):
                    if math.isfinite(value := float(pair.value)):
                        into.setdefault(pair.key[:-3], Durations()).add(value / 1e3)

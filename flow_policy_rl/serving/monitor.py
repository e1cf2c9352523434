"""What a node keeps count of: latencies by stage, and observations unlike those of training."""

from collections import deque
from collections.abc import Iterable, Mapping

import numpy as np

from flow_policy_rl.spec import PolicySpec

WINDOW = 500
UNNUMBERED = 2**64 - 1  # the sequence number of a middleware that has none
TELLING_FALLS = 3
SETTLED = (
    500  # messages in a row whose numbers rise: the falls before were of one that was started again
)
SMALLEST_STD = 1e-6  # of a field that never moved in training: no judgement


class Latencies:
    """The last `WINDOW` values of every stage, in ms."""

    def __init__(self):
        self._stages: dict[str, deque] = {}

    def add(self, stages: Mapping[str, float]) -> None:
        """One value per stage."""
        for name, value in stages.items():
            self._stages.setdefault(name, deque(maxlen=WINDOW)).append(value)

    def summary(self) -> dict[str, str]:
        """`p50 / p95 / p99 / max` by stage."""
        result = {}
        for name, values in list(self._stages.items()):  # another thread may add one
            numbers = [*np.percentile(values, [50, 95, 99]), max(values)]
            result[name] = " / ".join(f"{v:.3f}" for v in numbers)
        return result


class Arrivals:
    """Counts the messages of one topic, and by their publisher's sequence numbers those that never came.

    Attributes:
        received, lost: messages so far.
    """

    def __init__(self):
        self.received = self.lost = 0
        self._last: int | None = None

    def count(self, sequence: int | None) -> None:
        """One more; None where the middleware gives no number (then nothing is known to be lost)."""
        self.received += 1
        if sequence is not None and self._last is not None and sequence > self._last:
            self.lost += sequence - self._last - 1
        self._last = sequence

    def begin_again(self) -> None:
        """Another publisher, or another subscription: numbers have nothing to do with those before."""
        self._last = None


class SaidTwice:
    """Tells by sequence numbers whether two publishers of a topic say the same thing: those of one only rise. A
    publisher that was started again begins once from the beginning, two go back and forth."""

    def __init__(self):
        self.begin_again()

    def count(self, what: Iterable[str], sequence: int | None) -> None:
        """A message about these things; None where the middleware gives no number (then nothing is found)."""
        if sequence is None or sequence == UNNUMBERED:
            return
        for name in what:
            if sequence <= self._last.get(name, -1):
                self._falls[name] = self._falls.get(name, 0) + 1
                self._rises[name] = 0
            else:
                self._rises[name] = self._rises.get(name, 0) + 1
                if self._rises[name] >= SETTLED:
                    self._falls.pop(name, None)
            self._last[name] = sequence

    def begin_again(self) -> None:
        """Other publishers: nothing is known of them."""
        self._last: dict[str, int] = {}
        self._falls: dict[str, int] = {}
        self._rises: dict[str, int] = {}

    @property
    def names(self) -> list[str]:
        """What more than one publisher says."""
        return [name for name, falls in self._falls.items() if falls >= TELLING_FALLS]


class Familiarity:
    """How far an observation is from what the policy was trained on, by the mean and spread in its spec.

    Args:
        max_sigma: standard deviations beyond which a number is unusual; 0 never is.
    """

    def __init__(self, spec: PolicySpec, max_sigma: float):
        self.max_sigma = max_sigma
        self._known = [
            (f.name, f.elements, np.array(f.mean), np.array(f.std))
            for f in spec.observations
            if f.kind != "image" and len(f.mean) == len(f.std) == f.size > 0
        ]

    def unusual(self, obs: Mapping[str, np.ndarray]) -> str:
        """The most unusual number of an observation, in words; empty when all are familiar."""
        if self.max_sigma <= 0:
            return ""
        worst, text = self.max_sigma, ""
        for name, elements, mean, std in self._known:
            away = np.abs(obs[name] - mean) / np.where(std > SMALLEST_STD, std, np.inf)
            k = int(away.argmax())
            if away[k] > worst:
                worst = float(away[k])
                text = f"{name}.{elements[k]} is {obs[name][k]:.3f}, {worst:.1f} standard deviations from training"
        return text

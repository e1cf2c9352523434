"""What could not be used, counted and located: reading goes on, and nothing is skipped in silence."""

import re
from dataclasses import dataclass

MAX_KINDS = 200  # a fuzzed file can invent reasons without end


@dataclass
class Problem:
    """One kind of problem.

    Attributes:
        topic: where it happened; a file name for damage to a file.
        reason: what is wrong.
        count: how often.
        first, last: first and last place: a time in the bag (s), or a position in a file.
    """

    topic: str
    reason: str
    count: int
    first: str
    last: str


class Problems:
    """Problems by topic and reason, in order of appearance."""

    def __init__(self):
        self._found: dict[tuple[str, str], Problem] = {}

    def add(self, topic: str, reason: str, where: str | int) -> None:
        """Count one. A `where` of type int is a time in ns. Decimal numbers do not make a reason another one."""
        where = f"{where / 1e9:.3f} s" if isinstance(where, int) else where
        key = (topic, re.sub(r"\d+\.\d+", "#", reason))
        if key not in self._found and len(self._found) >= MAX_KINDS:
            key, topic, reason = ("", "other"), "", "further kinds of problems"
        found = self._found.setdefault(key, Problem(topic, reason, 0, where, where))
        found.count += 1
        found.last = where

    def __iter__(self):
        return iter(self._found.values())

    def __len__(self) -> int:
        return len(self._found)

    @property
    def total(self) -> int:
        """Over all kinds."""
        return sum(p.count for p in self)

    def rows(self) -> list[dict]:
        """For JSON."""
        return [vars(p).copy() for p in self]

    def __str__(self) -> str:
        return "; ".join(f"{p.topic}: {p.reason} ({p.count}x, first at {p.first})" for p in self)

"""Pieces of a demonstrator's script: generators that yield once per control step."""

import itertools
from collections.abc import Iterable, Iterator

Script = Iterator[None]


def wait(steps: int) -> Script:
    """Stay for some control steps."""
    yield from itertools.repeat(None, steps)


def together(*scripts: Iterable) -> Script:
    """Several at once, until the last is done."""
    for _ in itertools.zip_longest(*scripts):
        yield

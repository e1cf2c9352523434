"""What this package raises when its input, not its code, is wrong."""

import difflib
from collections.abc import Iterable


class SimulationError(ValueError):
    """Wrong input to the simulation: one line that says what, where and the valid alternatives."""


def unknown_name(kind: str, name: str, valid: Iterable[str]) -> SimulationError:
    """An error for a misspelt name: the nearest valid one first, then all of them."""
    valid = sorted(valid)
    near = difflib.get_close_matches(name, valid, n=1)
    hint = f" (did you mean '{near[0]}'?)" if near else ""
    return SimulationError(f"unknown {kind} '{name}'{hint}; valid: {', '.join(valid) or 'none'}")

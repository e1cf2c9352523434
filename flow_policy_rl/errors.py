"""Exceptions for wrong input: the command line prints their message in one line and exits with 2."""

import difflib
from collections.abc import Iterable
from pathlib import Path


class InputError(ValueError):
    """Wrong input, not a bug. The message says what is wrong, where, and what would be valid."""


class PolicyFileError(InputError):
    """A policy.onnx that cannot be used: damaged, foreign, too new, or not what its spec says."""


class ObservationError(InputError):
    """An observation, noise or prefix that the policy cannot take: missing, of the wrong shape or type, not finite."""


class ProviderError(InputError):
    """An execution provider that is unknown, or not there on this machine."""


def unknown_name(kind: str, name: str, valid: Iterable[str]) -> InputError:
    """An error for a misspelt name: the nearest valid one first, then all of them."""
    valid = sorted(valid)
    return InputError(
        f"unknown {kind} '{name}'{near_match(name, valid)}; valid: {', '.join(valid)}"
    )


def near_match(name: str, valid: Iterable[str]) -> str:
    """` (did you mean 'x'?)` with the nearest valid name, or nothing."""
    near = difflib.get_close_matches(name, valid, n=1)
    return f" (did you mean '{near[0]}'?)" if near else ""


def existing_file(path: str | Path, what: str) -> Path:
    """The path, if a file is there.

    Raises:
        InputError: nothing there, or not a file; names the neighbours of the same ending.
    """
    path = Path(path)
    if path.is_file():
        return path
    if path.exists():
        raise InputError(f"{what} '{path}' is not a file")
    near = (
        sorted(p.name for p in path.parent.glob(f"*{path.suffix}"))[:8]
        if path.parent.is_dir()
        else []
    )
    there = f"; that folder has: {', '.join(near)}" if near else ""
    raise InputError(f"{what} '{path}' does not exist{there}")


class RunFailed(RuntimeError):
    """Right input, but the work came to no good end (training diverged, a gate failed). Exit code 1, one line."""

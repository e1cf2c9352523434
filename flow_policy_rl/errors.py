"""Exceptions for wrong input: the command line prints their message in one line and exits with 2."""

import dataclasses
import difflib
import math
import os
from collections.abc import Callable, Iterable, Sequence
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
        f"unknown {kind} '{name}'{near_match(name, valid)}; valid: {', '.join(valid) or 'none'}"
    )


def near_match(name: str, valid: Iterable[str]) -> str:
    """` (did you mean 'x'?)` with the nearest valid name, or nothing."""
    near = difflib.get_close_matches(name, valid, n=1)
    return f" (did you mean '{near[0]}'?)" if near else ""


# In words, and whether a number is in it; nan is in none.
Range = tuple[str, Callable[[float], bool]]
COUNT: Range = "at least 1", lambda value: value >= 1
POSITIVE: Range = "more than 0 and finite", lambda value: 0 < value < math.inf
LIMIT: Range = "more than 0 (inf: none)", lambda value: value > 0
NOT_NEGATIVE: Range = "at least 0 and finite", lambda value: 0 <= value < math.inf
SHARE: Range = "from 0 to 1", lambda value: 0 <= value <= 1
DECAY: Range = "from 0 to less than 1", lambda value: 0 <= value < 1


def check_settings(settings: object, where: str, valid: Range, *names: str) -> None:
    """Refuse numbers of nested settings that are not in a range; None is no number, but a default.

    Args:
        where: what the settings are called, for the error.

    Raises:
        InputError: names the first.
    """
    words, holds = valid
    for name in names:
        value = getattr(settings, name)
        if value is not None and not holds(value):
            raise InputError(f"{where}.{name} must be {words}, not {value}")


def refuse_below(config: object, **least: float) -> None:
    """Refuse settings that are below their least value or not finite; None, and what is not given, is fine.

    Args:
        config: whose fields are flags; of a tuple each value counts.
        least: by field.

    Raises:
        InputError: names the flag.
    """
    for name, bound in least.items():
        given = getattr(config, name)
        for value in given if isinstance(given, tuple) else (given,):
            if value is not None and not bound <= value < math.inf:
                flag = name.replace("_", "-")
                finite = " and finite" * (value == math.inf)
                raise InputError(f"--{flag} must be at least {bound}{finite}, not {value:g}")


def refuse_unread(config: object, why: str, *names: str) -> None:
    """Refuse settings that differ from their defaults where nothing reads them: whoever gave them thinks otherwise.

    Args:
        config: a dataclass whose fields are flags.
        why: what follows the flag in the message.
        names: fields that nothing reads.

    Raises:
        InputError: names the flag.
    """
    for field in dataclasses.fields(config):
        made = field.default_factory
        default = field.default if made is dataclasses.MISSING else made()
        if field.name in names and getattr(config, field.name) != default:
            raise InputError(f"--{field.name.replace('_', '-')} {why}")


def existing_file(path: str | Path, what: str, names: Iterable[str] = ()) -> Path:
    """The path, if a file is there.

    Args:
        names: what else would have been valid there, for the near match.

    Raises:
        InputError: nothing there, or a folder; names what is.
    """
    path = Path(path)
    if path.is_file():
        return path
    if not path.is_dir():
        raise missing(path, what, path.parent.glob(f"*{path.suffix}"), names)
    inside = sorted(p.name for p in path.iterdir() if p.is_file())
    raise InputError(
        f"{what} '{path}' is not a file, but a folder{' with: ' * bool(inside)}{first_of(inside)}"
    )


def missing(
    path: Path, what: str, neighbours: Iterable[Path], names: Iterable[str] = ()
) -> InputError:
    """An error for a path where nothing is: the nearest of its neighbours and `names`, then the neighbours, then
    `names`."""
    there, names = sorted(p.name for p in neighbours), list(names)
    near = near_match(path.name, [*there, *names])
    has = f"; that folder has: {first_of(there)}" if there else ""
    ships = f"; by name there are: {', '.join(names)}" if names else ""
    return InputError(f"{what} '{path}' does not exist{near}{has}{ships}")


def first_of(names: Sequence[str], most: int = 8) -> str:
    """The first of some names, and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def output_file(path: Path, ending: str = "") -> Path:
    """The path, if a file can be written there; makes its folder. To be called before the work, not after it.

    Args:
        ending: of its name, by which what reads it knows it.

    Raises:
        InputError: another ending, a folder has that name, or its folder cannot be written to.
    """
    if not path.name.endswith(ending):
        raise InputError(f"output '{path}' must end in {ending}")
    if path.is_dir():
        raise InputError(f"output '{path}' is a folder: give the name of a file")
    output_folder(path.parent)
    return path


def new_file(path: Path) -> Path:
    """`output_file` for a file that is nothing yet.

    Raises:
        InputError: something is there, or its folder cannot be written to.
    """
    if path.exists():
        raise InputError(f"output '{path}' exists already")
    return output_file(path)


def output_folder(path: Path) -> Path:
    """The folder, made where there is none. To be called before the work, not after it.

    Raises:
        InputError: it cannot be made, or not be written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"output folder '{path}' cannot be made: a file is in the way") from None
    except OSError as error:
        raise InputError(f"output folder '{path}' cannot be made: {error.strerror}") from None
    if not os.access(path, os.W_OK):
        raise InputError(f"output folder '{path}' cannot be written to")
    return path


class RunFailed(RuntimeError):
    """Right input, but the work came to no good end (training diverged, a gate failed). Exit code 1, one line."""


class PeerLost(RunFailed):
    """Another process of the run is gone, which is no fault of what this one computes."""

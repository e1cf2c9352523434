"""Flags of one command as its config: tyro parses them, and whatever is wrong with them is one line.

tyro draws a box of several lines. Its parse-error hook gives the same as data, but is private to it: where a version of
tyro lacks the hook, the box is what people see.
"""

import contextlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tyro

from flow_policy_rl import config_file
from flow_policy_rl.errors import InputError, near_match, unknown_name

try:
    from tyro import _errors as tyro_errors
except ImportError:
    tyro_errors = None

TYPES = {"INT": "a whole number", "FLOAT": "a number", "PATH": "a path", "STR": "a text"}


def parse(config_type: type, flags: list[str], prog: str, file: Path | None, **options) -> Any:
    """Flags, after those of a config file, as a config.

    Args:
        options: of tyro.cli.

    Raises:
        InputError: a flag that is unknown, lacks its value or has a wrong one; one that is required and not there.
    """
    valid = set(config_file.flag_names(config_type))
    for flag in flags:
        name = flag.partition("=")[0].replace("_", "-")
        if name.startswith("--") and name not in valid | {"--help"}:
            hint = near_match(name, valid)
            raise InputError(f"unknown flag '{name}'{hint}; all of them: {prog} --help")
    from_file = config_file.load(file, config_type) if file else []
    about = inspect.getdoc(config_type).partition("Attributes:")[0].strip()
    with one_line_errors(prog, typed=flags, file=file):
        config = tyro.cli(
            config_type,
            args=from_file + flags,
            prog=prog,
            description=f"{about}\n\n{config_file.ABOUT}",
            **options,
        )
    if (seed := getattr(config, "seed", 0)) < 0:
        raise InputError(f"--seed must be at least 0, not {seed}")
    return config


@contextlib.contextmanager
def one_line_errors(prog: str, typed: list[str], file: Path | None) -> Iterator[None]:
    """What tyro finds wrong with flags that were typed, or that a config file gave, as an InputError."""

    def refuse(event) -> None:
        argument = getattr(event, "argument", None)
        name = argument.display_name() if argument else ""
        is_typed = any(flag.partition("=")[0].replace("_", "-") == name for flag in typed)
        where = f"config file '{file}': " if file and name and not is_typed else ""
        if message := _message(event, name):
            raise InputError(f"{where}{message}; see {prog} --help")

    with tyro_errors.on_parse_error(refuse) if tyro_errors else contextlib.nullcontext():
        yield


def _message(event: Any, name: str) -> str | None:
    """The line for what the hook reports; None for what no command here can cause."""
    match type(event).__name__:
        case "UnrecognizedArgs":
            return _unexpected(event.tokens)
        case "MissingArgs" if event.unrecognized_tokens:
            return _unexpected(event.unrecognized_tokens)
        case "MissingArgs":
            missing = (argument.arg for argument in event.missing_arguments)
            return "missing: " + ", ".join(f"{m.display_name()} ({_takes(m)})" for m in missing)
        case "BadValue":
            return f"{name} needs a value: {_takes(event.argument)}"
        case "InvalidChoice":
            return str(unknown_name(f"value of {name}:", event.value, event.choices))
        case "InstantiationFailure" if event.argument:
            # int() and float() end with the value; a union says what it was instantiated from
            given = re.search(r"(?: from \[(.*?)\]\.|('.*')$)", event.message)
            if given is None:
                return f"{name} takes {_takes(event.argument)}: {' '.join(event.message.split()).rstrip('.!')}"
            value = given[1] if given[2] is None else given[2]
            verb = f"takes {{}}, not {value}" if value else "needs a value: {}"
            return f"{name} {verb.format(_takes(event.argument))}"
        case "InstantiationFailure":
            return " ".join(event.message.split())


def _unexpected(tokens: list[str]) -> str:
    return "unexpected argument " + ", ".join(f"'{token}'" for token in tokens)


def _takes(argument: Any) -> str:
    """The type of a flag's value, in words: tyro's `[A [A ...]]` is any number of A, `{None}|A` an optional one."""
    metavar = re.sub(
        r"^\[(.+) \[\1 \.\.\.\]\]$", r"any number of \1", str(argument.lowered.metavar)
    )
    words = (TYPES.get(part, part.strip("{}").replace(",", ", ")) for part in metavar.split("|"))
    return " or ".join(words)

"""Settings as a file: `--config FILE` gives flags in YAML or JSON, `--dump-config` prints them.

Flags that are typed win over the file. A file is nothing but flags written down, nested where a flag has dots, so that
tyro checks their values; the `config.json` of a run folder is one.
"""

import dataclasses
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from flow_policy_rl.errors import InputError, existing_file, unknown_name

ABOUT = "Every command also takes --config FILE (flags as YAML or JSON) and --dump-config (print them and stop)."


def split(arguments: list[str]) -> tuple[Path | None, bool, list[str]]:
    """What `--config` names, whether `--dump-config` is there, and the other arguments.

    Raises:
        InputError: `--config` without a file.
    """
    path, dump, rest = None, False, []
    given = iter(arguments)
    for argument in given:
        name, equals, value = argument.partition("=")
        if name == "--config":
            value = value if equals else next(given, "")
            if not value or value.startswith("--"):
                raise InputError("--config needs a file: --config settings.yaml")
            path = Path(value)
        elif argument == "--dump-config":
            dump = True
        else:
            rest.append(argument)
    return path, dump, rest


def dump(config: Any) -> str:
    """A config dataclass as YAML that `--config` reads."""
    return yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def load(path: Path, config_type: type) -> list[str]:
    """The flags that a file stands for; positional arguments come as they are.

    Raises:
        InputError: no such file, not a mapping, or a key that the config does not have.
    """
    text = existing_file(path, "config file").read_text(errors="replace")
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(
            f"config file '{path}' is not YAML: {' '.join(str(error).split())}"
        ) from None
    return list(_flags(raw or {}, config_type, f"config file '{path}'", ""))


def _flags(raw: Any, config_type: type, where: str, prefix: str) -> Iterator[str]:
    if not isinstance(raw, Mapping):
        raise InputError(f"{where}: must be a mapping, not {type(raw).__name__}")
    types = fields(config_type)
    for key, value in raw.items():
        if key not in types:
            raise unknown_name(f"key in {where}:", str(key), types)
        nested, positional = types[key]
        if nested is not None:
            yield from _flags(value, nested, f"{where}: {prefix}{key}", f"{prefix}{key}.")
            continue
        flag = f"--{prefix}{key}".replace("_", "-")
        if positional:
            yield str(value)
        elif isinstance(value, bool):
            yield flag if value else _negated(flag)
        elif isinstance(value, list):
            yield from (flag, *map(str, value))
        elif isinstance(value, Mapping):
            yield from (flag, *(str(x) for item in value.items() for x in item))
        else:
            yield f"{flag}={value}"


def _negated(flag: str) -> str:
    head, dot, name = flag[2:].rpartition(".")
    return f"--{head}{dot}no-{name}"


def fields(config_type: type) -> dict[str, tuple[type | None, bool]]:
    """By name: the dataclass below a field, if there is one, and whether its flag is a bare argument."""
    from tyro.conf import Positional

    found = {}
    for name, hint in typing.get_type_hints(config_type, include_extras=True).items():
        marks = getattr(hint, "__metadata__", ())
        hint = hint.__origin__ if marks else hint
        nested = hint if isinstance(hint, type) and dataclasses.is_dataclass(hint) else None
        found[name] = (nested, Positional in marks)
    return found


def flag_names(config_type: type, prefix: str = "") -> Iterator[str]:
    """Every flag of a config."""
    for name, (nested, positional) in fields(config_type).items():
        if nested is not None:
            yield from flag_names(nested, f"{prefix}{name}.")
        elif not positional:
            flag = f"--{prefix}{name}".replace("_", "-")
            yield from (flag, _negated(flag))

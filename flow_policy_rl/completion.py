"""`flow-policy completion`: a script that completes commands and flags in a shell, as tyro makes it."""

import contextlib
import importlib
import io
from dataclasses import dataclass, make_dataclass
from typing import Annotated, Literal, Union

import tyro


@dataclass(frozen=True)
class Config:
    """Print a completion script.

    Example: flow-policy completion bash > ~/.local/share/bash-completion/completions/flow-policy

    Attributes:
        shell: where it is for.
        json: print one JSON object.
    """

    shell: Annotated[Literal["bash", "zsh", "fish"], tyro.conf.Positional]
    json: bool = False


def main(config: Config) -> dict:
    """Every command that this installation can import, as tyro subcommands."""
    from flow_policy_rl import train_config
    from flow_policy_rl.cli import BENCHES, COMMANDS

    modules = {name: (c.module, c.config) for name, c in COMMANDS.items() if c.config}
    types = {name: _config_type(*where) for name, where in modules.items()}
    benches = {name: _config_type(f"bench.{name}", "Config") for name in BENCHES}
    types["train"] = _group("Train", train_config.ALGORITHMS)
    if any(benches.values()):
        types["bench"] = _group("Bench", benches)
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        tyro.cli(_choice(types), prog="flow-policy", args=["--tyro-print-completion", config.shell])
    return {"shell": config.shell, "script": output.getvalue()}


def _config_type(module: str, config: str) -> type | None:
    """The config of a command, or None where something it needs is not installed."""
    try:
        return getattr(importlib.import_module(f"flow_policy_rl.{module}"), config)
    except ImportError:
        return None


def _choice(types: dict[str, type | None]):
    """A union in which each type is a subcommand."""
    given = {name: kind for name, kind in types.items() if kind is not None}
    return Union[  # noqa: UP007
        tuple(
            Annotated[kind, tyro.conf.subcommand(name, prefix_name=False)]
            for name, kind in given.items()
        )
    ]


def _group(name: str, types: dict[str, type | None]) -> type:
    """A command whose first argument is the name of one of these."""
    chosen = Annotated[_choice(types), tyro.conf.arg(name="")]
    return make_dataclass(name, [("chosen", chosen)], frozen=True)


def text(result: dict) -> str:
    """The script."""
    return result["script"]

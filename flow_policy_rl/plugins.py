"""Robots, algorithms and encoders of other packages, by entry points; `sim.tasks` finds tasks in the same way.

| group | the entry point names |
|---|---|
| `flow_policy_rl.tasks` | a subclass of `sim.tasks.base.Task` |
| `flow_policy_rl.robots` | the path of a robot file |
| `flow_policy_rl.algorithms` | a module with `Config` and `main(config) -> dict`, as every command is |
| `flow_policy_rl.encoders` | an `nn.Module` like `networks.ImageEncoder`: built from a resolution, with a `size` |
"""

from collections.abc import Mapping
from importlib import metadata
from typing import Any

from flow_policy_rl.errors import InputError, unknown_name

GROUPS = tuple(f"flow_policy_rl.{kind}" for kind in ("tasks", "robots", "algorithms", "encoders"))


def names(kind: str) -> list[str]:
    """Names that other packages register for a kind (`robots`, ...); nothing of theirs is imported."""
    return sorted({entry.name for entry in metadata.entry_points(group=f"flow_policy_rl.{kind}")})


def find(kind: str, name: str, ours: Mapping[str, Any]) -> Any:
    """What a name stands for: one of ours, else what another package registers.

    Raises:
        InputError: nobody knows the name, two packages do, or the package cannot be imported.
    """
    if name in ours:
        return ours[name]
    found = metadata.entry_points(group=f"flow_policy_rl.{kind}", name=name)
    one = kind.removesuffix("s")
    if not found:
        raise unknown_name(one, name, {*ours, *names(kind)})
    if len(found) > 1:
        packages = " and ".join(sorted(map(package, found)))
        raise InputError(f"{one} '{name}' is registered by {packages}: uninstall one of them")
    return load(next(iter(found)))


def load(entry: metadata.EntryPoint) -> Any:
    """Import what an entry point names.

    Raises:
        InputError: that fails; names the package.
    """
    try:
        return entry.load()
    except Exception as error:
        raise InputError(
            f"'{entry.name}' of package '{package(entry)}' ({entry.value}) cannot be imported: "
            f"{type(error).__name__}: {error}"
        ) from error


def package(entry: metadata.EntryPoint) -> str:
    """Name of the package that registers it."""
    return entry.dist.name if entry.dist else "?"

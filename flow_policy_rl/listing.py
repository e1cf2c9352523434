"""`flow-policy list`: the names that other commands take."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

KINDS = ("tasks", "algorithms", "presets", "robots")


@dataclass(frozen=True)
class Config:
    """Names of tasks, algorithms, presets and robots.

    Example: flow-policy list tasks

    Attributes:
        what: one kind, or all of them.
        json: print one JSON object.
    """

    what: Annotated[
        Literal["all", "tasks", "algorithms", "presets", "robots"], tyro.conf.Positional
    ] = "all"
    json: bool = False


def main(config: Config) -> dict:
    """Names by kind."""
    from flow_policy_rl import presets
    from flow_policy_rl.serving.robot import robot_names
    from flow_policy_rl.train import ALGORITHMS
    from sim.tasks import TASKS

    names = {
        "tasks": sorted(TASKS),
        "algorithms": list(ALGORITHMS),
        "presets": [f"{name} (task {task})" for name in presets.PRESETS for task in sorted(TASKS)],
        "robots": robot_names(),
    }
    return {kind: names[kind] for kind in KINDS if config.what in ("all", kind)}


def text(result: dict) -> str:
    """For people."""
    return "\n".join(f"{kind}: {', '.join(names)}" for kind, names in result.items())

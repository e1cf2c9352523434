"""`flow-policy list`: the names that other commands take."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

KINDS = ("tasks", "algorithms", "presets", "robots", "encoders")


@dataclass(frozen=True)
class Config:
    """Names of tasks, algorithms, presets, robots and image encoders, those of other packages included.

    Example: flow-policy list tasks

    Attributes:
        what: one kind, or all of them.
        json: print one JSON object.
    """

    what: Annotated[
        Literal["all", "tasks", "algorithms", "presets", "robots", "encoders"], tyro.conf.Positional
    ] = "all"
    json: bool = False


def main(config: Config) -> dict:
    """Names by kind."""
    from flow_policy_rl import plugins, presets
    from flow_policy_rl.networks import ENCODERS
    from flow_policy_rl.serving.robot import robot_names
    from flow_policy_rl.train import ALGORITHMS
    from sim.tasks import task_names

    names = {
        "tasks": task_names(),
        "algorithms": [*ALGORITHMS, *plugins.names("algorithms")],
        "presets": [f"{name} (task {task})" for name in presets.PRESETS for task in task_names()],
        "robots": robot_names(),
        "encoders": [*ENCODERS, *plugins.names("encoders")],
    }
    return {kind: names[kind] for kind in KINDS if config.what in ("all", kind)}


def text(result: dict) -> str:
    """For people."""
    return "\n".join(f"{kind}: {', '.join(names)}" for kind, names in result.items())

"""`flow-policy list`: the names that other commands take."""

import sys
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from flow_policy_rl import plugins
from flow_policy_rl.cli import ALGORITHMS
from flow_policy_rl.serving import shipped
from flow_policy_rl.serving.robot import robot_names

PRESETS = ("clean", "paper")  # of every algorithm
ENCODERS = ("keypoints",)  # those of networks.py


@dataclass(frozen=True)
class Config:
    """Names of tasks, algorithms, presets, robots, encoders and trained policies, those of other packages included.

    Example: flow-policy list tasks

    Attributes:
        kind: one kind, or all of them.
        json: print one JSON object.
    """

    kind: Annotated[
        Literal["all", "tasks", "algorithms", "presets", "robots", "encoders", "policies"],
        tyro.conf.Positional,
    ] = "all"
    json: bool = False


def tasks() -> list[str]:
    """Of the simulation."""
    from sim.tasks import task_names

    return task_names()


def algorithms() -> list[str]:
    """What flow-policy train takes."""
    return [*ALGORITHMS, *plugins.names("algorithms")]


def preset_names() -> list[str]:
    """Settings by algorithm: ours, and the published ones. Each is a function of the task."""
    return [f"{algorithm} --preset {kind}" for algorithm in ALGORITHMS for kind in PRESETS]


def encoders() -> list[str]:
    """What images go through."""
    return [*ENCODERS, *plugins.names("encoders")]


NAMES = {
    "tasks": tasks,
    "algorithms": algorithms,
    "presets": preset_names,
    "robots": robot_names,
    "encoders": encoders,
    "policies": lambda: list(shipped.policies()),
}


def main(config: Config) -> dict:
    """Names by kind; of all kinds, those that this installation has."""
    if config.kind != "all":
        return {config.kind: NAMES[config.kind]()}
    found = {}
    for kind, names in NAMES.items():
        try:
            found[kind] = names()
        except ModuleNotFoundError as error:
            print(f"{kind} need {error.name}, which is not installed", file=sys.stderr)
    return found


def text(result: dict) -> str:
    """For people."""
    return "\n".join(f"{kind}: {', '.join(names)}" for kind, names in result.items())

"""The page of `flow-policy eval --out`: success with its interval, every episode, films of what went right or wrong."""

import csv
import json
import shlex
import sys
from pathlib import Path

import numpy as np
import plotly.graph_objects as go

from flow_policy_rl import film, provenance, report
from flow_policy_rl.progress import Progress
from sim.backends import BackendName
from sim.errors import SimulationError
from sim.render import Renderer

RESULT = "evaluation.json"


def write(out: Path, task, outcome, result: dict, play: film.Play) -> dict:
    """Write the folder; returns the paths of what is in it.

    Args:
        outcome: an `evaluate.Evaluation`. result: the summary that goes with it.
        play: runs the same policy on seeds, for the films.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / RESULT).write_text(json.dumps(result, indent=2) + "\n")
    with (out / "episodes.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["seed", "success", "return", "steps"])
        success = [""] * len(outcome.seeds) if outcome.success is None else outcome.success
        writer.writerows(zip(outcome.seeds, success, outcome.returns, outcome.steps, strict=True))
    page = out / "report.html"
    sections = [
        report.Tiles(tiles(result)),
        films(task, outcome, play, result["backend"]),
        episode_figures(task, outcome),
        report.Code("To reproduce", command(result)),
        report.Code("Versions and machine", json.dumps(provenance.environment(), indent=2), True),
    ]
    report.write(page, f"Evaluation on {result['task']}", result["policy"], sections)
    return {"report": str(page), "out": str(out)}


def tiles(result: dict) -> list[tuple[str, str, str]]:
    """Headline numbers of an evaluation."""
    found = []
    if result["success_rate"] is not None:
        low, high = result["success_ci95"]
        small = f"95 % interval {low:.1%} to {high:.1%}"
        found.append((f"{result['success_rate']:.1%}", "success", small))
    spread = f"standard deviation {result['return_std']:,.4g}"
    seeds = f"seeds from {result['seed']}"
    return [
        *found,
        (f"{result['return_mean']:,.4g}", "return", spread),
        (f"{result['steps_mean']:.0f}", "control steps", "mean length of an episode"),
        (str(result["episodes"]), "episodes", seeds),
    ]


def command(result: dict) -> str:
    """What repeats the evaluation."""
    words = ["flow-policy", "eval"]
    for name in ("policy", "task", "episodes", "seed", "noise", "inference_delay", "backend"):
        words += [f"--{name.replace('_', '-')}", str(result[name])]
    options = [str(word) for option in result["task_options"].items() for word in option]
    return shlex.join(words + (["--task-options", *options] if options else []))


def episode_figures(task, outcome) -> report.Figures | None:
    """How long episodes took and what they returned."""
    groups = {"": np.ones(len(outcome.seeds), bool)}
    if outcome.success is not None:
        groups = {"success": outcome.success, "no success": ~outcome.success}
    colors = dict(zip(groups, (report.COLORS[2], report.COLORS[1]), strict=False))
    figures = []
    values = {"length of episodes, s": outcome.steps * task.control_dt, "return": outcome.returns}
    for name, numbers in values.items():
        figure = go.Figure()
        low, high = float(numbers.min()), float(numbers.max())
        if low == high:  # a single bar says no more than the tiles
            continue
        size = (high - low) / 30
        bins = {"start": low - size / 2, "end": high + size, "size": size}
        for group, chosen in groups.items():
            if chosen.any():
                color = {"color": colors[group]}
                figure.add_histogram(x=numbers[chosen], name=group, xbins=bins, marker=color)
        report.layout(figure, "", "episodes").update_layout(
            barmode="stack", showlegend=len(groups) > 1
        )
        figures.append(report.Figure(name, figure, height=260))
    return report.Figures("Episodes", figures) if figures else None


def films(task, outcome, play: film.Play, backend: BackendName) -> report.Films | None:
    """The episodes worth a film, four to a picture."""
    if not task.cameras:
        print(f"no film: task '{task.name}' names no cameras", file=sys.stderr)
        return None
    chosen, made = outcome.watched(), []
    try:
        with (
            Renderer(task.world, *film.SIZE) as renderer,
            Progress("film", len(chosen), "film") as progress,
        ):
            for label, seeds in chosen.items():
                states = film.record(task, seeds, play, backend)
                frames = film.draw(renderer, states, task.cameras[0])
                caption = f"{label}: seeds {', '.join(map(str, seeds))}"
                fps = round(1 / task.control_dt)
                made.append(report.Film(report.encode_film(frames, fps), caption))
                progress.update(1)
    except SimulationError as error:
        print(f"no film: {error}", file=sys.stderr)
        return None
    return report.Films("Films", made)

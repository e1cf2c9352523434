"""`flow-policy eval --randomize`: what is left of a policy where world, senses and links are not nominal."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from flow_policy_rl.evaluate import Evaluation
from flow_policy_rl.progress import Progress
from sim.backends import BackendName
from sim.randomize import PRESETS, Randomization, RandomizedVecEnv, Randomizer, preset

NOISES = (0.0, 0.002, 0.005, 0.01)  # rad and m
LATENCIES = (0.0, 0.5, 1.0, 2.0)  # control steps


def robustness(
    task,
    play: Callable[[RandomizedVecEnv, Sequence[int]], Evaluation],
    seeds: Sequence[int],
    num_envs: int,
    cell_episodes: int,
    folder: Path,
    backend: BackendName = "cpu",
) -> dict:
    """Evaluate under every preset, and on a grid of observation noise and action latency.

    Writes a page with table and heat map into `folder`, and every episode with what it drew (`.jsonl`).

    Args:
        play: runs one episode per seed in an environment.
        seeds: of the episodes, the same ones under every preset.
        cell_episodes: episodes in each cell of the grid (the first of the seeds).
    """
    cells = [(sigma, lag) for sigma in NOISES for lag in LATENCIES]
    folder.mkdir(parents=True, exist_ok=True)
    out, episodes = folder / "robustness.html", folder / "robustness.jsonl"

    def judge(randomization: Randomization, chosen: Sequence[int]) -> Evaluation:
        env = RandomizedVecEnv(
            task, min(num_envs, len(chosen)), randomization=randomization, backend=backend
        )
        result = play(env, chosen)
        env.close()
        return result

    rows, grid = [], []
    with Progress("robustness", len(PRESETS) + len(cells), "setting") as progress:
        with episodes.open("w") as file:
            for name in PRESETS:
                randomization = preset(name, task)
                result = judge(randomization, seeds)
                rows.append({"randomization": name, **result.summary()})
                for record in episode_records(task, name, randomization, result):
                    file.write(json.dumps(record) + "\n")
                progress.update(1, name)
        for sigma, lag in cells:
            delay = lag * task.control_dt
            randomization = Randomization(
                observation_noise=(sigma, sigma), action_latency=(delay, delay)
            )
            summary = judge(randomization, seeds[:cell_episodes]).summary()
            grid.append({"observation_noise": sigma, "action_latency_s": delay, **summary})
            progress.update(1, f"noise {sigma:g}, latency {delay * 1e3:.0f} ms")
    write_page(out, task, rows, grid)
    return {
        "robustness": rows,
        "heat_map": grid,
        "robustness_page": str(out),
        "robustness_episodes": str(episodes),
    }


def episode_records(
    task, name: str, randomization: Randomization, result: Evaluation
) -> Iterator[dict]:
    """One line per episode: seed, outcome and every drawn value."""
    randomizer = Randomizer(task, randomization)
    for i, seed in enumerate(result.seeds):
        draw = randomizer.for_seed(seed)
        yield {
            "randomization": name,
            "seed": int(seed),
            "success": None if result.success is None else bool(result.success[i]),
            "return": float(result.returns[i]),
            "steps": int(result.steps[i]),
            "draw": {key: np.asarray(value).tolist() for key, value in draw.items()},
        }


def figure_of(rate: float | None, value: float) -> str:
    """Success where the task knows it, else the return."""
    return f"{value:.2f}" if rate is None else f"{rate:.1%}"


def write_page(out: Path, task, rows: list[dict], grid: list[dict]) -> None:
    """Table and heat map in one HTML file."""
    import plotly.graph_objects as go

    from flow_policy_rl import report

    key = "return_mean" if rows[0]["success_rate"] is None else "success_rate"
    values = np.array([cell[key] for cell in grid]).reshape(len(NOISES), len(LATENCIES))
    texts = [figure_of(c["success_rate"], c["return_mean"]) for c in grid]
    heat = go.Figure(
        go.Heatmap(
            z=values,
            x=[f"{lag * task.control_dt * 1e3:.0f} ms" for lag in LATENCIES],
            y=[f"{sigma:g}" for sigma in NOISES],
            text=np.array(texts).reshape(values.shape),
            texttemplate="%{text}",
            colorscale="Blues",
            zmin=0 if key == "success_rate" else None,
            zmax=1 if key == "success_rate" else None,
        )
    )
    report.layout(heat, "action latency", "observation noise (rad, m)")
    settings = {name: dataclasses.asdict(preset(name, task)) for name in PRESETS}
    table = report.Table(
        "Same episodes, other worlds",
        ("randomisation", "success", "95 % interval", "return", "steps"),
        [
            (
                row["randomization"],
                "" if row["success_rate"] is None else f"{row['success_rate']:.1%}",
                ""
                if row["success_rate"] is None
                else "{:.1%} to {:.1%}".format(*row["success_ci95"]),
                f"{row['return_mean']:.3f} ± {row['return_std']:.3f}",
                f"{row['steps_mean']:.0f}",
            )
            for row in rows
        ],
    )
    caption = f"{grid[0]['episodes']} episodes in each cell; nothing else is randomised."
    report.write(
        out,
        f"Robustness on {task.name}",
        "",
        [
            table,
            report.Figure("Noise and latency", heat, caption),
            report.Code("Ranges drawn from", json.dumps(settings, indent=1)),
        ],
    )


def text(result: dict) -> str:
    """Table and heat map for a terminal."""
    lines = ["", f"{'randomisation':<14} {'success':>8}  {'95 % interval':<18} {'return':>16}"]
    for row in result["robustness"]:
        success = interval = ""
        if row["success_rate"] is not None:
            success = f"{row['success_rate']:.1%}"
            interval = "{:.1%} to {:.1%}".format(*row["success_ci95"])
        returns = f"{row['return_mean']:.3f} ± {row['return_std']:.3f}"
        lines.append(f"{row['randomization']:<14} {success:>8}  {interval:<18} {returns:>16}")
    grid = result["heat_map"]
    header = "".join(f"{c['action_latency_s'] * 1e3:>7.0f} ms" for c in grid[: len(LATENCIES)])
    lines += ["", f"noise \\ latency{header}   ({grid[0]['episodes']} episodes in each cell)"]
    for start in range(0, len(grid), len(LATENCIES)):
        cells = grid[start : start + len(LATENCIES)]
        values = "".join(f"{figure_of(c['success_rate'], c['return_mean']):>10}" for c in cells)
        lines.append(f"{cells[0]['observation_noise']:<15g}{values}")
    return "\n".join([*lines, "", f"page: {result['robustness_page']}"])

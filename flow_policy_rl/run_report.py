"""`flow-policy report`: the page of a training run, or of several runs side by side."""

import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from flow_policy_rl import evaluation_report, report
from flow_policy_rl.errors import InputError, output_file
from flow_policy_rl.logger import read_metrics
from flow_policy_rl.nesting import flat

SEED_KEYS = {
    "seed",
    "run_dir",
    "checkpoint",
    "demos",
    "json",
}  # repetitions of a run may differ in these
CURVES = (
    "eval/success_rate",
    "eval/return",
    "rollout/success_rate",
    "rollout/return",
    "rollout/episode_steps",
    "eval/cfm_loss",
)
GROUPS = {"eval/": "Evaluation", "rollout/": "Roll-outs", "train/": "Optimisation", "time/": "Time"}
AXIS = "time/env_steps"


@dataclass(frozen=True)
class Config:
    """HTML report of a training run, or of several to compare. Runs that differ in their seed alone are drawn as one.

    Example: flow-policy report --run-dir runs/fpo runs/score_flow --out comparison.html

    Attributes:
        run_dir: folders that flow-policy train wrote.
        out: page to write (None: report.html in the folder, or comparison.html for several).
        json: print one JSON object.
    """

    run_dir: tuple[Path, ...]
    out: Path | None = None
    json: bool = False


@dataclass(frozen=True)
class Run:
    """What a run folder says.

    Attributes:
        name: path of the folder. settings: its config, flat, by dotted name. rows: its metrics.
        evaluation: result of `flow-policy eval --out` somewhere in the folder, if there is one.
    """

    name: str
    settings: dict[str, Any]
    environment: dict
    rows: list[dict[str, float]]
    evaluation: dict | None

    def curve(self, metric: str) -> tuple[list[float], list[float]]:
        """A metric over environment steps, or over the steps of the optimiser where there is no environment."""
        points = [(row.get(AXIS, row["step"]), row[metric]) for row in self.rows if metric in row]
        return [x for x, _ in points], [y for _, y in points]

    @property
    def metrics(self) -> set[str]:
        """Names of what was logged."""
        return {name for row in self.rows for name in row if "/" in name}


def main(config: Config) -> dict:
    """Write the page."""
    if not config.run_dir:
        raise InputError("--run-dir needs at least one folder")
    several = len(config.run_dir) > 1
    out = config.out or (Path("comparison.html") if several else config.run_dir[0] / "report.html")
    runs = [read_run(path) for path in config.run_dir]
    output_file(out, ".html")
    common = os.path.commonpath([run.name for run in runs]) if len(runs) > 1 else ""
    runs = (
        [replace(run, name=os.path.relpath(run.name, common or None)) for run in runs]
        if common
        else runs
    )
    (compare if several else single)(runs, out)
    return {"report": str(out), "runs": len(runs), "rows": sum(len(run.rows) for run in runs)}


def read_run(folder: Path) -> Run:
    """A run folder.

    Raises:
        InputError: it is none.
    """
    for name in ("metrics.csv", "config.json", "environment.json"):
        if not (folder / name).is_file():
            raise InputError(
                f"run folder '{folder}' has no {name}: give a folder that flow-policy train wrote"
            )
    read = lambda name: json.loads((folder / name).read_text())  # noqa: E731
    found = sorted(folder.rglob(evaluation_report.RESULT))
    evaluation = json.loads(found[-1].read_text()) if found else None
    settings = flat(read("config.json"), ".")
    rows = read_metrics(folder / "metrics.csv")
    return Run(str(folder), settings, read("environment.json"), rows, evaluation)


# --- one run ---


def single(runs: Sequence[Run], out: Path) -> None:
    """Learning curve first, then every metric as a small figure."""
    run = runs[0]
    sections: list = [report.Tiles(tiles(run))]
    if "rollout/success_rate" in run.metrics:
        sections.append(report.learning_figure(run.rows))
    for prefix, title in GROUPS.items():
        names = sorted(n for n in run.metrics if n.startswith(prefix) and n != AXIS)
        figures = [metric_figure(name, [[run]]) for name in names]
        if figures:
            sections.append(report.Figures(title, figures))
    sections += [
        report.Table(
            "Settings", ["setting", "value"], [[k, str(v)] for k, v in run.settings.items()]
        ),
        report.Code("Versions and machine", json.dumps(run.environment, indent=2), folded=True),
    ]
    report.write(out, heading(run), run.name, sections)


def heading(run: Run) -> str:
    """Algorithm and task."""
    algorithm = (
        run.settings.get("algorithm")
        or run.environment.get("command", "").split("train ")[-1].split(" ")[0]
    )
    return f"Training: {algorithm} on {run.settings.get('task', '?')}".replace(":  on", ":")


def tiles(run: Run) -> list[tuple[str, str, str]]:
    """Headline numbers of a run."""
    found = []
    if run.evaluation is not None:
        found += evaluation_report.tiles(run.evaluation)[:1]
    watched = {"eval/success_rate": "success, last in training", "eval/cfm_loss": "held-out loss"}
    for metric, what in watched.items():
        _, values = run.curve(metric)
        if values:
            percent = metric.endswith("rate")
            show = (lambda v: f"{v:.1%}") if percent else (lambda v: f"{v:.4g}")
            best = max(values) if percent else min(values)
            found.append((show(values[-1]), what, f"best {show(best)}"))
    last = run.rows[-1] if run.rows else {}
    if AXIS in last:
        found.append((f"{last[AXIS]:,.0f}", "control steps", f"{last['step']:.0f} iterations"))
    if "time/wall_s" in last:
        rate = (
            f"{last[AXIS] / last['time/wall_s']:,.0f} control steps per s" if AXIS in last else ""
        )
        found.append((duration(last["time/wall_s"]), "wall time", rate))
    return found


def duration(seconds: float) -> str:
    """Seconds for people."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes:02d} min"
        if hours
        else f"{minutes} min {rest:02d} s"
        if minutes
        else f"{seconds:.0f} s"
    )


def metric_figure(metric: str, groups: Sequence[Sequence[Run]]) -> report.Figure:
    """One metric; each group of repetitions as its mean, in the range of the repetitions."""
    figure = go.Figure()
    for i, group in enumerate(groups):
        color = report.COLORS[i % len(report.COLORS)]
        x, low, mean, high = band([run.curve(metric) for run in group])
        if not x:
            continue
        if len(group) > 1:
            figure.add_scatter(
                x=[*x, *reversed(x)],
                y=[*high, *reversed(low)],
                fill="toself",
                fillcolor=color,
                opacity=0.2,
                line={"width": 0},
                hoverinfo="skip",
                showlegend=False,
            )
        figure.add_scatter(
            x=x,
            y=mean,
            name=label(group),
            line={"color": color},
            mode="lines+markers" if len(x) < 40 else "lines",
            marker={"size": 5},
        )
    over = (
        "control steps"
        if any(AXIS in r.metrics for g in groups for r in g if metric in r.metrics)
        else "step"
    )
    report.layout(figure, over, "").update_layout(showlegend=False)
    if metric.endswith("_rate"):
        figure.update_yaxes(range=[0, 1.02], tickformat=".0%")
    return report.Figure(metric, figure, height=230)


def band(curves: Sequence[tuple[list[float], list[float]]]) -> tuple[list, list, list, list]:
    """Mean and range of curves where all of them have a point: x, low, mean, high. Points are matched by number."""
    curves = [c for c in curves if c[0]]
    if not curves:
        return [], [], [], []
    length = min(len(x) for x, _ in curves)
    columns = []
    for k in range(length):
        values = [y[k] for _, y in curves]
        columns.append(
            (
                statistics.fmean(x[k] for x, _ in curves),
                min(values),
                statistics.fmean(values),
                max(values),
            )
        )
    x, low, mean, high = map(list, zip(*columns, strict=True))
    return x, low, mean, high


# --- several runs ---


def repetitions(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs grouped by all of their settings but the seed."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        key = {k: v for k, v in run.settings.items() if k.rpartition(".")[2] not in SEED_KEYS}
        groups.setdefault(json.dumps(key, sort_keys=True), []).append(run)
    return [
        part
        for group in groups.values()
        for part in ([group] if differ_in_seed(group) else [[run] for run in group])
    ]


def differ_in_seed(group: Sequence[Run]) -> bool:
    """Whether no two have the same seed."""
    return len({run.settings.get("seed") for run in group}) == len(group)


def label(group: Sequence[Run]) -> str:
    """Name of a group in legends and tables."""
    more = f" and {len(group) - 1} more" if len(group) > 1 else ""
    return f"{group[0].name}{more}"


def compare(runs: Sequence[Run], out: Path) -> None:
    """Curves over each other, final numbers with intervals, and the settings that differ."""
    groups = repetitions(runs)
    metrics = set.union(*(run.metrics for run in runs))
    first = [name for name in CURVES if name in metrics]
    rest = sorted(n for n in metrics - set(first) if n.startswith("train/"))
    names = [label(group) for group in groups]
    captioned = "Mean and range of the repetitions." if len(groups) < len(runs) else ""
    sections = [
        final_table(runs),
        evaluation_figure(runs),
        report.Figures("Learning", [metric_figure(n, groups) for n in first], captioned, names),
        settings_table(runs),
        report.Figures("Optimisation", [metric_figure(n, groups) for n in rest], "", names)
        if rest
        else None,
    ]
    report.write(out, f"Comparison of {len(runs)} runs", ", ".join(names), sections)


def final_table(runs: Sequence[Run]) -> report.Table:
    """Last numbers of every run; columns that are empty for all of them are left out."""
    header = [
        "run",
        "seed",
        "success",
        "95 % interval",
        "episodes",
        "last in training",
        "control steps",
        "wall time",
    ]
    rows = []
    for run in runs:
        measured, last = run.evaluation or {}, run.rows[-1] if run.rows else {}
        rate, interval = measured.get("success_rate"), measured.get("success_ci95")
        _, watched = run.curve("eval/success_rate")
        rows.append(
            [
                run.name,
                str(run.settings.get("seed", "-")),
                "-" if rate is None else f"{rate:.1%}",
                f"{interval[0]:.1%} to {interval[1]:.1%}" if interval else "-",
                str(measured.get("episodes", "-")),
                f"{watched[-1]:.1%}" if watched else "-",
                f"{last[AXIS]:,.0f}" if AXIS in last else "-",
                duration(last["time/wall_s"]) if "time/wall_s" in last else "-",
            ]
        )
    known = [i for i in range(len(header)) if i == 0 or any(row[i] != "-" for row in rows)]
    return report.Table(
        "Results", [header[i] for i in known], [[row[i] for i in known] for row in rows]
    )


def evaluation_figure(runs: Sequence[Run]) -> report.Figure | None:
    """Success with its interval, where `flow-policy eval --out` measured it."""
    measured = [r for r in runs if r.evaluation and r.evaluation.get("success_ci95")]
    if not measured:
        return None
    rates = [r.evaluation["success_rate"] for r in measured]
    intervals = [r.evaluation["success_ci95"] for r in measured]
    figure = go.Figure().add_scatter(
        x=rates,
        y=[r.name for r in measured],
        mode="markers",
        marker={"size": 10},
        error_x={
            "type": "data",
            "symmetric": False,
            "array": [high - rate for rate, (_, high) in zip(rates, intervals, strict=True)],
            "arrayminus": [rate - low for rate, (low, _) in zip(rates, intervals, strict=True)],
        },
    )
    report.layout(figure, "success rate", "").update_xaxes(range=[0, 1.02], tickformat=".0%")
    figure.update_yaxes(autorange="reversed")
    return report.Figure("Success, 95 % intervals", figure, height=110 + 34 * len(measured))


def settings_table(runs: Sequence[Run]) -> report.Table | None:
    """The settings in which the runs that have them differ."""
    keys = {key: None for run in runs for key in run.settings if key not in ("run_dir", "json")}
    value = lambda run, key: str(run.settings.get(key, "-"))  # noqa: E731
    having = {key: [run for run in runs if key in run.settings] for key in keys}
    differing = [k for k in keys if len({value(run, k) for run in having[k]}) > 1]
    rows = [[key, *(value(run, key) for run in runs)] for key in differing]
    if not rows:
        return None
    return report.Table("Settings that differ", ["setting", *(run.name for run in runs)], rows)


def text(result: dict) -> str:
    """For people."""
    return f"report: {result['report']}"

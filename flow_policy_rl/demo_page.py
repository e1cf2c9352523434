"""The page of `flow-policy demo`: before and after in numbers and films, the same by hand, versions."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from flow_policy_rl import collect, export_command, film, provenance, replay, report
from flow_policy_rl.evaluate import wilson_interval
from flow_policy_rl.logger import read_metrics
from flow_policy_rl.progress import Progress
from flow_policy_rl.train_config import default_config
from sim.errors import SimulationError
from sim.render import Renderer

if TYPE_CHECKING:
    from flow_policy_rl.demo_stages import Demo


def write(demo: "Demo") -> dict:
    """The page, from what the stages left."""
    config, results = demo.config, demo.results
    deploy, replayed = results["deploy"], results["replay"]
    judged = replay.judge(demo.replay_config, demo.export_config.out)
    recording = judged.recording
    rows = table(results)
    sections = [
        report.Text(
            f"{senses(demo)} {config.task} policy learned from {results['collect']['episodes']} "
            f"scripted demonstrations, then improved itself by {config.algorithm} in "
            f"{results['fine_tune']['env_steps']:,} control steps of simulation with a sparse "
            f"reward. It was exported to one policy.onnx and drove the simulated arm over real "
            f"ROS 2 messages between separate processes. {agreement(results)}"
        ),
        report.Tiles(tiles(results)),
        report.Table("Success", list(rows[0]), [[*row.values()] for row in rows], strong=1),
        films(demo),
        report.learning_figure(
            read_metrics(demo.rl_config.run_dir / "metrics.csv"),
            results["evaluate"]["base"]["success_rate"],
        ),
        report.latency_figure(recording.latencies_s * 1e3),
        report.chunk_figure(
            judged.spec, recording.times, judged.chunks, recording.truth, recording.segment
        ),
        report.Table(
            "Replay of the bag",
            ["joint", "mean absolute error", "root mean square"],
            [[n, shown(v["mae"]), shown(v["rmse"])] for n, v in replayed["joints"].items()],
        ),
        report.Text(
            f"Parity of policy.onnx with torch: largest error "
            f"{results['export']['max_abs_error']:.1e} rad. "
            f"Replay: mean error {shown(replayed['mae'])}, hold position {shown(replayed['mae_hold'])}, "
            f"copy last command {shown(replayed['mae_copy_last'])}; mean jump where one "
            f"chunk takes over from the other {shown(replayed['seams']['position_mean'])}. "
            f"Over ROS, real-time factor {config.real_time_factor:g}: "
            f"latency {latency(deploy['end_to_end_ms'])}."
        ),
        report.Table(
            "Time",
            ["stage", "seconds"],
            [[name, f"{s:.1f}"] for name, s in demo.seconds.items()],
        ),
        report.Code("The same by hand", "\n".join(commands(demo))),
        report.Code("Versions and machine", json.dumps(provenance.environment(), indent=2)),
    ]
    out = demo.dir / "report.html"
    pictures = " from camera pictures" if config.cameras else ""
    title = f"flow_policy_rl demo: {config.task}{pictures}, {config.algorithm}"
    report.write(out, title, str(demo.dir), sections)
    return {"report": str(out)}


def table(results: dict) -> list[dict[str, str]]:
    """Success of base, fine-tuned and over ROS."""
    tuned, deploy = results["evaluate"]["finetuned"], results["deploy"]
    total, shared = deploy["episodes"], tuned["success_rate_on_ros_seeds"]
    alike = {
        "success_rate": shared,
        "success_ci95": wilson_interval(round(shared * total), total),
        "episodes": total,
    }
    rows = []
    for label, result in {
        "base (imitation)": results["evaluate"]["base"],
        "fine-tuned": tuned,
        "fine-tuned, over ROS 2": deploy,
        "the same seeds without ROS": alike,
    }.items():
        low, high = result["success_ci95"]
        rows.append(
            {
                "policy": label,
                "success": f"{result['success_rate']:.1%}",
                "95 % interval": f"{low:.1%} to {high:.1%}",
                "episodes": str(result["episodes"]),
            }
        )
    return rows


def tiles(results: dict) -> list[tuple[str, str, str]]:
    """Headline numbers."""
    rows = [(row["success"], row["policy"], row["95 % interval"]) for row in table(results)[:3]]
    ms = results["deploy"]["end_to_end_ms"]
    if ms["p50"] is None:
        return rows
    return [*rows, (f"{ms['p50']:.1f} ms", "state to command, median", f"p99 {ms['p99']:.1f} ms")]


def latency(ms: dict[str, float | None]) -> str:
    """From state to command over ROS. A command is paired with its observation by the number of its message, which
    Humble and Cyclone DDS do not give."""
    if ms["p50"] is None:
        return "not measured (this ROS numbers no messages)"
    return f"p50 {ms['p50']:.2f} ms, p99 {ms['p99']:.2f} ms"


def senses(demo: "Demo") -> str:
    """What the policy is told, as the beginning of a sentence."""
    images = [f for f in demo.make_task().obs_fields if f.kind == "image"]
    if not images:
        return "A"
    size = lambda f: " x ".join(str(side) for side in f.resolution)  # noqa: E731
    seen = " and ".join(f"the camera '{f.source}' ({size(f)} pixels)" for f in images)
    return f"From {seen}, and its joints, without being told where anything is, a"


def agreement(results: dict) -> str:
    """Over ROS against plain simulation, on equal seeds."""
    plain, deploy = results["evaluate"]["finetuned"]["success_rate_on_ros_seeds"], results["deploy"]
    return (
        f"Over ROS 2 it succeeds in {deploy['success_rate']:.1%} of {deploy['episodes']} episodes, "
        f"in plain simulation in {plain:.1%} of the same."
    )


def films(demo: "Demo") -> report.Films | None:
    """Films of both policies, and of what a policy with cameras sees; nothing where nothing can be drawn."""
    task = demo.make_task()
    try:
        renderer = Renderer(task.world, *film.SIZE)
    except SimulationError as error:
        demo.say(f"no film: {error}")
        return None
    drawn, states = [], {}
    rate = round(1 / task.control_dt)
    with renderer, Progress("film", 2, "film") as progress:
        for name, label in {"base": "Base policy", "finetuned": "Fine-tuned"}.items():
            path = demo.dir / demo.results["evaluate"][name]["film"]
            states[name] = np.load(path)["states"]  # (4, T, state)
            frames = film.draw(renderer, states[name], task.cameras[0])
            drawn.append(report.Film(report.encode_film(frames, rate), f"{label}, four episodes"))
            progress.update(1)
    for field in (f for f in task.obs_fields if f.kind == "image"):
        with Renderer(task.world, *field.resolution) as eye:
            frames = film.draw(eye, states["finetuned"], field.source, field.resolution)
        label = f"What the fine-tuned policy sees: camera '{field.source}'"
        drawn.append(report.Film(report.encode_film(frames, rate), label))
    return report.Films("Before and after, same start positions", drawn)


def commands(demo: "Demo") -> list[str]:
    """The same run, by hand."""
    task, base, tuned = demo.config.task, demo.bc_config, demo.rl_config
    policy, evaluation = demo.export_config.out, demo.evaluation_flags
    tuned_default = default_config(tuned.algorithm, task)
    nothing = export_command.ExportConfig(Path(), Path())
    return [
        f"flow-policy collect {flags(demo.collect_config, collect.Config(task, Path()))}",
        f"flow-policy train bc {flags(base, default_config('bc', task))}",
        f"flow-policy train {tuned.algorithm} {flags(tuned, tuned_default)}",
        f"flow-policy eval --policy {tuned.checkpoint} {evaluation}",
        f"flow-policy eval --policy {demo.export_config.checkpoint} {evaluation}",
        f"flow-policy export {flags(demo.export_config, nothing)}",
        f"flow-policy sim --task {task} &   # then, in another terminal:",
        f"flow-policy deploy --policy {policy} --use-sim-time --armed",
        f"flow-policy replay --bag {demo.dir / 'bag'} --policy {policy} --out {demo.dir / 'replay'}",
    ]


def flags(config, default) -> str:
    """Command-line flags that turn one config into another."""

    def walk(value, base, prefix):
        for f in dataclasses.fields(value):
            new, old = getattr(value, f.name), getattr(base, f.name, None)
            name = f"{prefix}{f.name}".replace("_", "-")
            if dataclasses.is_dataclass(new):
                yield from walk(new, old, f"{prefix}{f.name}.")
            elif f.name == "json" or (new == old and (prefix or f.name != "task")):
                continue
            elif isinstance(new, bool):
                yield f"--{name}" if new else f"--no-{name}"
            else:
                yield f"--{name} {new}"

    return " ".join(walk(config, default, ""))


def shown(value: float | None) -> str:
    """A number of a replay that may not be known."""
    return "unknown" if value is None else f"{value:.5f}"

"""`flow-policy demo`: the whole product on real input, and one page that shows what happened.

    collect -> pretrain -> fine_tune -> evaluate -> export -> deploy (ROS 2) -> replay -> report

Each stage leaves its files in the run folder and an entry in `stages.json`; `--resume` goes on after
the last one that finished.
"""

import dataclasses
import json
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from flow_policy_rl import (
    checkpoint,
    collect,
    evaluate,
    export,
    film,
    presets,
    provenance,
    replay,
    report,
    ros,
    train,
)
from flow_policy_rl.errors import InputError, RunFailed
from flow_policy_rl.evaluate import wilson_interval
from flow_policy_rl.logger import read_metrics
from flow_policy_rl.over_ros import run_episodes
from flow_policy_rl.progress import Progress
from flow_policy_rl.run_folder import claimed
from sim.errors import SimulationError
from sim.render import Renderer
from sim.tasks import make_task
from sim.vec_env import VecEnv

EVAL_SEED = 10_000
FILM_SEEDS = range(EVAL_SEED, EVAL_SEED + 4)


@dataclass(frozen=True)
class Config:
    """Demonstrations, imitation, RL fine-tuning, policy.onnx, a ROS 2 arm, a rosbag and a report, in a few minutes.

    Example: flow-policy demo --run-dir runs/demo

    Attributes:
        algorithm: how the policy is fine-tuned.
        task: what it learns.
        cameras: the policy sees the object through a camera instead of being told where it is.
        run_dir: folder for everything; emptied first unless --resume.
        seed: of the whole run.
        episodes: evaluation episodes of base and fine-tuned policy.
        ros_episodes: closed-loop episodes over ROS.
        real_time_factor: simulated seconds per second while over ROS.
        resume: go on after the last finished stage of the run folder.
        json: print one JSON object.
    """

    algorithm: Literal["score_flow", "reinflow", "fpo", "fpo_plus_plus", "rldt", "gaussian_ppo"] = (
        "score_flow"
    )
    task: str = "lift"
    cameras: bool = False
    run_dir: Path = Path("runs/demo")
    seed: int = 0
    episodes: int = 200
    ros_episodes: int = 100
    real_time_factor: float = 5.0
    resume: bool = False
    json: bool = False


class Demo:
    """The stages. Each returns a JSON-able result, which later stages and `--resume` read back."""

    def __init__(self, config: Config):
        self.config = config
        self.dir = config.run_dir
        self.results: dict[str, dict] = {}
        self.seconds: dict[str, float] = {}
        self.collect_config = collect.Config(
            config.task,
            self.dir / "demos.hdf5",
            **presets.demo_data(config.task, config.cameras),
            seed=config.seed,
        )
        self.bc_config = train.TrainBC(
            task=config.task,
            demos=self.collect_config.out,
            run_dir=self.dir / "base",
            seed=config.seed,
            bc=presets.demo_bc(config.task, config.cameras),
        )
        self.rl_config = dataclasses.replace(
            train.default_config(config.algorithm, config.task),
            checkpoint=self.bc_config.run_dir / train.POLICY_FILE,
            run_dir=self.dir / "finetuned",
            seed=config.seed,
        )
        self.export_config = export.ExportConfig(
            self.rl_config.run_dir / train.POLICY_FILE, self.dir / "policy.onnx"
        )

    @property
    def stages(self) -> dict[str, Callable[[], dict]]:
        """In order."""
        return {
            "collect": lambda: collect.main(self.collect_config),
            "pretrain": lambda: train_afresh(self.bc_config),
            "fine_tune": lambda: train_afresh(self.rl_config),
            "evaluate": self.run_evaluate,
            "export": lambda: export.main(self.export_config),
            "deploy": self.run_deploy,
            "replay": self.run_replay,
            "report": self.run_report,
        }

    def run(self) -> dict:
        """All stages that are not finished."""
        self._begin()
        for name, stage in self.stages.items():
            if name in self.results:
                self._say(f"[{name}] finished earlier")
                continue
            self._say(f"[{name}]")
            start = time.monotonic()
            self.results[name] = stage()
            self.seconds[name] = round(time.monotonic() - start, 1)
            self._save()
        return self.summary()

    def _begin(self) -> None:
        state = self.dir / "stages.json"
        settings = json.loads(
            json.dumps(
                dataclasses.asdict(dataclasses.replace(self.config, resume=False, json=False)),
                default=str,
            )
        )
        if self.config.resume:
            if not state.is_file():
                raise InputError(f"nothing to resume: '{self.dir}' has no stages.json")
            saved = json.loads(state.read_text())
            if saved["settings"] != settings:
                different = [k for k in settings if settings[k] != saved["settings"].get(k)]
                raise InputError(
                    f"'{self.dir}' was run with other settings: {', '.join(different)}"
                )
            self.results, self.seconds = saved["results"], saved["seconds"]
        else:
            there = list(self.dir.iterdir())
            if there and not state.is_file():
                raise InputError(
                    f"'{self.dir}' is not a run folder of this demo: choose another --run-dir"
                )
            for path in there:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        self._settings = settings
        self._save()

    def _save(self) -> None:
        state = {"settings": self._settings, "results": self.results, "seconds": self.seconds}
        partial = self.dir / "stages.partial"
        partial.write_text(json.dumps(state, indent=2))
        partial.rename(self.dir / "stages.json")

    def _task(self):
        return make_task(self.config.task, **({"cameras": True} if self.config.cameras else {}))

    def _say(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    # --- stages that are more than one command ---

    def run_evaluate(self) -> dict:
        """Base and fine-tuned policy on the same seeds, and a film of both."""
        task = self._task()
        paths = {"base": self.bc_config.run_dir, "finetuned": self.rl_config.run_dir}
        result = {}
        with Progress("evaluate", len(paths), "policy") as progress:
            for name, folder in paths.items():
                policy = checkpoint.load(folder / train.POLICY_FILE)
                env = VecEnv(task, self.config.episodes)
                seeds = range(EVAL_SEED, EVAL_SEED + self.config.episodes)
                act = evaluate.torch_policy(policy)
                outcome = evaluate.evaluate(
                    env, act, seeds, policy.chunk_shape, policy.spec.execute_horizon
                )
                env.close()
                shared = outcome.success[: self.config.ros_episodes]
                result[name] = outcome.summary() | {
                    "success_rate_on_ros_seeds": float(shared.mean())
                }
                result[name]["film"] = self._film(task, act, policy, self.dir / f"{name}_film.npz")
                progress.update(1, f"{name} {outcome.success.mean():.0%}")
        return result

    def _film(self, task, act, policy, path: Path) -> str:
        """States of a few episodes, for the report to draw."""
        shape, execute = policy.chunk_shape, policy.spec.execute_horizon

        def play(env, seeds, on_states):
            evaluate.evaluate(env, act, seeds, shape, execute, on_states=on_states)

        np.savez_compressed(path, states=film.record(task, FILM_SEEDS, play))
        return path.name

    def run_deploy(self) -> dict:
        """Simulated arm and policy as two processes on ROS 2, everything recorded."""
        bag = self.dir / "bag"
        shutil.rmtree(bag, ignore_errors=True)
        nodes = {
            "recorder": {"bag": str(bag.absolute())},
            "sim_node": {
                "task": self.config.task,
                "first_seed": EVAL_SEED,
                "real_time_factor": self.config.real_time_factor,
                "state_rate_hz": 20.0,
                "image_rate_hz": 20.0 if self.config.cameras else 2.0,
            },
            "policy_node": {
                "policy": str(self.export_config.out.absolute()),
                "armed": True,
                "use_sim_time": True,
            },
        }
        result = run_episodes(nodes, self.config.ros_episodes, self.dir)
        times = result.pop("end_to_end_s")
        return result | {"end_to_end_ms": replay.percentiles(times * 1e3), "bag": str(bag)}

    def run_replay(self) -> dict:
        """The bag through the same decoding and policy code."""
        return replay.main(self.replay_config)

    @property
    def replay_config(self) -> replay.Config:
        """The bag of the deployment and the policy that made it."""
        policy, out = self.export_config.out, self.dir / "replay"
        return replay.Config(bag=self.dir / "bag", policy=policy, out=out)

    # --- what comes out ---

    def commands(self) -> list[str]:
        """The same run, by hand."""
        base, tuned = self.bc_config, self.rl_config
        line = lambda name, config, default: f"flow-policy {name} " + flags(config, default)  # noqa: E731
        plain_eval = (
            f"--task {self.config.task} --episodes {self.config.episodes} --seed {EVAL_SEED}"
        )
        return [
            line("collect", self.collect_config, collect.Config(self.config.task, Path())),
            line("train bc", base, train.default_config("bc", self.config.task)),
            line(
                f"train {tuned.algorithm}",
                tuned,
                train.default_config(tuned.algorithm, self.config.task),
            ),
            f"flow-policy eval --policy {tuned.checkpoint} {plain_eval}",
            f"flow-policy eval --policy {self.export_config.checkpoint} {plain_eval}",
            line("export", self.export_config, export.ExportConfig(Path(), Path())),
            f"flow-policy sim --task {self.config.task} &   # then, in another terminal:",
            f"flow-policy deploy --policy {self.export_config.out} --use-sim-time --armed",
            f"flow-policy replay --bag {self.dir / 'bag'} --policy {self.export_config.out} "
            f"--out {self.dir / 'replay'}",
        ]

    def run_report(self) -> dict:
        """The page."""
        table = [[*row.values()] for row in self.table()]
        deploy, replayed = self.results["deploy"], self.results["replay"]
        rows = read_metrics(self.rl_config.run_dir / "metrics.csv")
        judged = replay.judge(self.replay_config, self.export_config.out)
        recording, chunks = judged.recording, judged.chunks
        environment = provenance.environment()
        sections = [
            report.Text(
                f"{self.senses()} {self.config.task} policy learned from {self.results['collect']['episodes']} "
                f"scripted demonstrations, then improved itself by {self.config.algorithm} in "
                f"{self.results['fine_tune']['env_steps']:,} control steps of simulation with a sparse "
                f"reward. It was exported to one policy.onnx and drove the simulated arm over real "
                f"ROS 2 messages between separate processes. {self.agreement()}"
            ),
            report.Tiles(self.tiles()),
            report.Table("Success", list(self.table()[0]), table, strong=1),
            self._films(),
            report.learning_figure(rows, self.results["evaluate"]["base"]["success_rate"]),
            report.latency_figure(recording.latencies_s * 1e3),
            report.chunk_figure(
                judged.spec, recording.times, chunks, recording.truth, recording.segment
            ),
            report.Table(
                "Replay of the bag",
                ["joint", "mean absolute error", "root mean square"],
                [[n, shown(v["mae"]), shown(v["rmse"])] for n, v in replayed["joints"].items()],
            ),
            report.Text(
                f"Parity of policy.onnx with torch: largest error "
                f"{self.results['export']['max_abs_error']:.1e} rad. "
                f"Replay: mean error {shown(replayed['mae'])}, hold position {shown(replayed['mae_hold'])}, "
                f"copy last command {shown(replayed['mae_copy_last'])}; mean jump where one "
                f"chunk takes over from the other "
                f"{shown(replayed['seams']['position_mean'])}. "
                f"Over ROS, real-time factor {self.config.real_time_factor:g}: "
                f"latency p50 {deploy['end_to_end_ms']['p50']:.2f} ms, p99 {deploy['end_to_end_ms']['p99']:.2f} ms."
            ),
            report.Table(
                "Time",
                ["stage", "seconds"],
                [[name, f"{s:.1f}"] for name, s in self.seconds.items()],
            ),
            report.Code("The same by hand", "\n".join(self.commands())),
            report.Code("Versions and machine", json.dumps(environment, indent=2)),
        ]
        out = self.dir / "report.html"
        report.write(
            out,
            f"flow_policy_rl demo: {self.config.task}{' from camera pictures' if self.config.cameras else ''}, "
            f"{self.config.algorithm}",
            str(self.dir),
            sections,
        )
        return {"report": str(out)}

    def tiles(self) -> list[tuple[str, str, str]]:
        """Headline numbers."""
        rows = [(row["success"], row["policy"], row["95 % interval"]) for row in self.table()[:3]]
        latency = self.results["deploy"]["end_to_end_ms"]
        return [
            *rows,
            (
                f"{latency['p50']:.1f} ms",
                "state to command, median",
                f"p99 {latency['p99']:.1f} ms",
            ),
        ]

    def senses(self) -> str:
        """What the policy is told, as the beginning of a sentence."""
        images = [f for f in self._task().obs_fields if f.kind == "image"]
        if not images:
            return "A"
        size = lambda f: " x ".join(str(side) for side in f.resolution)  # noqa: E731
        seen = " and ".join(f"the camera '{f.source}' ({size(f)} pixels)" for f in images)
        return f"From {seen}, and its joints, without being told where anything is, a"

    def agreement(self) -> str:
        """Over ROS against plain simulation, on equal seeds."""
        plain = self.results["evaluate"]["finetuned"]["success_rate_on_ros_seeds"]
        deploy = self.results["deploy"]
        return (
            f"Over ROS 2 it succeeds in {deploy['success_rate']:.1%} of {deploy['episodes']} episodes, "
            f"in plain simulation in {plain:.1%} of the same."
        )

    def _films(self) -> report.Films | None:
        """Films of both policies, and of what a policy with cameras sees; nothing where nothing can be drawn."""
        task = self._task()
        try:
            renderer = Renderer(task.world, *film.SIZE)
        except SimulationError as error:
            self._say(f"no film: {error}")
            return None
        films, states = [], {}
        rate = round(1 / task.control_dt)
        with renderer, Progress("film", 2, "film") as progress:
            for name, label in {"base": "Base policy", "finetuned": "Fine-tuned"}.items():
                path = self.dir / self.results["evaluate"][name]["film"]
                states[name] = np.load(path)["states"]  # (4, T, state)
                frames = film.draw(renderer, states[name], task.cameras[0])
                films.append(
                    report.Film(report.encode_film(frames, rate), f"{label}, four episodes")
                )
                progress.update(1)
        for field in (f for f in task.obs_fields if f.kind == "image"):
            with Renderer(task.world, *field.resolution) as eye:
                frames = film.draw(eye, states["finetuned"], field.source, field.resolution)
            label = f"What the fine-tuned policy sees: camera '{field.source}'"
            films.append(report.Film(report.encode_film(frames, rate), label))
        return report.Films("Before and after, same start positions", films)

    def table(self) -> list[dict[str, str]]:
        """Success of base, fine-tuned and over ROS."""
        results = self.results
        tuned, deploy = results["evaluate"]["finetuned"], results["deploy"]
        total = deploy["episodes"]
        shared = tuned["success_rate_on_ros_seeds"]
        interval = list(wilson_interval(round(shared * total), total))
        rows = []
        for label, key in {
            "base (imitation)": results["evaluate"]["base"],
            "fine-tuned": tuned,
            "fine-tuned, over ROS 2": deploy,
            "the same seeds without ROS": {
                "success_rate": shared,
                "success_ci95": interval,
                "episodes": total,
            },
        }.items():
            low, high = key["success_ci95"]
            rows.append(
                {
                    "policy": label,
                    "success": f"{key['success_rate']:.1%}",
                    "95 % interval": f"{low:.1%} to {high:.1%}",
                    "episodes": str(key["episodes"]),
                }
            )
        return rows

    def summary(self) -> dict:
        """What `--json` prints."""
        keys = ("success_rate", "success_ci95", "episodes")
        results = self.results
        pick = lambda result: {k: result[k] for k in keys}  # noqa: E731
        return {
            "base": pick(results["evaluate"]["base"]),
            "finetuned": pick(results["evaluate"]["finetuned"]),
            "ros": pick(results["deploy"])
            | {
                "emergency_stops": results["deploy"]["emergency_stops"],
                "success_rate_without_ros": results["evaluate"]["finetuned"][
                    "success_rate_on_ros_seeds"
                ],
            },
            "seconds": {**self.seconds, "total": round(sum(self.seconds.values()), 1)},
            "parity_max_abs_error": results["export"]["max_abs_error"],
            "latency_ms": {
                "inference": results["replay"]["inference_ms"],
                "end_to_end": results["deploy"]["end_to_end_ms"],
            },
            "report": results["report"]["report"],
            "policy": str(self.export_config.out),
            "bag": results["deploy"]["bag"],
            "table": self.table(),
        }


def shown(value: float | None) -> str:
    """A number of a replay that may not be known."""
    return "unknown" if value is None else f"{value:.5f}"


def flag(name: str, value) -> str:
    """One command-line flag."""
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} {value}"


def flags(config, default) -> str:
    """Command-line flags that turn one config into another."""

    def walk(value, base, prefix):
        for f in dataclasses.fields(value):
            new, old = getattr(value, f.name), getattr(base, f.name, None)
            name = f"{prefix}{f.name}".replace("_", "-")
            if dataclasses.is_dataclass(new):
                yield from walk(new, old, f"{prefix}{f.name}.")
            elif f.name != "json" and (new != old or (prefix == "" and f.name == "task")):
                yield flag(name, new)

    return " ".join(walk(config, default, ""))


def train_afresh(config: train.TrainBC | train.TrainRL) -> dict:
    """A stage that was interrupted begins again."""
    shutil.rmtree(config.run_dir, ignore_errors=True)
    return train.main(config)


def main(config: Config) -> dict:
    """Run the demo. SIGTERM ends it like Ctrl-C."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    for package in ("rclpy", "flow_policy_ros"):
        if package not in sys.modules:
            ros.node_command("sim_node", {})  # fail now, not after minutes of training
    try:
        with claimed(config.run_dir):
            return Demo(config).run()
    except KeyboardInterrupt:
        print(
            f"\ninterrupted; go on with: flow-policy demo --run-dir {config.run_dir} --resume",
            file=sys.stderr,
        )
        raise
    except RunFailed as error:
        raise RunFailed(f"{error}; go on with --resume") from None


def text(result: dict) -> str:
    """For people."""
    rows = result["table"]
    widths = {key: max(len(key), *(len(row[key]) for row in rows)) for key in rows[0]}
    lines = ["  ".join(key.ljust(widths[key]) for key in rows[0])]
    lines += ["  ".join(row[key].ljust(widths[key]) for key in row) for row in rows]
    end_to_end = result["latency_ms"]["end_to_end"]
    if stops := result["ros"]["emergency_stops"]:
        lines += [f"{stops} episodes over ROS ended in an emergency stop of the policy node"]
    return "\n".join(
        [
            "",
            *lines,
            "",
            f"latency over ROS: p50 {end_to_end['p50']:.2f} ms, p99 {end_to_end['p99']:.2f} ms; "
            f"policy.onnx differs from torch by {result['parity_max_abs_error']:.1e} rad at most; "
            f"{result['seconds']['total']:.0f} s in all",
            f"policy: {result['policy']}",
            f"bag:    {result['bag']}",
            f"report: {result['report']}",
        ]
    )

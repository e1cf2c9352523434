"""The stages of `flow-policy demo`; `demo.py` says in which order, `demo_page.py` writes what comes out."""

import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Callable

import numpy as np

from flow_policy_rl import (
    checkpoint,
    collect,
    demo_page,
    export_command,
    film,
    presets,
    replay,
    train,
)
from flow_policy_rl.demo import Config
from flow_policy_rl.errors import InputError
from flow_policy_rl.evaluate import player
from flow_policy_rl.offline.metrics import percentiles
from flow_policy_rl.over_ros import run_episodes
from flow_policy_rl.progress import Progress
from flow_policy_rl.run_folder import POLICY_FILE
from flow_policy_rl.train_config import TrainBC, TrainRL, default_config
from sim.tasks import make_task
from sim.vec_env import VecEnv

EVAL_SEED = 10_000
FILM_SEEDS = range(EVAL_SEED, EVAL_SEED + 4)


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
        self.bc_config = TrainBC(
            task=config.task,
            demos=self.collect_config.out,
            run_dir=self.dir / "base",
            seed=config.seed,
            bc=presets.demo_bc(config.task, config.cameras),
        )
        self.rl_config = dataclasses.replace(
            default_config(config.algorithm, config.task),
            checkpoint=self.bc_config.run_dir / POLICY_FILE,
            run_dir=self.dir / "finetuned",
            seed=config.seed,
        )
        self.export_config = export_command.ExportConfig(
            self.rl_config.run_dir / POLICY_FILE, self.dir / "policy.onnx"
        )

    @property
    def stages(self) -> dict[str, Callable[[], dict]]:
        """In order."""
        return {
            "collect": lambda: collect_afresh(self.collect_config),
            "pretrain": lambda: train_afresh(self.bc_config),
            "fine_tune": lambda: train_afresh(self.rl_config),
            "evaluate": self.run_evaluate,
            "export": lambda: export_command.main(self.export_config),
            "deploy": self.run_deploy,
            "replay": lambda: replay.main(self.replay_config),
            "report": lambda: demo_page.write(self),
        }

    def run(self) -> dict:
        """All stages that are not finished."""
        self._begin()
        for name, stage in self.stages.items():
            if name in self.results:
                self.say(f"[{name}] finished earlier")
                continue
            self.say(f"[{name}]")
            start = time.monotonic()
            self.results[name] = stage()
            self.seconds[name] = round(time.monotonic() - start, 1)
            self._save()
        return self.summary()

    def _begin(self) -> None:
        state = self.dir / "stages.json"
        settings = dataclasses.asdict(dataclasses.replace(self.config, resume=False, json=False))
        settings = json.loads(json.dumps(settings, default=str))
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

    def make_task(self):
        """What is learned."""
        return make_task(self.config.task, cameras=self.config.cameras or None)

    def say(self, line: str) -> None:
        """To whoever watches."""
        print(line, file=sys.stderr, flush=True)

    # --- stages that are more than one command ---

    def run_evaluate(self) -> dict:
        """Base and fine-tuned policy on the same seeds, and a film of both."""
        task = self.make_task()
        paths = {"base": self.bc_config.run_dir, "finetuned": self.rl_config.run_dir}
        result = {}
        with Progress("evaluate", len(paths), "policy") as progress:
            for name, folder in paths.items():
                policy = checkpoint.load(folder / POLICY_FILE)
                play = player(policy.spec, policy.act)
                env = VecEnv(task, self.config.episodes)
                outcome = play(env, range(EVAL_SEED, EVAL_SEED + self.config.episodes))
                env.close()
                states = self.dir / f"{name}_film.npz"
                np.savez_compressed(states, states=film.record(task, FILM_SEEDS, play))
                shared = outcome.success[: self.config.ros_episodes]
                result[name] = outcome.summary() | {
                    "success_rate_on_ros_seeds": float(shared.mean()),
                    "film": states.name,
                }
                progress.update(1, f"{name} {outcome.success.mean():.0%}")
        return result

    @property
    def evaluation_flags(self) -> str:
        """What repeats an evaluation."""
        config = self.config
        return f"--task {config.task} --episodes {config.episodes} --seed {EVAL_SEED}"

    def run_deploy(self) -> dict:
        """Simulated arm and policy as two processes on ROS 2, everything recorded."""
        bag = self.dir / "bag"
        shutil.rmtree(bag, ignore_errors=True)
        rate = 1 / self.make_task().control_dt
        nodes = {
            "recorder": {"bag": str(bag.absolute())},
            "sim_node": {
                "task": self.config.task,
                "first_seed": EVAL_SEED,
                "real_time_factor": self.config.real_time_factor,
                "state_rate_hz": rate,
                "image_rate_hz": rate if self.config.cameras else 2.0,
            },
            "policy_node": {
                "policy": str(self.export_config.out.absolute()),
                "armed": True,
                "use_sim_time": True,
            },
        }
        result = run_episodes(nodes, self.config.ros_episodes, self.dir)
        times = result.pop("end_to_end_s")
        return result | {"end_to_end_ms": percentiles(times * 1e3), "bag": str(bag)}

    @property
    def replay_config(self) -> replay.Config:
        """The bag of the deployment and the policy that made it."""
        policy, out = self.export_config.out, self.dir / "replay"
        return replay.Config(bag=self.dir / "bag", policy=policy, out=out)

    def summary(self) -> dict:
        """What `--json` prints."""
        keys = ("success_rate", "success_ci95", "episodes")
        results = self.results
        base, tuned = (results["evaluate"][name] for name in ("base", "finetuned"))
        deploy = results["deploy"]
        pick = lambda result: {k: result[k] for k in keys}  # noqa: E731
        return {
            "base": pick(base),
            "finetuned": pick(tuned),
            "ros": pick(deploy)
            | {
                "emergency_stops": deploy["emergency_stops"],
                "success_rate_without_ros": tuned["success_rate_on_ros_seeds"],
            },
            "seconds": {**self.seconds, "total": round(sum(self.seconds.values()), 1)},
            "parity_max_abs_error": results["export"]["max_abs_error"],
            "latency_ms": {
                "inference": results["replay"]["inference_ms"],
                "end_to_end": deploy["end_to_end_ms"],
            },
            "report": results["report"]["report"],
            "policy": str(self.export_config.out),
            "bag": deploy["bag"],
            "table": demo_page.table(results),
        }


def collect_afresh(config: collect.Config) -> dict:
    """A stage that was interrupted begins again, be it after the last byte."""
    config.out.unlink(missing_ok=True)
    return collect.main(config)


def train_afresh(config: TrainBC | TrainRL) -> dict:
    """A stage that was interrupted begins again."""
    shutil.rmtree(config.run_dir, ignore_errors=True)
    return train.main(config)

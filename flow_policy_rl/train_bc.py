"""Imitation of demonstrations: `flow-policy train bc`."""

import dataclasses
import time

import torch

from flow_policy_rl import distributed, provenance, resume
from flow_policy_rl.algorithms.bc import Imitation
from flow_policy_rl.data import demonstrations, sources
from flow_policy_rl.data import recorded as recording
from flow_policy_rl.data.demonstrations import ChunkDataset, Demonstrations
from flow_policy_rl.errors import InputError, RunFailed
from flow_policy_rl.evaluate import task_of
from flow_policy_rl.logger import RunLogger
from flow_policy_rl.policy import FlowPolicy
from flow_policy_rl.progress import Progress
from flow_policy_rl.run_folder import POLICY_FILE, state_file
from flow_policy_rl.spec import MEANING
from flow_policy_rl.train_config import TrainBC
from flow_policy_rl.train_run import (
    begin_run,
    interruptible,
    policy_spec,
    require_finite,
    save_policy,
)

LOG_EVERY, SAVE_EVERY = 100, 500  # steps


def train_bc(config: TrainBC) -> dict:
    """Imitation.

    Raises:
        InputError: started by torchrun with more than one process.
    """
    if distributed.world_size() > 1:
        raise InputError("bc runs in one process: start it without torchrun")
    demos = demonstrations.load(config.demos)
    recorded = config.task == recording.NAME
    options = demos.provenance.get("task_options")
    task = (
        recording.recorded_task(demos) if recorded else task_of(demos.layout, config.task, options)
    )
    check_demos(demos, task, config)
    torch.manual_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    spec = policy_spec(task, demos.layout.observations, config).replace(
        algorithm="bc",
        provenance={
            "demos": {
                "sha256": sources.hash_of(config.demos),
                "episodes": len(demos.episodes),
            },
            "environment": provenance.environment(),
        },
    )
    data = ChunkDataset(demos.episodes, config.action_horizon)
    learner = Imitation(FlowPolicy(spec, config.network), data, config.bc, generator)
    state, settings = state_file(config.run_dir, distributed.rank()), dataclasses.asdict(config)
    wall_s = resume.load(state, learner, settings)["wall_s"] if config.resume else 0.0
    begin_run(config)
    logger = RunLogger(config.run_dir, learner.num_steps, trackers=config.track, settings=settings)
    start, last = time.monotonic() - wall_s, config.bc.num_steps
    with (
        Progress("train bc", last, "step", done=learner.num_steps) as progress,
        interruptible(config, "step", lambda: learner.num_steps) as saved,
    ):
        while learner.num_steps < last:
            loss = learner.step()
            step = learner.num_steps
            if step % LOG_EVERY and step != last:
                continue
            metrics = learner.losses(loss)
            try:
                require_finite(metrics)
            except RunFailed as error:
                raise RunFailed(
                    f"training stopped at step {step}: {error}; lower the learning rate"
                ) from None
            wall_s = time.monotonic() - start
            logger.log(step, metrics | {"time/wall_s": wall_s})
            progress.reach(step, learning(metrics, config, len(demos.episodes)), metrics)
            if step % SAVE_EVERY == 0 or step == last:
                resume.save(state, learner, settings, {"wall_s": wall_s})
                saved()
    logger.close()
    save_policy(config.run_dir, learner, spec)
    return {
        "checkpoint": str(config.run_dir / POLICY_FILE),
        "seconds": time.monotonic() - start,
    }


def check_demos(demos: Demonstrations, task, config: TrainBC) -> None:
    """Refuse data of another task, joint order, rate or set of observations, and a batch larger than the data."""
    layout, path = demos.layout, config.demos
    names = tuple(f.name for f in task.obs_fields)
    differences = {
        "task": (layout.task, task.name),
        "joints": (layout.joint_names, task.world.joint_names),
        "control_dt": (layout.control_dt, task.control_dt),
        "observations": (tuple(f.name for f in layout.observations), names),
    }
    for mine, theirs in zip(layout.observations, task.obs_fields, strict=False):
        for what in MEANING:
            found, wanted = getattr(mine, what), getattr(theirs, what)
            differences[f"observation '{theirs.name}' with {what}"] = (found, wanted)
    for what, (found, wanted) in differences.items():
        if found != wanted:
            raise InputError(
                f"demonstrations '{path}' have {what} {found}; task '{task.name}' has {wanted}"
            )
    if all(e.success is False for e in demos.episodes):
        raise InputError(
            f"none of the {len(demos.episodes)} demonstrations in '{path}' was a success: there is nothing to imitate"
        )
    if config.bc.batch_size > demos.num_steps:
        raise InputError(
            f"--bc.batch-size {config.bc.batch_size} is larger than the {demos.num_steps} steps in '{path}'"
        )


def learning(metrics: dict[str, float], config: TrainBC, episodes: int) -> str:
    """How well it imitates, for the progress line."""
    if "eval/cfm_loss" in metrics:
        return f"held-out loss {metrics['eval/cfm_loss']:.3f}"
    loss = f"training loss {metrics['train/cfm_loss']:.3f}"
    few = f" (too few episodes to hold any out: {episodes})"
    return f"{loss}{few if config.bc.held_out else ''}"

"""`flow-policy train ALGO`: builds task, policy and algorithm in the open and runs them. No algorithm code here.

A run folder holds `config.json`, `environment.json`, `metrics.csv`, TensorBoard events and `policy.safetensors`.
"""

import dataclasses
import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from flow_policy_rl import checkpoint, presets, provenance
from flow_policy_rl.algorithms import bc as imitation
from flow_policy_rl.algorithms.bc import BCConfig
from flow_policy_rl.algorithms.ppo import PPO, PPOConfig
from flow_policy_rl.algorithms.score_flow import ScoreFlow, ScoreFlowConfig
from flow_policy_rl.data import demonstrations
from flow_policy_rl.data.demonstrations import ChunkDataset, Demonstrations
from flow_policy_rl.errors import InputError, RunFailed
from flow_policy_rl.evaluate import check_fits, evaluate, task_of, torch_policy
from flow_policy_rl.logger import RunLogger
from flow_policy_rl.policy import FlowPolicy, NetworkConfig
from flow_policy_rl.progress import Progress
from flow_policy_rl.spec import PolicySpec
from sim.vec_env import VecEnv

POLICY_FILE = "policy.safetensors"
EVAL_SEED = 50_000  # first seed of the episodes that watch training; reported results use others


@dataclass(frozen=True)
class TrainBC:
    """Flow-matching imitation of demonstrations.

    Example: flow-policy train bc --task lift --demos demos.hdf5 --run-dir runs/bc

    Attributes:
        task: name of the task.
        demos: robomimic-style HDF5 file.
        run_dir: folder to write.
        seed: of initial weights and batches.
        action_horizon: H, actions per chunk.
        execute_horizon: actions executed before the next chunk.
        num_flow_steps: K, integration steps.
        prefix_horizon: P, most actions of a previous chunk that the policy learns to continue (real-time chunking);
            0 is none.
        network: size of the velocity field.
        bc: optimisation.
        json: print one JSON object.
    """

    task: str
    demos: Path
    run_dir: Path = Path("runs/bc")
    seed: int = 0
    action_horizon: int = 12
    execute_horizon: int = 8
    num_flow_steps: int = 4
    prefix_horizon: int = 0
    network: NetworkConfig = field(default_factory=NetworkConfig)
    bc: BCConfig = field(default_factory=BCConfig)
    json: bool = False


@dataclass(frozen=True)
class TrainScoreFlow:
    """ScoRe-Flow: PPO on the flow's chain of transitions, with a score drift.

    Example: flow-policy train score_flow --task lift --checkpoint runs/bc/policy.safetensors --run-dir runs/rl

    Attributes:
        task: name of the task.
        checkpoint: pre-trained policy to start from.
        run_dir: folder to write.
        seed: of environments, exploration and batches.
        eval_every: iterations between evaluations on the mean flow (0: never).
        eval_episodes: episodes of each.
        ppo: the on-policy loop.
        score_flow: the transition kernel.
        json: print one JSON object.
    """

    task: str
    checkpoint: Path
    run_dir: Path = Path("runs/score_flow")
    seed: int = 0
    eval_every: int = 5
    eval_episodes: int = 100
    ppo: PPOConfig = field(default_factory=PPOConfig)
    score_flow: ScoreFlowConfig = field(default_factory=ScoreFlowConfig)
    json: bool = False


def default_config(algorithm: str, task: str):
    """The preset of a task, as a config whose paths are still to be given."""
    if algorithm == "bc":
        return TrainBC(task=task, demos=Path("demos.hdf5"), bc=presets.bc(task))
    ppo, kernel = presets.score_flow(task)
    return TrainScoreFlow(
        task=task, checkpoint=Path("policy.safetensors"), ppo=ppo, score_flow=kernel
    )


ALGORITHMS = {"bc": TrainBC, "score_flow": TrainScoreFlow}


def main(config: TrainBC | TrainScoreFlow) -> dict:
    """Train, and write the run folder."""
    begin_run(config)
    return train_bc(config) if isinstance(config, TrainBC) else train_score_flow(config)


def begin_run(config) -> None:
    """Write down what is about to run."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    resolved = json.dumps(dataclasses.asdict(config), indent=2, default=str)
    (config.run_dir / "config.json").write_text(resolved + "\n")
    (config.run_dir / "environment.json").write_text(
        json.dumps(provenance.environment(), indent=2) + "\n"
    )


def train_bc(config: TrainBC) -> dict:
    """Imitation."""
    demos = demonstrations.load(config.demos)
    task = task_of(demos.layout, config.task)
    check_demos(demos, task, config)
    torch.manual_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    spec = PolicySpec(
        task=task.name,
        robot=task.robot,
        joint_names=demos.layout.joint_names,
        action_low=tuple(task.world.target_low.tolist()),
        action_high=tuple(task.world.target_high.tolist()),
        action_kind=task.world.interface,
        observations=demos.layout.observations,
        control_dt=demos.layout.control_dt,
        action_horizon=config.action_horizon,
        execute_horizon=config.execute_horizon,
        num_flow_steps=config.num_flow_steps,
        prefix_horizon=config.prefix_horizon,
        algorithm="bc",
        provenance={
            "demos": {
                "sha256": provenance.file_hash(config.demos),
                "episodes": len(demos.episodes),
            },
            "environment": provenance.environment(),
        },
    )
    data = ChunkDataset(demos.episodes, config.action_horizon)
    logger = RunLogger(config.run_dir)
    start = time.monotonic()
    with Progress("train bc", config.bc.num_steps, "step") as progress:

        def on_step(step: int, metrics: dict[str, float]) -> None:
            require_finite(metrics, step)
            logger.log(step, metrics | {"time/wall_s": time.monotonic() - start})
            progress.reach(step, f"held-out loss {metrics.get('eval/cfm_loss', math.nan):.3f}")

        policy = imitation.train(
            FlowPolicy(spec, config.network), data, config.bc, generator, on_step
        )
    policy.spec = with_statistics(spec, policy)
    logger.close()
    checkpoint.save(config.run_dir / POLICY_FILE, policy)
    return {"checkpoint": str(config.run_dir / POLICY_FILE), "seconds": time.monotonic() - start}


def check_demos(demos: Demonstrations, task, config: TrainBC) -> None:
    """Refuse data of another task, joint order or rate, and a batch larger than the data."""
    layout, path = demos.layout, config.demos
    names = tuple(f.name for f in task.obs_fields)
    differences = {
        "task": (layout.task, task.name),
        "joints": (layout.joint_names, task.world.joint_names),
        "control_dt": (layout.control_dt, task.control_dt),
        "observations": (tuple(f.name for f in layout.observations), names),
    }
    for what, (found, wanted) in differences.items():
        if found != wanted:
            raise InputError(
                f"demonstrations '{path}' have {what} {found}; task '{task.name}' has {wanted}"
            )
    if config.bc.batch_size > demos.num_steps:
        raise InputError(
            f"--bc.batch-size {config.bc.batch_size} is larger than the {demos.num_steps} steps in '{path}'"
        )


def with_statistics(spec: PolicySpec, policy: FlowPolicy) -> PolicySpec:
    """The spec with mean and spread of each observation as the policy's normaliser has them."""
    names, sizes = list(policy.normalizer.fields), list(policy.normalizer.fields.values())
    means = dict(zip(names, policy.normalizer.mean.split(sizes), strict=True))
    stds = dict(zip(names, policy.normalizer.std.split(sizes), strict=True))
    fields = [
        dataclasses.replace(f, mean=tuple(means[f.name].tolist()), std=tuple(stds[f.name].tolist()))
        if f.name in means
        else f
        for f in spec.observations
    ]
    return spec.replace(observations=tuple(fields))


def train_score_flow(config: TrainScoreFlow) -> dict:
    """RL fine-tuning."""
    base = checkpoint.load(config.checkpoint)
    task = task_of(base.spec, config.task)
    check_fits(base.spec, task, str(config.checkpoint))
    torch.manual_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    policy = FlowPolicy(
        base.spec.replace(algorithm="score_flow"),
        dataclasses.replace(base.network, score_drift=config.score_flow.drift == "learned"),
    )
    policy.load_state_dict(base.state_dict(), strict=False)
    env = VecEnv(task, config.ppo.num_envs, seed=config.seed)
    watch = VecEnv(task, config.eval_episodes) if config.eval_every else None
    learner = PPO(policy, ScoreFlow(policy, config.score_flow), env, config.ppo, generator)
    logger = RunLogger(config.run_dir)
    env_steps, start = 0, time.monotonic()
    with Progress("train score_flow", config.ppo.num_iterations, "it") as progress:
        for iteration in range(1, config.ppo.num_iterations + 1):
            metrics = learner.iterate()
            require_finite(metrics, iteration, optional=("rollout/return",))
            env_steps += int(metrics["rollout/env_steps"])
            if watch is not None and (
                iteration % config.eval_every == 0 or iteration == config.ppo.num_iterations
            ):
                result = evaluate_policy(watch, policy, config.eval_episodes, EVAL_SEED)
                metrics["eval/return"] = result["return_mean"]
                if result["success_rate"] is not None:
                    metrics["eval/success_rate"] = result["success_rate"]
            logger.log(
                iteration,
                metrics | {"time/env_steps": env_steps, "time/wall_s": time.monotonic() - start},
            )
            progress.update(1, f"success {metrics['rollout/success_rate']:.0%} while exploring")
    env.close()
    logger.close()
    policy.spec = policy.spec.replace(
        provenance={
            **base.spec.provenance,
            "fine_tuning": {
                "env_steps": env_steps,
                "base_checkpoint_sha256": provenance.file_hash(config.checkpoint),
                "environment": provenance.environment(),
            },
        }
    )
    checkpoint.save(config.run_dir / POLICY_FILE, policy)
    return {
        "checkpoint": str(config.run_dir / POLICY_FILE),
        "env_steps": env_steps,
        "seconds": time.monotonic() - start,
    }


def evaluate_policy(
    env: VecEnv, policy: FlowPolicy, episodes: int, first_seed: int, noise: str = "zero"
) -> dict:
    """Success of a policy on consecutive seeds."""
    seeds = range(first_seed, first_seed + episodes)
    return evaluate(
        env, torch_policy(policy), seeds, policy.chunk_shape, policy.spec.execute_horizon, noise
    ).summary()


def require_finite(metrics: dict[str, float], step: int, optional: tuple[str, ...] = ()) -> None:
    """Stop at the first number that is not finite.

    Raises:
        RunFailed: names the step and the term.
    """
    for name, value in metrics.items():
        if not math.isfinite(value) and name not in optional:
            raise RunFailed(
                f"training diverged at step {step}: {name} is {value}; lower the learning rate"
            )


def text(result: dict) -> str:
    """For people."""
    return f"trained in {result['seconds']:.0f} s: {result['checkpoint']}"

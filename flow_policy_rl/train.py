"""`flow-policy train ALGO`: builds task, policy and algorithm in the open and runs them. No algorithm code here.

A run folder holds `config.json`, `environment.json`, `metrics.csv`, TensorBoard events, `policy.safetensors` and
`state.safetensors`, from which an RL run goes on exactly (`--resume`). docs/training.md has the line for a cluster.
"""

import contextlib
import dataclasses
import json
import math
import os
import shlex
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from flow_policy_rl import checkpoint, distributed, presets, provenance, resume
from flow_policy_rl.algorithms.bc import BCConfig, Imitation
from flow_policy_rl.algorithms.fpo import FPO, FPOConfig
from flow_policy_rl.algorithms.gaussian import Gaussian, GaussianConfig
from flow_policy_rl.algorithms.ppo import PPO, PPOConfig
from flow_policy_rl.algorithms.rldt import RLDT, RLDTConfig
from flow_policy_rl.algorithms.score_flow import ScoreFlow, ScoreFlowConfig
from flow_policy_rl.data import demonstrations, sources
from flow_policy_rl.data import recorded as recording
from flow_policy_rl.data.demonstrations import ChunkDataset, DemoLayout, Demonstrations
from flow_policy_rl.errors import InputError, PeerLost, RunFailed, refuse_below
from flow_policy_rl.evaluate import check_fits, player, task_of
from flow_policy_rl.logger import RunLogger, Tracker
from flow_policy_rl.policy import FlowPolicy, NetworkConfig
from flow_policy_rl.presets import Preset
from flow_policy_rl.progress import Progress
from flow_policy_rl.run_folder import (
    POLICY_FILE,
    RAW_POLICY_FILE,
    claimed,
    failed_file,
    state_file,
)
from flow_policy_rl.spec import ObservationField, PolicySpec
from sim.backends import BackendName
from sim.randomize import PresetName, make_env
from sim.tasks import make_task
from sim.vec_env import VecEnv

BC_LOG_EVERY, BC_SAVE_EVERY = 100, 500  # steps
EVAL_SEED = 50_000  # first seed of the episodes that watch training; reported results use others


@dataclass(frozen=True)
class ScratchConfig:
    """A policy without pre-training: feedback at every step, which exploration without a plan needs.

    Attributes:
        action_horizon: H, actions per chunk.
        execute_horizon: actions executed before the next chunk.
        num_flow_steps: K, integration steps.
        prefix_horizon: P, most actions of a previous chunk that the policy learns to continue.
        network: size of the velocity field.
    """

    action_horizon: int = 1
    execute_horizon: int = 1
    num_flow_steps: int = 4
    prefix_horizon: int = 0
    network: NetworkConfig = field(default_factory=NetworkConfig)


@dataclass(frozen=True)
class TrainBC:
    """Flow-matching imitation of demonstrations.

    Example: flow-policy train bc --task lift --demos demos.hdf5 --run-dir runs/bc

    Attributes:
        task: name of the task; `recorded` for data of a robot or task that has no simulation here.
        demos: robomimic HDF5, LeRobot v3 folder, Minari folder or D4RL file.
        run_dir: folder to write.
        seed: of initial weights and batches.
        resume: go on from the last state of the run folder, exactly.
        action_horizon: H, actions per chunk.
        execute_horizon: actions executed before the next chunk.
        num_flow_steps: K, integration steps.
        prefix_horizon: P, most actions of a previous chunk that the policy learns to continue (real-time chunking);
            0 is none.
        network: size of the velocity field.
        bc: optimisation.
        track: send metrics to these as well: wandb, trackio.
        json: print one JSON object.
    """

    task: str
    demos: Path
    run_dir: Path = Path("runs/bc")
    seed: int = 0
    resume: bool = False
    action_horizon: int = 12
    execute_horizon: int = 8
    num_flow_steps: int = 4
    prefix_horizon: int = 0
    network: NetworkConfig = field(default_factory=lambda: NetworkConfig(predicts="chunk"))
    bc: BCConfig = field(default_factory=BCConfig)
    track: tuple[Tracker, ...] = ()
    json: bool = False


@dataclass(frozen=True)
class TrainRL:
    """What every RL algorithm takes.

    Attributes:
        task: name of the task.
        task_options: names and values of the task's own options, e.g. `reward dense`.
        checkpoint: pre-trained policy to start from (default: none, from scratch).
        run_dir: folder to write.
        algorithm: name of the algorithm, as in the run folder and the policy's spec.
        preset: `clean` (ours) or `paper` (published settings): the defaults of all that follows. Some differ between
            training from a checkpoint and from scratch.
        seed: of environments, exploration and batches.
        eval_every: iterations between evaluations at zero noise (0: never).
        eval_episodes: episodes of each.
        stop_at: end at the first evaluation that reaches this success rate, or return where a task has no success; for
            a policy of a chosen skill.
        save_every: iterations between checkpoints; each overwrites the one before.
        resume: go on from the last checkpoint of the run folder, exactly.
        device: where networks and rollouts live; `auto` is CUDA where there is some.
        backend: what computes the physics: cpu, warp (MuJoCo Warp on an NVIDIA GPU), or warp-cpu (the same on the CPU);
            with -pixels it draws the pictures too (docs/simulation.md).
        randomize: each episode of training in a world, senses and links that differ: nominal, mild or hard. Evaluations
            stay nominal.
        time_limit: control steps after which an episode of training is cut off (default: the task's, which evaluations
            always have). Where success comes early, what follows a failure teaches little and takes long.
        peer_timeout_s: how long the processes of torchrun wait for one another.
        scratch: the policy, where there is no checkpoint.
        track: send metrics to these as well: wandb, trackio.
        json: print one JSON object.
    """

    task: str
    task_options: dict[str, str] = field(default_factory=dict)
    checkpoint: Path | None = None
    run_dir: Path = Path("runs/rl")
    algorithm: str = ""
    preset: Preset = "clean"
    seed: int = 0
    eval_every: int = 5
    eval_episodes: int = 100
    stop_at: float | None = None
    save_every: int = 5
    resume: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    backend: BackendName = "cpu"
    randomize: PresetName = "nominal"
    time_limit: int | None = None
    peer_timeout_s: float = 60.0
    scratch: ScratchConfig = field(default_factory=ScratchConfig)
    track: tuple[Tracker, ...] = ()
    json: bool = False


@dataclass(frozen=True)
class TrainOnPolicy(TrainRL):
    """What every on-policy algorithm takes.

    Attributes:
        ppo: the on-policy loop.
    """

    ppo: PPOConfig = field(default_factory=PPOConfig)

    @property
    def loop(self) -> PPOConfig:
        """num_iterations and num_envs."""
        return self.ppo


@dataclass(frozen=True)
class TrainScoreFlow(TrainOnPolicy):
    """ScoRe-Flow, and ReinFlow as its case without drift: PPO on the flow's chain of transitions.

    Example: flow-policy train score_flow --task lift --checkpoint runs/bc/policy.safetensors --run-dir runs/rl

    Attributes:
        score_flow: the transition kernel.
    """

    score_flow: ScoreFlowConfig = field(default_factory=ScoreFlowConfig)


@dataclass(frozen=True)
class TrainFPO(TrainOnPolicy):
    """FPO and FPO++: PPO with a ratio from flow-matching losses.

    Example: flow-policy train fpo_plus_plus --task lift --checkpoint runs/bc/policy.safetensors --run-dir runs/rl

    Attributes:
        fpo: the ratio.
    """

    fpo: FPOConfig = field(default_factory=FPOConfig)


@dataclass(frozen=True)
class TrainGaussian(TrainOnPolicy):
    """Gaussian PPO, the control: the same loop and network, with Gaussian noise on the zero-noise chunk.

    Example: flow-policy train gaussian_ppo --task lift --checkpoint runs/bc/policy.safetensors --run-dir runs/rl

    Attributes:
        gaussian: its standard deviation.
    """

    gaussian: GaussianConfig = field(default_factory=GaussianConfig)


@dataclass(frozen=True)
class TrainRLDT(TrainRL):
    """RLDT: samples of the flow move along the field of a learned critic, off policy.

    Example: flow-policy train rldt --task lift --checkpoint runs/bc/policy.safetensors --run-dir runs/rl

    Attributes:
        rldt: density transport, its critic and its field.
    """

    rldt: RLDTConfig = field(default_factory=RLDTConfig)

    @property
    def loop(self) -> RLDTConfig:
        """num_iterations and num_envs."""
        return self.rldt


ALGORITHMS = {
    "bc": TrainBC,
    "fpo": TrainFPO,
    "fpo_plus_plus": TrainFPO,
    "score_flow": TrainScoreFlow,
    "reinflow": TrainScoreFlow,
    "rldt": TrainRLDT,
    "gaussian_ppo": TrainGaussian,
}


def default_config(algorithm: str, task: str, preset: Preset = "clean", from_scratch: bool = False):
    """The preset of a task, from a checkpoint or from scratch, as a config whose paths are still to be given."""
    settings = presets.PRESETS[algorithm](task, preset, from_scratch)
    if algorithm == "bc":
        return TrainBC(task=task, demos=Path("demos.hdf5"), bc=settings)
    return ALGORITHMS[algorithm](
        task=task,
        run_dir=Path("runs") / algorithm,
        algorithm=algorithm,
        preset=preset,
        **settings,
    )


def main(config: TrainBC | TrainRL) -> dict:
    """Train, and write the run folder."""
    distributed.begin(getattr(config, "peer_timeout_s", 60.0))
    try:
        return run_training(config)
    finally:
        distributed.end()


def run_training(config: TrainBC | TrainRL) -> dict:
    """The same, once all processes have met."""
    run = train_bc if isinstance(config, TrainBC) else train_rl
    if distributed.rank() != 0:
        return run(config)
    with claimed(config.run_dir):
        if (config.run_dir / POLICY_FILE).exists() and not config.resume:
            raise InputError(
                f"run folder '{config.run_dir}' holds a trained policy already: go on with --resume, "
                "or choose another --run-dir"
            )
        return run(config)


def begin_run(config) -> None:
    """Write down what is about to run, so that `--config` repeats it from the beginning."""
    settings = dataclasses.asdict(config) | {"resume": False}
    resolved = json.dumps(settings, indent=2, default=str)
    (config.run_dir / "config.json").write_text(resolved + "\n")
    (config.run_dir / "environment.json").write_text(
        json.dumps(provenance.environment(), indent=2) + "\n"
    )


@contextlib.contextmanager
def interruptible(
    config: TrainBC | TrainRL, unit: str, done: Callable[[], int]
) -> Iterator[Callable[[], None]]:
    """Ctrl-C says how to go on, behind the `interrupted` of cli.py. Yields what to call when the state was saved."""
    saved = done()

    def save() -> None:
        nonlocal saved
        saved = done()

    try:
        yield save
    except KeyboardInterrupt:
        what = f"after {unit} {done()}"
        if not saved:
            raise KeyboardInterrupt(f"{what}; nothing is saved yet") from None
        command = "torchrun ... -m flow_policy_rl.cli"
        if distributed.world_size() == 1:
            command = "flow-policy"
        file = shlex.quote(str(config.run_dir / "config.json"))
        raise KeyboardInterrupt(
            f"{what} (state of {unit} {saved} is saved); go on with: "
            f"{command} train {getattr(config, 'algorithm', 'bc')} --config {file} --resume"
        ) from None


def train_bc(config: TrainBC) -> dict:
    """Imitation.

    Raises:
        InputError: started by torchrun with more than one process.
    """
    if distributed.world_size() > 1:
        raise InputError("bc runs in one process: start it without torchrun")
    demos = demonstrations.load(config.demos)
    recorded = config.task == recording.NAME
    task = recording.recorded_task(demos) if recorded else task_of(demos.layout, config.task)
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
    _, wall_s = resume.load(state, learner, settings) if config.resume else (0, 0.0)
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
            if step % BC_LOG_EVERY and step != last:
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
            if step % BC_SAVE_EVERY == 0 or step == last:
                resume.save(state, learner, settings, 0, wall_s)
                saved()
    logger.close()
    save_policy(config.run_dir, learner, spec)
    return {
        "checkpoint": str(config.run_dir / POLICY_FILE),
        "seconds": time.monotonic() - start,
    }


def policy_spec(task, observations: tuple[ObservationField, ...], horizons) -> PolicySpec:
    """What a new policy for a task sees and commands; action_horizon, execute_horizon, num_flow_steps of `horizons`."""
    return PolicySpec(
        task=task.name,
        robot=task.robot,
        joint_names=task.world.joint_names,
        action_kind=task.world.interface,
        action_low=tuple(task.world.target_low.tolist()),
        action_high=tuple(task.world.target_high.tolist()),
        observations=observations,
        control_dt=task.control_dt,
        action_horizon=horizons.action_horizon,
        execute_horizon=horizons.execute_horizon,
        num_flow_steps=horizons.num_flow_steps,
        prefix_horizon=horizons.prefix_horizon,
    )


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
    if all(e.success is False for e in demos.episodes):
        raise InputError(
            f"none of the {len(demos.episodes)} demonstrations in '{path}' was a success: there is nothing to imitate"
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


def build_estimator(config: TrainOnPolicy, base: FlowPolicy) -> torch.nn.Module:
    """The ratio estimator of an algorithm, around the policy that it trains (`.policy`)."""
    if isinstance(config, TrainScoreFlow):
        return ScoreFlow(ScoreFlow.prepare(base, config.score_flow), config.score_flow)
    if isinstance(config, TrainFPO):
        return FPO(base, config.fpo)
    return Gaussian(base, config.gaussian)


def build_learner(
    config: TrainRL, base: FlowPolicy, env: VecEnv, generator: torch.Generator
) -> PPO | RLDT:
    """What iterates: an object with `policy`, `average` (what is evaluated) and `iterate() -> metrics`.

    Raises:
        InputError: RLDT's values are held to 0 and more, and the task's reward has costs.
    """
    if isinstance(config, TrainRLDT):
        low, reward = config.rldt.critic.value_low, getattr(env.task, "reward", "dense")
        if reward != "sparse" and low is not None and low >= 0:
            raise InputError(
                f"rldt.critic.value_low is {low:g}, and reward '{reward}' of task '{env.task.name}' has costs: give "
                "--rldt.critic.value-low=-inf --rldt.critic.value-high=inf, or a range that holds its returns"
            )
        return RLDT(base.to(generator.device), env, config.rldt, generator)
    estimator = build_estimator(config, base).to(generator.device)
    scratch = config.checkpoint is None
    return PPO(estimator.policy, estimator, env, config.ppo, generator, scratch)


def starting_point(config: TrainRL):
    """The task, and the checkpoint or a fresh policy for it.

    Raises:
        InputError: the checkpoint is another task's, or there is none and the algorithm needs one.
    """
    if config.checkpoint is not None:
        policy = checkpoint.load(config.checkpoint)
        task = task_of(policy.spec, config.task, config.task_options)
        check_fits(policy.spec, task, str(config.checkpoint))
        return task, policy
    if isinstance(config, TrainRLDT):
        raise InputError(
            "train rldt needs --checkpoint, a policy to hold on to; from nothing learn fpo, fpo_plus_plus and "
            "gaussian_ppo"
        )
    task = make_task(config.task, **config.task_options)
    fields = DemoLayout.of_task(task).observations
    return task, FlowPolicy(policy_spec(task, fields, config.scratch), config.scratch.network)


def train_rl(config: TrainRL) -> dict:
    """RL, from a checkpoint or from scratch, in this process or in all that torchrun started."""
    device = choose_device(config)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # physics on a GPU takes the same one
    torch.manual_seed(config.seed)
    generator = torch.Generator(device).manual_seed(config.seed)
    task, base = starting_point(config)
    if config.stop_at is not None and not config.eval_every:
        raise InputError("--stop-at needs evaluations: --eval-every must be at least 1")
    refuse_below(config, eval_every=0, eval_episodes=1, save_every=1)
    env = own_environments(task, config)
    learner = build_learner(config, base, env, generator)
    learner.policy.spec = learner.policy.spec.replace(algorithm=config.algorithm)
    state, settings = state_file(config.run_dir, distributed.rank()), dataclasses.asdict(config)
    env_steps, wall_s = resume.load(state, learner, settings) if config.resume else (0, 0.0)
    if learner.iteration > config.loop.num_iterations:
        flag = f"--{'rldt' if isinstance(config, TrainRLDT) else 'ppo'}.num-iterations"
        raise InputError(
            f"nothing left: {learner.iteration} iterations are done, {flag} is {config.loop.num_iterations}"
        )
    leads = distributed.rank() == 0
    watch = None
    if config.eval_every and leads:
        watch = VecEnv(task, config.eval_episodes, backend=config.backend)
    logger = None
    if leads:
        begin_run(config)
        logger = RunLogger(config.run_dir, learner.iteration, config.track, settings)
    start, last = time.monotonic() - wall_s, config.loop.num_iterations
    label, before = f"train {config.algorithm}", learner.iteration
    with (
        Progress(label, last, "it", quiet=not leads, done=before) as progress,
        interruptible(config, "iteration", lambda: learner.iteration) as saved,
    ):
        while learner.iteration < last:
            iteration, skill = learner.iteration + 1, None
            try:
                metrics = learner.iterate()
                require_finite(metrics)
            except PeerLost:
                raise
            except RunFailed as error:
                failed = failed_file(config.run_dir, distributed.rank())
                resume.save(failed, learner, settings, env_steps, wall_s)
                raise RunFailed(
                    f"training stopped in iteration {iteration}: {error}; state in '{failed}'"
                    f"{last_good(config)}; lower the learning rates"
                ) from None
            env_steps += int(metrics["rollout/env_steps"])
            due = iteration == last or (config.eval_every and iteration % config.eval_every == 0)
            if watch is not None and due:
                play = player(learner.average.spec, learner.average.act)
                result = play(watch, range(EVAL_SEED, EVAL_SEED + config.eval_episodes)).summary()
                metrics["eval/return"] = skill = result["return_mean"]
                if result["success_rate"] is not None:
                    metrics["eval/success_rate"] = skill = result["success_rate"]
            if config.stop_at is not None and reached(skill, config.stop_at):
                last = iteration
            wall_s = time.monotonic() - start
            if logger is not None:
                spent = {"time/env_steps": env_steps, "time/wall_s": wall_s}
                logger.log(iteration, metrics | spent)
            if iteration == last or iteration % config.save_every == 0:
                resume.save(state, learner, settings, env_steps, wall_s)
                saved()
                if leads:
                    save_fine_tuned(config, learner, env_steps)
            progress.update(1, exploring(metrics, task.success_hold_steps is not None), metrics)
    for simulation in (env, watch):
        if simulation is not None:
            simulation.close()
    if logger is not None:
        logger.close()
    return {
        "checkpoint": str(config.run_dir / POLICY_FILE),
        "env_steps": env_steps,
        "seconds": time.monotonic() - start,
    }


def learning(metrics: dict[str, float], config: TrainBC, episodes: int) -> str:
    """How well it imitates, for the progress line."""
    if "eval/cfm_loss" in metrics:
        return f"held-out loss {metrics['eval/cfm_loss']:.3f}"
    loss = f"training loss {metrics['train/cfm_loss']:.3f}"
    few = f" (too few episodes to hold any out: {episodes})"
    return f"{loss}{few if config.bc.held_out else ''}"


def exploring(metrics: dict[str, float], succeeds: bool) -> str:
    """How the last rollout went, for the progress line."""
    if not metrics["rollout/episodes"]:
        return "no episode's time is up yet"
    if succeeds:
        return f"success {metrics['rollout/success_rate']:.0%} while exploring"
    return f"return {metrics['rollout/return']:,.4g} while exploring"


def reached(skill: float | None, enough: float) -> bool:
    """Whether the process that evaluates has seen enough; all processes get the same answer."""
    enough_here = skill is not None and skill >= enough
    return distributed.sums([enough_here])[0] > 0


def choose_device(config: TrainRL) -> torch.device:
    """`auto` is CUDA where there is some.

    Raises:
        InputError: CUDA is asked for and not there.
    """
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise InputError("--device cuda: torch finds no CUDA device here; use auto or cpu")
    if config.device == "cpu" or not available:
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def own_environments(task, config: TrainRL) -> VecEnv:
    """The environments of this process: an equal share of all, with their numbers."""
    everyone, processes = config.loop.num_envs, distributed.world_size()
    if everyone % processes:
        raise InputError(f"{everyone} environments do not divide by {processes} processes")
    share = everyone // processes
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    threads = max(1, len(os.sched_getaffinity(0)) // here)
    first = distributed.rank() * share
    return make_env(
        task,
        share,
        config.randomize,
        seed=config.seed,
        num_threads=threads,
        first_env=first,
        backend=config.backend,
        time_limit=config.time_limit,
    )


def save_fine_tuned(config: TrainRL, learner: PPO | RLDT, env_steps: int) -> None:
    """The policy, with what made it."""
    training = {"env_steps": env_steps, "environment": provenance.environment()}
    if config.checkpoint is not None:
        training["base_checkpoint_sha256"] = provenance.file_hash(config.checkpoint)
    spec = learner.policy.spec
    spec = spec.replace(provenance={**spec.provenance, "fine_tuning": training})
    save_policy(config.run_dir, learner, spec)


def save_policy(run_dir: Path, learner: Imitation | PPO | RLDT, spec: PolicySpec) -> None:
    """`policy.safetensors`, and beside it the raw weights where that one is their moving average."""
    policies = {RAW_POLICY_FILE: learner.policy, POLICY_FILE: learner.average}
    if learner.average is learner.policy:
        del policies[RAW_POLICY_FILE]
    for name, policy in policies.items():
        policy.spec = with_statistics(spec, policy)
        checkpoint.save(run_dir / name, policy)


def last_good(config: TrainRL) -> str:
    """Where the last good checkpoint is, if there is one."""
    path = config.run_dir / POLICY_FILE
    return f", last good checkpoint in '{path}'" if path.is_file() else ""


def require_finite(metrics: dict[str, float]) -> None:
    """Stop at the first number that is not finite.

    Raises:
        RunFailed: names the term.
    """
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise RunFailed(f"{name} is {value}")


def text(result: dict) -> str:
    """For people."""
    return f"trained in {result['seconds']:.0f} s: {result['checkpoint']}"

"""`flow-policy train ALGO`: builds task, policy and algorithm in the open and runs them. No algorithm code here.

A run folder holds `config.json`, `environment.json`, `metrics.csv`, TensorBoard events, `policy.safetensors`,
`policy_best.safetensors` and `state.safetensors`, from which an RL run goes on exactly (`--resume`). docs/training.md
has the line for a cluster.
"""

import dataclasses
import math
import os
import time

import torch

from flow_policy_rl import checkpoint, distributed, provenance, resume
from flow_policy_rl.algorithms.fpo import FPO
from flow_policy_rl.algorithms.gaussian import Gaussian
from flow_policy_rl.algorithms.ppo import PPO
from flow_policy_rl.algorithms.rldt import RLDT
from flow_policy_rl.algorithms.score_flow import ScoreFlow
from flow_policy_rl.data.demonstrations import DemoLayout
from flow_policy_rl.errors import InputError, PeerLost, RunFailed, refuse_below
from flow_policy_rl.evaluate import check_fits, player, task_of
from flow_policy_rl.logger import RunLogger
from flow_policy_rl.policy import FlowPolicy
from flow_policy_rl.progress import Progress
from flow_policy_rl.run_folder import (
    BEST_POLICY_FILE,
    POLICY_FILE,
    claimed,
    failed_file,
    refuse_a_run,
    state_file,
)
from flow_policy_rl.spec import PolicySpec
from flow_policy_rl.train_bc import train_bc
from flow_policy_rl.train_config import (
    TrainBC,
    TrainFPO,
    TrainOnPolicy,
    TrainRL,
    TrainRLDT,
    TrainScoreFlow,
)
from flow_policy_rl.train_run import (
    begin_run,
    interruptible,
    policy_spec,
    require_finite,
    save_one,
    save_policy,
)
from sim.randomize import make_env
from sim.tasks import make_task
from sim.vec_env import VecEnv

EVAL_SEED = 50_000  # first seed of the episodes that watch training; reported results use others
NOTHING_SEEN = {"env_steps": 0, "watched": -math.inf}


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
        if not config.resume:
            refuse_a_run(config.run_dir)
        return run(config)


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
    check_watching(config)
    device = choose_device(config)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # physics on a GPU takes the same one
    torch.manual_seed(config.seed)
    generator = torch.Generator(device).manual_seed(config.seed)
    task, base = starting_point(config)
    env = own_environments(task, config)
    learner = build_learner(config, base, env, generator)
    learner.policy.spec = learner.policy.spec.replace(
        algorithm=config.algorithm, task=task.name, task_options=dict(task.options)
    )
    state, settings = state_file(config.run_dir, distributed.rank()), dataclasses.asdict(config)
    so_far = {"env_steps": 0, "wall_s": 0.0, "look": {}}
    if config.resume:
        so_far |= resume.load(state, learner, settings)
    check_unfinished(config, learner)

    watch = logger = None
    best = best_seen(config) if config.resume else NOTHING_SEEN
    leads = distributed.rank() == 0
    if config.eval_every and watched_seeds(config):
        watch = VecEnv(
            task,
            len(watched_seeds(config)),
            num_threads=threads_of_one(),
            backend=config.backend,
        )
    if leads:
        begin_run(config)
        logger = RunLogger(config.run_dir, learner.iteration, config.track, settings)
    if leads and config.resume:
        # What ended the run may have come between the state and the policy.
        save_fine_tuned(config, learner, so_far["env_steps"])
    start, last = time.monotonic() - so_far["wall_s"], config.loop.num_iterations
    if reached(so_far["look"], config.stop_at):
        last = learner.iteration
    label, before = f"train {config.algorithm}", learner.iteration
    with (
        Progress(label, last, "it", quiet=not leads, done=before) as progress,
        interruptible(config, "iteration", lambda: learner.iteration) as saved,
    ):
        while learner.iteration < last:
            metrics = iterate(config, learner, settings, so_far)
            iteration = learner.iteration
            env_steps = so_far["env_steps"] + int(metrics["rollout/env_steps"])
            seen = {}
            if config.eval_every and (iteration == last or iteration % config.eval_every == 0):
                seen = look(config, learner, watch)
                metrics |= seen
                if skill(seen) >= best["watched"]:
                    best = {"env_steps": env_steps, "watched": skill(seen)}
                    if leads:
                        save_best(config, learner, best)
            if reached(seen, config.stop_at):
                last = iteration
            wall_s = time.monotonic() - start
            so_far = {"env_steps": env_steps, "wall_s": wall_s, "look": seen}
            if logger is not None:
                spent = {"time/env_steps": env_steps, "time/wall_s": wall_s}
                logger.log(iteration, metrics | spent)
            if iteration == last or iteration % config.save_every == 0:
                resume.save(state, learner, settings, so_far)
                saved()
                if leads:
                    save_fine_tuned(config, learner, env_steps)
            progress.update(1, exploring(metrics, task.success_hold_steps is not None), metrics)
    for opened in (env, watch, logger):
        if opened is not None:
            opened.close()
    return {
        "checkpoint": str(config.run_dir / POLICY_FILE),
        "env_steps": so_far["env_steps"],
        "seconds": time.monotonic() - start,
        "best": best if best["env_steps"] else None,
    }


def check_watching(config: TrainRL) -> None:
    """Refuse numbers of evaluations and checkpoints that make no sense."""
    if config.stop_at is not None and not config.eval_every:
        raise InputError("--stop-at needs evaluations: --eval-every must be at least 1")
    refuse_below(config, eval_every=0, eval_episodes=1, save_every=1)


def check_unfinished(config: TrainRL, learner: PPO | RLDT) -> None:
    """Refuse to go on with a run that has more iterations behind it than it is to have, or not everywhere the same."""
    everywhere = (
        distributed.gather(torch.tensor([learner.iteration], device="cpu"), dim=0).unique().tolist()
    )
    if len(everywhere) > 1:
        raise InputError(
            f"the states in '{config.run_dir}' are of iterations {' and '.join(map(str, everywhere))}: the run was "
            f"ended while it wrote them; start another one with --checkpoint {config.run_dir / POLICY_FILE}"
        )
    if learner.iteration > config.loop.num_iterations:
        flag = f"--{'rldt' if isinstance(config, TrainRLDT) else 'ppo'}.num-iterations"
        raise InputError(
            f"nothing left: {learner.iteration} iterations are done, {flag} is {config.loop.num_iterations}"
        )


def iterate(config: TrainRL, learner: PPO | RLDT, settings: dict, so_far: dict) -> dict[str, float]:
    """One iteration's metrics.

    Args:
        settings, so_far: for the state that is kept of one that diverged, as `resume.save` takes them.

    Raises:
        RunFailed: it diverged, or another process is gone.
    """
    iteration = learner.iteration + 1
    try:
        metrics = learner.iterate()
        require_finite(metrics)
    except PeerLost:
        raise
    except RunFailed as error:
        failed = failed_file(config.run_dir, distributed.rank())
        resume.save(failed, learner, settings, so_far, together=False)
        raise RunFailed(
            f"training stopped in iteration {iteration}: {error}; state in '{failed}'"
            f"{last_good(config)}; lower the learning rates"
        ) from None
    return metrics


def watched_seeds(config: TrainRL) -> range:
    """Of the episodes that this process plays when it is time to look: nobody waits long for another one's."""
    seeds = range(EVAL_SEED, EVAL_SEED + config.eval_episodes)
    return seeds[distributed.rank() :: distributed.world_size()]


def look(config: TrainRL, learner: PPO | RLDT, watch: VecEnv | None) -> dict[str, float]:
    """What the policy does at zero noise, over the episodes of all processes.

    Args:
        watch: None: there are fewer episodes than processes, and none for this one.
    """
    mine = (0, 0.0, 0)
    if watch is not None:
        play = player(learner.average.spec, learner.average.act)
        outcome = play(watch, watched_seeds(config))
        successes = 0 if outcome.success is None else outcome.success.sum()
        mine = (len(outcome.returns), outcome.returns.sum(), successes)
    episodes, return_sum, successes = distributed.sums(mine)
    seen = {"eval/return": return_sum / episodes}
    if learner.collector.env.task.success_hold_steps is not None:
        seen["eval/success_rate"] = successes / episodes
    return seen


def exploring(metrics: dict[str, float], succeeds: bool) -> str:
    """How the last rollout went, for the progress line."""
    if not metrics["rollout/episodes"]:
        return "no episode's time is up yet"
    if succeeds:
        return f"success {metrics['rollout/success_rate']:.0%} while exploring"
    return f"return {metrics['rollout/return']:,.4g} while exploring"


def skill(metrics: dict[str, float]) -> float:
    """The success rate of a look, or the return where a task has no success; nan without a look."""
    return metrics.get("eval/success_rate", metrics.get("eval/return", math.nan))


def reached(seen: dict[str, float], enough: float | None) -> bool:
    """Whether a look, if there was one, was good enough, if there is such a thing."""
    return enough is not None and skill(seen) >= enough


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
    first = distributed.rank() * share
    return make_env(
        task,
        share,
        config.randomize,
        seed=config.seed,
        num_threads=threads_of_one(),
        first_env=first,
        backend=config.backend,
        time_limit=config.time_limit,
    )


def threads_of_one() -> int:
    """The share of this machine's cores that a process of the run has."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, len(os.sched_getaffinity(0)) // here)


def save_fine_tuned(config: TrainRL, learner: PPO | RLDT, env_steps: int) -> None:
    """The policy, with what made it."""
    save_policy(config.run_dir, learner, fine_tuned(config, learner, {"env_steps": env_steps}))


def save_best(config: TrainRL, learner: PPO | RLDT, best: dict[str, float]) -> None:
    """What was watched, which is better than all before, or as good after more steps."""
    spec = fine_tuned(config, learner, best)
    save_one(config.run_dir / BEST_POLICY_FILE, learner.average, spec)


def best_seen(config: TrainRL) -> dict[str, float]:
    """What a run that goes on did best, as `save_best` wrote it."""
    path = config.run_dir / BEST_POLICY_FILE
    if not path.is_file():
        return NOTHING_SEEN
    made = checkpoint.load(path).spec.provenance["fine_tuning"]
    return {name: made[name] for name in NOTHING_SEEN}


def fine_tuned(config: TrainRL, learner: PPO | RLDT, facts: dict[str, float]) -> PolicySpec:
    """The spec of what was learned until now, with what made it."""
    training = {**facts, "environment": provenance.environment()}
    if config.checkpoint is not None:
        training["base_checkpoint_sha256"] = provenance.file_hash(config.checkpoint)
    spec = learner.policy.spec
    return spec.replace(provenance={**spec.provenance, "fine_tuning": training})


def last_good(config: TrainRL) -> str:
    """Where the last good checkpoint is, if there is one."""
    path = config.run_dir / POLICY_FILE
    return f", last good checkpoint in '{path}'" if path.is_file() else ""


def text(result: dict) -> str:
    """For people."""
    said = f"trained in {result['seconds']:.0f} s: {result['checkpoint']}"
    best = result.get("best")
    if best is None or best["env_steps"] == result["env_steps"]:
        return said
    return (
        f"{said}; what was watched did best after {best['env_steps']:,} control steps "
        f"({best['watched']:,.4g}): {BEST_POLICY_FILE} beside it"
    )

"""Success rate of a policy on fixed episodes, with its uncertainty."""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from flow_policy_rl import rerun_log
from flow_policy_rl.data.robomimic import DemoLayout
from flow_policy_rl.errors import InputError, RunFailed, output_folder, refuse_below
from flow_policy_rl.rerun_log import RerunLog
from flow_policy_rl.serving import shipped
from flow_policy_rl.serving.onnx_policy import OnnxPolicy
from flow_policy_rl.spec import MEANING, PolicySpec, options_text, under_way
from sim.backends import BackendName
from sim.gym_task import GymnasiumTask, GymnasiumVecEnv, is_gymnasium
from sim.tasks import find_task, make_task, task_names
from sim.vec_env import Observation, VecEnv

VIEWED = 8  # episodes that --viewer plays
FILMED = 4  # of each outcome
GYMNASIUM_ENVS = 16  # at most so many of somebody else's environments are in memory
ChunkFn = Callable[[Observation, np.ndarray], np.ndarray]  # obs, noise (N, H, A) -> chunk (N, H, A)


@dataclass(frozen=True)
class Evaluation:
    """One episode per seed.

    Attributes:
        success: (E,) bool, None for a task that knows no success. returns: (E,) undiscounted.
        steps: (E,) control steps until the end.
    """

    seeds: tuple[int, ...]
    success: np.ndarray | None
    returns: np.ndarray
    steps: np.ndarray

    def summary(self) -> dict:
        """The numbers people ask for. `success_steps`: in how many control steps half of the successes come, and nine
        tenths.
        """
        rate = interval = took = None
        if self.success is not None:
            rate = float(self.success.mean())
            interval = list(wilson_interval(int(self.success.sum()), len(self.success)))
            if self.success.any():
                took = np.quantile(self.steps[self.success], (0.5, 0.9)).tolist()
        return {
            "success_rate": rate,
            "success_ci95": interval,
            "success_steps": took,
            "return_mean": float(self.returns.mean()),
            "return_std": float(self.returns.std()),
            "steps_mean": float(self.steps.mean()),
            "episodes": len(self.returns),
        }

    def watched(self) -> dict[str, list[int]]:
        """Seeds of the episodes worth a film, by outcome: four that failed and four that did not, or the first four."""
        if self.success is None:
            return {"Episodes": list(self.seeds[:FILMED])}
        seeds = np.array(self.seeds)
        chosen = {"Failed": seeds[~self.success], "Succeeded": seeds[self.success]}
        return {
            name: list(map(int, found[:FILMED])) for name, found in chosen.items() if len(found)
        }


def wilson_interval(
    successes: int, trials: int, z: float = 1.959963984540054
) -> tuple[float, float]:
    """95 % confidence interval of a proportion (Wilson, 1927): honest near 0 and 1, and for few trials."""
    rate = successes / trials
    center = (rate + z**2 / (2 * trials)) / (1 + z**2 / trials)
    half = z / (1 + z**2 / trials) * math.sqrt(rate * (1 - rate) / trials + z**2 / (4 * trials**2))
    return max(0.0, center - half), min(1.0, center + half)


def evaluate(
    env: VecEnv | GymnasiumVecEnv,
    act: ChunkFn,
    seeds: Sequence[int],
    chunk_shape: tuple[int, int],
    execute_horizon: int,
    noise: str = "zero",
    on_states: Callable[[np.ndarray, np.ndarray], None] = lambda states, valid: None,
    inference_delay: int = 0,
    prefix_horizon: int = 0,
) -> Evaluation:
    """Run one whole episode per seed, `env.num_envs` at a time.

    An environment whose episode ends takes the next seed at once, and is simulated no more when none is left. However
    long or short, every episode counts.

    Args:
        noise: `zero`, or `random`: drawn from a generator per episode, so that an episode is the same in any batch.
        on_states: called with the states (N, h, state_size) and their validity (N, h) of each chunk.
        inference_delay: control steps that inference takes: so many actions of a chunk are still those of the one
            before it.
        prefix_horizon: P, of a policy that is told about them; 0 is a policy that is not.

    Raises:
        RunFailed: the policy gave actions that are not finite.
    """
    won, returns = np.zeros(len(seeds), bool), np.zeros(len(seeds))
    steps = np.zeros(len(seeds), int)
    generators = [np.random.default_rng((seed, 1)) for seed in seeds]
    ahead = max(prefix_horizon, inference_delay)
    obs = env.play(seeds)
    begins = np.ones(env.num_envs, bool)
    chunk = np.zeros((env.num_envs, *chunk_shape), np.float32)
    while (env.playing >= 0).any():
        envs = np.flatnonzero(env.playing >= 0)
        episodes = env.playing[envs]
        draw = np.zeros((env.num_envs, *chunk_shape), np.float32)
        if noise == "random":
            draw[envs] = [
                generators[k].standard_normal(chunk_shape, dtype=np.float32) for k in episodes
            ]
        # An episode's first chunk has none before it: noise takes its place, and the delay is none.
        committed = under_way(np.where(begins[:, None, None], draw, chunk), execute_horizon, ahead)
        if prefix_horizon:
            delay = np.where(begins, 0, min(inference_delay, prefix_horizon))
            obs = obs | {"prefix": committed[:, :prefix_horizon], "inference_delay": delay}
        chunk = act(obs, draw)
        failed = episodes[~np.isfinite(chunk[envs]).all(axis=(1, 2))]
        if len(failed):
            raise RunFailed(
                f"the policy gave actions that are not finite in the episode of seed {seeds[failed[0]]}"
            )
        chunk[~begins, :inference_delay] = committed[~begins, :inference_delay]
        step = env.step(chunk[:, :execute_horizon])
        on_states(step.states, step.valid)
        returns[episodes] += step.reward.sum(axis=1)[envs]
        steps[episodes] += step.valid.sum(axis=1)[envs]
        won[episodes] |= step.success[envs]
        obs, begins = step.obs, step.ended
    knows_success = env.task.success_hold_steps is not None
    return Evaluation(tuple(seeds), won if knows_success else None, returns, steps)


def player(spec: PolicySpec, act: ChunkFn, noise: str = "zero", inference_delay: int = 0):
    """`evaluate` for one policy: a function of environments, seeds and `on_states`."""
    shape = (spec.action_horizon, spec.num_joints)

    def play(env, seeds, on_states=lambda states, valid: None) -> Evaluation:
        delays = (inference_delay, spec.prefix_horizon)
        return evaluate(env, act, seeds, shape, spec.execute_horizon, noise, on_states, *delays)

    return play


@dataclass(frozen=True)
class Config:
    """Success rate of a policy in simulation, one whole episode per seed.

    Example: flow-policy eval --policy policy.onnx --task lift --episodes 200

    Attributes:
        policy: checkpoint (.safetensors), exported policy (.onnx), or the name of one that ships.
        task: name of the task (None: the one the policy was trained for), a Gymnasium environment
            (`Hopper-v5`, `gymnasium_robotics:FetchReach-v4`), or a stock one of robosuite (`robosuite_lift`).
        task_options: names and values of the task's own options, e.g. `randomness med` (empty: those the policy was
            trained with).
        episodes: number of episodes.
        seed: of the first episode; the next ones follow.
        noise: where the flow starts: zero, or random per episode.
        num_envs: episodes side by side.
        inference_delay: control steps that inference takes.
        backend: what computes the physics: cpu, warp (MuJoCo Warp on an NVIDIA GPU), or warp-cpu (the same on the CPU);
            with -pixels it draws the pictures too (docs/simulation.md).
        randomize: also under randomised worlds, senses and links: a table of presets and a heat map (noise x latency).
        randomize_episodes: episodes in each cell of the heat map.
        viewer: show the first episodes in MuJoCo's viewer afterwards, until it is closed; needs a display.
        out: folder for a page with films, and a table of all episodes (None: none; with --randomize
            runs/robustness, for its page and every episode with what it drew).
        rerun: file for the Rerun viewer: films and joints of four episodes that failed and four that did not.
        json: print one JSON object.
    """

    policy: Path
    task: str | None = None
    task_options: dict[str, str] = field(default_factory=dict)
    episodes: int = 200
    seed: int = 10_000
    noise: Literal["zero", "random"] = "zero"
    num_envs: int = 200
    inference_delay: int = 0
    backend: BackendName = "cpu"
    randomize: bool = False
    randomize_episodes: int = 50
    viewer: bool = False
    out: Path | None = None
    rerun: Path | None = None
    json: bool = False


def main(config: Config) -> dict:
    """Evaluate a file."""
    refuse_below(config, episodes=1, randomize_episodes=1, num_envs=1)
    if config.out is not None:
        output_folder(config.out)
    spec, act = load_policy(config.policy)
    task = played_task(spec, config)
    spare = spec.action_horizon - spec.execute_horizon
    if not 0 <= config.inference_delay <= spare:
        raise InputError(
            f"--inference-delay {config.inference_delay}: chunks of {spec.action_horizon} actions of which "
            f"{spec.execute_horizon} are executed bridge 0 to {spare} control steps"
        )
    log = None if config.rerun is None else RerunLog(config.rerun, "episode_time", stamps=False)

    play = player(spec, act, config.noise, config.inference_delay)
    num_envs = min(config.num_envs, config.episodes)
    if isinstance(task, GymnasiumTask):
        env = GymnasiumVecEnv(task, min(num_envs, GYMNASIUM_ENVS), spec.observations)
    else:
        env = VecEnv(task, num_envs, backend=config.backend)
    outcome = play(env, range(config.seed, config.seed + config.episodes))
    env.close()
    result = {
        **outcome.summary(),
        "seed": config.seed,
        "noise": config.noise,
        "inference_delay": config.inference_delay,
        "backend": config.backend,
        "task": task.name,
        "task_options": dict(task.options),
        "policy": str(config.policy),
    }
    if config.randomize:
        from flow_policy_rl.robustness import robustness

        result |= robustness(
            task,
            play,
            range(config.seed, config.seed + config.episodes),
            config.num_envs,
            config.randomize_episodes,
            config.out or Path("runs/robustness"),
            config.backend,
        )
    if config.out is not None:
        from flow_policy_rl import evaluation_report

        result |= evaluation_report.write(config.out, task, outcome, result, play)
    if log is not None:
        rerun_log.episodes(log, task, outcome.watched(), play, config.backend)
        log.close()
        result["rerun"] = str(config.rerun)
    if config.viewer:
        from flow_policy_rl import film
        from sim import viewer

        viewer.show(task.world, film.record(task, outcome.seeds[:VIEWED], play, config.backend))
    return result


def played_task(spec: PolicySpec, config: Config):
    """The task of an evaluation, which the policy fits.

    Raises:
        InputError, SimulationError: there is none, it is not there, or it is another policy's.
    """
    name = config.task or spec.task
    if not is_gymnasium(name) or name in task_names():
        task = task_of(spec, name, config.task_options)
        check_fits(spec, task, str(config.policy))
        return task
    defaults = Config(config.policy)
    for flag in ("randomize", "viewer", "rerun", "backend"):
        if getattr(config, flag) != getattr(defaults, flag):
            raise InputError(f"--{flag} needs a task of this package; '{name}' is Gymnasium's")
    recorded = spec.task_options if name == spec.task else {}
    task = GymnasiumTask(name, spec.control_dt, recorded | config.task_options)
    check_fits_gymnasium(spec, task, str(config.policy))
    return task


def check_fits_gymnasium(spec: PolicySpec, task: GymnasiumTask, name: str) -> None:
    """Refuse a policy of other dimensions, or one that asks for what the environment does not show.

    Raises:
        InputError: names both sides.
    """
    mine = {"control_dt": spec.control_dt, "actions": spec.num_joints}
    theirs = {"control_dt": task.control_dt, "actions": task.num_actions}
    wanted = {f.name: f.shape for f in spec.observations}
    if GymnasiumTask.VECTOR in task.fields:  # all fields, one after the other
        theirs["observations"] = task.fields[GymnasiumTask.VECTOR]
        images = any(len(shape) > 1 for shape in wanted.values())
        mine["observations"] = wanted if images else (sum(n for (n,) in wanted.values()),)
    else:
        theirs["observations"] = task.fields
        shown = {f: task.fields.get(f) for f in wanted}
        mine["observations"] = task.fields if shown == wanted else wanted
    different = [what for what in mine if mine[what] != theirs[what]]
    if different:
        say = lambda side: ", ".join(f"{what} {side[what]}" for what in different)  # noqa: E731
        raise InputError(
            f"policy '{name}' ({say(mine)}) does not fit environment '{task.name}' ({say(theirs)})"
        )


def load_policy(path: Path) -> tuple[PolicySpec, ChunkFn]:
    """A checkpoint or an exported policy as a function of numpy arrays."""
    path = shipped.existing(path)
    if path.suffix == ".onnx":
        exported = OnnxPolicy(path)
        return exported.spec, exported.infer
    from flow_policy_rl import checkpoint  # with torch, which an exported policy does without

    policy = checkpoint.load(path)
    return policy.spec, policy.act


def task_of(
    made: PolicySpec | DemoLayout,
    name: str | None = None,
    options: Mapping[str, str] | None = None,
):
    """The task that a policy or demonstrations were made for, or another one with the same robot and senses.

    Args:
        options: of the task, before those that the policy was trained with.

    Raises:
        SimulationError: unknown task, option or value.
    """
    name = name or made.task
    known_robot = made.robot in getattr(find_task(name), "robots", ())
    sees = any(f.kind == "image" for f in made.observations)
    mine = {"robot": made.robot if known_robot else None, "cameras": sees or None}
    if isinstance(made, PolicySpec) and name == made.task:
        mine |= made.task_options
    return make_task(name, **mine | dict(options or {}))


def check_fits(spec: PolicySpec, task, name: str) -> None:
    """Refuse a policy made for another task, and say so where its options were others.

    Raises:
        InputError: names both sides.
    """
    mine = {
        "observations": [f.name for f in spec.observations],
        "joints": list(spec.joint_names),
        "control_dt": spec.control_dt,
        "actions": spec.action_kind,
    }
    theirs = {
        "observations": [f.name for f in task.obs_fields],
        "joints": list(task.world.joint_names),
        "control_dt": task.control_dt,
        "actions": task.world.interface,
    }
    for side, fields in ((mine, spec.observations), (theirs, task.obs_fields)):
        shown = (*MEANING, "resolution")
        side |= {f"{what} of {f.name}": getattr(f, what) for f in fields for what in shown}
    different = [what for what in mine if what in theirs and mine[what] != theirs[what]]
    if different:
        say = lambda side: ", ".join(f"{what} {side[what]}" for what in different)  # noqa: E731
        raise InputError(
            f"policy '{name}' (task '{spec.task}', {say(mine)}) does not fit task '{task.name}' ({say(theirs)})"
        )
    if task.name == spec.task and task.options != spec.task_options:
        print(
            f"note: task '{task.name}' with {options_text(task.options)}; "
            f"policy '{name}' was trained with {options_text(spec.task_options)}",
            file=sys.stderr,
        )


def text(result: dict) -> str:
    """For people."""
    parts = [f"return {result['return_mean']:.3f} ± {result['return_std']:.3f}"]
    if result["success_rate"] is not None:
        low, high = result["success_ci95"]
        success = f"success {result['success_rate']:.1%} (95 % interval {low:.1%} to {high:.1%})"
        if result["success_steps"]:
            success += " within {:.0f} control steps by median, {:.0f} for nine tenths".format(
                *result["success_steps"]
            )
        parts.insert(0, success)
    options = f" ({options_text(result['task_options'])})" if result["task_options"] else ""
    line = f"{result['policy']} on {result['task']}{options}, {result['episodes']} episodes: {', '.join(parts)}"
    if "robustness" in result:
        from flow_policy_rl import robustness

        line += "\n" + robustness.text(result)
    return line + (f"\nreport: {result['report']}" if "report" in result else "")

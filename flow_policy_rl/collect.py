"""`flow-policy collect`: demonstrations by a scripted expert or by a policy, run side by side, successes kept.

Noise is added to what is executed, and the clean intention is what is recorded (DART, Laskey et al., arXiv
1703.09327): the data cover states off the demonstrator's path together with the way back.
"""

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from flow_policy_rl import provenance
from flow_policy_rl.data import sources
from flow_policy_rl.data.robomimic import HDF5, DemoLayout, Episode
from flow_policy_rl.errors import InputError, new_file, refuse_below
from flow_policy_rl.evaluate import check_fits, load_policy, task_of
from flow_policy_rl.progress import Progress
from flow_policy_rl.run_folder import uninterrupted
from flow_policy_rl.serving import shipped
from sim.backends import BackendName
from sim.expert import has_expert, make_expert
from sim.randomize import PresetName, make_env
from sim.tasks import make_task
from sim.vec_env import Observation, VecEnv

LOG = logging.getLogger(__name__)
LOOK_AFTER = 200  # attempts
FEW = 0.02  # of the attempts: worth a word
NOISE_MEMORY = 0.8  # per control step: noise that lasts moves the arm, white noise only shakes it


@dataclass(frozen=True)
class Config:
    """Demonstrations of a task, by its scripted expert or by a policy, written in robomimic's HDF5 layout.

    Example: flow-policy collect --task lift --episodes 100 --out demos.hdf5

    Attributes:
        task: name of the task (flow-policy list tasks).
        out: file to write.
        task_options: names and values of the task's own options, e.g. `randomness med`.
        episodes: episodes to keep: successes, where the task knows success.
        robot: the arm (None: the task's first, or the policy's).
        policy: checkpoint, exported policy or name of one that ships, which acts in place of the scripted expert.
        min_return: keep only episodes with at least this return.
        noise: standard deviation of the noise on the targets, rad, grippers spared (None: what the task's expert
            copes with: 0.003 for insert, 0.001 for one_leg, lamp and round_table, 0.02 elsewhere).
        seed: of start states and noise.
        num_envs: episodes side by side.
        cameras: record camera images in place of what only a simulation knows.
        randomize: each episode in a world, senses and links that differ: nominal, mild or hard; the file has what each
            drew.
        backend: what computes the physics: cpu, warp (MuJoCo Warp on an NVIDIA GPU), or warp-cpu (the same on the CPU);
            with -pixels it draws the pictures too (docs/simulation.md).
        json: print one JSON object.
    """

    task: str
    out: Path
    task_options: dict[str, str] = field(default_factory=dict)
    episodes: int = 100
    robot: str | None = None
    policy: Path | None = None
    min_return: float | None = None
    noise: float | None = None
    seed: int = 0
    num_envs: int = 32
    cameras: bool = False
    randomize: PresetName = "nominal"
    backend: BackendName = "cpu"
    json: bool = False


def main(config: Config) -> dict:
    """Collect, write episode by episode, and say how many attempts it took.

    Raises:
        KeyboardInterrupt: the file has the episodes until then; there is none if it has none.
    """
    refuse_below(config, episodes=1, num_envs=1, noise=0)
    if config.out.suffix not in HDF5:
        raise InputError(f"--out '{config.out}' must end in {' or '.join(HDF5)}")
    new_file(config.out)
    if config.policy is not None:
        config = dataclasses.replace(config, policy=shipped.find(config.policy))
    task, demonstrator = _demonstrator(config)
    noise = task.demo_noise if config.noise is None else config.noise
    env = make_env(
        task,
        min(config.num_envs, config.episodes),
        config.randomize,
        seed=config.seed,
        backend=config.backend,
    )
    layout = DemoLayout.of_task(task)
    attempts, found, returns = 0, 0, []
    looked = interrupted = False
    with (
        sources.writer_for(config.out, layout) as writer,
        Progress("collect", config.episodes, "episode") as progress,
    ):
        try:
            while writer.num_episodes < config.episodes:
                rng = np.random.default_rng((config.seed, 2, attempts))
                kept = collect_batch(env, demonstrator, noise, rng, config.min_return)
                with uninterrupted():
                    attempts += env.num_envs
                    found += len(kept)
                    for episode in kept[: config.episodes - writer.num_episodes]:
                        writer.episode(episode)
                        returns.append(episode.rewards.sum())
                if attempts >= LOOK_AFTER and not looked:
                    looked = True
                    _look(found, attempts, noise, config)
                progress.reach(writer.num_episodes, f"{found / attempts:.0%} of attempts succeed")
        except KeyboardInterrupt:
            if not writer.num_episodes:
                raise
            interrupted = True
        with uninterrupted():
            writer.close(_provenance(config, task, noise, attempts))
    env.close()
    if interrupted:
        raise KeyboardInterrupt(
            f"after {writer.num_episodes} of {config.episodes} episodes, which are in '{config.out}'"
        )
    return {
        "out": str(config.out),
        "episodes": writer.num_episodes,
        "steps": writer.num_steps,
        "attempts": attempts,
        "return_mean": float(np.mean(returns)),
    }


def _provenance(config: Config, task, noise: float, attempts: int) -> dict:
    by = (
        {"policy": str(config.policy.name), "policy_sha256": provenance.file_hash(config.policy)}
        if config.policy
        else {"expert": "scripted"}
    )
    return {
        **by,
        "task_options": dict(task.options),
        "attempts": attempts,
        "noise": noise,
        "min_return": config.min_return,
        "seed": config.seed,
        "backend": config.backend,
        "randomize": config.randomize,
        **provenance.environment(),
    }


def _look(kept: int, attempts: int, noise: float, config: Config) -> None:
    """Whether this will come to an end, while it has cost little.

    Raises:
        InputError: nothing was kept.
    """
    least = "" if config.min_return is None else f" or --min-return (now {config.min_return})"
    way_out = f"lower --noise (now {noise}){least}"
    if not kept:
        raise InputError(
            f"no episode to keep in {attempts} attempts at task '{config.task}': {way_out}"
        )
    if kept < FEW * attempts:
        LOG.warning(
            "%d of %d attempts at task '%s' kept: %d episodes will take some %d attempts; %s",
            kept, attempts, config.task, config.episodes, config.episodes * attempts // kept, way_out,
        )  # fmt: skip


def _demonstrator(config: Config):
    """The task and who does it."""
    if config.policy is None:
        options = {"robot": config.robot, "cameras": config.cameras or None}
        task = make_task(config.task, **options | config.task_options)
        if not has_expert(task):
            raise InputError(
                f"task '{task.name}' has no scripted expert; give --policy, which acts in its place"
            )
        return task, ScriptedExperts()
    spec, act = load_policy(config.policy)
    if config.robot not in (None, spec.robot):
        raise InputError(
            f"policy '{config.policy}' is for robot '{spec.robot}', not '{config.robot}'"
        )
    task = task_of(spec, config.task, config.task_options)
    check_fits(spec, task, str(config.policy))
    return task, PolicyChunks(spec, act)


class ScriptedExperts:
    """The task's own expert, one for each environment."""

    def begin(self, env: VecEnv, rng: np.random.Generator) -> None:
        """A new episode everywhere."""
        self._experts = [make_expert(env.task, state, rng) for state in env.state]

    def act(self, env: VecEnv, obs: Observation, running: np.ndarray) -> np.ndarray:
        """Intended actions (N, A) for the next control step; environments that no longer run hold still."""
        actions = env.command.copy()
        for i in np.flatnonzero(running):
            action = self._experts[i].act(env.state[i])
            if np.shape(action) != actions[i].shape:
                raise InputError(
                    f"the expert of task '{env.task.name}' gives an action of shape {np.shape(action)}, "
                    f"not {actions[i].shape}: one target per actuator"
                )
            actions[i] = action
        return actions


class PolicyChunks:
    """A policy that plans a chunk, from zero noise, and runs the executed part of it."""

    def __init__(self, spec, act):
        self._spec, self._act = spec, act

    def begin(self, env: VecEnv, rng: np.random.Generator) -> None:
        """A new episode everywhere."""
        self._chunk = np.zeros((env.num_envs, 0, self._spec.num_joints))

    def act(self, env: VecEnv, obs: Observation, running: np.ndarray) -> np.ndarray:
        """Actions (N, A) for the next control step."""
        if not self._chunk.shape[1]:
            spec, n = self._spec, env.num_envs
            if spec.prefix_horizon:  # nothing is under way: a simulation waits for inference
                prefix = np.zeros((n, spec.prefix_horizon, spec.num_joints))
                obs = obs | {"prefix": prefix, "inference_delay": np.zeros(n, int)}
            noise = np.zeros((n, spec.action_horizon, spec.num_joints), np.float32)
            self._chunk = self._act(obs, noise)[:, : spec.execute_horizon]
        action, self._chunk = self._chunk[:, 0], self._chunk[:, 1:]
        return action


def collect_batch(
    env: VecEnv,
    demonstrator: ScriptedExperts | PolicyChunks,
    noise: float,
    rng: np.random.Generator,
    min_return: float | None = None,
) -> list[Episode]:
    """One new episode in every environment; returns those worth keeping."""
    task = env.task
    obs = env.reset()
    drawn = list(env.draws)  # an environment whose episode ends draws for the next one
    demonstrator.begin(env, rng)
    spread = np.full(len(task.world.joint_names), noise)
    spread[[arm.columns[-1] for arm in getattr(task, "arms", ())]] = 0.0  # the grippers
    disturbance = np.zeros((env.num_envs, len(spread)))
    records: list[list] = [[] for _ in range(env.num_envs)]
    running = np.ones(env.num_envs, bool)
    kept = np.full(env.num_envs, task.success_hold_steps is None)
    while running.any():
        intended = demonstrator.act(env, obs, running)
        innovation = rng.standard_normal(disturbance.shape) * np.sqrt(1 - NOISE_MEMORY**2)
        disturbance = NOISE_MEMORY * disturbance + spread * innovation
        before = env.state.copy()
        step = env.step((intended + disturbance)[:, None])
        for i in np.flatnonzero(running):
            seen = {name: values[i] for name, values in obs.items()}
            records[i].append((seen, intended[i], step.reward[i, 0], before[i]))
        kept = (kept | running & step.success) & ~(running & step.diverged)
        running &= ~step.ended
        obs = step.obs
    success = None if task.success_hold_steps is None else True
    episodes = [_episode(records[i], drawn[i], success) for i in np.flatnonzero(kept)]
    least = -np.inf if min_return is None else min_return
    return [e for e in episodes if e.rewards.sum() >= least]


def _episode(
    record: list, drawn: Mapping[str, float | np.ndarray], success: bool | None
) -> Episode:
    seen, actions, rewards, states = zip(*record, strict=True)
    obs = {name: np.stack([s[name] for s in seen]) for name in seen[0]}
    randomization = {name: np.asarray(value) for name, value in drawn.items()}
    return Episode(
        obs, np.stack(actions), np.array(rewards), np.stack(states), success, randomization
    )


def text(result: dict) -> str:
    """For people."""
    return f"{result['episodes']} episodes, {result['steps']} steps, {result['attempts']} attempts: {result['out']}"

"""`flow-policy collect`: scripted demonstrations, run side by side, successes kept.

Noise is added to what is executed, and the expert's clean intention is what is recorded (DART,
Laskey et al., arXiv 1703.09327): the data cover states off the expert's path together with the way back.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flow_policy_rl import provenance
from flow_policy_rl.data.demonstrations import DemoLayout, Demonstrations, Episode, save
from flow_policy_rl.errors import InputError
from flow_policy_rl.progress import Progress
from flow_policy_rl.spec import ObservationField
from sim.expert import make_expert
from sim.tasks import make_task
from sim.vec_env import VecEnv

NOISE_MEMORY = 0.8  # per control step: noise that lasts moves the arm, white noise only shakes it


@dataclass(frozen=True)
class Config:
    """Scripted demonstrations of a task, written in robomimic's HDF5 layout.

    Example: flow-policy collect --task lift --episodes 100 --out demos.hdf5

    Attributes:
        task: name of the task (flow-policy list tasks).
        episodes: successful episodes to keep.
        out: file to write.
        noise: spread of the disturbance of the joint targets, rad.
        seed: of start states and noise.
        num_envs: episodes side by side.
        cameras: record camera images in place of what only a simulation knows.
        json: print one JSON object.
    """

    task: str
    out: Path
    episodes: int = 100
    noise: float = 0.02
    seed: int = 0
    num_envs: int = 32
    cameras: bool = False
    json: bool = False


def main(config: Config) -> dict:
    """Collect, write, and say how many attempts it took."""
    if config.episodes < 1:
        raise InputError(f"--episodes must be at least 1, not {config.episodes}")
    task = make_task(config.task, **({"cameras": True} if config.cameras else {}))
    env = VecEnv(task, min(config.num_envs, config.episodes), seed=config.seed)
    episodes: list[Episode] = []
    attempts = 0
    with Progress("collect", config.episodes, "episode") as progress:
        while len(episodes) < config.episodes:
            kept = collect_batch(
                env, config.noise, np.random.default_rng((config.seed, 2, attempts))
            )
            attempts += env.num_envs
            if attempts >= 50 * config.episodes and not episodes:
                raise InputError(
                    f"no success in {attempts} attempts at task '{config.task}': lower --noise (now {config.noise})"
                )
            episodes += kept
            progress.update(len(kept), f"{len(episodes) / attempts:.0%} of attempts succeed")
    env.close()
    layout = DemoLayout(
        task.name,
        task.robot,
        task.world.joint_names,
        task.control_dt,
        tuple(ObservationField(**dataclasses.asdict(f)) for f in task.obs_fields),
    )
    facts = {
        "attempts": attempts,
        "noise": config.noise,
        "seed": config.seed,
        **provenance.environment(),
    }
    demos = Demonstrations(layout, episodes[: config.episodes], facts)
    save(config.out, demos)
    return {
        "out": str(config.out),
        "episodes": len(demos.episodes),
        "steps": demos.num_steps,
        "attempts": attempts,
    }


def collect_batch(env: VecEnv, noise: float, rng: np.random.Generator) -> list[Episode]:
    """One new episode in every environment; returns those that succeeded."""
    task = env.task
    obs = env.reset()
    experts = [make_expert(task, state, rng) for state in env.state]
    spread = noise * np.where(
        task.world.velocity_limit > 1.0, 1.0, 0.0
    )  # the arm's joints, not the gripper
    disturbance = np.zeros((env.num_envs, len(task.world.joint_names)))
    records: list[list] = [[] for _ in experts]
    running, succeeded = np.ones(env.num_envs, bool), np.zeros(env.num_envs, bool)
    while running.any():
        intended = np.stack(
            [expert.act(state) for expert, state in zip(experts, env.state, strict=True)]
        )
        innovation = rng.standard_normal(disturbance.shape) * np.sqrt(1 - NOISE_MEMORY**2)
        disturbance = NOISE_MEMORY * disturbance + spread * innovation
        before = env.state.copy()
        step = env.step((intended + disturbance)[:, None])
        for i in np.flatnonzero(running):
            seen = {name: values[i] for name, values in obs.items()}
            records[i].append((seen, intended[i], step.reward[i, 0], before[i]))
        succeeded |= running & step.success
        running &= ~step.ended
        obs = step.obs
    return [_episode(record) for record, won in zip(records, succeeded, strict=True) if won]


def _episode(record: list) -> Episode:
    seen, actions, rewards, states = zip(*record, strict=True)
    obs = {name: np.stack([s[name] for s in seen]) for name in seen[0]}
    return Episode(obs, np.stack(actions), np.array(rewards), np.stack(states))


def text(result: dict) -> str:
    """For people."""
    return f"{result['episodes']} episodes, {result['steps']} steps, {result['attempts']} attempts: {result['out']}"

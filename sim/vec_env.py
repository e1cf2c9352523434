"""N copies of a task, stepped a chunk of actions at a time."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sim.backends.rollout import RolloutBackend
from sim.render import Renderer

Observation = dict[str, np.ndarray]  # field name -> (N, size), or (N, height, width, 3) uint8


@dataclass(frozen=True)
class ChunkStep:
    """What one chunk of h control steps gave. Everything after an episode's end inside the chunk is masked.

    Attributes:
        obs: observation after the chunk; of the new episode where one ended.
        final_obs: observation at the last valid step, before any reset (use it to bootstrap a truncation).
        reward: (N, h), zero where not valid.
        reward_terms: the same, by name.
        valid: (N, h) bool, control steps that count.
        terminated, truncated: (N,) bool, the episode ended by the task or by its time limit. Never both.
        success: (N,) bool, it ended by success.
        diverged: (N,) bool, physics broke down (not a finite state); such an episode counts as truncated.
        states: (N, h, state_size) at the end of each control step, for recording and films.
        commands: (N, h, A) position really commanded at the end of each control step.
    """

    obs: Observation
    final_obs: Observation
    reward: np.ndarray
    reward_terms: dict[str, np.ndarray]
    valid: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    success: np.ndarray
    diverged: np.ndarray
    states: np.ndarray
    commands: np.ndarray

    @property
    def ended(self) -> np.ndarray:
        """(N,) bool, terminated or truncated."""
        return self.terminated | self.truncated


class VecEnv:
    """Batched environment with automatic reset at chunk ends.

    Episode k of environment i starts from a state that depends on (seed, i, k) alone; `reset(seeds)` starts given
    episodes instead, each a function of its seed alone, so the same seed gives the same episode in any batch.
    """

    def __init__(self, task, num_envs: int, *, seed: int = 0, num_threads: int | None = None):
        self.task = task
        self.world = task.world
        self.num_envs = num_envs
        self.seed = seed
        self.backend = RolloutBackend(task.world, num_threads)
        self._episode = np.zeros(num_envs, dtype=int)
        self._steps = np.zeros(num_envs, dtype=int)
        self._held = np.zeros(num_envs, dtype=int)
        self._images = [f for f in task.obs_fields if f.kind == "image"]
        self._renderers = {
            size: Renderer(self.world, *size) for size in {f.resolution for f in self._images}
        }
        self.state = np.zeros((num_envs, self.world.state_size))
        self.command = np.zeros((num_envs, len(self.world.joint_names)))

    def reset(self, seeds: Sequence[int] | None = None) -> Observation:
        """Start a new episode everywhere."""
        for i in range(self.num_envs):
            self._start(i, None if seeds is None else np.random.default_rng(seeds[i]))
        return self._observe(self.state)

    def _observe(self, state: np.ndarray) -> Observation:
        """What the policy sees of states (n, state_size). Images are drawn here and nowhere else: once per chunk."""
        obs = self.task.observe(state)
        for f in self._images:
            draw = self._renderers[f.resolution].render
            obs[f.name] = np.stack([draw(row, f.source) for row in state])
        return {f.name: obs[f.name] for f in self.task.obs_fields}

    def _start(self, i: int, rng: np.random.Generator | None = None) -> None:
        rng = rng or np.random.default_rng((self.seed, i, self._episode[i]))
        self._episode[i] += 1
        self._steps[i] = 0
        self._held[i] = 0
        self.state[i] = self.task.initial_state(rng)
        self.command[i] = self.world.qpos(self.state[i])[self.world.joint_qpos]

    def step(self, action_chunk: np.ndarray) -> ChunkStep:
        """Execute (N, h, A) joint targets open loop."""
        task, horizon = self.task, action_chunk.shape[1]
        controls, commands = self.world.ramp(
            self.command, np.asarray(action_chunk, dtype=np.float64)
        )
        states = self.backend.step(self.state, controls)  # (N, h, state_size)

        # MuJoCo restarts a simulation that broke down from time zero, so its clock tells as well as its numbers.
        due = self.state[:, :1] + (1 + np.arange(horizon)) * self.world.control_dt
        diverged_at = ~np.isfinite(states).all(axis=-1) | (
            np.abs(states[..., 0] - due) > 1e-6
        )  # (N, h)
        states = np.where(diverged_at[..., None], self.state[:, None], states)
        holds = task.is_success(states) & ~diverged_at
        valid, succeeded = (
            np.ones((self.num_envs, horizon), bool),
            np.zeros((self.num_envs, horizon), bool),
        )
        truncated, diverged = np.zeros(self.num_envs, bool), np.zeros(self.num_envs, bool)
        alive = np.ones(self.num_envs, bool)
        for h in range(horizon):
            valid[:, h] = alive
            self._steps += alive
            self._held = np.where(holds[:, h], self._held + 1, 0)
            succeeded[:, h] = alive & (self._held >= task.success_hold_steps)
            diverged |= alive & diverged_at[:, h]
            out_of_time = alive & (self._steps >= task.episode_steps) & ~succeeded[:, h]
            truncated |= out_of_time | (alive & diverged_at[:, h])
            alive &= ~(succeeded[:, h] | truncated)
        success = succeeded.any(axis=1)

        reward_terms = {
            name: term * valid for name, term in task.reward_terms(states, succeeded).items()
        }
        last = valid.sum(axis=1) - 1
        rows = np.arange(self.num_envs)
        self.state = states[rows, last].copy()
        self.command = commands[rows, last].copy()
        final_obs = obs = self._observe(self.state)
        ended = np.flatnonzero(success | truncated)
        if len(ended):
            for i in ended:
                self._start(i)
            obs = {name: values.copy() for name, values in final_obs.items()}
            for name, values in self._observe(self.state[ended]).items():
                obs[name][ended] = values
        return ChunkStep(
            obs=obs,
            final_obs=final_obs,
            reward=sum(reward_terms.values()),
            reward_terms=reward_terms,
            valid=valid,
            terminated=success,
            truncated=truncated,
            success=success,
            diverged=diverged,
            states=states,
            commands=commands,
        )

    def close(self) -> None:
        """End the physics threads, free the GL context."""
        self.backend.close()
        for renderer in self._renderers.values():
            renderer.close()

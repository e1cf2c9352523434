"""N copies of a task, stepped a chunk of actions at a time."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mujoco
import numpy as np

from sim.backends import BackendName, make_backend, make_renderer
from sim.backends.base import StopFn
from sim.errors import SimulationError
from sim.tasks.base import Task

LOG = logging.getLogger(__name__)
ABSURD = 1e6  # m, rad, or per second: MuJoCo itself gives up at 1e10
MOST_DUMPS = 20
DUMP_DIR = Path("runs/diverged")
GOLDEN_RATIO = (1 + 5**0.5) / 2  # its multiples modulo 1 are spread evenly, however many there are

Observation = dict[str, np.ndarray]  # field name -> (N, size), or (N, height, width, 3) uint8


@dataclass(frozen=True)
class ChunkStep:
    """What one chunk of h control steps gave. Everything after an episode's end inside the chunk is masked.

    Attributes:
        obs: observation after the chunk; of the new episode where one ended.
        final_obs: observation at the last valid step, before any reset (use it to bootstrap a truncation). Shares
            memory with `obs` where no episode ended.
        reward: (N, h), zero where not valid, and where physics broke down.
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


class Playlist:
    """Episodes of given seeds, each played once, and who plays which.

    Attributes:
        playing: (N,) int, number of the episode that each environment plays; -1 where it is at rest.
    """

    def __init__(self, seeds: Sequence[int], num_envs: int):
        self.playing = np.full(num_envs, -1)
        self._seeds = list(seeds)
        self._begun = 0

    def take(self, free: np.ndarray) -> tuple[np.ndarray, list[int]]:
        """The next episodes for environments (n,) that are free: those (m,) that got one, m <= n, and their seeds."""
        seeds = self._seeds[self._begun : self._begun + len(free)]
        envs = free[: len(seeds)]
        self.playing[free] = -1
        self.playing[envs] = self._begun + np.arange(len(seeds))
        self._begun += len(seeds)
        return envs, seeds


SNAPSHOT = ("state", "command", "_episode", "_steps", "_held")


class VecEnv:
    """Batched environment with automatic reset at chunk ends.

    Episode k of environment i starts from a state that depends on (seed, i, k) alone (counted from `first_env`, so that
    several processes can share one numbering); `reset(seeds)` starts given episodes instead, each a function of its
    seed alone, so the same seed gives the same episode in any batch. `play(seeds)` plays as many episodes as there are
    seeds; an environment for which none is left is at rest: it is not simulated, and nothing of it is valid.

    A simulation that breaks down (not finite, or absurd numbers) ends its own episode as truncated. It is counted in
    `num_diverged`, logged, and written to `dump_dir` (None: not written); all others go on as if nothing had happened.

    `backend` says what computes the physics (`sim.backends.make_backend`). `draws[i]` is what the running episode of
    environment i drew, empty unless its world is randomised (`sim/randomize.py`).

    Episodes are truncated after `time_limit` control steps, the task's own unless another is given.
    """

    def __init__(
        self,
        task,
        num_envs: int,
        *,
        seed: int = 0,
        num_threads: int | None = None,
        first_env: int = 0,
        dump_dir: Path | None = DUMP_DIR,
        backend: BackendName = "cpu",
        time_limit: int | None = None,
    ):
        self.first_env = first_env
        self.task = task
        self.time_limit = task.episode_steps if time_limit is None else time_limit
        if not 1 <= self.time_limit <= task.episode_steps:
            raise SimulationError(
                f"the time limit must be 1 to {task.episode_steps} control steps, as '{task.name}' has them, "
                f"not {time_limit}"
            )
        self.world = task.world
        self.num_envs = num_envs
        self.seed = seed
        self.dump_dir = dump_dir
        self.num_diverged = 0
        self.models: list[mujoco.MjModel] | None = None  # one per environment, where they differ
        self.draws: list[dict[str, float | np.ndarray]] = [{} for _ in range(num_envs)]
        self._playlist: Playlist | None = None  # None: every episode is followed by another one
        self.backend = make_backend(task.world, num_threads, backend)
        # Physics after a fall need not be computed; a task that cannot fall need not be asked.
        self._stop = None if type(task).is_failure is Task.is_failure else task.is_failure
        self._episode = np.zeros(num_envs, dtype=int)
        self._steps = np.zeros(num_envs, dtype=int)
        self._held = np.zeros(num_envs, dtype=int)
        self._images = [f for f in task.obs_fields if f.kind == "image"]
        self._renderers = {
            size: make_renderer(self.world, *size, backend)
            for size in {f.resolution for f in self._images}
        }
        self.state = np.zeros((num_envs, self.world.state_size))
        self.command = np.zeros((num_envs, len(self.world.joint_names)))

    def restart(self, seed: int) -> None:
        """Count episodes from the beginning, under another seed."""
        self.seed = seed
        self._episode[:] = 0

    def reset(
        self,
        seeds: Sequence[int] | None = None,
        rngs: Sequence[np.random.Generator] | None = None,
    ) -> Observation:
        """Start a new episode everywhere: the next one, or those of given seeds or generators (N,).

        Raises:
            SimulationError: another number of seeds than of environments.
        """
        if seeds is not None:
            rngs = generators(seeds)
        if rngs is not None and len(rngs) != self.num_envs:
            raise SimulationError(
                f"{self.num_envs} environments need as many seeds, not {len(rngs)}"
            )
        everyone = np.arange(self.num_envs)
        self._playlist = None
        self._start(everyone, rngs)
        return self._observe(self.state, everyone)

    def play(self, seeds: Sequence[int]) -> Observation:
        """Play the episodes of these seeds (E,), each once, until the next `reset`.

        An environment whose episode ends takes the next seed at the end of the chunk. What is observed at rest means
        nothing.
        """
        everyone = np.arange(self.num_envs)
        # Also what is at rest from the beginning needs a state to be in: one of these.
        self._start(everyone, generators(np.resize(seeds, self.num_envs)))
        self._playlist = Playlist(seeds, self.num_envs)
        self._playlist.take(everyone)
        return self._observe(self.state, everyone)

    @property
    def playing(self) -> np.ndarray:
        """(N,) int, number of the seed that each environment plays, among those of `play`; -1 where it is at rest."""
        return np.zeros(self.num_envs, int) if self._playlist is None else self._playlist.playing

    def stagger(self) -> None:
        """Move the time limits of the running episodes apart, evenly over an episode's length.

        Environments that start together fail together: a rollout shorter than an episode then holds nothing but
        beginnings, or nothing but time limits.
        """
        everyone = self.first_env + np.arange(self.num_envs)
        self._steps[:] = everyone * GOLDEN_RATIO % 1 * self.time_limit

    @property
    def elapsed(self) -> np.ndarray:
        """Control steps of the running episodes so far, (N,); what `stagger` took from them counts as over."""
        return self._steps.copy()

    def _observe(self, state: np.ndarray, envs: np.ndarray) -> Observation:
        """What the policy sees of states (n, state_size) of some environments (n,).

        Images are drawn here and nowhere else: once per chunk, and black for environments at rest.
        """
        obs = self.task.observe(state)
        awake = self.playing[envs] >= 0
        for f in self._images:
            drawn = self._renderers[f.resolution].batch(
                state[awake], f.source, self._models(envs[awake])
            )
            obs[f.name] = drawn
            if not awake.all():
                obs[f.name] = np.zeros((len(state), *drawn.shape[1:]), np.uint8)
                obs[f.name][awake] = drawn
        return {f.name: obs[f.name] for f in self.task.obs_fields}

    def _models(self, envs: np.ndarray) -> list[mujoco.MjModel] | None:
        """Of some environments (n,), where models differ."""
        return None if self.models is None else [self.models[i] for i in envs]

    def _seen(self, trail: np.ndarray, last: np.ndarray) -> np.ndarray:
        """The state (N, state_size) that the observation after step `last` (N,) of a chunk shows: that step's."""
        return trail[np.arange(self.num_envs), 1 + last]

    def _start(
        self, envs: np.ndarray, rngs: Sequence[np.random.Generator] | None = None
    ) -> Sequence[np.random.Generator]:
        """Begin an episode in some environments (n,): the next one of each, or those of given generators (n,)."""
        if rngs is None:
            numbers = np.stack([self.first_env + envs, self._episode[envs]], axis=1)
            rngs = [np.random.default_rng((self.seed, *number)) for number in numbers.tolist()]
        self.state[envs] = [self.task.initial_state(rng) for rng in rngs]
        self.command[envs] = self.world.initial_command(self.state[envs])
        self._episode[envs] += 1
        self._steps[envs] = self._held[envs] = 0
        return rngs

    def step(self, action_chunk: np.ndarray) -> ChunkStep:
        """Execute (N, h, A) actions open loop."""
        task = self.task
        actions = np.asarray(action_chunk, dtype=np.float64)
        trail, commands, diverged_at = self._advance(actions)
        before, states = trail[:, :-1], trail[:, 1:]
        succeeded = self._succeeded(states, diverged_at)
        failed = task.is_failure(states) & ~diverged_at
        step_number = self._steps[:, None] + 1 + np.arange(actions.shape[1])
        out_of_time = step_number >= self.time_limit

        # The first of these ends the episode; what comes after it inside the chunk does not count.
        awake = (self.playing >= 0)[:, None]
        ends = awake & (succeeded | failed | diverged_at | out_of_time)  # (N, h)
        ended = ends.any(axis=1)
        last = np.where(ended, ends.argmax(axis=1), actions.shape[1] - 1)
        valid = awake & (np.arange(actions.shape[1]) <= last[:, None])
        rows = np.arange(self.num_envs)

        reward_terms = {
            name: np.where(valid & ~diverged_at, term, 0.0)
            for name, term in task.reward_terms(before, actions, states, succeeded).items()
        }
        success, failure, diverged = (
            ended & at[rows, last] for at in (succeeded, failed, diverged_at)
        )
        terminated = success | failure
        for i in np.flatnonzero(diverged):
            self._report_divergence(i, actions[i], int(self._steps[i] + last[i] + 1))
        self._steps += last + 1
        self.state = states[rows, last]
        self.command = commands[rows, last].copy()
        # NOTE: observations may be views of what they show, so that must not be self.state.
        final_obs = obs = self._observe(self._seen(trail, last), rows)
        begun, rngs = np.flatnonzero(ended), None
        if self._playlist is not None:
            begun, seeds = self._playlist.take(begun)
            rngs = generators(seeds)
        if len(begun):
            self._start(begun, rngs)
            obs = {name: values.copy() for name, values in final_obs.items()}
            for name, values in self._observe(self.state[begun], begun).items():
                obs[name][begun] = values
        return ChunkStep(
            obs=obs,
            final_obs=final_obs,
            reward=sum(reward_terms.values()),
            reward_terms=reward_terms,
            valid=valid,
            terminated=terminated,
            truncated=ended & ~terminated,
            success=success,
            diverged=diverged,
            states=states,
            commands=commands,
        )

    def _advance(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Physics: states (N, 1 + h, state_size) from now on, commands (N, h, A), where it broke down (N, h)."""
        horizon = actions.shape[1]
        trail = np.empty((self.num_envs, 1 + horizon, self.world.state_size))
        trail[:, 0] = self.state
        if not self.task.feedback:
            return trail, *self._run(trail, self.command, actions)
        commands, diverged = np.empty_like(actions), np.zeros(actions.shape[:2], bool)
        command = self.command
        for h in range(horizon):
            wanted = self.task.act(trail[:, h], actions[:, h])[:, None]
            given, broken = self._run(trail[:, h : h + 2], command, wanted)
            self.world.memory(trail[:, h + 1])[:] = self.world.memory(trail[:, h])
            trail[:, h + 1] = self.task.after_step(trail[:, h + 1])
            command = commands[:, h] = given[:, 0]
            diverged[:, h] = broken[:, 0]
        return trail, commands, np.logical_or.accumulate(diverged, axis=1)

    def _run(
        self, trail: np.ndarray, command: np.ndarray, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Fill `trail` (N, 1 + h, state_size) from its first state on; returns commands and where it broke down."""
        state, states = trail[:, 0], trail[:, 1:]
        controls, commands = self._controls(command, actions)
        self._simulate(state, controls, states)
        # MuJoCo restarts a simulation that broke down from time zero, so its clock tells as well as its numbers.
        due = state[:, :1] + (1 + np.arange(actions.shape[1])) * self.world.control_dt
        moving = states[..., 1 : 1 + self.world.model.nq + self.world.model.nv]
        sane = (np.abs(moving) < ABSURD).all(axis=-1)
        diverged = ~sane | ~(np.abs(states[..., 0] - due) < 1e-6)
        env, step = np.nonzero(diverged)
        states[env, step] = state[env]
        return commands, diverged

    def _simulate(self, state: np.ndarray, controls: np.ndarray, states: np.ndarray) -> None:
        """Physics: fill states (N, h, state_size) at the ends of control steps."""
        self._compute(state, controls, states, self._stop)

    def _compute(
        self,
        state: np.ndarray,
        controls: np.ndarray,
        out: np.ndarray,
        stop: StopFn | None,
        steps_per_row: int | None = None,
    ) -> None:
        """`Backend.step`, in which environments at rest stay as they are."""
        resting = self.playing < 0
        if not resting.any():
            self.backend.step(state, controls, out, stop, self.models, steps_per_row)
            return
        envs = np.flatnonzero(~resting) if self.backend.any_number else np.arange(self.num_envs)
        rows = np.empty((len(envs), *out.shape[1:]))
        models = self._models(envs)
        self.backend.step(state[envs], controls[envs], rows, stop, models, steps_per_row)
        out[envs] = rows
        out[resting] = state[resting, None]

    def _controls(self, command: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What reaches the actuators, as `World.controls` has it."""
        return self.world.controls(command, actions)

    def _report_divergence(self, env: int, actions: np.ndarray, step: int) -> None:
        """Count it, say so, and keep what is needed to see it again: the state before the chunk, and the chunk."""
        self.num_diverged += 1
        kept = ""
        if self.dump_dir is not None and self.num_diverged <= MOST_DUMPS:
            try:
                kept = f"; state and actions before it: {self._dump(env, actions, step)}"
            except OSError as error:
                # A disk that is full must not end the run for the sake of a report.
                kept = f"; state and actions before it could not be kept: {error}"
        LOG.warning(
            "task '%s': the simulation of environment %d broke down at control step %d and was reset (%d so far)%s",
            self.task.name, env, step, self.num_diverged, kept,
        )  # fmt: skip

    def _dump(self, env: int, actions: np.ndarray, step: int) -> Path:
        """The file that lets it be seen again."""
        episode = int(self._episode[env]) - 1
        path = Path(self.dump_dir) / f"{self.task.name}-{self.seed}-{env}-{episode}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(
            path,
            task=self.task.name,
            state=self.state[env],
            command=self.command[env],
            actions=actions,
            seed=self.seed,
            env=env,
            episode=episode,
            step=step,
        )
        return path

    def _succeeded(self, states: np.ndarray, diverged_at: np.ndarray) -> np.ndarray:
        """(N, h) bool: steps at which the goal has been met for long enough."""
        succeeded = np.zeros(states.shape[:2], bool)
        if self.task.success_hold_steps is None:
            return succeeded
        holds = self.task.is_success(states) & ~diverged_at
        for h in range(states.shape[1]):
            self._held = np.where(holds[:, h], self._held + 1, 0)
            succeeded[:, h] = self._held >= self.task.success_hold_steps
        return succeeded

    def snapshot(self) -> dict[str, np.ndarray]:
        """Copies of everything that the next step depends on."""
        return {name.strip("_"): getattr(self, name).copy() for name in SNAPSHOT}

    def restore(self, snapshot: dict[str, np.ndarray]) -> None:
        """Go on from a snapshot of as many environments of the same task."""
        for name in SNAPSHOT:
            getattr(self, name)[:] = snapshot[name.strip("_")]

    def close(self) -> None:
        """End the physics threads, free the GL context."""
        self.backend.close()
        for renderer in self._renderers.values():
            renderer.close()


def generators(seeds: Sequence[int]) -> list[np.random.Generator]:
    """One per seed: where everything random of its episode comes from."""
    return [np.random.default_rng(seed) for seed in seeds]

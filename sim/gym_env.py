"""Every task as a Gymnasium environment, single and vectorised. Importing this module registers them, those of other
packages too (`pick_place` is `flow_policy/PickPlace-v0`).

    import gymnasium, sim.gym_env
    env = gymnasium.make("flow_policy/Lift-v0")
    envs = gymnasium.make_vec("flow_policy/Lift-v0", num_envs=256)

A step is one control step. Actions and observations are those of the task, raw: positions, rad, m; the observation is
a dict of its fields, or one vector with `flat=True`. Options of the task (`robot`, `reward`, `cameras`) are passed on.
"""

from typing import Any, ClassVar

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from sim.errors import SimulationError
from sim.render import Renderer
from sim.tasks import TASKS, make_task, task_names
from sim.vec_env import Observation, VecEnv

RENDER_SIZE = (240, 320)


def env_id(task: str) -> str:
    """`pick_place` -> `flow_policy/PickPlace-v0`; a task of another package is not imported for it."""
    name = TASKS[task].__name__ if task in TASKS else task.title().replace("_", "")
    return f"flow_policy/{name}-v0"


def observation_space(task, flat: bool) -> spaces.Space:
    """Of one environment: a dict of fields, or one vector.

    Raises:
        SimulationError: a vector is wanted of a task with images.
    """
    images = [f.name for f in task.obs_fields if f.kind == "image"]
    if flat:
        if images:
            raise SimulationError(f"flat=True cannot hold the images {images}: use flat=False")
        size = sum(len(f.elements) for f in task.obs_fields)
        return spaces.Box(-np.inf, np.inf, (size,), np.float64)
    return spaces.Dict(
        {
            f.name: spaces.Box(0, 255, (*f.resolution, 3), np.uint8)
            if f.kind == "image"
            else spaces.Box(-np.inf, np.inf, (len(f.elements),), np.float64)
            for f in task.obs_fields
        }
    )


def action_space(task) -> spaces.Box:
    """Of one environment: the range of the actuators."""
    low, high = task.world.target_low, task.world.target_high
    return spaces.Box(low.astype(np.float32), high.astype(np.float32), dtype=np.float32)


def gather(obs: Observation, flat: bool) -> Any:
    """Batched fields as the space has them."""
    if flat:
        return np.concatenate(list(obs.values()), axis=-1)
    return {name: np.array(values) for name, values in obs.items()}


class TaskEnv(gymnasium.Env):
    """One environment, without automatic reset. `reset(seed=s)` starts the episode that `flow-policy eval` runs for s.

    Args:
        task: name of the task.
        render_mode: None or `rgb_array`.
        flat: observations as one vector.
        options: of the task.
    """

    metadata: ClassVar[dict] = {"render_modes": ["rgb_array"], "render_fps": 20}

    def __init__(
        self, task: str, render_mode: str | None = None, flat: bool = False, **options: Any
    ):
        self.task = make_task(task, **options)
        self.metadata = self.metadata | {"render_fps": round(1 / self.task.control_dt)}
        self.render_mode = render_mode
        self.flat = flat
        self._env = VecEnv(self.task, 1, num_threads=1)
        self._renderer: Renderer | None = None
        self.observation_space = observation_space(self.task, flat)
        self.action_space = action_space(self.task)

    def _first(self, obs: Observation) -> Any:
        return gather({name: values[0] for name, values in obs.items()}, self.flat)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Any, dict]:
        """Start an episode."""
        super().reset(seed=seed)
        obs = self._env.reset(rngs=[self.np_random])
        self._shown = self._env.state[0].copy()
        return self._first(obs), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict]:
        """One control step. `info` has `success` and the reward by term."""
        step = self._env.step(np.asarray(action, dtype=np.float64)[None, None])
        self._shown = step.states[0, -1]
        info = {
            "success": bool(step.success[0]),
            "diverged": bool(step.diverged[0]),
            "reward_terms": {name: float(term[0, 0]) for name, term in step.reward_terms.items()},
        }
        ended = bool(step.terminated[0]), bool(step.truncated[0])
        return self._first(step.final_obs), float(step.reward[0, 0]), *ended, info

    def render(self) -> np.ndarray | None:
        """A picture (240, 320, 3) from the task's first camera."""
        if self.render_mode is None:
            return None
        if self._renderer is None:
            self._renderer = Renderer(self.task.world, *RENDER_SIZE)
        return self._renderer.render(self._shown, self.task.cameras[0])

    def close(self) -> None:
        """Free threads and GL context."""
        self._env.close()
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None


class TaskVectorEnv(VectorEnv):
    """N environments in one batched simulation. Ended episodes restart within the same step.

    `info` has `success`, `diverged` (N,), and where an episode ended `final_obs`, with the mask `_final_obs` (N,).
    """

    def __init__(
        self,
        task: str,
        num_envs: int = 1,
        num_threads: int | None = None,
        flat: bool = False,
        render_mode: str | None = None,
        **options: Any,
    ):
        if render_mode is not None:
            raise SimulationError("the vectorised environment does not render: render_mode=None")
        self.task = make_task(task, **options)
        self.num_envs = num_envs
        self.flat = flat
        self.render_mode = None
        self.metadata = {
            "render_modes": [],
            "render_fps": round(1 / self.task.control_dt),
            "autoreset_mode": AutoresetMode.SAME_STEP,
        }
        seed = int(self.np_random.integers(2**32))  # until a reset brings another one
        self._env = VecEnv(self.task, num_envs, seed=seed, num_threads=num_threads)
        self.single_observation_space = observation_space(self.task, flat)
        self.single_action_space = action_space(self.task)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    def reset(
        self, *, seed: int | list[int] | None = None, options: dict | None = None
    ) -> tuple[Any, dict]:
        """Start an episode everywhere: from seeds seed, seed + 1 ..., or a list of them, or where we are. What follows
        depends on them as well; without any, no two runs are alike.
        """
        if isinstance(seed, (int, np.integer)):
            seed = int(seed)
            self._env.restart(seed)
            seed = [seed + i for i in range(self.num_envs)]
        elif seed is not None and None not in seed:
            self._env.restart(int(np.random.SeedSequence(seed).generate_state(1)[0]))
        return gather(self._env.reset(seed), self.flat), {}

    def step(self, actions: np.ndarray) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict]:
        """One control step everywhere."""
        step = self._env.step(np.asarray(actions, dtype=np.float64)[:, None])
        info: dict[str, Any] = {"success": step.success, "diverged": step.diverged}
        if step.ended.any():
            info["final_obs"], info["_final_obs"] = gather(step.final_obs, self.flat), step.ended
        return gather(step.obs, self.flat), step.reward[:, 0], step.terminated, step.truncated, info

    def close_extras(self, **kwargs: Any) -> None:
        """End the threads."""
        self._env.close()


for _name in task_names():
    if env_id(_name) not in gymnasium.registry:
        gymnasium.register(
            env_id(_name),
            entry_point="sim.gym_env:TaskEnv",
            vector_entry_point="sim.gym_env:TaskVectorEnv",
            kwargs={"task": _name},
        )

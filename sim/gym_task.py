"""Any registered Gymnasium environment as a task that a policy plays on: the other direction of `gym_env.py`.

A name is Gymnasium's id (`Hopper-v5`), after the module that registers it where one is needed
(`gymnasium_robotics:FetchReach-v4`), or one of `SHORT_NAMES`. Observations are a vector or a dict of arrays, actions a
vector. The environment gets the actions as the policy gives them.
"""

import importlib
import re
from collections.abc import Mapping, Sequence

import gymnasium
import numpy as np
from gymnasium import spaces

from sim.errors import SimulationError
from sim.robosuite_env import STOCK
from sim.vec_env import ChunkStep, Observation, Playlist

SHORT_NAMES = {f"robosuite_{name.lower()}": f"flow_policy/Robosuite{name}-v0" for name in STOCK}
SUCCESS_KEYS = ("success", "is_success")  # of the info: Meta-World's, ours; gymnasium-robotics'


def is_gymnasium(name: str) -> bool:
    """Whether a name is one of those: a short name, or written like an id."""
    return name in SHORT_NAMES or re.search(r"[/:]|-v\d+$", name) is not None


class GymnasiumTask:
    """What an evaluation asks of a task.

    Attributes:
        name: as it was given.
        control_dt: of the environment where it says (`dt`), s; else as given.
        fields: shape of each entry of the observation; the only one is called `VECTOR` where it is a vector.
        num_actions: A.
        options: as given.
        success_hold_steps: None until an environment speaks of success.

    Args:
        control_dt: s, for an environment that does not say.
        options: of the environment, as `gymnasium.make` takes them.

    Raises:
        SimulationError: nobody registers the name, it cannot be made, or it has other spaces.
    """

    VECTOR = ""
    cameras: tuple[str, ...] = ()

    def __init__(self, name: str, control_dt: float, options: Mapping[str, str] | None = None):
        self.name = name
        self.options = dict(options or {})
        self.success_hold_steps: int | None = None
        env = self.make()
        self.control_dt = float(getattr(env.unwrapped, "dt", control_dt))
        seen, action = env.observation_space, env.action_space
        parts = seen.spaces if isinstance(seen, spaces.Dict) else {self.VECTOR: seen}
        env.close()
        boxes = all(isinstance(part, spaces.Box) for part in (*parts.values(), action))
        if not boxes or len(action.shape) != 1:
            raise SimulationError(
                f"environment '{name}' has observations {seen} and actions {action}; a policy needs a vector or a "
                "dict of arrays, and a vector"
            )
        self.fields = {part: space.shape for part, space in parts.items()}
        self.num_actions = action.shape[0]

    def make(self) -> gymnasium.Env:
        """A new environment."""
        module, _, env_id = SHORT_NAMES.get(self.name, self.name).rpartition(":")
        try:
            for needed in ("sim.gym_env", "sim.robosuite_env", module):
                if needed:
                    importlib.import_module(needed)
            return gymnasium.make(env_id, disable_env_checker=True, **self.options)
        except SimulationError:
            raise
        except (gymnasium.error.Error, ImportError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise SimulationError(f"Gymnasium environment '{self.name}': {reason}") from None

    def observe(self, obs, wanted: Sequence) -> Observation:
        """One observation as fields: by name from a dict, in their order from a vector.

        Args:
            wanted: the policy's fields, each with `name` and `size`.
        """
        if self.VECTOR not in self.fields:
            return {f.name: np.asarray(obs[f.name]) for f in wanted}
        ends = np.cumsum([f.size for f in wanted])[:-1]
        return dict(zip((f.name for f in wanted), np.split(obs, ends), strict=True))


class GymnasiumVecEnv:
    """N environments, one after the other, a chunk of actions at a time; to an evaluation like a `VecEnv`.

    An episode is a function of its seed alone if the environment keeps Gymnasium's promise about seeds. It succeeds
    where the `info` of its last step says so.

    Args:
        wanted: the policy's observation fields.
    """

    def __init__(self, task: GymnasiumTask, num_envs: int, wanted: Sequence):
        self.task, self.num_envs = task, num_envs
        self._wanted = wanted
        self._envs = [task.make() for _ in range(num_envs)]
        self._obs: list[Observation] = [{} for _ in range(num_envs)]
        self._playlist = Playlist((), num_envs)

    @property
    def playing(self) -> np.ndarray:
        """As `VecEnv.playing`."""
        return self._playlist.playing

    def play(self, seeds: Sequence[int]) -> Observation:
        """As `VecEnv.play`."""
        everyone = np.arange(self.num_envs)
        self._start(everyone, np.resize(seeds, self.num_envs))
        self._playlist = Playlist(seeds, self.num_envs)
        self._playlist.take(everyone)
        return self._gather()

    def _start(self, envs: np.ndarray, seeds: Sequence[int]) -> None:
        for i, seed in zip(envs, seeds, strict=True):
            obs, _ = self._envs[i].reset(seed=int(seed))
            self._obs[i] = self.task.observe(obs, self._wanted)

    def _gather(self) -> Observation:
        return {f.name: np.stack([obs[f.name] for obs in self._obs]) for f in self._wanted}

    def step(self, action_chunk: np.ndarray) -> ChunkStep:
        """Execute (N, h, A) actions open loop."""
        shape = action_chunk.shape[:2]
        reward, valid = np.zeros(shape), np.zeros(shape, bool)
        terminated, truncated, success = np.zeros((3, self.num_envs), bool)
        for i, h in np.ndindex(*shape):
            if self.playing[i] < 0 or terminated[i] or truncated[i]:
                continue
            env = self._envs[i]
            action = action_chunk[i, h].astype(env.action_space.dtype)
            obs, reward[i, h], terminated[i], truncated[i], info = env.step(action)
            self._obs[i] = self.task.observe(obs, self._wanted)
            valid[i, h] = True
            said = [bool(info[key]) for key in SUCCESS_KEYS if key in info]
            if said:
                self.task.success_hold_steps = 1
            success[i] = (terminated[i] or truncated[i]) and any(said)
        final_obs = self._gather()
        self._start(*self._playlist.take(np.flatnonzero(terminated | truncated)))
        obs = self._gather()
        return ChunkStep(
            obs=obs,
            final_obs=final_obs,
            reward=reward,
            reward_terms={},
            valid=valid,
            terminated=terminated,
            truncated=truncated & ~terminated,
            success=success,
            diverged=np.zeros(self.num_envs, bool),
            states=np.zeros((*shape, 0)),
            commands=action_chunk,
        )

    def close(self) -> None:
        """Close them all."""
        for env in self._envs:
            env.close()

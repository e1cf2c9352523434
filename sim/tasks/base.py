"""What a task is: an MJCF model plus pure batched functions of the state."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from sim.arrays import namespace
from sim.tasks.layout import ObsField
from sim.world import World


class Task:
    """The MDP on a `World`. All functions but `initial_state` take and give batches (...,), of NumPy or of PyTorch
    (`sim/arrays.py`).

    A task sets the attributes and writes `initial_state`, `observe` and `reward_terms`; `is_success` where success
    means something, `is_failure` where an episode can end without it, and, with `feedback`, `act` and `after_step`.

    Attributes:
        name, robot: of the task, of the robot in it.
        options: what was chosen of its own options, by name (`make_task`); the others have their defaults.
        robots: arms to choose from with the option `robot`; empty where there is no choice.
        control_dt: control period, s.
        episode_steps: time limit, control steps.
        success_hold_steps: control steps in a row for which `is_success` must hold; None: the task knows no success,
            only reward.
        cameras: named cameras of the model that show the task; the first is for films.
        demo_noise: disturbance of targets that the expert stands, rad; `flow-policy collect` adds it.
        feedback: control steps are run one at a time, with `act` and `after_step` between them.
        world: model, state layout and command interface.
        obs_fields: what `observe` gives, in order.
    """

    name: str
    robot: str
    options: Mapping[str, Any] = MappingProxyType({})
    robots: tuple[str, ...] = ()
    control_dt: float
    episode_steps: int
    success_hold_steps: int | None = None
    cameras: tuple[str, ...] = ()
    demo_noise: float = 0.02
    feedback: bool = False
    world: World
    obs_fields: tuple[ObsField, ...]

    def initial_state(self, rng: np.random.Generator) -> np.ndarray:
        """A start state (state_size,)."""
        raise NotImplementedError

    def observe(self, state: np.ndarray) -> dict[str, np.ndarray]:
        """Observation fields (..., size) of states (..., state_size)."""
        raise NotImplementedError

    def is_success(self, state: np.ndarray) -> np.ndarray:
        """Whether the goal is met at this moment, (...,) bool."""
        raise NotImplementedError

    def is_failure(self, state: np.ndarray) -> np.ndarray:
        """Whether the episode ends here without success, (...,) bool."""
        return namespace(state).zeros_like(state[..., 0], dtype=bool)

    def reward_terms(
        self, before: np.ndarray, action: np.ndarray, after: np.ndarray, succeeded: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Reward by name, (...,) each; the reward is their sum.

        Args:
            before, after: states (..., state_size) around the control step.
            action: (..., A) as the policy gave it.
            succeeded: (...,) bool, this step completes the task.
        """
        raise NotImplementedError

    def act(self, state: np.ndarray, action: np.ndarray) -> np.ndarray:
        """With `feedback`: the command (..., A) for the next control step."""
        return action

    def after_step(self, state: np.ndarray) -> np.ndarray:
        """With `feedback`: discrete events after a control step, e.g. an equality constraint that switches on."""
        return state

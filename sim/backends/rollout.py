"""Physics with `mujoco.rollout`: C++ threads, one call for a whole chunk."""

from collections.abc import Sequence

import mujoco
import numpy as np
from mujoco import rollout

from sim.backends.base import StopFn, default_threads
from sim.world import STATE, World


class RolloutBackend:
    """For worlds whose rows are MuJoCo's plain state.

    The constraint solver starts every call without a warm start: `mujoco.rollout` returns none. So a call does not
    depend on the number of threads, on the batch, or on what ran before, but two chunks are not exactly one long
    simulation.
    """

    any_number = True

    def __init__(self, world: World, num_threads: int | None = None):
        self.world = world
        self.num_threads = num_threads or default_threads()
        self._data = [mujoco.MjData(world.model) for _ in range(self.num_threads)]
        self._pool = rollout.Rollout(nthread=self.num_threads if self.num_threads > 1 else 0)

    @staticmethod
    def serves(world: World) -> bool:
        """Whether a world's rows are what `mujoco.rollout` takes and gives."""
        return world.state_spec == int(STATE) and not world.outputs

    def step(
        self,
        state: np.ndarray,
        controls: np.ndarray,
        out: np.ndarray,
        stop: StopFn | None = None,
        models: Sequence[mujoco.MjModel] | None = None,
        steps_per_row: int | None = None,
    ) -> None:
        """As in `Backend`, without taking the hint."""
        every = steps_per_row or self.world.decimation
        controls = np.repeat(controls, out.shape[1] * every // controls.shape[1], axis=1)
        models = self.world.model if models is None else models
        states, _ = self._pool.rollout(models, self._data, state, controls)
        out[:] = states[:, every - 1 :: every]

    def close(self) -> None:
        """End the threads."""
        self._pool.close()

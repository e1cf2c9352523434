"""Physics for all environments with `mj_step` in threads: exact, and with all that MjData holds."""

import itertools
import os
from concurrent.futures import ThreadPoolExecutor

import mujoco
import numpy as np

from sim.world import WARM_START, World

BLOCKS_PER_THREAD = (
    8  # so that a thread that is held up by another process does not hold up the rest
)


class ThreadsBackend:
    """Advance N states by the same number of physics steps, as `mj_step` in a loop does.

    `mj_step` releases Python's interpreter lock. A row holds all that the next step depends on, so one MjData per
    thread is enough: a call is a pure function of (state, controls), which depends neither on the number of threads
    nor on the batch. With `WARM_START` in the row, chunk after chunk equals one long simulation bit for bit; without,
    every call starts cold, as a rollout does. Contact forces are computed at the end of each control step
    (`mj_rnePostConstraint`) for worlds that put them out.
    """

    def __init__(self, world: World, num_threads: int | None = None):
        self.world = world
        self.num_threads = num_threads or len(os.sched_getaffinity(0))
        self._idle = [mujoco.MjData(world.model) for _ in range(self.num_threads)]
        self._pool = ThreadPoolExecutor(self.num_threads) if self.num_threads > 1 else None

    def step(self, state: np.ndarray, controls: np.ndarray) -> np.ndarray:
        """Advance by T rows of controls; arguments and result as in `RolloutBackend.step`."""
        num_envs, rows = controls.shape[:2]
        horizon = rows * self.world.steps_per_control // self.world.decimation
        states = np.empty((num_envs, horizon, self.world.state_size))
        blocks = min(num_envs, self.num_threads * BLOCKS_PER_THREAD)
        bounds = np.linspace(0, num_envs, blocks + 1).astype(int)
        parts = [slice(a, b) for a, b in itertools.pairwise(bounds)]

        def run(part: slice) -> None:
            data = self._idle.pop()
            self._run(data, state[part], controls[part], states[part])
            self._idle.append(data)

        list((self._pool.map if self._pool else map)(run, parts))
        return states

    def _run(
        self, data: mujoco.MjData, state: np.ndarray, controls: np.ndarray, states: np.ndarray
    ) -> None:
        """A block of environments, one after the other."""
        world, model = self.world, self.world.model
        physics, spec, held = world.physics_size, world.state_spec, world.steps_per_control
        rows = world.decimation // held
        outputs = [(where, getattr(data, name)) for name, (where, _) in world.outputs.items()]
        ctrl, warm_start = data.ctrl, data.qacc_warmstart
        cold = not spec & int(WARM_START)
        for i in range(len(state)):
            mujoco.mj_setState(model, data, state[i, :physics], spec)
            if cold:
                warm_start[:] = 0  # not that of the environment before
            k = 0
            for out in states[i]:
                for _ in range(rows):
                    ctrl[:] = controls[i, k]
                    mujoco.mj_step(model, data, held)
                    k += 1
                if world.needs_contact_forces:
                    mujoco.mj_rnePostConstraint(model, data)
                mujoco.mj_getState(model, data, out[:physics], spec)
                for where, values in outputs:
                    out[where] = values.reshape(-1)

    def close(self) -> None:
        """End the threads."""
        if self._pool:
            self._pool.shutdown()

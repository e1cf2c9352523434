"""Physics with `mj_step` in threads: exact, and with all that MjData holds."""

import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import mujoco
import numpy as np
from mujoco import rollout

from sim.backends.base import StopFn, default_threads
from sim.world import STATE, WARM_START, World

LOOK_EVERY = (
    2  # control steps between looks at who may stop: one call more costs 1 % of hopper's physics
)
BLOCKS_PER_THREAD = 8  # a thread held up by another process must not hold up the rest


class ThreadsBackend:
    """For every world: `mj_step` in a loop, in C where the row holds no more than state and warm start.

    `mj_step` releases Python's interpreter lock. A row holds all that the next step depends on, so one MjData per
    thread is enough: a call depends neither on the number of threads nor on the batch. With `WARM_START` in the row,
    chunk after chunk equals one long simulation bit for bit; without, every call starts cold, as a rollout does.
    Contact forces are computed at the end of each control step (`mj_rnePostConstraint`) for worlds that put them out.

    Threads wait for one another whenever Python runs between two calls into MuJoCo. So a chunk of one environment is
    one call where that is possible (a `mujoco.rollout` of its own; of two control steps where some may stop). Then
    the warm start is in the last row of a chunk and in some rows before it; the others hold zeros there.
    """

    any_number = True

    def __init__(self, world: World, num_threads: int | None = None):
        self.world = world
        self.num_threads = num_threads or default_threads()
        self._idle = [
            (mujoco.MjData(world.model), rollout.Rollout(nthread=0))
            for _ in range(self.num_threads)
        ]
        self._plain = mujoco.mj_stateSize(world.model, STATE)
        warm = world.parts.get(int(WARM_START), slice(0))
        ends = (warm.start, warm.stop, world.physics_size)
        self._whole = ends == (self._plain, *2 * (world.physics_size,)) and not world.outputs
        self._pool = ThreadPoolExecutor(self.num_threads) if self.num_threads > 1 else None

    def step(
        self,
        state: np.ndarray,
        controls: np.ndarray,
        out: np.ndarray,
        stop: StopFn | None = None,
        models: Sequence[mujoco.MjModel] | None = None,
        steps_per_row: int | None = None,
    ) -> None:
        """As in `Backend`; the hint is taken where rows hold a warm start."""
        num_envs, every = len(state), steps_per_row or self.world.decimation
        controls = controls.reshape(*out.shape[:2], -1, controls.shape[-1])
        models = [self.world.model] * num_envs if models is None else models
        blocks = min(num_envs, self.num_threads * BLOCKS_PER_THREAD)
        bounds = np.linspace(0, num_envs, blocks + 1).astype(int)
        parts = [slice(a, b) for a, b in itertools.pairwise(bounds)]

        def run(part: slice) -> None:
            data, roller = self._idle.pop()
            given = models[part], data, state[part], controls[part], out[part]
            try:
                if self._whole:
                    self._run_whole(roller, *given, every, stop)
                else:
                    self._run(*given, every, stop)
            finally:
                self._idle.append((data, roller))

        list((self._pool.map if self._pool else map)(run, parts))

    def _run_whole(
        self,
        roller: rollout.Rollout,
        models: Sequence[mujoco.MjModel],
        data: mujoco.MjData,
        state: np.ndarray,
        controls: np.ndarray,
        states: np.ndarray,
        every: int,
        stop: StopFn | None,
    ) -> None:
        """A block of environments: each for the whole chunk, or for `LOOK_EVERY` control steps where some may stop."""
        horizon = states.shape[1]
        leg = LOOK_EVERY if stop else horizon
        going, now = np.arange(len(state)), state
        for first in range(0, horizon, leg):
            span = slice(first, min(first + leg, horizon))
            rows = self._roll(
                roller, [models[i] for i in going], data, now, controls[going, span], every
            )
            states[going, span] = rows
            if span.stop == horizon:
                return
            stopped = stop(rows[:, -1])
            states[going[stopped], span.stop :] = rows[stopped, -1:]
            going, now = going[~stopped], rows[~stopped, -1]
            if not len(going):
                return

    def _roll(
        self,
        roller: rollout.Rollout,
        models: Sequence[mujoco.MjModel],
        data: mujoco.MjData,
        state: np.ndarray,
        controls: np.ndarray,
        every: int,
    ) -> np.ndarray:
        """Rows (n, h, state_size), `every` physics steps each, from states (n, state_size) and controls (n, h, k, A):
        one call for each environment."""
        world = self.world
        num_envs, horizon, held = controls.shape[:3]
        count = horizon * every
        sent = np.repeat(controls, every // held, axis=2).reshape(num_envs, 1, count, -1)
        start = state[:, None, : self._plain].copy()
        warm_start = world.part(state, WARM_START)[:, None].copy()
        after = np.empty((num_envs, 1, count, self._plain))
        sensors = np.empty((1, count, world.model.nsensordata))  # nobody looks
        for model, at, wanted, warm, seen in zip(
            models, start, sent, warm_start, after, strict=True
        ):
            roller.rollout(
                [model],
                [data],
                at,
                wanted,
                skip_checks=True,
                nstep=count,
                initial_warmstart=warm,
                state=seen,
                sensordata=sensors,
            )
            warm[:] = data.qacc_warmstart
        rows = np.zeros((num_envs, horizon, world.state_size))
        rows[..., : self._plain] = after[:, 0, every - 1 :: every]
        world.part(rows, WARM_START)[:, -1] = warm_start[:, 0]
        return rows

    def _run(
        self,
        models: Sequence[mujoco.MjModel],
        data: mujoco.MjData,
        state: np.ndarray,
        controls: np.ndarray,
        states: np.ndarray,
        every: int,
        stop: StopFn | None,
    ) -> None:
        """A block of environments: each for the whole chunk, or step by step where some may stop."""
        world = self.world
        size, spec, held = (
            world.physics_size,
            world.state_spec,
            every // controls.shape[2],
        )
        cold = not spec & int(WARM_START)
        ctrl, warm_start = data.ctrl, data.qacc_warmstart
        outputs = [
            (where, getattr(data, name).reshape(-1)) for name, (where, _) in world.outputs.items()
        ]

        def load(model: mujoco.MjModel, row: np.ndarray) -> None:
            mujoco.mj_setState(model, data, row, spec)
            if cold:
                warm_start[:] = 0  # not that of the environment before

        def advance(
            model: mujoco.MjModel, controls: np.ndarray, physics: np.ndarray, row: np.ndarray
        ) -> None:
            for values in controls:
                ctrl[:] = values
                mujoco.mj_step(model, data, held)
            if world.needs_contact_forces:
                mujoco.mj_rnePostConstraint(model, data)
            mujoco.mj_getState(model, data, physics, spec)
            for where, values in outputs:
                row[where] = values

        horizon = controls.shape[1]
        start, physics = state[:, :size], states[..., :size]
        if stop is None or cold:
            for i, model in enumerate(models):
                load(model, start[i])
                for h in range(horizon):
                    advance(model, controls[i, h], physics[i, h], states[i, h])
            return
        going = np.arange(len(state))
        for h in range(horizon):
            for i in going.tolist():
                load(models[i], physics[i, h - 1] if h else start[i])
                advance(models[i], controls[i, h], physics[i, h], states[i, h])
            stopped = stop(states[going, h])
            states[going[stopped], h + 1 :] = states[going[stopped], h, None]
            going = going[~stopped]

    def close(self) -> None:
        """End the threads."""
        if self._pool:
            self._pool.shutdown()

"""One environment that runs on, a physics step at a time, under a controller of the caller's: what
a robot node needs."""

from collections.abc import Callable

import mujoco
import numpy as np

from sim.world import World


class LiveWorld:
    """A world with a present. Time goes on across resets, as it does on a robot.

    Attributes:
        time: seconds since the start.
        state: (state_size,) now.
        command: (A,) joint position commanded now.
        moving_joints: names of all joints with one degree of freedom, commanded or not (a JointState has them all).
    """

    def __init__(self, world: World, state: np.ndarray):
        self.world = world
        self.time = 0.0
        model = world.model
        self.moving_joints = [
            model.joint(i).name
            for i in range(model.njnt)
            if model.jnt_type[i] != mujoco.mjtJoint.mjJNT_FREE
        ]
        self._qpos = world.qpos_address(self.moving_joints)
        self._qvel = world.qvel_address(self.moving_joints)
        self._data = mujoco.MjData(model)
        self.reset(state)

    def reset(self, state: np.ndarray) -> None:
        """Begin again from a state, holding still."""
        mujoco.mj_resetData(self.world.model, self._data)
        self.world.write(state, self._data)
        self.state = state.copy()
        self.command = self.world.initial_command(state).copy()

    def advance(self, steps: int, reference: Callable[[float], np.ndarray]) -> None:
        """Physics steps under `reference(time)` -> (A,), each joint within its range and velocity limit."""
        world = self.world
        most = world.velocity_limit * world.physics_dt
        for _ in range(steps):
            self.time += world.physics_dt
            target = np.clip(reference(self.time), world.target_low, world.target_high)
            self.command += np.clip(target - self.command, -most, most)
            self._data.ctrl[:] = self.command
            mujoco.mj_step(world.model, self._data)
        world.read(self._data, self.state)

    @property
    def joint_state(self) -> tuple[np.ndarray, np.ndarray]:
        """Position and velocity of `moving_joints`."""
        return self.world.qpos(self.state)[self._qpos], self.world.qvel(self.state)[self._qvel]

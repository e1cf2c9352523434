"""A compiled MuJoCo model seen as a robot that follows joint-position targets at a control rate.

A `World` holds no state. A state is a row of numbers in MuJoCo's own layout (`mjSTATE_FULLPHYSICS`: time, qpos, qvel,
act), so N environments are one array (N, state_size) and a chunk of actions for all of them is one call of a backend.
"""

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import mujoco
import numpy as np

from sim.errors import SimulationError, unknown_name

STATE = mujoco.mjtState.mjSTATE_FULLPHYSICS


def asset(name: str) -> Path:
    """Path of a file in `sim/assets`."""
    return Path(str(resources.files("sim") / "assets" / name))


class World:
    """A model and its joint-position interface: one target per actuator and control step.

    Targets are held to the actuator's control range and approached in a straight line over the control step, never
    faster than the joint's velocity limit (first `user` value of the actuator, rad/s or m/s). That is what a joint
    trajectory controller does with a chunk of positions, so simulation and robot see the same motion.

    Raises:
        SimulationError: the control period is not a whole number of physics steps, or an actuator has no limits.
    """

    def __init__(self, spec: mujoco.MjSpec, control_dt: float):
        self.model = spec.compile()
        self.control_dt = control_dt
        self.physics_dt = float(self.model.opt.timestep)
        self.decimation = round(control_dt / self.physics_dt)
        if abs(self.decimation * self.physics_dt - control_dt) > 1e-9:
            raise SimulationError(
                f"control period {control_dt} s is not a whole number of physics steps of {self.physics_dt} s"
            )
        model = self.model
        self.state_size = mujoco.mj_stateSize(model, STATE)
        self.joint_names = tuple(model.actuator(i).name for i in range(model.nu))
        if model.nuser_actuator < 1 or not model.actuator_ctrllimited.all():
            raise SimulationError(
                "every actuator needs a control range and a velocity limit (user='...')"
            )
        self.target_low = model.actuator_ctrlrange[:, 0].copy()
        self.target_high = model.actuator_ctrlrange[:, 1].copy()
        self.velocity_limit = model.actuator_user[:, 0].copy()
        self.joint_qpos = self.qpos_address(self.joint_names)
        self.joint_qvel = self.qvel_address(self.joint_names)

    # --- where things are in a state row ---

    def qpos_address(self, joints: Sequence[str]) -> np.ndarray:
        """Index into qpos of each scalar joint."""
        return np.array([self._joint(name).qposadr[0] for name in joints])

    def qvel_address(self, joints: Sequence[str]) -> np.ndarray:
        """Index into qvel of each scalar joint."""
        return np.array([self._joint(name).dofadr[0] for name in joints])

    def pose_address(self, joint: str) -> slice:
        """Slice of qpos (x, y, z, qw, qx, qy, qz) of a free joint."""
        start = self._joint(joint).qposadr[0]
        return slice(start, start + 7)

    def _joint(self, name: str):
        joints = [self.model.joint(i).name for i in range(self.model.njnt)]
        if name not in joints:
            raise unknown_name("joint", name, joints)
        return self.model.joint(name)

    def qpos(self, state: np.ndarray) -> np.ndarray:
        """(..., state_size) -> (..., nq)."""
        return state[..., 1 : 1 + self.model.nq]

    def qvel(self, state: np.ndarray) -> np.ndarray:
        """(..., state_size) -> (..., nv)."""
        return state[..., 1 + self.model.nq : 1 + self.model.nq + self.model.nv]

    def make_state(self, qpos: np.ndarray, qvel: np.ndarray | None = None) -> np.ndarray:
        """A state row (state_size,) at time zero; qvel is zero unless given."""
        data = mujoco.MjData(self.model)
        data.qpos[:] = qpos
        if qvel is not None:
            data.qvel[:] = qvel
        state = np.empty(self.state_size)
        mujoco.mj_getState(self.model, data, state, STATE)
        return state

    @property
    def home_qpos(self) -> np.ndarray:
        """qpos (nq,) of the keyframe `home`."""
        return self.model.key("home").qpos.copy()

    # --- the joint-position interface ---

    def ramp(self, command: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Turn targets into controls for every physics step.

        Args:
            command: (N, A) last commanded position.
            targets: (N, H, A) position wanted at the end of each of H control steps.

        Returns:
            controls (N, H * decimation, A) and commands (N, H, A): the position really commanded at each step's end.
        """
        num_envs, horizon, num_joints = targets.shape
        most = self.velocity_limit * self.control_dt
        targets = np.clip(targets, self.target_low, self.target_high)
        commands = np.empty((num_envs, horizon + 1, num_joints))
        commands[:, 0] = command
        for h in range(horizon):
            commands[:, h + 1] = commands[:, h] + np.clip(
                targets[:, h] - commands[:, h], -most, most
            )
        share = np.arange(1, self.decimation + 1)[:, None] / self.decimation  # (decimation, 1)
        start, change = (
            commands[:, :-1, None],
            np.diff(commands, axis=1)[:, :, None],
        )  # (N, H, 1, A)
        controls = start + share * change  # (N, H, decimation, A)
        return controls.reshape(num_envs, horizon * self.decimation, num_joints), commands[:, 1:]


def attach_robot(scene: mujoco.MjSpec, robot: str, frame: str) -> mujoco.MjSpec:
    """Put a robot of `sim/assets` at a named frame of a scene. Its keyframe `home` comes along."""
    child = mujoco.MjSpec.from_file(str(asset(f"{robot}.xml")))
    scene.attach(child, frame=frame, prefix="")
    return scene

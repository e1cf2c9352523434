"""A compiled MuJoCo model seen as a robot that is commanded at a control rate.

A `World` holds no state. A state is a row of numbers: MuJoCo's own layout (`mjSTATE_FULLPHYSICS`: time, qpos, qvel,
act), then what a task asks for in addition. So N environments are one array (N, state_size), a chunk of actions for
all of them is one call of a backend, and that call is a pure function.
"""

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import mujoco
import numpy as np

from sim.arrays import constant, namespace
from sim.errors import SimulationError, unknown_name

STATE = mujoco.mjtState.mjSTATE_FULLPHYSICS
WARM_START = mujoco.mjtState.mjSTATE_WARMSTART
EQUALITIES = mujoco.mjtState.mjSTATE_EQ_ACTIVE
INTERFACES = ("joint_position", "control")


def asset(name: str) -> Path:
    """Path of a file in `sim/assets`."""
    return Path(str(resources.files("sim") / "assets" / name))


def load_spec(path: Path | str) -> mujoco.MjSpec:
    """Read an MJCF file.

    Raises:
        SimulationError: missing or malformed; the message names the file and what MuJoCo found wrong with it.
    """
    if not Path(path).is_file():
        raise SimulationError(f"model file '{path}' does not exist")
    try:
        return mujoco.MjSpec.from_file(str(path))
    except ValueError as error:
        raise SimulationError(f"model file '{path}': {one_line(error)}") from None


def one_line(error: Exception) -> str:
    """MuJoCo's messages have several lines."""
    return " ".join(str(error).split())


class World:
    """A model, what a state row holds, and how the robot is commanded.

    Two interfaces, one command per actuator and control step:

    - `joint_position`: a position target, held to the actuator's control range and approached in a straight line over
      the control step, never faster than the joint's velocity limit (first `user` value of the actuator, rad/s or m/s).
      That is what a joint trajectory controller does with a chunk of positions, so simulation and robot see the same
      motion.
    - `control`: the number goes to the actuator as it is (a torque, say) and is held for the control step. MuJoCo
      itself clamps it to the control range.

    Args:
        spec: the model.
        control_dt: control period, s.
        interface: one of `INTERFACES`.
        extra_state: more of MuJoCo's state to carry in a row: `WARM_START` makes chunk after chunk equal to one long
            simulation bit for bit; `EQUALITIES` lets a task switch equality constraints.
        outputs: names of MjData arrays (cfrc_ext, xpos, sensordata...) to append to every row, as they are after the
            control step. Like `mj_step` they describe the state before its last physics step.
        memory: numbers at the end of a row that physics leaves alone and a task with `feedback` writes.

    Raises:
        SimulationError: malformed model, the control period is not a whole number of physics steps, an actuator has no
            limits, or an unknown interface or output.
    """

    def __init__(
        self,
        spec: mujoco.MjSpec | mujoco.MjModel,
        control_dt: float,
        *,
        interface: str = "joint_position",
        extra_state: int = 0,
        outputs: Sequence[str] = (),
        memory: int = 0,
    ):
        if interface not in INTERFACES:
            raise unknown_name("interface", interface, INTERFACES)
        self.model = model = compile_model(spec)
        self.interface = interface
        self.control_dt = control_dt
        self.physics_dt = float(model.opt.timestep)
        self.decimation = round(control_dt / self.physics_dt)
        if abs(self.decimation * self.physics_dt - control_dt) > 1e-9:
            raise SimulationError(
                f"control period {control_dt} s is not a whole number of physics steps of {self.physics_dt} s"
            )
        self._scratch = mujoco.MjData(model)
        self._lay_out(extra_state, outputs)
        self._memory = slice(self.state_size, self.state_size + memory)
        self.state_size += memory
        self._blank = np.zeros(self.state_size)
        self.read(self._scratch, self._blank)
        self._name_joints()

    def _lay_out(self, extra_state: int, outputs: Sequence[str]) -> None:
        """Where things are in a state row."""
        model = self.model
        self.state_spec = int(STATE) | int(extra_state)
        self.physics_size = mujoco.mj_stateSize(model, self.state_spec)
        self.parts: dict[int, slice] = {}
        start = 0
        for bit in range(int(mujoco.mjtState.mjNSTATE)):
            if self.state_spec & (1 << bit):
                size = mujoco.mj_stateSize(model, 1 << bit)
                self.parts[1 << bit] = slice(start, start + size)
                start += size
        self.outputs: dict[str, tuple[slice, tuple[int, ...]]] = {}
        for name in outputs:
            values = getattr(self._scratch, name, None)
            if not isinstance(values, np.ndarray):
                raise SimulationError(f"MjData has no array '{name}' to put out")
            self.outputs[name] = (slice(start, start + values.size), values.shape)
            start += values.size
        self.state_size = start
        self.needs_contact_forces = bool({"cfrc_ext", "cfrc_int", "cacc"} & set(outputs))

    def _name_joints(self) -> None:
        """Joint names, limits and addresses of the actuators."""
        model = self.model
        names = [
            model.actuator(i).name or model.joint(model.actuator_trnid[i, 0]).name
            for i in range(model.nu)
        ]
        self.joint_names = tuple(names)
        self.target_low = model.actuator_ctrlrange[:, 0].copy()
        self.target_high = model.actuator_ctrlrange[:, 1].copy()
        self._require_each(model.actuator_ctrllimited, "no control range (ctrlrange='low high')")
        if self.interface == "control":
            self.velocity_limit = np.full(model.nu, np.inf)
            return
        limits = model.actuator_user[:, 0] if model.nuser_actuator else np.zeros(model.nu)
        self._require_each(limits > 0, "no velocity limit above 0 (user='rad/s')")
        self.velocity_limit = limits.copy()
        self.joint_qpos = self.qpos_address(self.joint_names)
        self.joint_qvel = self.qvel_address(self.joint_names)

    def _require_each(self, given: np.ndarray, lack: str) -> None:
        if not all(given):
            without = [name for name, ok in zip(self.joint_names, given, strict=True) if not ok]
            raise SimulationError(f"actuator {', '.join(without)} has {lack}")

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
        """(..., state_size) -> (..., nq), a view."""
        return state[..., 1 : 1 + self.model.nq]

    def qvel(self, state: np.ndarray) -> np.ndarray:
        """(..., state_size) -> (..., nv), a view."""
        return state[..., 1 + self.model.nq : 1 + self.model.nq + self.model.nv]

    def part(self, state: np.ndarray, flag: int) -> np.ndarray:
        """One component of MuJoCo's state (an `mjtState` flag such as `EQUALITIES`), a view."""
        return state[..., self.parts[int(flag)]]

    def output(self, state: np.ndarray, name: str) -> np.ndarray:
        """(..., state_size) -> (..., *shape of the MjData array)."""
        where, shape = self.outputs[name]
        return state[..., where].reshape(*state.shape[:-1], *shape)

    def memory(self, state: np.ndarray) -> np.ndarray:
        """(..., state_size) -> (..., memory), a view."""
        return state[..., self._memory]

    def make_state(self, qpos: np.ndarray, qvel: np.ndarray | None = None) -> np.ndarray:
        """A state row (state_size,) at time zero; qvel is zero unless given, and so is the task's memory."""
        state = self._blank.copy()
        self.qpos(state)[:] = qpos
        if qvel is not None:
            self.qvel(state)[:] = qvel
        if self.outputs:
            self.write(state, self._scratch)
            mujoco.mj_forward(self.model, self._scratch)
            self.read(self._scratch, state)
        return state

    def read(self, data: mujoco.MjData, state: np.ndarray) -> None:
        """Copy an MjData into a state row (state_size,)."""
        mujoco.mj_getState(self.model, data, state[: self.physics_size], self.state_spec)
        for name, (where, _) in self.outputs.items():
            state[where] = getattr(data, name).ravel()

    def write(self, state: np.ndarray, data: mujoco.MjData) -> None:
        """Put an MjData into the state of a row; nothing is computed from it yet."""
        mujoco.mj_setState(self.model, data, state[: self.physics_size], self.state_spec)

    @property
    def home_qpos(self) -> np.ndarray:
        """qpos (nq,) of the keyframe `home`."""
        return self.model.key("home").qpos.copy()

    # --- commands ---

    @property
    def steps_per_control(self) -> int:
        """Physics steps for which one row of controls is held."""
        return self.decimation if self.interface == "control" else 1

    def initial_command(self, state: np.ndarray) -> np.ndarray:
        """(..., state_size) -> (..., A), the command that was in force before the first one: stay, or no control."""
        if self.interface == "control":
            return np.zeros((*state.shape[:-1], self.model.nu))
        return self.qpos(state)[..., self.joint_qpos]

    def controls(self, command: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Turn a chunk of commands into actuator controls.

        Args:
            command: (N, A) last one in force.
            targets: (N, H, A) wanted.

        Returns:
            controls (N, H * decimation / steps_per_control, A) and commands (N, H, A) really in force at each step's
            end.
        """
        if self.interface == "control":
            return targets, targets
        return self.ramp(command, targets)

    def ramp(self, command: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Turn position targets into controls for every physics step.

        Args:
            command: (N, A) last commanded position.
            targets: (N, H, A) position wanted at the end of each of H control steps.

        Returns:
            controls (N, H * decimation, A) and commands (N, H, A): the position really commanded at each step's end.
        """
        num_envs, horizon, num_joints = targets.shape
        xp = namespace(targets)
        low, high, most = (
            constant(targets, values)
            for values in (self.target_low, self.target_high, self.velocity_limit * self.control_dt)
        )
        targets = xp.clip(targets, low, high)
        ends = [command]
        for h in range(horizon):
            ends.append(ends[-1] + xp.clip(targets[:, h] - ends[-1], -most, most))
        commands = xp.stack(ends, axis=1)  # (N, 1 + H, A)
        share = constant(targets, np.arange(1, self.decimation + 1)[:, None] / self.decimation)
        start, change = commands[:, :-1, None], xp.diff(commands, axis=1)[:, :, None]
        controls = start + share * change  # (N, H, decimation, A)
        return controls.reshape(num_envs, horizon * self.decimation, num_joints), commands[:, 1:]


def compile_model(spec: mujoco.MjSpec | mujoco.MjModel) -> mujoco.MjModel:
    """Compile, with MuJoCo's complaint in one line.

    Raises:
        SimulationError: MuJoCo refuses the model.
    """
    if isinstance(spec, mujoco.MjModel):
        return spec
    try:
        return spec.compile()
    except ValueError as error:
        raise SimulationError(f"model '{spec.modelname}': {one_line(error)}") from None

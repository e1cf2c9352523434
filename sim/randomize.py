"""Domain randomisation: worlds, senses and links that differ from the nominal model, drawn anew for every episode.

What is drawn depends on the episode's generator alone, after its start state: an episode starts the same with and
without randomisation, and its draw can be looked up again (`Randomizer.for_seed`). Tobin et al., arXiv 1703.06907;
Peng et al., arXiv 1710.06537.
"""

import copy
import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import mujoco
import numpy as np

from sim.errors import SimulationError, unknown_name
from sim.vec_env import Observation, VecEnv

Range = tuple[float, float]
Draw = dict[str, float | np.ndarray]
ONE, ZERO = (1.0, 1.0), (0.0, 0.0)
LENGTHS = ("geom_size", "geom_pos", "geom_rbound", "geom_aabb", "body_ipos")
# A geom's rgba in MuJoCo unless something else is said: its material's color is seen.
UNPAINTED = (0.5, 0.5, 0.5, 1.0)
VELOCITY_NOISE = 10.0  # rad/s of noise in a velocity for each rad of noise in a position


@dataclass(frozen=True)
class Randomization:
    """Ranges; every episode draws uniformly from each. The default changes nothing.

    Attributes:
        mass: factor, per body (inertia with it).
        friction, damping, gain: factors, of all contacts, per joint, per actuator.
        object_size: factor, per free body (mass with its cube). What hangs on it by joints stays: the nut of a part to
            be assembled has to be where scripts and scoring expect it.
        joint_offset: rad, zero error of each commanded joint's encoder: measured minus true.
        camera_shift, camera_turn: m along and rad about each axis.
        light: factor of all lights. color: added to each red, green and blue (0 to 1).
        observation_noise: standard deviation in rad and m (poses: also rad about each axis; velocities: 10 times
            that per second; images: of the full scale).
        observation_delay, action_latency: s, rounded to physics steps.
        packet_loss: probability that an action is lost; the one before stays in force.
        rate_jitter: fraction of the control period by which each action comes late, at most.
    """

    mass: Range = ONE
    friction: Range = ONE
    damping: Range = ONE
    gain: Range = ONE
    object_size: Range = ONE
    joint_offset: Range = ZERO
    camera_shift: Range = ZERO
    camera_turn: Range = ZERO
    light: Range = ONE
    color: Range = ZERO
    observation_noise: Range = ZERO
    observation_delay: Range = ZERO
    action_latency: Range = ZERO
    packet_loss: Range = ZERO
    rate_jitter: Range = ZERO

    def __post_init__(self):
        for field in dataclasses.fields(self):
            low, high = getattr(self, field.name)
            least = -np.inf if field.name in SIGNED else 0.0
            if not least <= low <= high < np.inf:
                raise SimulationError(
                    f"randomisation '{field.name}': need {least} <= low <= high, not ({low}, {high})"
                )
            if field.default == ONE and low == 0:
                raise SimulationError(f"randomisation '{field.name}': a factor must be above 0")
        if self.packet_loss[1] > 1 or self.rate_jitter[1] > 1:
            raise SimulationError("randomisation: packet_loss and rate_jitter must be at most 1")


SIGNED = ("joint_offset", "camera_shift", "camera_turn", "color")


def mild(task) -> Randomization:
    """What a well calibrated robot differs by."""
    step = task.control_dt
    return Randomization(
        mass=(0.9, 1.1),
        friction=(0.8, 1.2),
        damping=(0.8, 1.25),
        gain=(0.95, 1.05),
        object_size=(0.99, 1.01),
        joint_offset=(-0.003, 0.003),
        camera_shift=(-0.005, 0.005),
        camera_turn=(-0.01, 0.01),
        light=(0.8, 1.2),
        color=(-0.03, 0.03),
        observation_noise=(0.0, 0.002),
        action_latency=(0.0, 0.3 * step),
        packet_loss=(0.0, 0.02),
        rate_jitter=(0.0, 0.1),
    )


def hard(task) -> Randomization:
    """What a neglected robot may differ by."""
    step = task.control_dt
    return Randomization(
        mass=(0.7, 1.4),
        friction=(0.5, 1.5),
        damping=(0.5, 2.0),
        gain=(0.8, 1.2),
        object_size=(0.97, 1.03),
        joint_offset=(-0.01, 0.01),
        camera_shift=(-0.02, 0.02),
        camera_turn=(-0.04, 0.04),
        light=(0.5, 1.5),
        color=(-0.1, 0.1),
        observation_noise=(0.002, 0.008),
        observation_delay=(0.0, step),
        action_latency=(0.2 * step, step),
        packet_loss=(0.0, 0.1),
        rate_jitter=(0.0, 0.3),
    )


PresetName = Literal["nominal", "mild", "hard"]
PRESETS: dict[str, Callable[..., Randomization]] = {
    "nominal": lambda task: Randomization(),
    "mild": mild,
    "hard": hard,
}


def preset(name: str, task) -> Randomization:
    """Named settings for a task.

    Raises:
        SimulationError: unknown name; the message lists the valid ones.
    """
    if name not in PRESETS:
        raise unknown_name("randomisation", name, PRESETS)
    return PRESETS[name](task)


class Randomizer:
    """Draws for one task, and puts draws into models. `sim_node` uses it with one model, `RandomizedVecEnv` with N."""

    def __init__(self, task, config: Randomization):
        self.task, self.config = task, config
        self.nominal: mujoco.MjModel = copy.copy(task.world.model)
        self._scratch = mujoco.MjData(self.nominal)
        model = self.nominal
        self.free_bodies = [
            int(model.jnt_bodyid[j])
            for j in range(model.njnt)
            if model.jnt_type[j] == mujoco.mjtJoint.mjJNT_FREE
        ]

    def draw(self, rng: np.random.Generator) -> Draw:
        """Values for one episode: numbers, or arrays where each body, joint, actuator, camera has its own."""
        model, joints = self.nominal, len(self.task.world.joint_names)
        shapes = {
            "mass": model.nbody,
            "damping": model.nv,
            "gain": model.nu,
            "object_size": len(self.free_bodies),
            "joint_offset": joints,
            "camera_shift": (model.ncam, 3),
            "camera_turn": (model.ncam, 3),
            "color": (model.ngeom, 3),
        }
        return {
            field.name: rng.uniform(*getattr(self.config, field.name), shapes.get(field.name))
            for field in dataclasses.fields(self.config)
        }

    def for_seed(self, seed: int) -> Draw:
        """What the episode of a seed draws (`VecEnv.reset([seed])`, `sim_node`)."""
        rng = np.random.default_rng(seed)
        self.task.initial_state(rng)
        return self.draw(rng)

    def apply(self, model: mujoco.MjModel, draw: Draw) -> None:
        """Make a copy of the nominal model what was drawn. Nothing is left of an earlier draw."""
        nominal = self.nominal
        model.body_mass[:] = nominal.body_mass * draw["mass"]
        model.body_inertia[:] = nominal.body_inertia * np.asarray(draw["mass"])[:, None]
        model.geom_friction[:] = nominal.geom_friction * draw["friction"]
        model.dof_damping[:] = nominal.dof_damping * draw["damping"]
        gain = np.asarray(draw["gain"])[:, None]
        model.actuator_gainprm[:] = nominal.actuator_gainprm * gain
        model.actuator_biasprm[:] = nominal.actuator_biasprm * gain
        for name in LENGTHS:
            getattr(model, name)[:] = getattr(nominal, name)
        for body, size in zip(self.free_bodies, draw["object_size"], strict=True):
            geoms = nominal.geom_bodyid == body
            for name in LENGTHS:
                getattr(model, name)[body if name == "body_ipos" else geoms] *= size
            model.body_mass[body] *= size**3
            model.body_inertia[body] *= size**5
        model.cam_pos[:] = nominal.cam_pos + draw["camera_shift"]
        for i, turn in enumerate(draw["camera_turn"]):
            model.cam_quat[i] = turned(nominal.cam_quat[i], turn)
        for kind in ("ambient", "diffuse", "specular"):
            lamps = getattr(nominal, f"light_{kind}")
            getattr(model, f"light_{kind}")[:] = lamps * draw["light"]
            head = getattr(nominal.vis.headlight, kind)
            getattr(model.vis.headlight, kind)[:] = head * draw["light"]
        self._paint(model, draw["color"])
        mujoco.mj_setConst(model, self._scratch)

    def _paint(self, model: mujoco.MjModel, color: np.ndarray) -> None:
        """A geom has a color of its own, or that of its material, which takes what its first geom drew."""
        nominal = self.nominal
        own = (nominal.geom_matid < 0) | (nominal.geom_rgba != UNPAINTED).any(axis=1)
        painted = np.clip(nominal.geom_rgba[:, :3] + color, 0.0, 1.0)
        model.geom_rgba[:, :3] = np.where(own[:, None], painted, nominal.geom_rgba[:, :3])
        materials, first = np.unique(np.where(own, -1, nominal.geom_matid), return_index=True)
        model.mat_rgba[:] = nominal.mat_rgba
        for material, geom in zip(materials, first, strict=True):
            if material >= 0:
                shade = nominal.mat_rgba[material, :3] + color[geom]
                model.mat_rgba[material, :3] = np.clip(shade, 0.0, 1.0)

    def sense(self, obs: Observation, draw: Draw, rng: np.random.Generator) -> Observation:
        """One environment's observation fields (size,) as its sensors give them."""
        noise = float(draw["observation_noise"])
        offset = dict(zip(self.task.world.joint_names, draw["joint_offset"], strict=True))
        seen = {}
        for f in self.task.obs_fields:
            value = obs[f.name]
            if f.kind == "image":
                grey = noise * 255 * rng.standard_normal(value.shape)
                seen[f.name] = np.clip(value + np.round(grey), 0, 255).astype(np.uint8)
                continue
            spread = noise * (VELOCITY_NOISE if f.kind == "joint_velocity" else 1.0)
            if f.kind == "pose":
                x, y, z, *quat, w = value
                position = np.array([x, y, z]) + spread * rng.standard_normal(3)
                w, *quat = turned(np.array([w, *quat]), spread * rng.standard_normal(3))
                sign = -1.0 if w < 0 else 1.0
                seen[f.name] = np.concatenate([position, sign * np.array([*quat, w])])
                continue
            seen[f.name] = value + spread * rng.standard_normal(value.shape)
            if f.kind == "joint_position":
                seen[f.name] += [offset.get(name, 0.0) for name in f.elements]
        return seen


def turned(quat: np.ndarray, rotation: np.ndarray) -> np.ndarray:
    """A unit quaternion (w, x, y, z) turned by a rotation vector (3,) in its own frame."""
    angle = float(np.linalg.norm(rotation))
    if angle == 0:
        return quat
    step, out = np.empty(4), np.empty(4)
    mujoco.mju_axisAngle2Quat(step, rotation / angle, angle)
    mujoco.mju_mulQuat(out, quat, step)
    return out


class RandomizedVecEnv(VecEnv):
    """A `VecEnv` whose environments differ, each episode anew.

    Args:
        randomization: ranges. Everything else as for `VecEnv`.
    """

    def __init__(self, task, num_envs: int, *, randomization: Randomization, **options):
        super().__init__(task, num_envs, **options)
        self.randomizer = Randomizer(task, randomization)
        self.models = [copy.copy(task.world.model) for _ in range(num_envs)]
        self._rngs = [np.random.default_rng(0)] * num_envs
        world = task.world
        is_late = randomization.action_latency[1] > 0 or randomization.rate_jitter[1] > 0
        # A control that is held for a control step can change within it when actions come late.
        self._rows = world.steps_per_control if is_late else 1
        self._row_dt = world.physics_dt * world.steps_per_control / self._rows
        jitter = randomization.rate_jitter[1] * world.control_dt
        most_late = int(np.ceil((randomization.action_latency[1] + jitter) / self._row_dt)) + 1
        self._late = np.zeros((num_envs, most_late, len(world.joint_names)))  # controls under way
        self._target = np.zeros_like(self.command)  # the last action that arrived
        # States at the latest physics steps, now the last of them, where observations come late; since then.
        most_delay = round(randomization.observation_delay[1] / world.physics_dt)
        self._past = np.zeros((num_envs, most_delay and most_delay + 1, world.state_size))
        self._since: list[np.ndarray] = []

    def _start(
        self, envs: np.ndarray, rngs: Sequence[np.random.Generator] | None = None
    ) -> Sequence[np.random.Generator]:
        rngs = super()._start(envs, rngs)
        for i, rng in zip(envs, rngs, strict=True):
            self.draws[i] = self.randomizer.draw(rng)
            self.randomizer.apply(self.models[i], self.draws[i])
            self._rngs[i] = rng
            self._late[i] = self.command[i] - self._offset(i)
            self._target[i] = self.command[i]
            self._past[i] = self.state[i]
        return rngs

    def snapshot(self) -> dict[str, np.ndarray]:
        """Also what the running episodes drew and will draw, and what is under way."""
        generators = json.dumps([rng.bit_generator.state for rng in self._rngs]).encode()
        return super().snapshot() | {
            "late": self._late.copy(),
            "target": self._target.copy(),
            "past": self._past.copy(),
            "generators": np.frombuffer(generators, np.uint8),
            **{f"draw.{name}": np.stack([d[name] for d in self.draws]) for name in self.draws[0]},
        }

    def restore(self, snapshot: dict[str, np.ndarray]) -> None:
        """Go on from a snapshot of as many environments of the same task under the same randomisation."""
        super().restore(snapshot)
        self._late[:], self._past[:] = snapshot["late"], snapshot["past"]
        self._target[:] = snapshot["target"]
        states = json.loads(snapshot["generators"].tobytes())
        names = [name.removeprefix("draw.") for name in snapshot if name.startswith("draw.")]
        for i, state in enumerate(states):
            self._rngs[i] = np.random.default_rng(0)
            self._rngs[i].bit_generator.state = state
            self.draws[i] = {name: snapshot[f"draw.{name}"][i] for name in names}
            self.randomizer.apply(self.models[i], self.draws[i])

    def _offset(self, i: int) -> np.ndarray | float:
        """The arm goes where its encoders say the target is."""
        return self.draws[i]["joint_offset"] if self.world.interface == "joint_position" else 0.0

    def _observe(self, state: np.ndarray, envs: np.ndarray) -> Observation:
        obs = super()._observe(state, envs)
        seen = [
            self.randomizer.sense(
                {name: v[k] for name, v in obs.items()}, self.draws[i], self._rngs[i]
            )
            for k, i in enumerate(envs)
        ]
        return {name: np.stack([one[name] for one in seen]) for name in obs}

    def _simulate(self, state: np.ndarray, controls: np.ndarray, states: np.ndarray) -> None:
        """Where observations come late, every physics step is kept. Between two control steps a task's memory is as it
        was before, and nobody is asked who has fallen."""
        count = self._past.shape[1]
        if not count:
            super()._simulate(state, controls, states)
            return
        world = self.world
        steps = states.shape[1] * world.decimation
        every = np.empty((self.num_envs, steps, world.state_size))
        controls = np.repeat(controls, steps // controls.shape[1], axis=1)
        self._compute(state, controls, every, None, steps_per_row=1)
        world.memory(every)[:] = world.memory(state)[:, None]
        states[:] = every[:, world.decimation - 1 :: world.decimation]
        self._since.append(every)

    def _run(
        self, trail: np.ndarray, command: np.ndarray, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        commands, diverged = super()._run(trail, command, actions)
        if self._since:
            env, step = np.nonzero(diverged)
            every = self._since[-1].reshape(*actions.shape[:2], -1, self.world.state_size)
            every[env, step] = trail[env, :1]
        return commands, diverged

    def _seen(self, trail: np.ndarray, last: np.ndarray) -> np.ndarray:
        count, steps = self._past.shape[1], self.world.decimation
        if not count:
            return super()._seen(trail, last)
        chain = np.concatenate([self._past, *self._since], axis=1)
        chain[:, count + steps - 1 :: steps] = trail[
            :, 1:
        ]  # what a task does after a control step is in these
        self._since.clear()
        now = count - 1 + steps * (1 + last)  # of the chain
        delay = np.array([d["observation_delay"] for d in self.draws]) / self.world.physics_dt
        rows, back = np.arange(self.num_envs), np.arange(count - 1, -1, -1)
        self._past = chain[rows[:, None], now[:, None] - back]
        return chain[rows, now - np.round(delay).astype(int)]

    def _controls(self, command: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Lose some actions, then send controls that come late."""
        horizon = actions.shape[1]
        received = actions.copy()
        lag = np.empty((self.num_envs, horizon))
        for i, (draw, rng) in enumerate(zip(self.draws, self._rngs, strict=True)):
            lost = rng.random(horizon) < draw["packet_loss"]
            lag[i] = draw["action_latency"]
            lag[i] += draw["rate_jitter"] * self.world.control_dt * rng.random(horizon)
            for h in np.flatnonzero(lost):
                received[i, h] = received[i, h - 1] if h else self._target[i]
        self._target = received[:, -1].copy()
        controls, commands = self.world.controls(command, received)
        controls = np.repeat(controls, self._rows, axis=1)
        offset = np.stack(
            [np.broadcast_to(self._offset(i), command.shape[1]) for i in range(self.num_envs)]
        )
        sent = np.concatenate([self._late, controls - offset[:, None]], axis=1)
        late, rows = self._late.shape[1], controls.shape[1]
        # Row t of what is executed was sent `lag` earlier.
        lag = np.repeat(np.round(lag / self._row_dt).astype(int), rows // horizon, axis=1)
        executed = sent[np.arange(self.num_envs)[:, None], late + np.arange(rows) - lag]
        self._late = sent[:, -late:]
        return executed, commands


def make_env(task, num_envs: int, randomize: PresetName = "nominal", **options) -> VecEnv:
    """Environments under a preset; nominal ones share one model.

    Raises:
        SimulationError: unknown preset.
    """
    randomization = preset(randomize, task)
    if randomization == Randomization():
        return VecEnv(task, num_envs, **options)
    return RandomizedVecEnv(task, num_envs, randomization=randomization, **options)

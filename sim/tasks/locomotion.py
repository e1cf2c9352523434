"""Gymnasium's MuJoCo locomotion tasks, version 5, batched: Hopper, Walker2d, HalfCheetah, Ant, Humanoid.

Models, start states, observations, rewards and ends of episodes are those of `gymnasium.envs.mujoco` (1.x), to
rounding: the tests step both side by side. The models are read from the installed gymnasium. Gymnasium reads body
positions and contact forces as `mj_step` leaves them, one physics step behind the state; so do these.

The observation is split into named fields; put together in order they are Gymnasium's vector. An action goes to the
actuators as it is (torque over gear), between -1 and 1 (Humanoid: -0.4 and 0.4).
"""

from importlib.util import find_spec
from pathlib import Path

import mujoco
import numpy as np

from sim.arrays import constant, namespace
from sim.errors import SimulationError
from sim.tasks.base import Task
from sim.tasks.layout import ObsField, camera_field
from sim.tasks.names import body_names, scalar_names
from sim.world import WARM_START, World, load_spec

FORCE_LIMIT = 1.0  # Ant clips contact forces to this, N and N m


def gymnasium_asset(name: str) -> Path:
    """Path of an MJCF file in the installed gymnasium, which need not be imported.

    Raises:
        SimulationError: gymnasium is not installed.
    """
    package = find_spec("gymnasium")
    if package is None:
        raise SimulationError(
            "locomotion tasks take their models from gymnasium: pip install gymnasium"
        )
    return Path(package.submodule_search_locations[0]) / "envs" / "mujoco" / "assets" / name


class Locomotion(Task):
    """What the five share. Subclasses set the constants and say what is healthy.

    Args:
        cameras: the policy also sees the scene through the camera `track`.

    Attributes:
        model_file: MJCF file in gymnasium.
        gymnasium_id: the environment it equals.
        hidden: leading coordinates of qpos that the policy does not see.
        frame_skip: physics steps per control step.
        forward_weight, control_weight, contact_weight, healthy_reward: of the reward terms.
        reset_noise: spread of start positions (uniform) and velocities (uniform, or normal where `normal_velocity`).
        velocity_clip: of observed velocities.
    """

    model_file: str
    gymnasium_id: str
    outputs: tuple[str, ...] = ()
    hidden = 1
    frame_skip: int
    forward_weight = 1.0
    control_weight: float
    contact_weight = 0.0
    healthy_reward = 1.0
    reset_noise: float
    normal_velocity = False
    velocity_clip = np.inf
    episode_steps = 1000
    cameras = ("track",)

    def __init__(self, cameras: bool = False):
        spec = load_spec(gymnasium_asset(self.model_file))
        spec.visual.quality.shadowsize = spec.visual.quality.offsamples = 0
        self.robot = self.name
        self.control_dt = spec.option.timestep * self.frame_skip
        self.world = World(
            spec,
            self.control_dt,
            interface="control",
            extra_state=WARM_START,
            outputs=self.outputs,
        )
        self._dt = self.world.physics_dt * self.frame_skip
        start = mujoco.MjData(self.world.model)
        self._start = start.qpos.copy()
        coordinates, velocities = scalar_names(self.world.model)
        self.obs_fields = (
            ObsField("qpos", "state", coordinates[self.hidden :], "m, rad"),
            ObsField("qvel", "state", velocities, "m/s, rad/s"),
            *self._more_fields(),
            *([camera_field("track")] if cameras else []),
        )

    def _more_fields(self) -> tuple[ObsField, ...]:
        return ()

    def initial_state(self, rng: np.random.Generator) -> np.ndarray:
        """A start state (state_size,): the one Gymnasium's `reset(seed)` gives for the same generator."""
        model, noise = self.world.model, self.reset_noise
        qpos = self._start + rng.uniform(-noise, noise, model.nq)
        if self.normal_velocity:
            return self.world.make_state(qpos, noise * rng.standard_normal(model.nv))
        return self.world.make_state(qpos, rng.uniform(-noise, noise, model.nv))

    def observe(self, state: np.ndarray) -> dict[str, np.ndarray]:
        """Observation fields (..., size) of states (..., state_size)."""
        qvel = self.world.qvel(state)
        if np.isfinite(self.velocity_clip):
            qvel = namespace(qvel).clip(qvel, -self.velocity_clip, self.velocity_clip)
        return {"qpos": self.world.qpos(state)[..., self.hidden :], "qvel": qvel}

    def is_failure(self, state: np.ndarray) -> np.ndarray:
        """Whether it has fallen, (...,) bool."""
        return ~self.is_healthy(state)

    def is_healthy(self, state: np.ndarray) -> np.ndarray:
        """Whether it stands, (...,) bool."""
        return namespace(state).ones_like(state[..., 0], dtype=bool)

    def position(self, state: np.ndarray) -> np.ndarray:
        """How far it has come, (...,) m along x."""
        return self.world.qpos(state)[..., 0]

    def reward_terms(
        self, before: np.ndarray, action: np.ndarray, after: np.ndarray, succeeded: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Forward speed, being healthy, and the cost of control and contact, (...,) each."""
        speed = (self.position(after) - self.position(before)) / self._dt
        terms = {
            "forward": self.forward_weight * speed,
            "control": -self.control_weight * (action * action).sum(axis=-1),
        }
        if self.healthy_reward:
            terms["healthy"] = self.healthy_reward * self.is_healthy(after)
        if self.contact_weight:
            terms["contact"] = -self.contact_cost(after)
        return terms

    def contact_cost(self, state: np.ndarray) -> np.ndarray:
        """(...,), positive."""
        raise NotImplementedError


class Hopper(Locomotion):
    """One leg, three joints; ends when it falls."""

    name, gymnasium_id, model_file = "hopper", "Hopper-v5", "hopper.xml"
    frame_skip, control_weight, reset_noise, velocity_clip = 4, 1e-3, 5e-3, 10.0

    def is_healthy(self, state: np.ndarray) -> np.ndarray:
        """Height above 0.7 m, lean below 0.2 rad, everything else below 100."""
        qpos, qvel = self.world.qpos(state), self.world.qvel(state)
        return (
            (abs(qpos[..., 2:]) < 100).all(axis=-1)
            & (abs(qvel) < 100).all(axis=-1)
            & (qpos[..., 1] > 0.7)
            & (abs(qpos[..., 2]) < 0.2)
        )


class Walker2d(Locomotion):
    """Two legs, six joints; ends when it falls."""

    name, gymnasium_id, model_file = "walker2d", "Walker2d-v5", "walker2d_v5.xml"
    frame_skip, control_weight, reset_noise, velocity_clip = 4, 1e-3, 5e-3, 10.0

    def is_healthy(self, state: np.ndarray) -> np.ndarray:
        """Height between 0.8 and 2 m, lean below 1 rad."""
        z, angle = self.world.qpos(state)[..., 1], self.world.qpos(state)[..., 2]
        return (z > 0.8) & (z < 2.0) & (abs(angle) < 1.0)


class HalfCheetah(Locomotion):
    """Two legs, six joints; cannot fall, runs to the time limit."""

    name, gymnasium_id, model_file = "halfcheetah", "HalfCheetah-v5", "half_cheetah.xml"
    frame_skip, control_weight, reset_noise, normal_velocity = 5, 0.1, 0.1, True
    healthy_reward = 0.0

    is_failure = Task.is_failure  # never


class Ant(Locomotion):
    """Four legs, eight joints, in three dimensions; sees contact forces; ends when it flies or falls."""

    name, gymnasium_id, model_file = "ant", "Ant-v5", "ant.xml"
    frame_skip, control_weight, reset_noise, normal_velocity = 5, 0.5, 0.1, True
    hidden, contact_weight = 2, 5e-4
    outputs = ("xpos", "cfrc_ext")

    def _more_fields(self) -> tuple[ObsField, ...]:
        return (ObsField("cfrc_ext", "state", body_names(self.world.model, 6), "N m, N"),)

    def is_healthy(self, state: np.ndarray) -> np.ndarray:
        """Height between 0.2 and 1 m."""
        z = self.world.qpos(state)[..., 2]
        return (z >= 0.2) & (z <= 1.0)

    def position(self, state: np.ndarray) -> np.ndarray:
        """Of the torso, (...,) m."""
        return self.world.output(state, "xpos")[..., 1, 0]

    def observe(self, state: np.ndarray) -> dict[str, np.ndarray]:
        """Observation fields (..., size) of states (..., state_size)."""
        return super().observe(state) | {"cfrc_ext": self._forces(state)[..., 6:]}

    def contact_cost(self, state: np.ndarray) -> np.ndarray:
        """Clipped forces squared, (...,)."""
        return self.contact_weight * (self._forces(state) ** 2).sum(axis=-1)

    def _forces(self, state: np.ndarray) -> np.ndarray:
        where, _ = self.world.outputs["cfrc_ext"]
        return namespace(state).clip(state[..., where], -FORCE_LIMIT, FORCE_LIMIT)


class Humanoid(Locomotion):
    """Two legs, two arms, seventeen joints; sees inertias, body velocities and forces; ends when it falls."""

    name, gymnasium_id, model_file = "humanoid", "Humanoid-v5", "humanoid.xml"
    frame_skip, control_weight, reset_noise = 5, 0.1, 1e-2
    hidden, contact_weight, forward_weight, healthy_reward = 2, 5e-7, 1.25, 5.0
    outputs = ("cinert", "cvel", "qfrc_actuator", "cfrc_ext", "xipos")
    contact_limit = 10.0

    def __init__(self, cameras: bool = False):
        super().__init__(cameras)
        mass = self.world.model.body_mass
        self._mass_share = mass / mass.sum()

    def _more_fields(self) -> tuple[ObsField, ...]:
        model = self.world.model
        _, velocities = scalar_names(model)
        return (
            ObsField("cinert", "state", body_names(model, 10), "kg m2, kg m, kg"),
            ObsField("cvel", "state", body_names(model, 6), "rad/s, m/s"),
            ObsField("qfrc_actuator", "state", velocities[6:], "N m"),
            ObsField("cfrc_ext", "state", body_names(model, 6), "N m, N"),
        )

    def is_healthy(self, state: np.ndarray) -> np.ndarray:
        """Height between 1 and 2 m."""
        z = self.world.qpos(state)[..., 2]
        return (z > 1.0) & (z < 2.0)

    def position(self, state: np.ndarray) -> np.ndarray:
        """Of the centre of mass, (...,) m."""
        return self.world.output(state, "xipos")[..., 0] @ constant(state, self._mass_share)

    def observe(self, state: np.ndarray) -> dict[str, np.ndarray]:
        """Observation fields (..., size) of states (..., state_size). The world's body is left out."""
        obs = super().observe(state)
        for name, skipped in (("cinert", 10), ("cvel", 6), ("qfrc_actuator", 6), ("cfrc_ext", 6)):
            where, _ = self.world.outputs[name]
            obs[name] = state[..., where.start + skipped : where.stop]
        return obs

    def contact_cost(self, state: np.ndarray) -> np.ndarray:
        """Forces squared, limited, (...,)."""
        where, _ = self.world.outputs["cfrc_ext"]
        cost = self.contact_weight * (state[..., where] ** 2).sum(axis=-1)
        return namespace(cost).clip(cost, None, self.contact_limit)


LOCOMOTION = {task.name: task for task in (Hopper, Walker2d, HalfCheetah, Ant, Humanoid)}

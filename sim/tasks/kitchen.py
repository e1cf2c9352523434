"""Franka Kitchen (Gupta et al., arXiv 1910.11956): open, switch and move things in a kitchen, several in an episode.

Model, controller, sensor noise, rewards and ends are those of gymnasium-robotics' `FrankaKitchen-v1`; the tests step
both side by side. The model is read from the installed package. An action is a joint velocity between -1 and 1 (times
2 rad/s or m/s); the controller adds it to the last reading of the joints, which is noisy, so each control step depends
on what the one before measured. Noise is a function of the episode and the step alone.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from sim.arrays import namespace
from sim.errors import SimulationError, unknown_name
from sim.tasks.base import Task
from sim.tasks.layout import ObsField, camera_field
from sim.tasks.names import scalar_names
from sim.world import WARM_START, World, compile_model, load_spec

# What to do: where its coordinates are in qpos, and where they should be.
GOALS: dict[str, tuple[slice, tuple[float, ...]]] = {
    "bottom burner": (slice(11, 13), (-0.88, -0.01)),
    "top burner": (slice(15, 17), (-0.92, -0.01)),
    "light switch": (slice(17, 19), (-0.69, -0.05)),
    "slide cabinet": (slice(19, 20), (0.37,)),
    "hinge cabinet": (slice(20, 22), (0.0, 1.45)),
    "microwave": (slice(22, 23), (-0.75,)),
    "kettle": (slice(23, 30), (-0.23, 0.75, 1.62, 0.99, 0.0, 0.0, -0.06)),
}
CLOSE = 0.3  # distance in qpos at which a thing counts as done
ARM = 9  # joints, two of them fingers
START = (
    1.48388023e-01, -1.76848573e00, 1.84390296e00, -2.47685760e00, 2.60252026e-01, 7.12533105e-01,
    1.59515394e00, 4.79267505e-02, 3.71350919e-02, -2.66279850e-04, -5.18043486e-05, 3.12877220e-05,
    -4.51199853e-05, -3.90842156e-06, -4.22629655e-05, 6.28065475e-05, 4.04984708e-05, 4.62730939e-04,
    -2.26906415e-04, -4.65501369e-04, -6.44129196e-03, -1.77048263e-03, 1.08009684e-03, -2.69397440e-01,
    3.50383255e-01, 1.61944683e00, 1.00618764e00, 4.06395120e-03, -6.62095997e-03, -2.68278933e-04,
)  # fmt: skip
ROBOT_NOISE, OBJECT_NOISE = 0.01, 0.0005
SPEED = 2.0  # rad/s (m/s for fingers) of an action of 1


def kitchen_assets() -> Path:
    """The folder of the installed gymnasium-robotics, which need not be imported.

    Raises:
        SimulationError: it is not installed.
    """
    package = find_spec("gymnasium_robotics")
    if package is None:
        raise SimulationError(
            "task 'kitchen' takes its model from gymnasium-robotics: "
            "pip install --no-deps gymnasium-robotics==1.4.2"
        )
    return Path(package.submodule_search_locations[0]) / "envs" / "assets" / "kitchen_franka"


class Kitchen(Task):
    """A Franka arm in a kitchen. Success: all goals have been met in the episode.

    Args:
        goals: keys of `GOALS`, or one text with commas between them; the default is D4RL's `kitchen-complete`.
        cameras: the policy also sees the scene through the camera `front`.

    Raises:
        SimulationError: unknown goal, or gymnasium-robotics is not installed.
    """

    name = "kitchen"
    robot = "kitchen_franka"
    gymnasium_id = "gymnasium_robotics:FrankaKitchen-v1"
    control_dt = 0.08
    episode_steps = 280
    success_hold_steps = 1
    cameras = ("front",)
    feedback = True

    def __init__(
        self,
        goals: Sequence[str] = ("microwave", "kettle", "light switch", "slide cabinet"),
        cameras: bool = False,
    ):
        goals = (
            tuple(g.strip() for g in goals.split(",")) if isinstance(goals, str) else tuple(goals)
        )
        for goal in goals:
            if goal not in GOALS:
                raise unknown_name("kitchen goal", goal, GOALS)
        self.goals = goals
        spec = load_spec(kitchen_assets() / "kitchen_assets" / "kitchen_env_model.xml")
        spec.visual.quality.shadowsize = spec.visual.quality.offsamples = 0
        spec.worldbody.add_camera(
            name="front", pos=[-0.8, -1.2, 3.2], xyaxes=[0.94, -0.33, 0, 0.19, 0.55, 0.81]
        )
        model = compile_model(spec)
        self._read_limits(kitchen_assets() / "franka_assets" / "franka_config.xml", model.nv)
        num_readings = len(self._noise)
        self.world = World(
            model,
            self.control_dt,
            interface="control",
            extra_state=WARM_START,
            memory=num_readings + len(goals) + 2,
        )
        # The action is a velocity; what goes to the actuators is computed in `act`.
        self.world.target_low[:], self.world.target_high[:] = -1.0, 1.0
        self._readings = slice(0, num_readings)
        self._done = slice(num_readings, num_readings + len(goals))
        positions, velocities = scalar_names(self.world.model)
        self.obs_fields = (
            ObsField("robot_pos", "state", positions[:ARM], "rad, m"),
            ObsField("robot_vel", "state", velocities[:ARM], "rad/s, m/s"),
            ObsField("object_pos", "state", positions[ARM:], "rad, m"),
            ObsField("object_vel", "state", velocities[ARM:], "rad/s, m/s"),
            *([camera_field("front")] if cameras else []),
        )
        sizes = [ARM, ARM, len(positions) - ARM, len(velocities) - ARM]
        stops = np.cumsum(sizes)
        self._fields = {
            f.name: slice(stop - size, stop)
            for f, size, stop in zip(self.obs_fields, sizes, stops, strict=False)
        }

    def _read_limits(self, path: Path, num_velocities: int) -> None:
        """Joint limits, and the spread of noise in each reading."""
        root = ElementTree.parse(path).getroot()
        joints = [root.find(f"qpos{i}") for i in range(num_velocities)]

        def column(key: str) -> np.ndarray:
            return np.array([np.array(j.get(key).split(), float) for j in joints])

        self._position_bound = column("pos_bound")[:ARM]
        self._velocity_bound = column("vel_bound")[:ARM]
        positions, velocities = column("pos_noise_amp")[:, 0], column("vel_noise_amp")[:, 0]
        # NOTE: gymnasium-robotics takes the objects' position noise from index 8 on, and so do we.
        self._noise = np.concatenate(
            [
                ROBOT_NOISE * positions[:ARM],
                ROBOT_NOISE * velocities[:ARM],
                OBJECT_NOISE * positions[ARM - 1 :],
                OBJECT_NOISE * velocities[ARM:],
            ]
        )

    def initial_state(self, rng: np.random.Generator) -> np.ndarray:
        """Always the same pose (state_size,); the episode's noise differs."""
        state = self.world.make_state(np.array(START))
        memory = self.world.memory(state)
        memory[-2] = rng.integers(2**32)
        self._sense(state[None])
        return state

    def expert(self, state: np.ndarray, rng: np.random.Generator):
        """The scripted demonstrator for an episode that starts in `state` (state_size,).

        Raises:
            SimulationError: a goal that has no script.
        """
        from sim.kitchen_expert import KitchenExpert

        return KitchenExpert(self, state, rng)

    def _sense(self, state: np.ndarray) -> None:
        """Write what the sensors read into the memory of states (N, state_size)."""
        memory = self.world.memory(state)
        qpos, qvel = self.world.qpos(state), self.world.qvel(state)
        true = [qpos[:, :ARM], qvel[:, :ARM], qpos[:, ARM:], qvel[:, ARM:]]
        memory[:, self._readings] = np.concatenate(true, axis=1)
        for row in memory:
            row[self._readings] += self._noise * self.noise(int(row[-2]), int(row[-1]))

    def noise(self, episode: int, step: int) -> np.ndarray:
        """Uniform between -1 and 1, one number per reading."""
        return np.random.default_rng((episode, step)).uniform(-1.0, 1.0, len(self._noise))

    def act(self, state: np.ndarray, action: np.ndarray) -> np.ndarray:
        """Joint velocities to position targets, from the last reading."""
        velocity = np.clip(SPEED * np.clip(action, -1.0, 1.0), *self._velocity_bound.T)
        reading = self.world.memory(state)[..., :ARM]
        dt = self.world.physics_dt * self.world.decimation
        return np.clip(reading + velocity * dt, *self._position_bound.T)

    def after_step(self, state: np.ndarray) -> np.ndarray:
        """Read the sensors, note what is done."""
        memory = self.world.memory(state)
        memory[:, -1] += 1
        self._sense(state)
        done = memory[:, self._done]
        done[:] = np.maximum(done, self._met(state))
        return state

    def _met(self, state: np.ndarray) -> np.ndarray:
        """Which goals are met at this moment, (N, goals) bool."""
        qpos = self.world.qpos(state)
        return np.stack(
            [
                np.linalg.norm(qpos[..., where] - np.array(goal), axis=-1) < CLOSE
                for where, goal in (GOALS[name] for name in self.goals)
            ],
            axis=-1,
        )

    def observe(self, state: np.ndarray) -> dict[str, np.ndarray]:
        """The noisy readings, (..., size) each."""
        readings = self.world.memory(state)[..., self._readings]
        return {name: readings[..., where] for name, where in self._fields.items()}

    def completed(self, state: np.ndarray) -> np.ndarray:
        """Goals met so far in the episode, (..., goals) bool."""
        return self.world.memory(state)[..., self._done] > 0

    def is_success(self, state: np.ndarray) -> np.ndarray:
        """Whether every goal has been met, (...,) bool."""
        return self.completed(state).all(axis=-1)

    def reward_terms(
        self, before: np.ndarray, action: np.ndarray, after: np.ndarray, succeeded: np.ndarray
    ) -> dict[str, np.ndarray]:
        """One for each goal, by name, on the step that meets it first."""
        xp, new = namespace(after), self.completed(after) & ~self.completed(before)
        return {
            name: xp.asarray(new[..., i], dtype=after.dtype) for i, name in enumerate(self.goals)
        }

"""Task `point`: bring the tip of a two-joint arm, read from an MJCF file, to a point in the plane."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np

from sim.tasks.base import Task
from sim.tasks.layout import POSE_ELEMENTS, ObsField
from sim.tasks.tabletop import pose_from_qpos
from sim.world import World, load_spec


def tip(angles: np.ndarray) -> np.ndarray:  # (..., 2) rad -> (..., 2) m
    first, second = angles[..., 0], angles[..., 0] + angles[..., 1]
    return 0.3 * np.stack([np.cos(first) + np.cos(second), np.sin(first) + np.sin(second)], axis=-1)


class Point(Task):
    name, robot, control_dt, episode_steps, success_hold_steps = "point", "planar", 0.05, 80, 5

    def __init__(self):
        self.world = World(load_spec(Path(__file__).with_name("planar.xml")), self.control_dt)
        self.obs_fields = (
            ObsField("joint_pos", "joint_position", ("shoulder", "elbow"), "rad"),
            ObsField("goal_pose", "pose", POSE_ELEMENTS, "m", "goal"),
        )

    def initial_state(self, rng):
        arm, goal = rng.uniform((-1, 0.5), (1, 2), (2, 2))
        return self.world.make_state(np.array([*tip(goal), 0, 1, 0, 0, 0, *arm]))

    def observe(self, state):
        qpos = self.world.qpos(state)
        return {"joint_pos": qpos[..., 7:], "goal_pose": pose_from_qpos(qpos[..., :7])}

    def is_success(self, state):
        qpos = self.world.qpos(state)
        return np.linalg.norm(tip(qpos[..., 7:]) - qpos[..., :2], axis=-1) < 0.03

    def reward_terms(self, before, action, after, succeeded):
        return {"success": succeeded.astype(float)}

    def expert(self, state, rng):
        """For flow-policy collect: inverse kinematics by the law of cosines, elbow always to the left."""
        x, y = self.world.qpos(state)[:2]
        elbow = np.arccos(np.clip((x * x + y * y) / 0.18 - 1, -1, 1))
        return SimpleNamespace(act=lambda state: np.array([np.arctan2(y, x) - elbow / 2, elbow]))

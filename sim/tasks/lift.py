"""Lift: a Panda-like arm picks a cube off the table.

The cube lies anywhere in a 24 x 24 cm square, at any yaw. Success: the cube is held at least 10 cm
above where it rested for ten control steps in a row (0.5 s). The episode ends there, or after six seconds.
"""

import mujoco
import numpy as np

from sim.tasks.base import Task
from sim.tasks.layout import POSE_ELEMENTS, ObsField, camera_field
from sim.world import World, attach_robot

CUBE_HALF = 0.0225  # m
CUBE_CENTER = np.array([0.5, 0.0])  # m, middle of the square in which the cube starts
CUBE_SPREAD = 0.12  # m, half the side of that square
LIFT_HEIGHT = 0.10  # m, clearance that counts as lifted
ARM_JITTER = 0.02  # rad, spread of the arm's start pose

SCENE = f"""
<mujoco model="lift">
  <option timestep="0.005" integrator="implicitfast" cone="elliptic" impratio="4"/>
  <visual>
    <quality shadowsize="0" offsamples="0" numslices="10" numstacks="5" numquads="1"/>
    <global offwidth="640" offheight="480"/>
    <headlight ambient="0.35 0.35 0.35" diffuse="0.4 0.4 0.4" specular="0 0 0"/>
  </visual>
  <worldbody>
    <light pos="1.2 -0.8 1.8" dir="-0.5 0.4 -1" diffuse="0.7 0.7 0.7" specular="0.1 0.1 0.1" castshadow="false"/>
    <camera name="front" pos="1.3 -0.7 0.75" xyaxes="0.623 0.783 0 -0.334 0.265 0.905" fovy="45"/>
    <geom name="floor" type="plane" size="30 30 0.1" pos="0 0 -0.4" rgba="0.36 0.4 0.45 1"/>
    <geom name="table" type="box" size="0.55 0.6 0.02" pos="0.35 0 -0.02" rgba="0.78 0.69 0.56 1"
          friction="1 0.005 0.0001"/>
    <frame name="robot"/>
    <body name="cube" pos="0.5 0 {CUBE_HALF}">
      <freejoint name="cube"/>
      <geom name="cube" type="box" size="{CUBE_HALF} {CUBE_HALF} {CUBE_HALF}" mass="0.1" condim="4"
            friction="1 0.02 0.0001" rgba="0.8 0.16 0.16 1"/>
    </body>
  </worldbody>
</mujoco>
"""


class Lift(Task):
    """The MDP on a `World`: start states, observation, success. All functions take and give batches.

    Args:
        cameras: the policy sees the scene through the camera `front` instead of being told where the cube is.
    """

    name = "lift"
    robot = "panda"
    control_dt = 0.05  # s
    episode_steps = 120
    success_hold_steps = 10
    cameras = ("front",)

    def __init__(self, cameras: bool = False):
        scene = attach_robot(mujoco.MjSpec.from_string(SCENE), self.robot, frame="robot")
        self.world = World(scene, self.control_dt)
        joints = self.world.joint_names
        arm, gripper = joints[:7], joints[7:]
        self.obs_fields = (
            ObsField("joint_pos", "joint_position", arm, "rad"),
            ObsField("joint_vel", "joint_velocity", arm, "rad/s"),
            ObsField("gripper_pos", "joint_position", gripper, "m"),
            camera_field("front")
            if cameras
            else ObsField("object_pose", "pose", POSE_ELEMENTS, "m", source="cube"),
        )
        self._joint_vel = self.world.qvel_address(arm)
        self._joint_pos = self.world.qpos_address(arm)
        self._gripper_pos = self.world.qpos_address(gripper)
        self._cube = self.world.pose_address("cube")

    def initial_state(self, rng: np.random.Generator) -> np.ndarray:
        """A start state (state_size,): arm near home, hand open, cube somewhere."""
        qpos = self.world.home_qpos
        qpos[self._joint_pos] += rng.uniform(-ARM_JITTER, ARM_JITTER, len(self._joint_pos))
        yaw = rng.uniform(-np.pi, np.pi)
        xy = CUBE_CENTER + rng.uniform(-CUBE_SPREAD, CUBE_SPREAD, 2)
        qpos[self._cube] = [*xy, CUBE_HALF, np.cos(yaw / 2), 0.0, 0.0, np.sin(yaw / 2)]
        return self.world.make_state(qpos)

    def observe(self, state: np.ndarray) -> dict[str, np.ndarray]:
        """Observation fields (..., size) of states (..., state_size); images are the environment's to draw."""
        qpos, qvel = self.world.qpos(state), self.world.qvel(state)
        return {
            "joint_pos": qpos[..., self._joint_pos],
            "joint_vel": qvel[..., self._joint_vel],
            "gripper_pos": qpos[..., self._gripper_pos],
            "object_pose": pose_from_qpos(qpos[..., self._cube]),
        }

    def is_success(self, state: np.ndarray) -> np.ndarray:
        """Whether the cube is lifted at this moment, (...,) bool."""
        height = self.world.qpos(state)[..., self._cube][..., 2] - CUBE_HALF
        return height >= LIFT_HEIGHT

    def reward_terms(
        self, before: np.ndarray, action: np.ndarray, after: np.ndarray, succeeded: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Reward by name, (...,) each: one on the step that completes the task."""
        return {"success": succeeded.astype(np.float64)}


def pose_from_qpos(qpos: np.ndarray) -> np.ndarray:
    """MuJoCo's (x, y, z, qw, qx, qy, qz) to `POSE_ELEMENTS`, with qw >= 0 so that a pose has one form, (..., 7)."""
    quat = qpos[..., 3:] * np.where(qpos[..., 3:4] < 0, -1.0, 1.0)
    return np.concatenate([qpos[..., :3], quat[..., 1:], quat[..., :1]], axis=-1)

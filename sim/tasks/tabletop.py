"""What every manipulation task shares: table, arms, camera, start states, observation, rewards by name.

A task is a subclass that says which bodies stand on the table, where they start, what counts as success, what a dense
reward pays for, and how a scripted expert does it. `push.py` is a good one to copy.
"""

from dataclasses import dataclass

import mujoco
import numpy as np

from sim import poses
from sim.arm import attach_arms, find_arm
from sim.arrays import namespace
from sim.errors import SimulationError, unknown_name
from sim.kinematics import SitePose
from sim.tasks.base import Task
from sim.tasks.layout import POSE_ELEMENTS, ObsField, camera_field
from sim.world import World

ARM_JITTER = 0.02  # rad, spread of the arm's start pose
DENSE_SCALE = 0.02  # per control step, of each dense term, which lies in [-1, 0]
RED, GREEN, BLUE, YELLOW = "0.8 0.16 0.16 1", "0.2 0.6 0.25 1", "0.2 0.35 0.75 1", "0.9 0.75 0.2 1"
MARK = "0.2 0.75 0.3 0.5"  # a place to go to: seen, never touched

SCENE = """
<mujoco model="{name}">
  <compiler angle="radian"/>
  <option timestep="{timestep}" integrator="implicitfast" cone="elliptic" impratio="4"/>
  <visual>
    <quality shadowsize="0" offsamples="0" numslices="10" numstacks="5" numquads="1"/>
    <global offwidth="640" offheight="480"/>
    <headlight ambient="0.35 0.35 0.35" diffuse="0.4 0.4 0.4" specular="0 0 0"/>
  </visual>
  <worldbody>
    <light pos="1.2 -0.8 1.8" dir="-0.5 0.4 -1" diffuse="0.7 0.7 0.7" specular="0.1 0.1 0.1" castshadow="false"/>
    <camera name="overview" {overview} fovy="45"/>
    <camera name="front" {front}/>
    <geom name="floor" type="plane" size="30 30 30" pos="0 0 -0.4" rgba="0.36 0.4 0.45 1"/>
    <geom name="table" type="box" {table} rgba="0.78 0.69 0.56 1" friction="1 0.005 0.0001"/>
    {frames}
    {bodies}
  </worldbody>
  <equality>{equalities}</equality>
</mujoco>
"""


@dataclass(frozen=True)
class Start:
    """Where a free body begins: uniform in a box around a point, and turned about the vertical.

    Attributes:
        center: (x, y, z) m.
        spread: half the sides of the box, m.
        yaw, yaw_spread: rad.
    """

    center: tuple[float, float, float]
    spread: tuple[float, float, float] = (0.0, 0.0, 0.0)
    yaw: float = 0.0
    yaw_spread: float = np.pi

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """A pose (7,)."""
        yaw = self.yaw + rng.uniform(-self.yaw_spread, self.yaw_spread)
        spread, position = np.array(self.spread), np.array(self.center)
        free = spread > 0
        position[free] += rng.uniform(-spread[free], spread[free])
        return poses.pose(position, poses.about_z(yaw))


class Tabletop(Task):
    """Arms at a table. Subclasses set what is below.

    Attributes:
        name: of the task.
        bodies, equalities: MJCF of what stands on the table (elements of worldbody and of equality). A free body has a
            free joint of its own name.
        starts: start of each free body, in the order in which they are drawn.
        apart: least distance between two starts in the plane, m.
        observed: observation field -> free body.
        robots: as in `Task`; the first is the default.
        arm_places: prefix of each arm's names -> attributes of its frame.
        rewards: names for the option `reward`.
        overview, front, table: attributes of the camera that films, of the camera that policies see through, and of the
            table top. `front` is as near as its view of all starts allows: an object of three pixels cannot be grasped.
        timestep: physics step, s.

    Args:
        robot: one of `robots`.
        reward: one of `rewards`.
        cameras: the policy sees the scene through the cameras instead of being told where the bodies are.

    Raises:
        SimulationError: a robot or a reward that the task does not have; the message lists the valid ones.
    """

    bodies = ""
    equalities = ""
    starts: dict[str, Start]
    apart = 0.0
    observed: dict[str, str]
    robots = ("panda",)
    arm_places = {"": 'pos="0 0 0"'}
    rewards = ("sparse", "dense")
    cameras = ("overview", "front")
    policy_cameras = ("front",)
    overview = 'pos="1.3 -0.7 0.75" xyaxes="0.623 0.783 0 -0.334 0.265 0.905"'
    front = 'pos="0.95 -0.4 0.6" xyaxes="0.632 0.775 0 -0.498 0.406 0.766" fovy="34"'
    table = 'size="0.55 0.6 0.02" pos="0.35 0 -0.02"'
    timestep = 0.005  # s
    control_dt = 0.05  # s
    episode_steps = 120
    success_hold_steps = 10

    def __init__(self, robot: str | None = None, reward: str = "sparse", cameras: bool = False):
        arm_name = robot or self.robots[0]
        if arm_name not in self.robots:
            raise unknown_name(f"robot for task '{self.name}'", arm_name, self.robots)
        if reward not in self.rewards:
            raise unknown_name(f"reward of task '{self.name}'", reward, self.rewards)
        self.robot, self.reward = self.robot_name(arm_name), reward
        prefixes = tuple(self.arm_places)
        scene = SCENE.format(
            name=self.name,
            timestep=self.timestep,
            overview=self.overview,
            front=self.front,
            table=self.table,
            frames="".join(f'<frame name="{p}robot" {at}/>' for p, at in self.arm_places.items()),
            bodies=self.bodies,
            equalities=self.equalities,
        )
        spec = attach_arms(mujoco.MjSpec.from_string(scene), arm_name, prefixes)
        self.world = World(spec, self.control_dt)
        self.arms = tuple(find_arm(self.world, arm_name, prefix) for prefix in prefixes)
        joints = sum((arm.joints for arm in self.arms), ())
        grippers = tuple(arm.gripper for arm in self.arms)
        self.obs_fields = (
            ObsField("joint_pos", "joint_position", joints, "rad"),
            ObsField("joint_vel", "joint_velocity", joints, "rad/s"),
            ObsField("gripper_pos", "joint_position", grippers, "m"),
            *(
                map(camera_field, self.policy_cameras)
                if cameras
                else (
                    ObsField(name, "pose", POSE_ELEMENTS, "m", body)
                    for name, body in self.observed.items()
                )
            ),
        )
        self._joint_pos = self.world.qpos_address(joints)
        self._joint_vel = self.world.qvel_address(joints)
        self._gripper_pos = self.world.qpos_address(grippers)
        self._pose = {body: self.world.pose_address(body) for body in self.starts}
        self._tools = [SitePose(self.world.model, arm.tool) for arm in self.arms]

    def robot_name(self, arm: str) -> str:
        """Name of the robot file that knows all joints of the task."""
        return arm

    def initial_state(self, rng: np.random.Generator) -> np.ndarray:
        """A start state (state_size,): arms near home, hands open, bodies where `starts` says, apart from another."""
        qpos = self.world.home_qpos
        qpos[self._joint_pos] += rng.uniform(-ARM_JITTER, ARM_JITTER, len(self._joint_pos))
        for body, place in self.draw_bodies(rng).items():
            qpos[self._pose[body]] = place
        return self.world.make_state(qpos)

    def draw_bodies(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Start poses (7,) of the free bodies."""
        for _ in range(1000):
            drawn = {body: start.draw(rng) for body, start in self.starts.items()}
            spots = [p[:2] for p in drawn.values()]
            gaps = [np.linalg.norm(a - b) for i, a in enumerate(spots) for b in spots[:i]]
            if min(gaps, default=np.inf) >= self.apart:
                return drawn
        raise SimulationError(f"task '{self.name}': no start with bodies {self.apart} m apart")

    def observe(self, state: np.ndarray) -> dict[str, np.ndarray]:
        """Observation fields (..., size) of states (..., state_size); images are the environment's to draw."""
        qpos, qvel = self.world.qpos(state), self.world.qvel(state)
        return {
            "joint_pos": qpos[..., self._joint_pos],
            "joint_vel": qvel[..., self._joint_vel],
            "gripper_pos": qpos[..., self._gripper_pos],
            **{f: pose_from_qpos(self.pose(state, body)) for f, body in self.observed.items()},
        }

    def reward_terms(self, before, action, after, succeeded) -> dict[str, np.ndarray]:
        """One on the step that completes the task; with a dense reward its costs as well.

        Dense terms are never positive: a success ends the episode, and must not end an income.
        """
        terms = {"success": namespace(after).asarray(succeeded, dtype=after.dtype)}
        if self.reward != "sparse":
            terms |= {name: DENSE_SCALE * cost for name, cost in self.costs(after).items()}
        return terms

    def costs(self, state: np.ndarray) -> dict[str, np.ndarray]:
        """Dense terms by name, (...,) each, from -1 (far from done) to 0 (done)."""
        raise NotImplementedError

    # --- what a task asks of a state ---

    def pose(self, state: np.ndarray, body: str) -> np.ndarray:
        """Pose (..., 7) of a free body."""
        return self.world.qpos(state)[..., self._pose[body]]

    def tool(self, state: np.ndarray, arm: int = 0) -> np.ndarray:
        """Pose (..., 7) of an arm's tool site."""
        return self._tools[arm](self.world.qpos(state))

    def released(self, state: np.ndarray, body: str, away: float = 0.06) -> np.ndarray:
        """Whether every hand is at least `away` m from the middle of a body, (...,) bool."""
        spot = self.pose(state, body)[..., :3]
        gaps = [distance(self.tool(state, i)[..., :3], spot) for i in range(len(self.arms))]
        xp = namespace(state)
        return xp.amin(xp.stack(gaps), axis=0) >= away


def pose_from_qpos(qpos: np.ndarray) -> np.ndarray:
    """MuJoCo's (x, y, z, qw, qx, qy, qz) to `POSE_ELEMENTS`, with qw >= 0 so that a pose has one form, (..., 7)."""
    xp = namespace(qpos)
    quat = qpos[..., 3:] * xp.where(qpos[..., 3:4] < 0, -1.0, 1.0)
    return xp.concatenate([qpos[..., :3], quat[..., 1:], quat[..., :1]], axis=-1)


def distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Between points (..., 2 or 3), (...,) m."""
    return namespace(a).linalg.norm(a - b, axis=-1)


def far(gap: np.ndarray, scale: float = 0.1) -> np.ndarray:
    """Cost of a distance, (...,): 0 when there, near -1 at several `scale` (m)."""
    return -namespace(gap).tanh(gap / scale)


def free_body(name: str, geoms: str) -> str:
    """MJCF of a body that moves freely."""
    return f'<body name="{name}" pos="0.5 0 0.1"><freejoint name="{name}"/>{geoms}</body>'


def block(size: tuple[float, ...], mass: float, rgba: str, **more: str) -> str:
    """MJCF of a graspable geom, a box unless `type` says otherwise; sizes are halves, m."""
    attributes = {
        "type": "box",
        "size": " ".join(str(s) for s in size),
        "mass": str(mass),
        "condim": "4",
        "friction": "1 0.02 0.0001",
        "rgba": rgba,
        **more,
    }
    return "<geom " + " ".join(f'{key}="{value}"' for key, value in attributes.items()) + "/>"


def goal_body(name: str, geom: str) -> str:
    """MJCF of a goal: a free body without weight that touches nothing, so that a state holds its pose."""
    return (
        f'<body name="{name}" gravcomp="1"><freejoint name="{name}"/>'
        f'<geom {geom} mass="0.1" contype="0" conaffinity="0" rgba="{MARK}"/></body>'
    )

"""Scripted demonstrators: Cartesian waypoints followed by inverse kinematics (mink), one arm at a time."""

from collections.abc import Iterator
from dataclasses import dataclass

import mink
import numpy as np

from sim.errors import unknown_name

MAX_LINEAR_STEP = 0.025  # m per control step (0.5 m/s)
MAX_ANGULAR_STEP = 0.12  # rad per control step
IK_ITERATIONS = 3
REACHED = 0.01  # m


@dataclass(frozen=True)
class Waypoint:
    """Where the tool should go. The hand points down; `yaw` turns it about the vertical axis.

    Attributes:
        position: (3,) m, world frame.
        yaw: rad.
        gripper: target of the finger joint, m.
        steps: control steps to stay after it is reached.
    """

    position: np.ndarray
    yaw: float
    gripper: float
    steps: int = 0


class WaypointExpert:
    """Follows waypoints with the tool site, from the last commanded joint position.

    Raises:
        SimulationError: the robot has no tool site of that name.
    """

    def __init__(
        self, task, waypoints: list[Waypoint], command: np.ndarray, tool: str = "panda_tcp"
    ):
        world = task.world
        sites = [world.model.site(i).name for i in range(world.model.nsite)]
        if tool not in sites:
            raise unknown_name("tool site", tool, sites)
        self._adr = world.joint_qpos[:-1]
        self._configuration = mink.Configuration(world.model, world.home_qpos)
        self._follow(command)
        self._frame = mink.FrameTask(tool, "site", position_cost=1.0, orientation_cost=0.3)
        self._posture = mink.PostureTask(world.model, cost=1e-3)
        self._posture.set_target(world.home_qpos)
        self._limits = [mink.ConfigurationLimit(world.model)]
        self._tool = tool
        self._dt = world.control_dt / IK_ITERATIONS
        self._targets = self._plan(waypoints)
        self._last = command

    def _follow(self, command: np.ndarray) -> None:
        qpos = self._configuration.q.copy()
        qpos[self._adr] = command[:-1]
        self._configuration.update(qpos)

    def _plan(self, waypoints: list[Waypoint]) -> Iterator[tuple[mink.SE3, float]]:
        """Cartesian targets, one per control step: a straight line to each waypoint, then a pause."""
        pose = self._configuration.get_transform_frame_to_world(self._tool, "site")
        for waypoint in waypoints:
            goal = mink.SE3.from_rotation_and_translation(
                downward(waypoint.yaw), np.asarray(waypoint.position, dtype=float)
            )
            distance = np.linalg.norm(goal.translation() - pose.translation())
            angle = np.linalg.norm((pose.rotation().inverse() @ goal.rotation()).log())
            count = int(np.ceil(max(distance / MAX_LINEAR_STEP, angle / MAX_ANGULAR_STEP, 1)))
            for share in np.arange(1, count + 1) / count:
                yield pose.interpolate(goal, share), waypoint.gripper
            for _ in range(waypoint.steps):
                yield goal, waypoint.gripper
            pose = goal
        while True:
            yield pose, waypoints[-1].gripper

    def act(self) -> np.ndarray:
        """The next joint-position target (A,)."""
        goal, gripper = next(self._targets)
        self._frame.set_target(goal)
        for _ in range(IK_ITERATIONS):
            velocity = mink.solve_ik(
                self._configuration,
                [self._frame, self._posture],
                self._dt,
                solver="daqp",
                damping=1e-6,
                limits=self._limits,
            )
            self._configuration.integrate_inplace(velocity, self._dt)
        self._last = np.append(self._configuration.q[self._adr], gripper)
        return self._last


def downward(yaw: float) -> mink.SO3:
    """Tool axis straight down, turned by `yaw`; zero is the hand of the home pose."""
    return mink.SO3.from_z_radians(yaw) @ mink.SO3.from_x_radians(np.pi)


def lift_waypoints(state_obs: dict[str, np.ndarray], rng: np.random.Generator) -> list[Waypoint]:
    """Above the cube, down, close, up. The grasp takes the nearest of the cube's four equal faces."""
    x, y, z, *quat_xyz, qw = state_obs["object_pose"]
    yaw = 2 * np.arctan2(quat_xyz[2], qw)
    yaw = (yaw + np.pi / 4) % (np.pi / 2) - np.pi / 4
    grasp = np.array([x, y, z])
    above = grasp + [0, 0, rng.uniform(0.08, 0.14)]
    up = grasp + [0, 0, 0.17]
    return [
        Waypoint(above, yaw, gripper=0.04, steps=2),
        Waypoint(grasp, yaw, gripper=0.04, steps=2),
        Waypoint(grasp, yaw, gripper=0.0, steps=6),
        Waypoint(up, yaw, gripper=0.0, steps=12),
    ]


EXPERTS = {"lift": lift_waypoints}


def make_expert(task, state: np.ndarray, rng: np.random.Generator) -> WaypointExpert:
    """The expert of a task for an episode that starts in `state` (state_size,).

    Raises:
        SimulationError: the task has no scripted expert.
    """
    if task.name not in EXPERTS:
        raise unknown_name("task with a scripted expert", task.name, EXPERTS)
    command = task.world.qpos(state)[task.world.joint_qpos]
    return WaypointExpert(task, EXPERTS[task.name](task.observe(state), rng), command)

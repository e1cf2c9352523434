"""Scripted demonstrators. A task's `demonstrate(expert)` is a generator: it looks, moves hands, and yields once per
control step. Inverse kinematics (mink) turns the hands' Cartesian goals into joint targets, one arm at a time.
"""

import mink
import numpy as np

from sim import poses
from sim.arm import Arm, robot_model
from sim.errors import SimulationError
from sim.script import Script, wait
from sim.tasks.tabletop import Tabletop

MAX_LINEAR_STEP = 0.025  # m per control step (0.5 m/s)
MAX_ANGULAR_STEP = 0.12  # rad per control step
IK_ITERATIONS = 3
CORRECTION = 0.2  # share of what is missing that a hand corrects per control step


class Hand:
    """One arm, led by the goal of its tool site.

    Attributes:
        opened, closed: finger targets, m.
        gripper: finger target now, m.
        yaw: turn about the vertical it was last sent to, rad.
    """

    def __init__(self, arm: Arm, command: np.ndarray, control_dt: float):
        self.opened, self.closed, self.gripper = arm.opened, arm.closed, arm.opened
        model = robot_model(arm.robot)
        site = f"{arm.robot}_tcp"
        self._base = mink.SE3(wxyz_xyz=np.concatenate([arm.base[3:], arm.base[:3]]))
        self._adr = np.array(
            [model.joint(j.removeprefix(arm.prefix)).qposadr[0] for j in arm.joints]
        )
        home = model.key("home").qpos.copy()
        self._configuration = mink.Configuration(model, home)
        self._frame = mink.FrameTask(site, "site", position_cost=1.0, orientation_cost=0.3)
        self._posture = mink.PostureTask(model, cost=1e-3)
        self._posture.set_target(home)
        self._limits = [mink.ConfigurationLimit(model)]
        self._dt = control_dt / IK_ITERATIONS
        self.yaw = poses.yaw(arm.base[3:])
        home[self._adr] = command[arm.columns[:-1]]
        self._configuration.update(home)
        self._goal = self._base @ self._configuration.get_transform_frame_to_world(site, "site")

    @property
    def position(self) -> np.ndarray:
        """Where the tool is meant to be now, (3,) m, world frame."""
        return self._goal.translation()

    def move(
        self, position, yaw: float | None = None, steps: int = 0, speed: float = 1.0
    ) -> Script:
        """To `position` (3,), hand pointing down, then stay for `steps`. The path is a screw motion: a straight line
        where the hand does not turn.

        Args:
            yaw: turn about the vertical; 0 is the home pose of an arm that looks along x. None keeps it.
            speed: share of the greatest.
        """
        yaw = self.yaw if yaw is None else yaw
        goal = mink.SE3.from_rotation_and_translation(
            downward(yaw), np.asarray(position, dtype=float)
        )
        start, self.yaw = self._goal, yaw
        length = np.linalg.norm(goal.translation() - start.translation())
        angle = np.linalg.norm((start.rotation().inverse() @ goal.rotation()).log())
        time = max(length / MAX_LINEAR_STEP, angle / MAX_ANGULAR_STEP) / speed
        count = int(np.ceil(max(time, 1)))
        for share in np.arange(1, count + 1) / count:
            self._goal = start.interpolate(goal, share)
            yield
        yield from wait(steps)

    def turn(self, angle: float, drop: float = 0.0, speed: float = 1.0) -> Script:
        """In place about the vertical by any angle, sinking by `drop` m on the way."""
        pieces = (
            int(np.ceil(abs(angle))) or 1
        )  # less than half a turn each, so that none goes the other way round
        for _ in range(pieces):
            below = self.position - [0, 0, drop / pieces]
            yield from self.move(below, self.yaw + angle / pieces, speed=speed)

    def grip(self, steps: int = 7) -> Script:
        """Close, and stay for `steps`."""
        self.gripper = self.closed
        yield from wait(steps)

    def release(self, steps: int = 4) -> Script:
        """Open, and stay for `steps`."""
        self.gripper = self.opened
        yield from wait(steps)

    def solve(self) -> np.ndarray:
        """Joint targets (len(arm.joints) + 1,) that lead to the goal."""
        self._frame.set_target(self._base.inverse() @ self._goal)
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
        return np.append(self._configuration.q[self._adr], self.gripper)


class Expert:
    """Runs a task's script for one episode.

    Attributes:
        rng: for choices the script leaves open.
        hands, hand: all arms, and the first.
    """

    def __init__(self, task: Tabletop, state: np.ndarray, rng: np.random.Generator):
        self._task = task
        self._state = state
        self.rng = rng
        command = task.world.qpos(state)[task.world.joint_qpos]
        self.hands = [Hand(arm, command, task.control_dt) for arm in task.arms]
        self.hand = self.hands[0]
        self._script = task.demonstrate(self)

    def pose(self, body: str) -> np.ndarray:
        """Pose (7,) of a free body now."""
        return self._task.pose(self._state, body)

    def tool(self, arm: int = 0) -> np.ndarray:
        """Pose (7,) of an arm's tool now."""
        return self._task.tool(self._state, arm)

    def carry(
        self, body: str, position, yaw: float, arm: int = 0, period: float = 2 * np.pi, **how
    ) -> Script:
        """Move a hand so that the upright body in it comes to `position` (3,) and `yaw`.

        The goal of the hand is shifted by what is missing, so that neither a slip in the grasp nor the sag of the
        arm matters once the arm is at rest.

        Args:
            period: turn after which the body looks the same; it takes the shorter way.
            how: `steps` and `speed` of `Hand.move`.
        """
        hand, now = self.hands[arm], self.pose(body)
        turn = float(poses.wrap(yaw - poses.yaw(now[3:]), period))
        offset = poses.rotate(poses.about_z(turn), hand.position - now[:3])
        yield from hand.move(np.asarray(position) + offset, hand.yaw + turn, **how)

    def align(
        self, body: str, position, yaw: float, tolerance: float, period: float = 2 * np.pi, **how
    ) -> Script:
        """Carry a body to a place, then take away what is missing, bit by bit, until it is there within `tolerance` (m;
        in rad ten times the number) for three control steps, at most sixty steps long.

        It never waits: what comes next follows from what is seen, so that a policy without memory can imitate it.
        """
        hand = self.hands[how.get("arm", 0)]
        yield from self.carry(body, position, yaw, period=period, **how)
        good = 0
        for _ in range(60):
            now = self.pose(body)
            miss = np.asarray(position) - now[:3]
            turn = float(poses.wrap(yaw - poses.yaw(now[3:]), period))
            there = np.linalg.norm(miss) < tolerance and abs(turn) < 10 * tolerance
            good = good + 1 if there else 0
            if good == 3:
                return
            arm = hand.position - now[:3]
            swing = poses.rotate(poses.about_z(CORRECTION * turn), arm) - arm
            yield from hand.move(
                hand.position + CORRECTION * miss + swing, hand.yaw + CORRECTION * turn
            )

    def act(self, state: np.ndarray) -> np.ndarray:
        """The joint-position target (A,) for the control step that begins in `state`. Holds when the script is over."""
        self._state = state
        next(self._script, None)
        action = np.empty(len(self._task.world.joint_names))
        for arm, hand in zip(self._task.arms, self.hands, strict=True):
            action[arm.columns] = hand.solve()
        return action


def downward(yaw: float) -> mink.SO3:
    """Tool axis straight down, turned by `yaw`; zero is the hand of the home pose."""
    return mink.SO3.from_z_radians(yaw) @ mink.SO3.from_x_radians(np.pi)


def has_expert(task) -> bool:
    """Whether the task can be demonstrated by a script."""
    return hasattr(task, "expert") or hasattr(task, "demonstrate")


def make_expert(task, state: np.ndarray, rng: np.random.Generator):
    """The expert of a task for an episode that starts in `state` (state_size,): something with `act(state)`.

    A task whose arm the hands above do not know brings one of its own, `task.expert(state, rng)`.

    Raises:
        SimulationError: the task has no scripted expert.
    """
    if not has_expert(task):
        raise SimulationError(f"task '{task.name}' has no scripted expert")
    if hasattr(task, "expert"):
        return task.expert(state, rng)
    return Expert(task, state, rng)

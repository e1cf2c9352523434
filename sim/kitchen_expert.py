"""Scripted demonstrator of the kitchen: the four goals of `kitchen-complete`, in any order.

The arm is led by a goal for its site `end_effector`, which inverse kinematics (mink) turns into joint positions; the
action is the joint velocity that reaches them from the last reading. The hand keeps the attitude in which it starts,
fingers ahead along +y, and their tips are some 4 cm ahead of the site.
"""

from collections.abc import Callable

import mink
import numpy as np

from sim.errors import unknown_name
from sim.script import Script, wait
from sim.tasks.kitchen import ARM, SPEED, Kitchen

STEP = 0.025  # m per control step (0.3 m/s)
IK_ITERATIONS = 4
OPEN, CLOSED = 0.04, 0.0  # m, of each finger
SAG = 0.02  # m by which the arm hangs below its goal: its servos have no gravity compensation
SPREAD = 0.01  # m, of the points that are passed on the way
ATTEMPTS = 3


class KitchenExpert:
    """Meets the task's goals one after the other, each at most `ATTEMPTS` times.

    Attributes:
        rng: for points on the way.
        fingers: their target, m.

    Raises:
        SimulationError: a goal that has no script.
    """

    def __init__(self, task: Kitchen, state: np.ndarray, rng: np.random.Generator):
        for goal in task.goals:
            if goal not in SCRIPTS:
                raise unknown_name("goal for the scripted expert of task 'kitchen'", goal, SCRIPTS)
        self._task, self._state, self.rng, self.fingers = task, state, rng, CLOSED
        model, home = task.world.model, task.world.qpos(state)
        self._configuration = mink.Configuration(model, home.copy())
        self._frame = mink.FrameTask(
            "end_effector", "site", position_cost=1.0, orientation_cost=0.1
        )
        self._posture = mink.PostureTask(model, cost=1e-3)
        self._posture.set_target(home)
        self._limits = [mink.ConfigurationLimit(model)]
        self._goal = self._configuration.get_transform_frame_to_world("end_effector", "site")
        self._script = self._play()

    def _play(self) -> Script:
        for i, goal in enumerate(self._task.goals):
            for _ in range(ATTEMPTS):
                yield from SCRIPTS[goal](self)
                self.fingers = OPEN  # let go, and back off
                yield from self.move(self._goal.translation() - [0, 0.12, 0])
                if self._task.completed(self._state)[i]:
                    break

    def move(self, position, steps: int = 0, speed: float = 1.0) -> Script:
        """The site in a straight line to `position` (3,) m, then stay for `steps` control steps.

        Args:
            speed: share of the greatest.
        """
        start = self._goal
        goal = mink.SE3.from_rotation_and_translation(
            start.rotation(), np.asarray(position, dtype=float)
        )
        length = np.linalg.norm(goal.translation() - start.translation())
        count = int(np.ceil(max(length / (STEP * speed), 1)))
        for share in np.arange(1, count + 1) / count:
            self._goal = start.interpolate(goal, share)
            yield
        yield from wait(steps)

    def near(self, position) -> np.ndarray:
        """A point close to one that nothing depends on, (3,) m."""
        return np.asarray(position) + self.rng.uniform(-SPREAD, SPREAD, 3)

    def act(self, state: np.ndarray) -> np.ndarray:
        """The action (9,) for the control step that begins in `state`. Stays when the script is over."""
        self._state = state
        next(self._script, None)
        lifted = mink.SE3.from_translation(np.array([0, 0, SAG])) @ self._goal
        self._frame.set_target(lifted)
        dt = self._task.control_dt / IK_ITERATIONS
        for _ in range(IK_ITERATIONS):
            velocity = mink.solve_ik(
                self._configuration, [self._frame, self._posture], dt, solver="daqp",
                damping=1e-6, limits=self._limits,
            )  # fmt: skip
            velocity[ARM:] = 0  # what is not the arm
            self._configuration.integrate_inplace(velocity, dt)
        target = self._configuration.q[:ARM].copy()
        target[-2:] = self.fingers
        reading = self._task.world.memory(state)[:ARM]
        return np.clip((target - reading) / (SPEED * self._task.control_dt), -1.0, 1.0)


def microwave(expert: KitchenExpert) -> Script:
    """Grasp the upright handle, pull it along its circle about the hinge."""
    handle, hinge = np.array([-0.642, 0.48, 1.79]), np.array([-1.128, 0.455, 1.79])
    expert.fingers = OPEN
    yield from expert.move(expert.near(handle - [0, 0.18, 0]))
    yield from expert.move(handle, steps=4, speed=0.5)
    expert.fingers = CLOSED
    yield from expert.move(handle, steps=6)
    for angle in np.linspace(0, 0.6, 8)[1:]:
        x, y, z = handle - hinge
        turned = [x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle), z]
        yield from expert.move(hinge + turned, speed=0.5)


def kettle(expert: KitchenExpert) -> Script:
    """Push it with both fingers onto the burner behind it, left of its middle because the spout is heavy."""
    expert.fingers = OPEN
    yield from expert.move(expert.near([-0.32, 0.03, 1.80]))
    yield from expert.move([-0.32, 0.10, 1.67])
    yield from expert.move([-0.32, 0.36, 1.67], speed=0.6)


def light_switch(expert: KitchenExpert) -> Script:
    """Sweep the lever from right to left."""
    expert.fingers = CLOSED
    yield from expert.move(expert.near([-0.27, 0.42, 2.28]))
    yield from expert.move([-0.29, 0.58, 2.28])
    yield from expert.move([-0.49, 0.58, 2.28], speed=0.5)


def slide_cabinet(expert: KitchenExpert) -> Script:
    """Push the handle of the door to the right."""
    expert.fingers = CLOSED
    yield from expert.move(expert.near([-0.25, 0.40, 2.50]))
    yield from expert.move([-0.20, 0.56, 2.58])
    yield from expert.move([0.10, 0.56, 2.58], speed=0.6)


SCRIPTS: dict[str, Callable[[KitchenExpert], Script]] = {
    "microwave": microwave,
    "kettle": kettle,
    "light switch": light_switch,
    "slide cabinet": slide_cabinet,
}

"""A task that exists only as data (`--task recorded`): what a policy needs to know of it without a simulation."""

from types import SimpleNamespace

import numpy as np

from flow_policy_rl.data.robomimic import Demonstrations
from flow_policy_rl.serving.robot import load_robot, robot_names

NAME = "recorded"
MARGIN = 0.1  # of the range of the recorded actions, where no robot file says what a joint may do


def recorded_task(demos: Demonstrations) -> SimpleNamespace:
    """Named, with joints, limits, rate and fields, as a task of `sim` has them; it cannot be simulated.

    Limits are those of the robot file where the data name a robot that we know with these joints, else the range of the
    recorded actions and a tenth more.
    """
    layout = demos.layout
    low, high = action_limits(demos)
    world = SimpleNamespace(
        joint_names=layout.joint_names,
        interface="joint_position",
        target_low=low,
        target_high=high,
    )
    return SimpleNamespace(
        name=layout.task,
        robot=layout.robot,
        options={},
        control_dt=layout.control_dt,
        obs_fields=layout.observations,
        world=world,
    )


def action_limits(demos: Demonstrations) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest action, (A,) each."""
    names = demos.layout.joint_names
    if demos.layout.robot in robot_names():
        robot = load_robot(demos.layout.robot)
        if set(names) <= set(robot.limits):
            low, high = robot.limit_array(names, "position").T
            return low, high
    low = np.min([e.actions.min(axis=0) for e in demos.episodes], axis=0)
    high = np.max([e.actions.max(axis=0) for e in demos.episodes], axis=0)
    margin = np.maximum(MARGIN * (high - low), 1e-3)
    return low - margin, high + margin

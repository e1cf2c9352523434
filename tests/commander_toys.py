"""A commander of a toy robot, and chunks for it."""

import numpy as np
from toys import small_spec

from flow_policy_rl.serving.chunk_scheduler import ChunkScheduler
from flow_policy_rl.serving.commander import Commander
from flow_policy_rl.serving.robot import JointLimits, Robot, Topics
from flow_policy_rl.serving.safety import EmergencyStop, SafetyFilter

MS = 1_000_000
START = 50_000 * MS
STEP = 50 * MS
HERE = np.zeros(3)


def make_commander(
    joining: str = "replace",
    soft_start_s: float = 0.0,
    lead_s: float = 0.01,
    emergency: EmergencyStop | None = None,
    max_tracking_error: float = 0.0,
    control_dt: float = 0.05,
) -> Commander:
    """Two quick arm joints and a gripper, chunks of six actions of which four are executed."""
    spec = small_spec(
        joint_names=("a", "b", "g"),
        action_low=(-9.0,) * 3,
        action_high=(9.0,) * 3,
        prefix_horizon=2 if joining == "rtc" else 0,
        control_dt=control_dt,
    )
    limits = JointLimits((-3, 3), 2.0, 20.0, 10_000.0)
    robot = Robot("toy", {"a": limits, "b": limits}, {"g": limits}, Topics("/j", "/c"))
    safety = SafetyFilter(robot, spec.joint_names, control_dt)
    scheduler = ChunkScheduler(spec, lead_s, joining)
    return Commander(scheduler, safety, emergency, soft_start_s, max_tracking_error)


def chunk(level: float) -> np.ndarray:
    """On the way to a level, a step at a time."""
    return level * np.linspace(1 / 6, 1, 6)[:, None] * np.ones(3)

"""What a gripper action is told: goals where trajectories have points."""

import numpy as np

from flow_policy_rl.serving.robot import GripperAction
from flow_policy_rl.serving.spline import Spline

# A goal is where the plan has the gripper so long from now: it takes time to get through.
LOOKAHEAD_S = 0.05


def wanted(spline: Spline, t: float) -> np.ndarray:
    """Where the joints (A,) should be sent at a time (s) of a plan."""
    return spline.position(np.array([t + LOOKAHEAD_S]))[0]


class GripperGoals:
    """Decides when a goal goes out: each ends the one before, so only for a change, and not too often."""

    def __init__(self, action: GripperAction):
        self._action = action
        self.forget()

    def forget(self) -> None:
        """The next goal goes out whatever it is."""
        self._last: np.ndarray | None = None
        self._sent = -np.inf

    def next(self, position: np.ndarray, now: float, at_once: bool = False) -> np.ndarray | None:
        """The goal (G,) to send at a steady time (s), or None; `at_once` does not wait its turn."""
        if self._last is not None:
            if np.abs(position - self._last).max() <= self._action.deadband:
                return None
            if now - self._sent < 1 / self._action.max_rate_hz and not at_once:
                return None
        self._last, self._sent = position.copy(), now
        return self._last

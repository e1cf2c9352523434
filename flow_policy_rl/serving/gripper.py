"""What a gripper action is told: goals where trajectories have points."""

import numpy as np

from flow_policy_rl.serving.robot import GripperAction
from flow_policy_rl.serving.spline import Spline

# A goal is where the plan has the gripper so long from now: it takes time to get through.
LOOKAHEAD_S = 0.05
RETRY_S = 1.0  # until the same goal goes out again, where it was refused


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
        self._refused = False

    def refused(self) -> None:
        """The goal sent last was not taken, or given up: it goes out again after `RETRY_S`, if it is still wanted."""
        self._refused = True

    def next(self, position: np.ndarray, now: float, at_once: bool = False) -> np.ndarray | None:
        """The goal (G,) to send at a steady time (s), or None; `at_once` does not wait its turn."""
        if self._last is not None:
            waited, near = now - self._sent, np.abs(position - self._last).max()
            if near <= self._action.deadband and not (self._refused and waited >= RETRY_S):
                return None
            if waited < 1 / self._action.max_rate_hz and not at_once:
                return None
        self._last, self._sent, self._refused = position.copy(), now, False
        return self._last

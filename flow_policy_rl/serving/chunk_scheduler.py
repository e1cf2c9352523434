"""When to infer, and how a chunk becomes a timed trajectory for a joint_trajectory_controller.

Action k of a chunk is due (k + 1) * control_dt after its observation. By the time the chunk is ready
some of it is past: those points are dropped, and the rest keep their place in time, so that the delay
does not shift the motion.
"""

from dataclasses import dataclass

import numpy as np

from flow_policy_rl.spec import PolicySpec


@dataclass(frozen=True)
class Trajectory:
    """Points for the controller: times (n,) in seconds from now, positions and velocities (n, A).
    The last point is at rest."""

    times: np.ndarray
    positions: np.ndarray
    velocities: np.ndarray


class ChunkScheduler:
    """Keeps the chunk in force."""

    def __init__(self, spec: PolicySpec, min_lead_s: float = 0.01):
        self.control_dt = spec.control_dt
        self.period = int(spec.execute_horizon * spec.control_dt * 1e9)
        self.min_lead_s = min_lead_s
        self._last_stamp: int | None = None

    def reset(self) -> None:
        """Infer at the next observation."""
        self._last_stamp = None

    def due(self, stamp: int) -> bool:
        """Whether an observation of this time (ns) should start an inference."""
        return (
            self._last_stamp is None
            or stamp - self._last_stamp >= self.period
            or stamp < self._last_stamp
        )

    def started(self, stamp: int) -> None:
        """An inference on the observation of this time has begun."""
        self._last_stamp = stamp

    def trajectory(self, chunk: np.ndarray, stamp: int, now: int) -> Trajectory | None:
        """What is left of a chunk (H, A) observed at `stamp`, seen from `now` (ns); None when all of it is past."""
        lead = (np.arange(len(chunk)) + 1) * self.control_dt - (now - stamp) / 1e9
        keep = lead >= self.min_lead_s
        if not keep.any():
            return None
        velocities = (
            np.gradient(chunk, self.control_dt, axis=0) if len(chunk) > 1 else np.zeros_like(chunk)
        )
        velocities[-1] = 0.0
        return Trajectory(lead[keep], chunk[keep], velocities[keep])

"""What ros2_control's joint_trajectory_controller does, for simulation and for reading bags.

A new trajectory replaces the old one at once. Between points: straight lines, or cubics where
velocities are given. Before the first point: from the present reference. After the last: hold.
"""

from collections.abc import Sequence

import numpy as np


class TrajectoryRejected(ValueError):
    """The controller drops the whole message; the text says why."""


class TrajectoryController:
    """Follows one trajectory at a time; times are seconds of the controller's clock."""

    def __init__(self, joint_names: Sequence[str], position: np.ndarray):
        self.joint_names = tuple(joint_names)
        self.hold(position)

    def hold(self, position: np.ndarray) -> None:
        """Forget the trajectory and stay at (A,)."""
        self._times = np.zeros(1)
        self._positions = np.asarray(position, float)[None]
        self._velocities: np.ndarray | None = None

    def accept(
        self,
        names: Sequence[str],
        times: np.ndarray,
        positions: np.ndarray,
        velocities: np.ndarray | None,
        now: float,
    ) -> None:
        """Start a trajectory: times (n,) from now, positions and velocities (n, A) in the order of `names`.

        Raises:
            TrajectoryRejected: as joint_trajectory_controller refuses it.
        """
        if len(times) == 0:
            raise TrajectoryRejected("no points")
        if sorted(names) != sorted(self.joint_names):
            raise TrajectoryRejected(
                f"joints {list(names)} are not the controller's {list(self.joint_names)}"
            )
        width = len(names)
        if positions.shape != (len(times), width):
            raise TrajectoryRejected(
                f"positions have shape {positions.shape}, not {(len(times), width)}"
            )
        if velocities is not None and velocities.shape != positions.shape:
            raise TrajectoryRejected(
                f"velocities have shape {velocities.shape}, not {positions.shape}"
            )
        if times[0] < 0 or (np.diff(times) <= 0).any():
            raise TrajectoryRejected("times are not strictly increasing")
        if velocities is not None and np.any(velocities[-1] != 0):
            raise TrajectoryRejected("the last point has a velocity")
        order = [list(names).index(name) for name in self.joint_names]
        start, start_velocity = self.sample(now)
        self._times = np.concatenate([[now], now + times])
        self._positions = np.vstack([start, positions[:, order]])
        self._velocities = (
            None if velocities is None else np.vstack([start_velocity, velocities[:, order]])
        )

    def sample(self, now: float) -> tuple[np.ndarray, np.ndarray]:
        """Reference position and velocity (A,) at a time."""
        times, points = self._times, self._positions
        if now >= times[-1]:
            return points[-1].copy(), np.zeros(points.shape[1])
        k = int(np.searchsorted(times, now, side="right")) - 1
        if k < 0:
            return points[0].copy(), np.zeros(points.shape[1])
        span = times[k + 1] - times[k]
        u, change = (now - times[k]) / span, points[k + 1] - points[k]
        if self._velocities is None:
            return points[k] + u * change, change / span
        v0, v1 = self._velocities[k] * span, self._velocities[k + 1] * span
        position = points[k] + u * (
            v0 + u * (3 * change - 2 * v0 - v1 + u * (v0 + v1 - 2 * change))
        )
        slope = v0 + u * (2 * (3 * change - 2 * v0 - v1) + 3 * u * (v0 + v1 - 2 * change))
        return position, slope / span

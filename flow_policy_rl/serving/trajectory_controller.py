"""What ros2_control's controllers do, for simulation and for reading bags.

joint_trajectory_controller: a new trajectory replaces the old one at once. Between points: straight lines, cubics where
velocities are given, quintics where accelerations are too. Before the first point: from the present reference. After
the last: hold. A stamp in the past means that points already past are skipped (and the reference jumps).
"""

from collections.abc import Sequence

import numpy as np

from flow_policy_rl.serving.spline import Spline


class TrajectoryRejected(ValueError):
    """The controller drops the whole message; the text says why."""


class TrajectoryController:
    """Follows one trajectory at a time; times are seconds of the controller's clock.

    Args:
        allow_partial: accept trajectories of some of the joints; the others hold their reference.
        allow_end_velocity: accept a velocity at the end (Humble's default; MoveIt Servo sends it), and hold there.
    """

    def __init__(
        self,
        joint_names: Sequence[str],
        position: np.ndarray,
        allow_partial: bool = False,
        allow_end_velocity: bool = False,
    ):
        self.joint_names = tuple(joint_names)
        self.allow_partial, self.allow_end_velocity = allow_partial, allow_end_velocity
        self.hold(position)

    def hold(self, position: np.ndarray) -> None:
        """Forget the trajectory and stay at (A,)."""
        self._spline = Spline(np.zeros(1), np.asarray(position, float)[None].copy())

    @property
    def motion(self) -> Spline:
        """What is being followed."""
        return self._spline

    @property
    def end(self) -> float:
        """When the trajectory in force ends."""
        return self._spline.end

    def accept(
        self,
        names: Sequence[str],
        times: np.ndarray,
        positions: np.ndarray,
        velocities: np.ndarray | None,
        now: float,
        accelerations: np.ndarray | None = None,
        start: float | None = None,
    ) -> None:
        """Start a trajectory: times (n,) from `start`, values (n, len(names)) in the order of `names`.

        Args:
            now: time of reception.
            start: the header stamp; None (a stamp of 0) is `now`.

        Raises:
            TrajectoryRejected: as joint_trajectory_controller refuses it, or a number is not finite.
        """
        self._check(names, times, positions, velocities, accelerations)
        start = now if start is None else start
        if start + times[-1] < now:
            raise TrajectoryRejected(
                f"the trajectory ended {now - start - times[-1]:.3f} s before it came"
            )
        columns = [list(self.joint_names).index(name) for name in names]
        reference = self.sample(now)

        def whole(values: np.ndarray | None, rest: np.ndarray) -> np.ndarray | None:
            """All joints: those that are not named stay at `rest`."""
            if values is None:
                return None
            full = np.tile(rest, (len(times), 1))
            full[:, columns] = values
            return full

        still = np.zeros(len(self.joint_names))
        position, velocity, acceleration = (
            whole(values, rest)
            for values, rest in (
                (positions, reference[0]),
                (velocities, still),
                (accelerations, still),
            )
        )
        moments = start + times
        if moments[0] > now:  # a bridge from where the reference is
            moments = np.concatenate([[now], moments])
            position = np.vstack([reference[0], position])
            velocity = None if velocity is None else np.vstack([reference[1], velocity])
            acceleration = None if acceleration is None else np.vstack([reference[2], acceleration])
        self._spline = Spline(moments, position, velocity, acceleration)

    def _check(self, names, times, positions, velocities, accelerations) -> None:
        if len(times) == 0:
            raise TrajectoryRejected("no points")
        unknown = set(names) - set(self.joint_names)
        incomplete = len(names) != len(self.joint_names) and not self.allow_partial
        if unknown or incomplete or len(set(names)) != len(names) or not len(names):
            raise TrajectoryRejected(
                f"joints {list(names)} are not the controller's {list(self.joint_names)}"
            )
        for what, values in (
            ("positions", positions),
            ("velocities", velocities),
            ("accelerations", accelerations),
        ):
            if values is not None and values.shape != (len(times), len(names)):
                raise TrajectoryRejected(
                    f"{what} have shape {values.shape}, not {(len(times), len(names))}"
                )
            if values is not None and not np.isfinite(values).all():
                raise TrajectoryRejected(f"{what} have numbers that are not finite")
        if times[0] < 0 or not np.isfinite(times).all() or (np.diff(times) <= 0).any():
            raise TrajectoryRejected("times are not strictly increasing")
        ends_at_rest = velocities is None or not np.any(velocities[-1] != 0)
        if not ends_at_rest and not self.allow_end_velocity:
            raise TrajectoryRejected("the last point has a velocity")

    def sample(self, now: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Reference position, velocity and acceleration (A,) at a time."""
        return self._spline.sample(now)


class ForwardController:
    """forward_command_controller: the last command, at once, until the next one. Order is that of `joint_names`."""

    def __init__(self, joint_names: Sequence[str], position: np.ndarray):
        self.joint_names = tuple(joint_names)
        self.hold(position)

    def hold(self, position: np.ndarray) -> None:
        """Stay at (A,)."""
        self._position = np.asarray(position, float).copy()

    def accept(self, values: Sequence[float]) -> None:
        """A new command.

        Raises:
            TrajectoryRejected: the wrong number of values, or one that is not finite.
        """
        if len(values) != len(self.joint_names):
            raise TrajectoryRejected(
                f"{len(values)} values for {len(self.joint_names)} joints {list(self.joint_names)}"
            )
        if not np.isfinite(values).all():
            raise TrajectoryRejected("values that are not finite")
        self._position = np.asarray(values, float)

    def sample(self, now: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Reference position (A,), at rest."""
        still = np.zeros(len(self._position))
        return self._position.copy(), still, still

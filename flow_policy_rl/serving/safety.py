"""What stands between a policy and a robot. On by default, in physical units, without ROS. Not a
certified safety function."""

from dataclasses import dataclass

import numpy as np

from flow_policy_rl.serving.robot import Robot


class Rejected(Exception):
    """A chunk that must not be sent; the text says why."""


@dataclass(frozen=True)
class Checked:
    """A chunk (H, A) within the limits, and how many of its actions had to be changed for that."""

    chunk: np.ndarray
    num_changed: int


class SafetyFilter:
    """Holds a chunk to position and velocity limits, and refuses what makes no sense.

    Args:
        max_start_distance: largest distance (rad or m) of the first target of a run from where the robot is.
    """

    def __init__(
        self,
        robot: Robot,
        joint_names: tuple[str, ...],
        control_dt: float,
        max_start_distance: float = 0.5,
    ):
        self.joint_names = joint_names
        self.low, self.high = robot.limit_array(joint_names, "position").T
        self.step = robot.limit_array(joint_names, "velocity") * control_dt
        self.max_start_distance = max_start_distance

    def check(self, chunk: np.ndarray, start: np.ndarray, first: bool = False) -> Checked:
        """Limit a chunk of targets, one per control step.

        Args:
            chunk: (H, A).
            start: (A,) position commanded, or measured, one control step before the first target.
            first: the robot was not commanded before.

        Raises:
            Rejected: not a finite number, or a first target too far away.
        """
        if not np.isfinite(chunk).all():
            bad = [
                n
                for n, wrong in zip(self.joint_names, ~np.isfinite(chunk).all(axis=0), strict=True)
                if wrong
            ]
            raise Rejected(f"not a finite target for {', '.join(bad)}")
        if first:
            distance = np.abs(chunk[0] - start)
            if (distance > self.max_start_distance).any():
                worst = int(distance.argmax())
                raise Rejected(
                    f"first target of {self.joint_names[worst]} is {distance[worst]:.3f} away from where it is, "
                    f"limit {self.max_start_distance:.3f}"
                )
        safe, previous = np.empty_like(chunk), start
        for k, target in enumerate(np.clip(chunk, self.low, self.high)):
            previous = previous + np.clip(target - previous, -self.step, self.step)
            safe[k] = previous
        changed = (np.abs(safe - chunk) > 1e-6).any(axis=1)
        return Checked(safe, int(changed.sum()))

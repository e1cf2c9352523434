"""Faults of a robot's messages, on purpose: late, lost, out of order, noisy, frozen, broken. All off by default;
every one is a parameter of the simulation node that can change while it runs (`ros2 param set /sim_node fault_drop
0.1`)."""

import heapq
import itertools
from array import array
from collections.abc import Callable

import numpy as np

from flow_policy_ros.parameters import Parameter

PARAMETERS = (
    Parameter(
        "fault_delay_s",
        0.0,
        "every state and image comes so much later (s, steady clock)",
        0.0,
        10.0,
    ),
    Parameter(
        "fault_jitter_s",
        0.0,
        "and up to so much more, at random: messages overtake each other",
        0.0,
        10.0,
    ),
    Parameter("fault_drop", 0.0, "share of states and images that is lost", 0.0, 1.0),
    Parameter("fault_command_drop", 0.0, "share of commands that is lost", 0.0, 1.0),
    Parameter(
        "fault_noise", 0.0, "standard deviation of measured joint positions (rad, m)", 0.0, 10.0
    ),
    Parameter("fault_frozen_camera", False, "cameras repeat their last frame, with its old stamp"),
    Parameter("fault_silent", False, "nothing is published but the clock"),
    Parameter("fault_nan_joint", "", "this joint reports nan"),
    Parameter("fault_renamed_joint", "", "this joint is reported under another name"),
)


class Faults:
    """Stands between the simulation and its publishers.

    Args:
        get: reads a parameter.
        rng: where chance comes from.
    """

    def __init__(self, get: Callable[[str], object], rng: np.random.Generator):
        self._get, self._rng = get, rng
        self._late: list[tuple[float, int, Callable, object]] = []
        self._count = itertools.count()

    def publish(self, send: Callable, msg, now: float) -> None:
        """Send a message now, later, or never; `now` in s of a steady clock."""
        if self._get("fault_silent") or self._rng.random() < self._get("fault_drop"):
            return
        delay = self._get("fault_delay_s") + self._rng.random() * self._get("fault_jitter_s")
        if delay == 0 and not self._late:
            send(msg)
        else:
            heapq.heappush(self._late, (now + delay, next(self._count), send, msg))

    def deliver(self, now: float) -> None:
        """Send what is due."""
        while self._late and self._late[0][0] <= now:
            _, _, send, msg = heapq.heappop(self._late)
            send(msg)

    def hears_command(self) -> bool:
        """Whether a command gets through."""
        return self._rng.random() >= self._get("fault_command_drop")

    def joint_state(self, msg):
        """The message as a faulty driver would publish it."""
        noise, nan, renamed = (
            self._get(f"fault_{name}") for name in ("noise", "nan_joint", "renamed_joint")
        )
        if noise:
            position = np.asarray(msg.position) + self._rng.normal(0, noise, len(msg.position))
            msg.position = array("d", position.tobytes())
        if nan in msg.name:
            msg.position[list(msg.name).index(nan)] = float("nan")
        if renamed in msg.name:
            msg.name = [f"{name}_renamed" if name == renamed else name for name in msg.name]
        return msg

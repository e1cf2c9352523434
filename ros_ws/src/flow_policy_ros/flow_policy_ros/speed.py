"""Hears how fast the robot executes, where the robot file names a topic that says so."""

import time
from collections.abc import Callable

from rclpy.node import Node
from std_msgs.msg import Float64

from flow_policy_rl.serving.speed_scaling import SpeedScaling
from flow_policy_ros.graph import Input


class SpeedListener:
    """`serving.speed_scaling` of a topic.

    Args:
        on_slowed: called with the reason when a robot at full speed is slowed down.
    """

    def __init__(self, node: Node, topic: str, on_slowed: Callable[[str], None]):
        self._clock, self._on_slowed = node.get_clock(), on_slowed
        self._scaling = SpeedScaling(node.resolve_topic_name(topic))
        self.told = self._scaling.told
        self._input = Input(node, Float64, topic, self._hear)

    def _hear(self, msg: Float64) -> None:
        now, steady = self._clock.now().nanoseconds, time.monotonic()
        if self._scaling.hear(msg.data, now, steady):
            self._on_slowed(self._scaling.problem(now, steady))

    def problem(self) -> str:
        """Why nothing may be commanded now; empty when it may."""
        self._input.adapt()
        now = self._clock.now().nanoseconds
        return self._input.mismatch or self._scaling.problem(now, time.monotonic())

    def close(self) -> None:
        """End the subscription."""
        self._input.close()

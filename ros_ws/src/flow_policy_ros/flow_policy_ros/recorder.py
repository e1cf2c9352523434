"""`recorder`: everything that crosses the topics, to a rosbag2 folder (MCAP), as it happens.

Messages are taken as raw bytes and written in small flushed chunks: a killed recorder or a full
disk leaves a bag that can be read up to that point.
"""

import sys
import time
from pathlib import Path

from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy

from flow_policy_rl.data.bags import BagWriter
from flow_policy_rl.errors import InputError, RunFailed
from flow_policy_ros import parameters
from flow_policy_ros.messages import message_class
from flow_policy_ros.parameters import Parameter
from flow_policy_ros.process import Stop, run_node

LOOK_EVERY_S = 0.2
IGNORED = ("/rosout", "/parameter_events")
DEPTH = 100
PARAMETERS = (Parameter("bag", "", "folder to write; must not exist", fixed=True),)


class Recorder(Node):
    """Subscribes to every topic that has a publisher, as soon as it appears."""

    def __init__(self):
        super().__init__("recorder")
        parameters.declare(self, PARAMETERS)
        bag = self.get_parameter("bag").value
        if not bag:
            raise InputError("parameter bag is empty: give the folder to write")
        self._writer = BagWriter(Path(bag))
        self._known: set[str] = set(IGNORED)
        self.count = 0
        self.failure = ""

    def look(self) -> None:
        """Subscribe to new topics."""
        for topic, types in self.get_topic_names_and_types():
            if topic in self._known or not self.count_publishers(topic):
                continue
            self._known.add(topic)
            kind = message_class(types[0])
            fields = () if kind is None else kind.get_fields_and_field_types()
            if kind is None or not self._writer.add_topic(topic, types[0], fields):
                self.get_logger().warning(
                    f"{topic} is not recorded: type {types[0]} is not known here"
                )
                continue
            self.create_subscription(
                kind,
                topic,
                lambda data, topic=topic: self._write(topic, data),
                self._matching_qos(topic),
                raw=True,
            )

    def _matching_qos(self, topic: str) -> QoSProfile:
        """Reliable and latched where every publisher is."""
        offered = [info.qos_profile for info in self.get_publishers_info_by_topic(topic)]
        reliable = all(q.reliability == ReliabilityPolicy.RELIABLE for q in offered)
        latched = all(q.durability == DurabilityPolicy.TRANSIENT_LOCAL for q in offered)
        return QoSProfile(
            depth=DEPTH,
            reliability=ReliabilityPolicy.RELIABLE if reliable else ReliabilityPolicy.BEST_EFFORT,
            durability=DurabilityPolicy.TRANSIENT_LOCAL if latched else DurabilityPolicy.VOLATILE,
        )

    def _write(self, topic: str, data: bytes) -> None:
        if self.failure:
            return
        try:
            self._writer.write(topic, time.time_ns(), data)
            self.count += 1
        except OSError as error:
            self.failure = f"recording stopped after {self.count} messages: {error}"
            self.get_logger().error(self.failure)

    def close(self) -> None:
        """Write the index, unless the disk is what failed, and say how much there is.

        Raises:
            RunFailed: now the disk is full.
        """
        if self.failure:
            return
        try:
            self._writer.close()
        except OSError as error:
            raise RunFailed(
                f"the end of the bag could not be written: {error}; what was flushed can be read"
            ) from None
        self.get_logger().info(f"recorded {self.count} messages")

    def spin(self, executor: SingleThreadedExecutor, stop: Stop) -> None:
        """Record until a signal."""
        looked = 0.0
        while not stop.requested and not self.failure:
            if time.monotonic() - looked >= LOOK_EVERY_S:
                self.look()
                looked = time.monotonic()
            executor.spin_once(timeout_sec=0.05)
        if self.failure:
            raise RunFailed(self.failure)


def main() -> int:
    """Entry point."""
    return run_node(Recorder, Recorder.spin)


if __name__ == "__main__":
    sys.exit(main())

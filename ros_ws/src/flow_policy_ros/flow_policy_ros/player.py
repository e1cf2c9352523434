"""`player`: some topics of a bag, published as they were recorded, with `/clock`.

What `ros2 bag play --clock` does, by the reader of `flow-policy replay`: damaged and compressed bags of any storage
play too. Messages go out as raw bytes. The clock is that of the header stamps where they are of another clock than the
recorder's (a simulation), else the time of recording.
"""

import sys
import time

from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rosgraph_msgs.msg import Clock

from flow_policy_rl.data.bags import BadMessage, Bag, Message
from flow_policy_rl.errors import InputError
from flow_policy_rl.offline.recording import STAMPED, header_stamp
from flow_policy_ros import parameters
from flow_policy_ros.messages import message_class, to_time
from flow_policy_ros.parameters import Parameter
from flow_policy_ros.process import Stop, run_node

PATIENCE_S = 20.0  # for somebody to listen
SETTLE_S = 1.0  # after the last message, for the last inference
OTHER_CLOCK_NS = 60_000_000_000
CLOCK_EVERY_NS = 10_000_000
PARAMETERS = (
    Parameter("bag", "", "rosbag2 folder, or one storage file", fixed=True),
    Parameter("topics", "", "BAG_TOPIC=TOPIC pairs, separated by commas", fixed=True),
    Parameter("rate", 1.0, "seconds of the bag per second", 0.001, 1000.0, fixed=True),
)


class Player(Node):
    """Plays once, then ends."""

    def __init__(self):
        super().__init__("player")
        parameters.declare(self, PARAMETERS)
        pairs = [pair.split("=") for pair in self._get("topics").split(",") if pair]
        if not pairs or any(len(pair) != 2 for pair in pairs):
            raise InputError("parameter topics must be BAG_TOPIC=TOPIC pairs, separated by commas")
        self._bag = Bag(self._get("bag"))
        types = self._bag.topics()
        self._outputs = {}
        for recorded, topic in pairs:
            kind = message_class(types[recorded]) if recorded in types else None
            if kind is None:
                raise InputError(
                    f"topic {recorded} is not in the bag, or its type is not installed"
                )
            self._outputs[recorded] = self.create_publisher(kind, topic, 50)
        self._clock_pub = self.create_publisher(Clock, "/clock", 50)
        self.count = 0

    def _get(self, name: str):
        return self.get_parameter(name).value

    def spin(self, executor: SingleThreadedExecutor, stop: Stop) -> None:
        """Wait for subscribers, play, give the listeners time to finish."""
        deadline = time.monotonic() + PATIENCE_S
        waiting = list(self._outputs.values())
        while waiting and not stop.requested:
            executor.spin_once(timeout_sec=0.05)
            waiting = [p for p in waiting if not p.get_subscription_count()]
            if waiting and time.monotonic() > deadline:
                names = ", ".join(p.topic_name for p in waiting)
                raise InputError(f"nobody listens to {names} after {PATIENCE_S:.0f} s")
        self._play(executor, stop)
        end = time.monotonic() + SETTLE_S
        while time.monotonic() < end and not stop.requested:
            executor.spin_once(timeout_sec=0.05)
        self.get_logger().info(
            f"played {self.count} messages; problems: {self._bag.problems or 'none'}"
        )

    def _play(self, executor: SingleThreadedExecutor, stop: Stop) -> None:
        rate, first, begin, shown = self._get("rate"), None, 0.0, -CLOCK_EVERY_NS
        for message in self._bag.messages(self._outputs):
            if stop.requested:
                return
            if first is None:
                self._set_clocks(self._now_of(message), executor)
                first, begin = message.log_time, time.monotonic()
            due = begin + (message.log_time - first) / 1e9 / rate
            while (left := due - time.monotonic()) > 0 and not stop.requested:
                executor.spin_once(timeout_sec=min(left, 0.05))
            now = self._now_of(message)
            if now - shown >= CLOCK_EVERY_NS or now < shown:
                self._clock_pub.publish(Clock(clock=to_time(now)))
                shown = now
            self._outputs[message.topic].publish(bytes(message.data))
            self.count += 1

    def _set_clocks(self, now: int, executor: SingleThreadedExecutor) -> None:
        """Tell the time for a moment before the first message: a clock that jumps makes a node start again."""
        for _ in range(5):
            self._clock_pub.publish(Clock(clock=to_time(now)))
            executor.spin_once(timeout_sec=0.05)

    def _now_of(self, message: Message) -> int:
        """What the clock showed when a message was recorded."""
        if message.type not in STAMPED:
            return message.log_time
        try:
            stamp = header_stamp(message)
        except BadMessage:
            return message.log_time
        other = abs(message.log_time - stamp) > OTHER_CLOCK_NS
        return stamp if other else message.log_time


def main() -> int:
    """Entry point."""
    return run_node(Player, Player.spin)


if __name__ == "__main__":
    sys.exit(main())

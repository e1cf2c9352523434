"""How every node of this package starts, spins and ends.

The default signal handlers of rclpy invalidate the context before a node can say goodbye, so a
final hold could not be sent. Here signals only set a flag; the node ends itself while everything still works.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

# NOTE: before rclpy starts: Fast DDS reads these once. Jazzy and older know the first name, Kilted both.
# Humble keeps to this machine by a network transport of its own, beside which that of a profile reaches the network.
if os.environ.get("ROS_LOCALHOST_ONLY") != "1":
    for _name in ("FASTRTPS_DEFAULT_PROFILES_FILE", "FASTDDS_DEFAULT_PROFILES_FILE"):
        os.environ.setdefault(_name, str(Path(__file__).parent / "config" / "fastdds.xml"))

try:
    import rclpy
except ImportError as error:
    raise SystemExit(
        f"rclpy cannot be imported ({error}): source a ROS 2 installation, or pip install 'flow_policy_ros[wheels]'"
    ) from None

from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.signals import SignalHandlerOptions

from flow_policy_rl.errors import InputError, RunFailed


class Stop:
    """Becomes true at SIGINT or SIGTERM."""

    def __init__(self):
        self.requested = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._request)

    def _request(self, *_) -> None:
        self.requested = True


def run_node(
    make: Callable[[], Node],
    spin: Callable[[Node, SingleThreadedExecutor, Stop], None] | None = None,
) -> int:
    """Create a node, spin it until a signal or until `spin` returns, end it cleanly. Returns the exit code.

    A node may have a `close()`, called while it can still publish; what it raises ends the process as what `spin` does.
    """
    stop = Stop()
    try:
        rclpy.init(args=sys.argv, signal_handler_options=SignalHandlerOptions.NO)
    except RuntimeError as error:  # what follows --ros-args, a parameter file say
        print(f"error: ROS arguments: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    try:
        node = make()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        rclpy.try_shutdown()
        return 2
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    try:
        try:
            (spin or spin_forever)(node, executor, stop)
        finally:
            if hasattr(node, "close"):
                node.close()
        return 0
    except (InputError, RunFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    finally:
        executor.shutdown()
        node.destroy_node()
        rclpy.try_shutdown()


def spin_forever(node: Node, executor: SingleThreadedExecutor, stop: Stop) -> None:
    """Serve callbacks until a signal."""
    while not stop.requested:
        executor.spin_once(timeout_sec=0.1)

"""`bench_peer`: plays the robot for `flow-policy bench ros`, and measures what the policy node does.

Joint states and poses at 100 Hz, on request 640x480 images at 30 Hz, stamped with system time; follows what it is
commanded. Writes one JSON file: end-to-end times (from publishing the observation to having the command's bytes in this
process, paired by DDS sequence number, which Humble does not give; a controller in C++ reads them at once), the node's
own record of every inference, frames published, and what the node says of their transport and decoding.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import PoseStamped
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.serialization import deserialize_message
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import Float64
from trajectory_msgs.msg import JointTrajectory

from flow_policy_rl.errors import InputError
from flow_policy_rl.serving.robot import load_robot
from flow_policy_rl.serving.trajectory_controller import TrajectoryController, TrajectoryRejected
from flow_policy_ros import messages, parameters
from flow_policy_ros.graph import numbered
from flow_policy_ros.parameters import Parameter
from flow_policy_ros.process import Stop, run_node

STATE_HZ, IMAGE_HZ = 100.0, 30.0
IMAGE_SHAPE = (480, 640, 3)
WARM_UP_S = 3.0  # discovery, first inferences: not counted
START_UP_S = 30.0
PARAMETERS = (
    Parameter("robot", "panda", "name of a robot, or path of a robot file"),
    Parameter("duration_s", 20.0, "how long to measure", 1.0, 86_400.0),
    Parameter("images", False, "publish camera images"),
    Parameter("out", "bench.json", "file to write"),
)


class BenchPeer(Node):
    """Source, controller and stopwatch."""

    def __init__(self):
        super().__init__("bench_peer")
        parameters.declare(self, PARAMETERS)
        robot = load_robot(self._get("robot"))
        topics = robot.topics
        self._names = list(robot.limits)
        start = [robot.home.get(n, sum(robot.limits[n].position) / 2) for n in self._names]
        self._controller = TrajectoryController(self._names, np.array(start))
        self._joints = self.create_publisher(JointState, topics.joint_states, 5)
        self._poses = [self.create_publisher(PoseStamped, t, 5) for t in topics.poses.values()]
        self._images = [self.create_publisher(Image, t, 1) for t in topics.images.values()]
        said = topics.speed_scaling
        self._speed = self.create_publisher(Float64, said, 5) if said else None
        if not self._get("images"):
            self._images = []
        pixels = np.random.default_rng(0).integers(0, 255, IMAGE_SHAPE, dtype=np.uint8)
        self._frame = messages.image(pixels, "camera", 0)
        self._sent: dict[int, int] = {}
        self._received: dict[int | None, int] = {}
        self._records: list[dict] = []
        self._frames = 0
        self._cameras = [p.topic_name for p in self._images]
        self._status: dict[str, str] = {}
        self.create_subscription(DiagnosticArray, "/diagnostics", self._on_status, 10)
        hear = numbered(self._on_command)
        self.create_subscription(JointTrajectory, topics.command, hear, 10, raw=True)
        self.create_subscription(DiagnosticArray, "/policy_node/inference", self._on_record, 100)
        self.create_timer(1 / STATE_HZ, self._publish_state)
        if self._images:
            self.create_timer(1 / IMAGE_HZ, self._publish_images)

    def _get(self, name: str):
        return self.get_parameter(name).value

    def _now(self) -> int:
        return self.get_clock().now().nanoseconds

    def _publish_state(self) -> None:
        stamp = self._now()
        for publisher in self._poses:
            publisher.publish(
                messages.pose_stamped(np.array([0.5, 0, 0.02, 0, 0, 0, 1]), "world", stamp)
            )
        position, velocity, _ = self._controller.sample(stamp / 1e9)
        msg = messages.joint_state(self._names, position, velocity, stamp)
        if self._speed is not None:
            self._speed.publish(Float64(data=100.0))
        self._sent[stamp] = time.perf_counter_ns()
        self._joints.publish(msg)

    def _publish_images(self) -> None:
        stamp = self._now()
        self._frame.header.stamp = messages.to_time(stamp)
        self._sent[stamp] = time.perf_counter_ns()
        self._frames += 1
        for publisher in self._images:
            publisher.publish(self._frame)

    def _on_command(self, data: bytes, number: int | None) -> None:
        self._received[number] = time.perf_counter_ns()
        msg = deserialize_message(data, JointTrajectory)
        times = np.array([messages.seconds(p.time_from_start) for p in msg.points])
        positions = np.array([p.positions for p in msg.points])
        velocities = np.array([p.velocities for p in msg.points])
        try:
            now = self._now() / 1e9
            self._controller.accept(msg.joint_names, times, positions, velocities, now)
        except TrajectoryRejected as error:
            self.get_logger().warning(f"trajectory rejected: {error}")

    def _on_record(self, msg: DiagnosticArray) -> None:
        self._records.append({p.key: p.value for p in msg.status[0].values})

    def _on_status(self, msg: DiagnosticArray) -> None:
        for status in msg.status:
            if status.name == "/policy_node":
                self._status = {p.key: p.value for p in status.values}

    def _camera_counts(self) -> dict[str, int]:
        """Frames that the policy node received, lost and used so far, over all cameras."""
        return {
            what: sum(int(self._status.get(f"{what} of {topic}", 0)) for topic in self._cameras)
            for what in ("received", "lost", "used")
        }

    def _camera_latencies(self) -> dict[str, dict[str, list[float]]]:
        """p50, p95, p99 and max of the node's last frames by camera: from stamp to callback, and to decode them."""
        return {
            topic: {
                what: [float(v) for v in self._status[f"{what}_ms of {topic}"].split(" / ")]
                for what in ("transport", "decode")
            }
            for topic in self._cameras
        }

    def spin(self, executor: SingleThreadedExecutor, stop: Stop) -> None:
        """Measure, then write."""
        begin = time.monotonic()
        while not self._records and not stop.requested:
            executor.spin_once(timeout_sec=0.1)
            if time.monotonic() - begin > START_UP_S:
                raise InputError(f"no inference within {START_UP_S:.0f} s; see policy_node.log")
        self._run(executor, stop, WARM_UP_S)
        self._records.clear()
        frames, counts = self._frames, self._camera_counts()
        self._run(executor, stop, self._get("duration_s"))
        end_to_end = []
        for record in self._records:
            sent = self._sent.get(int(record["observation_stamp"]))
            received = self._received.get(int(record["command_sequence"]))
            if sent is not None and received is not None:
                end_to_end.append((received - sent) / 1e6)
        result = {
            "end_to_end_ms": end_to_end,
            "records": self._records,
            "frames": {
                "published": (self._frames - frames) * len(self._cameras),
                **{what: n - counts[what] for what, n in self._camera_counts().items()},
            },
            "cameras_ms": self._camera_latencies(),
        }
        partial = Path(self._get("out")).with_suffix(".partial")
        partial.write_text(json.dumps(result))
        partial.rename(self._get("out"))

    def _run(self, executor: SingleThreadedExecutor, stop: Stop, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not stop.requested:
            executor.spin_once(timeout_sec=0.05)


def main() -> int:
    """Entry point."""
    return run_node(BenchPeer, BenchPeer.spin)


if __name__ == "__main__":
    sys.exit(main())

"""`policy_node`: a `policy.onnx` as a ROS 2 lifecycle node. Joint states and poses in, trajectory chunks out.

    configure   load the policy and the robot file, check one against the other, warm up
    activate    subscribe to nothing new, forget the past, begin at the next complete observation
    deactivate  one stop trajectory from where the arm is commanded to be, then silence

Dry run is the default: chunks are computed and published on `~/planned_chunk`, and the arm is commanded
only when `armed`. The robot file names the topics. Besides: `~/inference` (one record per inference,
with its latencies) and `/diagnostics`.
"""

import sys
import threading
import time
from dataclasses import dataclass

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from geometry_msgs.msg import PoseStamped
from rcl_interfaces.msg import FloatingPointRange, ParameterDescriptor
from rclpy._rclpy_pybind11 import RCLError
from rclpy.clock import Clock, ClockType
from rclpy.duration import Duration
from rclpy.executors import SingleThreadedExecutor
from rclpy.lifecycle import LifecycleNode, TransitionCallbackReturn
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import JointState
from trajectory_msgs.msg import JointTrajectory

from flow_policy_rl.errors import InputError
from flow_policy_rl.serving.chunk_scheduler import ChunkScheduler
from flow_policy_rl.serving.decode import stamp_ns
from flow_policy_rl.serving.onnx_policy import OnnxPolicy
from flow_policy_rl.serving.robot import load_robot
from flow_policy_rl.serving.safety import Rejected, SafetyFilter
from flow_policy_rl.serving.streams import NotReady, Snapshot, Streams, topics_of
from flow_policy_rl.spec import ObservationField
from flow_policy_ros import messages
from flow_policy_ros.process import Stop, run_node

MEASURED = (
    "measured_joint_pos"  # where the commanded joints are, read along with the policy's own inputs
)
STOP_TIME_S = 0.1
LAST_WORDS_S = 0.2
WATCHDOG_PERIOD_S = 0.05
DIAGNOSTICS_PERIOD_S = 1.0
WARM_UP = 20
SENSOR_QOS = QoSProfile(
    depth=5, reliability=ReliabilityPolicy.BEST_EFFORT
)  # matches every publisher


@dataclass
class InForce:
    """The chunk that is being executed, after safety: (H, A), and the time (ns) of its observation."""

    chunk: np.ndarray
    stamp: int

    def commanded(self, at: int, control_dt: float) -> np.ndarray:
        """Position (A,) commanded at a time (ns)."""
        steps = (at - self.stamp) / 1e9 / control_dt  # action k is due at k + 1
        points = np.arange(1, len(self.chunk) + 1)
        return np.array([np.interp(steps, points, joint) for joint in self.chunk.T])


class PolicyNode(LifecycleNode):
    """Parameters, callbacks and topics; the work is done by `flow_policy_rl.serving`."""

    def __init__(self):
        super().__init__("policy_node")
        self._text("policy", "", "path of the policy.onnx")
        self._text("robot", "panda", "name of a robot, or path of a robot file")
        self._flag(
            "armed", False, "command the arm; otherwise dry run: chunks are computed and shown only"
        )
        self._flag("autostart", True, "configure and activate without a lifecycle manager")
        self._text("noise", "zero", "where the flow starts: zero, or random from `seed`")
        self.declare_parameter("seed", 0, ParameterDescriptor(description="seed of random noise"))
        self._number("max_input_age_s", 0.2, 0.001, 10.0, "older input is stale: hold")
        self._number(
            "max_silence_s", 1.0, 0.01, 60.0, "no message at all for this long (steady clock): hold"
        )
        self._number(
            "max_start_distance",
            0.5,
            0.0,
            10.0,
            "refuse to start if the first target is further away",
        )
        self.problem = ""
        self._active = False
        self._in_force: InForce | None = None
        self._lock = threading.Lock()  # between the executor and the inference thread
        self._wake = threading.Condition()
        self._mailbox: tuple[Snapshot, int, int] | None = None
        self._closing = False
        self._worker: threading.Thread | None = None
        self._command_count = 0
        self._state = (DiagnosticStatus.WARN, "not configured")
        self._holding = False
        self._activated = self._last_message = 0.0
        self._status_pub = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self._inference_pub = self.create_publisher(DiagnosticArray, "~/inference", 50)
        self._planned_pub = self.create_publisher(JointTrajectory, "~/planned_chunk", 10)
        steady = Clock(clock_type=ClockType.STEADY_TIME)
        self.create_timer(WATCHDOG_PERIOD_S, self._watch, clock=steady)
        self.create_timer(DIAGNOSTICS_PERIOD_S, self._publish_status, clock=steady)

    def _text(self, name: str, default: str, description: str) -> None:
        self.declare_parameter(name, default, ParameterDescriptor(description=description))

    def _flag(self, name: str, default: bool, description: str) -> None:
        self.declare_parameter(
            name, default, ParameterDescriptor(description=description, read_only=True)
        )

    def _number(self, name: str, default: float, low: float, high: float, description: str) -> None:
        bounds = FloatingPointRange(from_value=low, to_value=high)
        self.declare_parameter(
            name,
            default,
            ParameterDescriptor(description=description, floating_point_range=[bounds]),
        )

    def _get(self, name: str):
        return self.get_parameter(name).value

    # --- lifecycle ---

    def on_configure(self, state) -> TransitionCallbackReturn:
        """Load and check everything, and warm up."""
        try:
            self._configure()
        except InputError as error:
            self.problem = str(error)
            self.get_logger().error(self.problem)
            self._set_state(DiagnosticStatus.ERROR, self.problem)
            return TransitionCallbackReturn.FAILURE
        self._set_state(DiagnosticStatus.OK, "configured")
        return TransitionCallbackReturn.SUCCESS

    def _configure(self) -> None:
        self._policy = policy = OnnxPolicy(self._get("policy"))
        spec, robot = policy.spec, load_robot(self._get("robot"))
        if spec.robot != robot.name:
            raise InputError(
                f"policy '{policy.path}' is for robot '{spec.robot}', the robot file is '{robot.name}'"
            )
        if self._get("noise") not in ("zero", "random"):
            raise InputError(f"parameter noise must be zero or random, not '{self._get('noise')}'")
        self._safety = SafetyFilter(
            robot, spec.joint_names, spec.control_dt, self._get("max_start_distance")
        )
        self._scheduler = ChunkScheduler(spec)
        fields = topics_of(spec, robot.topics)
        measured = ObservationField(MEASURED, "joint_position", spec.joint_names, "")
        fields.setdefault(robot.topics.joint_states, []).append(measured)
        self._streams = Streams(fields, self._get("max_input_age_s"))
        self._rng = np.random.default_rng(self._get("seed"))
        zeros = {f.name: np.asarray(f.mean, np.float32)[None] for f in spec.observations}
        for _ in range(WARM_UP):
            policy.infer(zeros, self._noise())
        self._command_pub = self.create_publisher(JointTrajectory, robot.topics.command, 1)
        for topic in fields:
            kind = JointState if topic == robot.topics.joint_states else PoseStamped
            self.create_subscription(
                kind, topic, lambda msg, topic=topic: self._receive(topic, msg), SENSOR_QOS
            )
        self._worker = threading.Thread(target=self._work, daemon=True)
        self._worker.start()

    def on_activate(self, state) -> TransitionCallbackReturn:
        """Begin at the next complete observation."""
        with self._lock:
            self._streams.clear()
            self._scheduler.reset()
            self._in_force, self._holding, self._active = None, False, True
            self._activated = self._last_message = time.monotonic()
        armed = "armed" if self._get("armed") else "dry run"
        self._set_state(DiagnosticStatus.OK, f"active, {armed}")
        return TransitionCallbackReturn.SUCCESS

    def on_deactivate(self, state) -> TransitionCallbackReturn:
        """Stop the arm, then be silent."""
        self._stop()
        self._set_state(DiagnosticStatus.OK, "inactive")
        return TransitionCallbackReturn.SUCCESS

    def close(self) -> None:
        """Last words: stop the arm and see that it has heard, end the thread."""
        if self._active:
            self._stop()
            if hasattr(self._command_pub, "wait_for_all_acked"):  # not in Humble
                self._command_pub.wait_for_all_acked(Duration(seconds=LAST_WORDS_S))
            else:
                time.sleep(LAST_WORDS_S)
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._worker is not None:
            self._worker.join(timeout=1.0)

    def _stop(self) -> None:
        with self._lock:
            self._active = False
            self._hold()
            self._in_force = None

    # --- from message to inference (executor thread) ---

    def _receive(self, topic: str, msg) -> None:
        received = time.perf_counter_ns()
        now = self._now()
        with self._lock:
            if not self._active:
                return
            self._last_message = time.monotonic()
            self._streams.push(topic, stamp_ns(msg) or now, msg)
            try:
                snapshot = self._streams.snapshot(now)
            except NotReady:
                return  # the watchdog says so if it lasts
            if not self._scheduler.due(snapshot.stamp):
                return
            self._scheduler.started(snapshot.stamp)
        with self._wake:
            self._mailbox = (snapshot, received, now)
            self._wake.notify()

    def _now(self) -> int:
        return self.get_clock().now().nanoseconds

    # --- inference (its own thread; onnxruntime releases the interpreter) ---

    def _work(self) -> None:
        while True:
            with self._wake:
                while self._mailbox is None and not self._closing:
                    self._wake.wait()
                if self._closing:
                    return
                (snapshot, received, now), self._mailbox = self._mailbox, None
            try:
                self._infer(snapshot, received, now)
            except (InputError, Rejected) as error:
                self._refuse(str(error))

    def _infer(self, snapshot: Snapshot, received: int, received_at: int) -> None:
        begin = time.perf_counter_ns()
        spec = self._policy.spec
        obs = {f.name: snapshot.obs[f.name][None] for f in spec.observations}
        chunk = self._policy.infer(obs, self._noise())[0].astype(np.float64)  # (H, A)
        done = time.perf_counter_ns()
        with self._lock:
            if not self._active:
                return
            first = self._in_force is None
            start = (
                snapshot.obs[MEASURED]
                if first
                else self._in_force.commanded(snapshot.stamp, spec.control_dt)
            )
            checked = self._safety.check(chunk, start, first)
            rest = self._scheduler.trajectory(checked.chunk, snapshot.stamp, self._now())
            if rest is None:
                raise Rejected("the chunk was late: all of its actions are past")
            self._in_force = InForce(checked.chunk, snapshot.stamp)
            armed = self._get("armed")
            if armed:
                self._command(rest.times, rest.positions, rest.velocities)
        published = time.perf_counter_ns()
        if self._holding:
            self._holding = False
            self._set_state(DiagnosticStatus.OK, "active, " + ("armed" if armed else "dry run"))
        record = {
            "observation_stamp": snapshot.stamp,
            "command_sequence": self._command_count if armed else 0,
            "observation_age_ms": (received_at - snapshot.stamp) / 1e6,
            "wait_ms": (begin - received) / 1e6,
            "inference_ms": (done - begin) / 1e6,
            "publish_ms": (published - done) / 1e6,
            "points": len(rest.times),
            "limited_actions": checked.num_changed,
        }
        self._inference_pub.publish(
            messages.diagnostics(
                "policy_node: inference", DiagnosticStatus.OK, "", record, snapshot.stamp
            )
        )
        times = (np.arange(len(chunk)) + 1) * spec.control_dt
        self._planned_pub.publish(
            messages.joint_trajectory(spec.joint_names, times, chunk, None, snapshot.stamp)
        )

    def _noise(self) -> np.ndarray:
        shape = (1, *self._policy.chunk_shape)
        if self._get("noise") == "random":
            return self._rng.standard_normal(shape, dtype=np.float32)
        return np.zeros(shape, np.float32)

    def _command(self, times: np.ndarray, positions: np.ndarray, velocities: np.ndarray) -> None:
        self._command_pub.publish(
            messages.joint_trajectory(self._policy.spec.joint_names, times, positions, velocities)
        )
        self._command_count += 1

    # --- holding ---

    def _watch(self) -> None:
        """Stop the arm when input is missing for too long, and say which."""
        with self._lock:
            if not self._active:
                return
            silence = time.monotonic() - self._last_message
            try:
                if silence > self._get("max_silence_s"):
                    raise NotReady(f"no message on any input for {silence:.1f} s")
                self._streams.snapshot(self._now())
                return
            except NotReady as error:
                if self._in_force is None and time.monotonic() - self._activated < self._get(
                    "max_silence_s"
                ):
                    return  # the first messages may take a moment
                reason = str(error)
        self._refuse(reason)

    def _refuse(self, reason: str) -> None:
        """Hold, and say why. The next good observation starts again."""
        with self._lock:
            if not self._active:
                return
            self._hold()
            self._scheduler.reset()
            self._in_force = None
            again, self._holding = self._holding, True
        if not again:
            self.get_logger().warning(f"holding: {reason}")
        self._set_state(DiagnosticStatus.ERROR, f"holding: {reason}")

    def _hold(self) -> None:
        """One trajectory that comes to rest from where the arm is commanded to be. Needs the lock."""
        if self._in_force is None or not self._get("armed"):
            return
        control_dt, now = self._policy.spec.control_dt, self._now()
        here = self._in_force.commanded(now, control_dt)
        soon = self._in_force.commanded(now + int(STOP_TIME_S / 2 * 1e9), control_dt)
        self._command(np.array([STOP_TIME_S]), soon[None], np.zeros((1, len(here))))

    # --- saying so ---

    def _set_state(self, level: bytes, text: str) -> None:
        changed, self._state = self._state != (level, text), (level, text)
        if changed:
            self._publish_status()

    def _publish_status(self) -> None:
        level, text = self._state
        values = {
            "policy": self._get("policy"),
            "robot": self._get("robot"),
            "armed": self._get("armed"),
        }
        self._status_pub.publish(
            messages.diagnostics("policy_node", level, text, values, self._now())
        )


def spin(node: PolicyNode, executor: SingleThreadedExecutor, stop: Stop) -> None:
    """Start if asked to, then serve."""
    if node.get_parameter("autostart").value:
        if node.trigger_configure() != TransitionCallbackReturn.SUCCESS:
            raise InputError(node.problem)
        node.trigger_activate()
    while not stop.requested:
        try:
            executor.spin_once(timeout_sec=0.1)
        except RCLError as error:
            # rclpy lets a lifecycle request that is impossible now (activate while active) escape from its service.
            node.get_logger().warning(f"request refused: {error}")


def main() -> int:
    """Entry point."""
    return run_node(PolicyNode, spin)


if __name__ == "__main__":
    sys.exit(main())

"""`policy_node`: a `policy.onnx` as a ROS 2 lifecycle node. Joint states, poses and images in, trajectory chunks out.

    configure   load the policy and the robot file, check one against the other, warm up, find the neighbours
    activate    forget the past, begin at the next complete observation, slowly at first
    deactivate  come to rest from the commanded state, then silence
    cleanup     forget policy and robot
    error       the same stop, then unconfigured

Dry run is the default: chunks are computed and published on `~/planned_chunk`, and the arm is commanded
only when `armed`. The robot file names the topics. Besides: `~/inference` (one record per inference,
with its latencies), `/diagnostics`, `~/emergency_stop`, `~/reset_emergency_stop`, `~/reload`, and on request
`~/debug_inference` (everything that went into an inference and came out).
"""

import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from geometry_msgs.msg import PoseStamped
from rclpy._rclpy_pybind11 import RCLError
from rclpy.callback_groups import ReentrantCallbackGroup
from rclpy.clock import Clock, ClockType, JumpThreshold
from rclpy.duration import Duration
from rclpy.executors import SingleThreadedExecutor
from rclpy.lifecycle import LifecycleNode, TransitionCallbackReturn
from sensor_msgs.msg import CompressedImage, Image, JointState
from std_msgs.msg import Bool, Float64MultiArray
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory

from flow_policy_rl.errors import InputError
from flow_policy_rl.serving.chunk_scheduler import ChunkScheduler
from flow_policy_rl.serving.commander import Commander, Outcome, Plan
from flow_policy_rl.serving.decode import stamp_ns
from flow_policy_rl.serving.monitor import Familiarity, Latencies
from flow_policy_rl.serving.onnx_policy import OnnxPolicy
from flow_policy_rl.serving.robot import Robot, load_robot
from flow_policy_rl.serving.safety import EmergencyStop, Rejected, SafetyFilter
from flow_policy_rl.serving.streams import NotReady, Snapshot, Streams, topics_of
from flow_policy_rl.spec import ObservationField, PolicySpec
from flow_policy_ros import messages, parameters
from flow_policy_ros.graph import Input
from flow_policy_ros.gripper import action_class
from flow_policy_ros.outputs import Outputs
from flow_policy_ros.policy_parameters import PARAMETERS
from flow_policy_ros.process import Stop, run_node

MEASURED = (
    "measured_joint_pos"  # where the commanded joints are, read along with the policy's own inputs
)
STOP_S = 1.5
WATCHDOG_PERIOD_S = 0.05
DIAGNOSTICS_PERIOD_S = 1.0
NEIGHBOURS_PERIOD_S = 0.25
GRIPPER_PERIOD_S = 0.05
WARM_UP = 20
RELOAD_POLL_S = 0.001
SWITCH_S = 0.0005  # how long the inference thread may wait for the interpreter while callbacks use it; 5 ms by default

INPUT_TYPES = {"joint_position": JointState, "joint_velocity": JointState, "pose": PoseStamped}


@dataclass(frozen=True)
class Order:
    """An inference to make: the observation, for which run, when its last message came (steady ns), the ROS time (ns)
    then."""

    snapshot: Snapshot
    run: int
    received: int
    received_at: int
    decoded: int


class _OthersFirst:
    """Awaited in a callback, it lets the executor serve the others before it goes on."""

    def __await__(self):
        yield


class PolicyNode(LifecycleNode):
    """Parameters, callbacks and topics; the work is done by `flow_policy_rl.serving`."""

    def __init__(self):
        super().__init__("policy_node")
        parameters.declare(self, PARAMETERS)
        self.problem = ""
        self._policy: OnnxPolicy | None = None
        self._active = False
        self._lock = threading.Lock()  # between the executor and the inference thread
        self._wake = threading.Condition()
        self._mailbox: Order | None = None
        self._run = 0  # counts activations and clock jumps: an inference that was begun before is not for this run
        self._closing = False
        self._worker: threading.Thread | None = None
        self._inputs: list[Input] = []
        self._outputs: Outputs | None = None  # none in a dry run
        self._ticker = None
        self._reload: threading.Thread | None = None
        self._command_count = self._deadline_misses = self._limited = self._rejected = 0
        self._state = (DiagnosticStatus.WARN, "not configured")
        self._holding = False
        self._obstacle = self._warning = ""
        self._activated = self._last_message = 0.0
        self._last_now = 0
        self._emergency, self._latencies = EmergencyStop(), Latencies()
        self._status_pub = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self._inference_pub = self.create_publisher(DiagnosticArray, "~/inference", 50)
        self._planned_pub = self.create_publisher(JointTrajectory, "~/planned_chunk", 10)
        self._debug_pub = self.create_publisher(Float64MultiArray, "~/debug_inference", 10)
        self.create_service(Trigger, "~/emergency_stop", self._on_emergency_stop)
        self.create_service(Trigger, "~/reset_emergency_stop", self._on_reset_emergency_stop)
        # In a group of its own: while it waits, the callbacks of its group are not served.
        alone = ReentrantCallbackGroup()
        self.create_service(Trigger, "~/reload", self._on_reload, callback_group=alone)
        topic = self._get("emergency_stop_topic")
        self._button = False
        self.create_subscription(Bool, topic, self._on_button, 10)
        steady = Clock(clock_type=ClockType.STEADY_TIME)
        self.create_timer(WATCHDOG_PERIOD_S, self._watch, clock=steady)
        self.create_timer(NEIGHBOURS_PERIOD_S, self._look_around, clock=steady)
        self.create_timer(GRIPPER_PERIOD_S, self._tend_gripper, clock=steady)
        self.create_timer(DIAGNOSTICS_PERIOD_S, self._publish_status, clock=steady)
        back = JumpThreshold(
            min_forward=None, min_backward=Duration(nanoseconds=-1), on_clock_change=True
        )
        self._jumps = self.get_clock().create_jump_callback(back, post_callback=self._on_clock_jump)
        self.add_on_set_parameters_callback(self._on_parameters)

    def _get(self, name: str):
        return self.get_parameter(name).value

    def _on_parameters(self, changes):
        verdict = parameters.check(PARAMETERS, changes, configured=self._policy is not None)
        if verdict.successful and self._policy is not None:
            self._apply({p.name: p.value for p in changes})
        return verdict

    def _most_limited(self, value: Callable) -> int:
        """Plans in a row that may be limited. In a dry run the arm does not follow, so plans are limited for ever."""
        return value("max_limited_in_a_row") if self._get("armed") else 0

    def _apply(self, changes: dict) -> None:
        """Numbers that may change while the node runs."""
        value = lambda name: changes.get(name, self._get(name))  # noqa: E731
        with self._lock:
            self._streams.max_age = int(value("max_input_age_s") * 1e9)
            self._commander.soft_start_s = value("soft_start_s")
            self._familiarity.max_sigma = value("max_sigma")
            self._emergency.max_consecutive_limited = self._most_limited(value)
            if {"max_start_distance", "position_margin"} & set(changes):
                self._commander.safety = self._make_safety(self._policy.spec, self._robot, changes)

    # --- lifecycle ---

    def on_configure(self, state) -> TransitionCallbackReturn:
        """Load and check everything, and warm up."""
        try:
            self._configure()
        except InputError as error:
            self.problem = str(error)
            self.get_logger().error(self.problem)
            self._set_state(DiagnosticStatus.ERROR, self.problem)
            self._release()
            return TransitionCallbackReturn.FAILURE
        self._set_state(DiagnosticStatus.OK, "configured")
        return TransitionCallbackReturn.SUCCESS

    def _configure(self) -> None:
        policy, robot = OnnxPolicy(self._get("policy")), load_robot(self._get("robot"))
        spec = policy.spec
        if spec.robot != robot.name:
            raise InputError(
                f"policy '{policy.path}' is for robot '{spec.robot}', the robot file is '{robot.name}'"
            )
        for p in PARAMETERS:
            if p.choices and self._get(p.name) not in p.choices:
                raise InputError(
                    f"parameter {p.name} must be one of {', '.join(p.choices)}, not '{self._get(p.name)}'"
                )
        if robot.gripper_action is not None:
            action_class(robot.gripper_action)  # in a dry run too
        self._robot = robot
        joining = self._get("joining")
        if joining == "auto":
            joining = "rtc" if spec.prefix_horizon else "replace"
        scheduler = ChunkScheduler(spec, self._get("lead_s"), joining)
        self._commander = Commander(
            scheduler,
            self._make_safety(spec, robot, {}),
            self._emergency,
            self._get("soft_start_s"),
        )
        self._emergency.max_consecutive_limited = self._most_limited(self._get)
        self._familiarity = Familiarity(spec, self._get("max_sigma"))
        fields = topics_of(spec, robot.topics)
        measured = ObservationField(MEASURED, "joint_position", spec.joint_names, "")
        fields.setdefault(robot.topics.joint_states, []).append(measured)
        self._streams = Streams(fields, self._get("max_input_age_s"))
        self._rng = np.random.default_rng(self._get("seed"))
        policy.warm_up(WARM_UP)
        self._policy = policy
        for topic, wanted in fields.items():
            compressed = topic.endswith("/compressed")
            kind = INPUT_TYPES.get(wanted[0].kind, CompressedImage if compressed else Image)
            receive = lambda msg, topic=topic: self._receive(topic, msg)  # noqa: E731
            self._inputs.append(Input(self, kind, topic, receive))
        if self._get("armed"):
            per_tick = self._get("output") == "per_tick"
            self._outputs = Outputs(self, spec.joint_names, robot, per_tick)
            if per_tick:
                self._tick_due, steady = time.monotonic(), Clock(clock_type=ClockType.STEADY_TIME)
                period = 1 / self._get("tick_rate_hz")
                self._ticker = self.create_timer(period, self._tick, clock=steady)
        self._closing = False
        self._worker = threading.Thread(target=self._work, daemon=True)
        self._worker.start()

    def _make_safety(self, spec: PolicySpec, robot: Robot, changes: dict) -> SafetyFilter:
        value = lambda name: changes.get(name, self._get(name))  # noqa: E731
        return SafetyFilter(
            robot,
            spec.joint_names,
            spec.control_dt,
            max_start_distance=value("max_start_distance"),
            position_margin=value("position_margin"),
            workspace=self._get("workspace"),
        )

    def on_activate(self, state) -> TransitionCallbackReturn:
        """Begin at the next complete observation."""
        with self._lock:
            self._streams.clear()
            self._commander.forget()
            self._holding, self._active = False, True
            self._run += 1
            self._activated = self._last_message = time.monotonic()
        self._set_state(DiagnosticStatus.OK, self._active_text())
        return TransitionCallbackReturn.SUCCESS

    def on_deactivate(self, state) -> TransitionCallbackReturn:
        """Stop the arm, then be silent."""
        self._stop()
        self._set_state(DiagnosticStatus.OK, "inactive")
        return TransitionCallbackReturn.SUCCESS

    def on_cleanup(self, state) -> TransitionCallbackReturn:
        """Back to unconfigured."""
        self._release()
        self._set_state(DiagnosticStatus.WARN, "not configured")
        return TransitionCallbackReturn.SUCCESS

    def on_shutdown(self, state) -> TransitionCallbackReturn:
        """Stop the arm and let go of everything."""
        self._last_words()
        self._release()
        self._set_state(DiagnosticStatus.WARN, "shut down")
        return TransitionCallbackReturn.SUCCESS

    def on_error(self, state) -> TransitionCallbackReturn:
        """A callback failed: stop the arm; the node can be configured again."""
        self._last_words()
        self._release()
        self._set_state(DiagnosticStatus.ERROR, "error: see the log")
        return TransitionCallbackReturn.SUCCESS

    def _active_text(self) -> str:
        return "active, " + ("armed" if self._get("armed") else "dry run")

    def close(self) -> None:
        """Last words: stop the arm and see that it has heard, end the thread."""
        self._last_words()
        self._release()

    def _last_words(self) -> None:
        if not self._active:
            return
        self._stop()
        deadline = time.monotonic() + STOP_S
        while (
            self._ticker is not None and time.monotonic() < deadline
        ):  # per tick: ramp down by hand
            self._tick()
            if self._commander.plan is None or self._commander.plan.settled(self._now()):
                break
            time.sleep(1 / self._get("tick_rate_hz"))
        if self._outputs is not None:
            self._outputs.last_words(self._commander.plan, self._now())

    def _release(self) -> None:
        """End the inference thread and give back what configure took."""
        with self._wake:
            self._closing, self._mailbox = True, None
            self._wake.notify()
        if self._worker is not None:
            self._worker.join(timeout=2.0)
            self._worker = None
        if self._ticker is not None:
            self.destroy_timer(self._ticker)
            self._ticker = None
        for neighbour in (*self._inputs, self._outputs):
            if neighbour is not None:
                neighbour.close()
        self._inputs, self._outputs, self._policy = [], None, None

    def _stop(self) -> None:
        with self._lock:
            self._active = False
            self._hold()

    # --- from message to inference (executor thread) ---

    def _receive(self, topic: str, msg) -> None:
        received = time.perf_counter_ns()
        now = self._now()
        with self._lock:
            if not self._active:
                return
            self._last_message = time.monotonic()
            self._last_now = now
            self._streams.push(topic, stamp_ns(msg) or now, msg)
            reference = self._streams.reference
            if self._obstacle or reference is None or not self._commander.scheduler.due(reference):
                return
            try:
                snapshot = self._streams.take(now)
            except NotReady:
                return  # the watchdog says so if it lasts
            self._commander.scheduler.started(snapshot.stamp)
        decoded = time.perf_counter_ns()
        with self._wake:
            self._mailbox = Order(snapshot, self._run, received, now, decoded)
            self._wake.notify()

    def _now(self) -> int:
        return self.get_clock().now().nanoseconds

    def _on_clock_jump(self, jump) -> None:
        """Simulated time went back, or the clock changed: nothing that was planned has a time any more."""
        with self._lock:
            if self._policy is None:
                return
            if self._active and self._last_now:
                self._hold(self._last_now)
            self._streams.clear()
            self._run += 1
            self._commander.stay(self._now())
            self._last_now = 0
            self._last_message = time.monotonic()
        self.get_logger().warning("the clock jumped: starting again from the next observation")

    # --- inference (its own thread; onnxruntime releases the interpreter) ---

    def _work(self) -> None:
        while True:
            with self._wake:
                while self._mailbox is None and not self._closing:
                    self._wake.wait()
                if self._closing:
                    return
                order, self._mailbox = self._mailbox, None
            try:
                self._infer(order)
            except (InputError, Rejected) as error:
                self._rejected += 1
                self._refuse(str(error))
            except Exception as error:  # the node must hold, not run on without its thread
                self.get_logger().error(f"inference failed: {error!r}")
                self._refuse(f"inference failed: {error!r}")

    def _infer(self, order: Order) -> None:
        begin = time.perf_counter_ns()
        policy, snapshot = self._policy, order.snapshot
        with self._lock:
            prefix = self._commander.prefix_inputs(snapshot.stamp)
        fields = policy.spec.observations
        inputs = {f.name: snapshot.obs[f.name][None] for f in fields} | prefix
        noise = self._noise(policy)
        chunk = policy.infer(inputs, noise)[0].astype(np.float64)  # (H, A)
        done = time.perf_counter_ns()
        with self._lock:
            if not self._active or policy is not self._policy or order.run != self._run:
                return
            if self._obstacle:
                raise Rejected(self._obstacle)
            self._check_tracking(snapshot)
            now = self._now()
            outcome = self._commander.accept(chunk, snapshot.stamp, now, snapshot.obs[MEASURED])
            limited = time.perf_counter_ns()
            if self._emergency.tripped:
                raise Rejected(f"emergency stop: {self._emergency.reason}")
            self._limited += bool(outcome.checked.num_changed)
            self._command(outcome.plan, now)
            self._holding = False
        published = time.perf_counter_ns()
        self._recovered(snapshot)
        stages = {
            "observation_age_ms": (order.received_at - snapshot.stamp) / 1e6,
            "decode_ms": (order.decoded - order.received) / 1e6,
            "wait_ms": (begin - order.decoded) / 1e6,
            "inference_ms": (done - begin) / 1e6,
            "safety_ms": (limited - done) / 1e6,
            "publish_ms": (published - limited) / 1e6,
            "overhead_ms": (published - order.received - (done - begin)) / 1e6,
            "end_to_end_ms": (published - order.received) / 1e6
            + (order.received_at - snapshot.stamp) / 1e6,
        }
        self._latencies.add(stages)
        self._record(snapshot, inputs, noise, chunk, outcome, stages)

    def _check_tracking(self, snapshot: Snapshot) -> None:
        """The arm must be where it was sent. Needs the lock."""
        limit, plan = self._get("max_tracking_error"), self._commander.plan
        if plan is None or limit <= 0 or not self._get("armed"):
            return
        error = np.abs(plan.at(snapshot.stamp).position - snapshot.obs[MEASURED])
        error = error[self._commander.safety.arm]
        if (error > limit).any():
            worst = int(error.argmax())
            name = self._policy.spec.joint_names[self._commander.safety.arm[worst]]
            raise Rejected(
                f"{name} is {error[worst]:.3f} from where it was commanded to be, limit {limit:.3f}: "
                "does the controller follow? Deactivate and activate to start from where it is"
            )

    def _recovered(self, snapshot: Snapshot) -> None:
        self._warning = self._familiarity.unusual(snapshot.obs)
        if self._warning:
            self._set_state(
                DiagnosticStatus.WARN, f"{self._active_text()}; unusual input: {self._warning}"
            )
        elif self._state[0] != DiagnosticStatus.OK:
            self._set_state(DiagnosticStatus.OK, self._active_text())

    def _record(self, snapshot, inputs, noise, chunk, outcome: Outcome, stages: dict) -> None:
        """Tell what was done, after it was done."""
        jump = outcome.targets.seam_jump
        record = {
            "observation_stamp": snapshot.stamp,
            "command_sequence": self._command_count if self._get("armed") else 0,
            **stages,
            "points": len(outcome.targets.due),
            "limited_actions": outcome.checked.num_changed,
            "seam_jump": float(np.abs(jump).max()) if jump is not None else 0.0,
            "joining": self._commander.scheduler.joining,
        }
        self._inference_pub.publish(
            messages.diagnostics(
                "policy_node: inference", DiagnosticStatus.OK, "", record, snapshot.stamp
            )
        )
        spec = self._policy.spec if self._policy else None
        if spec is None:
            return
        times = (np.arange(len(chunk)) + 1) * spec.control_dt
        self._planned_pub.publish(
            messages.joint_trajectory(spec.joint_names, times, chunk, None, snapshot.stamp)
        )
        if self._get("debug"):
            arrays = {**inputs, "noise": noise, "action_chunk": chunk[None]}
            self._debug_pub.publish(messages.debug_record(snapshot.stamp, arrays))

    def _noise(self, policy: OnnxPolicy) -> np.ndarray:
        shape = (1, *policy.chunk_shape)
        if self._get("noise") == "random":
            return self._rng.standard_normal(shape, dtype=np.float32)
        return np.zeros(shape, np.float32)

    # --- commands out ---

    def _command(self, plan: Plan, now: int) -> None:
        """Send a plan, unless it goes out tick by tick. Needs the lock."""
        if self._outputs is not None and self._ticker is None:
            self._outputs.send(plan, now)
            self._command_count += 1

    def _tend_gripper(self) -> None:
        with self._lock:
            if self._outputs is not None and not self._obstacle:
                self._outputs.tend_gripper(self._commander.plan, self._now())

    def _tick(self) -> None:
        """The commanded position now, from the same plan; nothing when nothing is planned or it has long come to
        rest."""
        period, now = 1 / self._get("tick_rate_hz"), time.monotonic()
        self._deadline_misses += now - self._tick_due > period
        self._tick_due = max(self._tick_due + period, now)
        with self._lock:
            plan = self._commander.plan if self._policy is not None else None
            at = self._now()
            if plan is None or (not self._active and plan.settled(at - round(4 * period * 1e9))):
                return
            self._outputs.tick(plan, at)

    # --- holding ---

    def _watch(self) -> None:
        """Stop the arm when input is missing for too long, and say which."""
        with self._lock:
            if not self._active:
                return
            silence = time.monotonic() - self._last_message
            try:
                if self._emergency.tripped:
                    raise NotReady(f"emergency stop: {self._emergency.reason}")
                if self._obstacle:
                    raise NotReady(self._obstacle)
                if silence > self._get("max_silence_s"):
                    raise NotReady(
                        f"no message on any input for {silence:.1f} s{self._mismatches()}"
                    )
                self._streams.snapshot(self._now())
                return
            except NotReady as error:
                settling = time.monotonic() - self._activated < self._get("max_silence_s")
                waits = self._commander.plan is None and settling
                if waits and not self._emergency.tripped and not self._obstacle:
                    return  # the first messages may take a moment
                reason = str(error)
        self._refuse(reason)

    def _mismatches(self) -> str:
        found = [i.mismatch for i in self._inputs if i.mismatch]
        return "; " + "; ".join(found) if found else ""

    def _refuse(self, reason: str) -> None:
        """Hold, and say why. The next good observation starts again."""
        with self._lock:
            if not self._active:
                return
            again, self._holding = self._holding, True
            self._hold(silent=again)
        if not again:
            self.get_logger().warning(f"holding: {reason}")
        self._set_state(DiagnosticStatus.ERROR, f"holding: {reason}")

    def _hold(self, now: int | None = None, silent: bool = False) -> None:
        """Come to rest from where the arm is commanded to be. Needs the lock."""
        now = self._now() if now is None else now
        plan = None if silent else self._commander.stop(now)
        if plan is None:
            self._commander.scheduler.reset()
        else:
            self._command(plan, now)

    def _look_around(self) -> None:
        """Neighbours change: QoS of the inputs, rivals and controllers on the command topics."""
        if self._policy is None:
            return
        for stream in self._inputs:
            stream.adapt()
        self._obstacle = self._outputs.problem() if self._outputs is not None else ""

    # --- emergency stop and reload ---

    def _on_button(self, msg: Bool) -> None:
        self._button = bool(msg.data)
        if self._button:
            self._trip(f"{self._get('emergency_stop_topic')} says so")

    def _on_emergency_stop(self, request, response):
        self._trip("requested by service")
        response.success, response.message = True, "stopped until ~/reset_emergency_stop"
        return response

    def _trip(self, reason: str) -> None:
        self._emergency.trip(reason)
        self._refuse(f"emergency stop: {self._emergency.reason}")

    def _on_reset_emergency_stop(self, request, response):
        response.success = not self._button
        response.message = f"{self._get('emergency_stop_topic')} still says stop"
        if response.success:
            response.message = f"was: {self._emergency.reason or 'not tripped'}"
            self._emergency.reset()
        return response

    async def _on_reload(self, request, response):
        """Read the policy file again: the new one must have the same interface.

        Loading takes seconds, in a thread of its own; the old policy goes on being served meanwhile.
        """
        if self._reload is not None:
            response.success, response.message = False, "a reload is under way already"
            return response
        self._reload = threading.Thread(target=self._load_again, args=(response,), daemon=True)
        self._reload.start()
        while self._reload.is_alive():
            self._reload.join(RELOAD_POLL_S)
            await _OthersFirst()
        self._reload = None
        if not response.success:
            self.get_logger().error(response.message)
        return response

    def _load_again(self, response) -> None:
        """Swap the policy if the file fits, and say so in the response."""
        old = self._policy
        try:
            if old is None:
                raise InputError("the node is not configured")
            policy = OnnxPolicy(self._get("policy"))
            self._check_same(policy.spec, old.spec)
            policy.warm_up(WARM_UP)
            familiarity = Familiarity(policy.spec, self._get("max_sigma"))
            with self._lock:
                if self._policy is not old:
                    raise InputError("the node was configured anew meanwhile")
                self._policy, self._familiarity = policy, familiarity
                self._commander.scheduler.reset()
        except Exception as error:  # whatever is wrong with a file must not cost the old policy
            response.success, response.message = False, f"the old policy stays: {error}"
            return
        response.success, response.message = True, f"serving {policy.path}"

    def _check_same(self, new: PolicySpec, old: PolicySpec) -> None:
        for what in (
            "robot",
            "joint_names",
            "control_dt",
            "action_horizon",
            "execute_horizon",
            "prefix_horizon",
        ):
            if getattr(new, what) != getattr(old, what):
                raise InputError(
                    f"{what} is {getattr(new, what)} in the new file, {getattr(old, what)} in the old"
                )
        if _interface(new) != _interface(old):
            raise InputError(
                "the new file has other observations: deactivate, clean up and configure again"
            )

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
            "joining": self._commander.scheduler.joining if self._policy else "",
            "commands": self._command_count,
            "deadline_misses": self._deadline_misses,
            "limited_plans": self._limited,
            "rejected_chunks": self._rejected,
            "emergency_stops": self._emergency.trips,
            "emergency_stop": self._emergency.reason or "no",
        }
        if self._policy is not None:
            now = self._now()
            values |= {f"age of {t}": f"{age:.3f} s" for t, age in self._streams.ages(now).items()}
            values |= {f"qos of {i.topic}": i.mismatch or "fits" for i in self._inputs}
            for i in self._inputs:
                values |= {
                    f"received of {i.topic}": i.arrivals.received,
                    f"lost of {i.topic}": i.arrivals.lost,
                    f"used of {i.topic}": self._streams.used[i.topic],
                }
            values |= self._latencies.summary()
        self._status_pub.publish(
            messages.diagnostics("policy_node", level, text, values, self._now())
        )


def _interface(spec: PolicySpec) -> list[tuple]:
    """What a policy reads."""
    return [(f.name, f.kind, f.elements, f.source, f.resolution) for f in spec.observations]


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
    sys.setswitchinterval(SWITCH_S)
    return run_node(PolicyNode, spin)


if __name__ == "__main__":
    sys.exit(main())

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

Here are the callbacks and who may command when. The work is done by `served` (policy, streams, safety), `worker` (the
inference thread), `graph` and `outputs` (neighbours) and `reports` (what is told).
"""

import sys
import threading
import time

import numpy as np
from diagnostic_msgs.msg import DiagnosticStatus
from rclpy.clock import Clock, ClockType, JumpThreshold
from rclpy.duration import Duration
from rclpy.executors import SingleThreadedExecutor
from rclpy.impl.implementation_singleton import rclpy_implementation
from rclpy.lifecycle import LifecycleNode, TransitionCallbackReturn
from sensor_msgs.msg import JointState
from std_srvs.srv import Trigger

from flow_policy_rl.errors import InputError
from flow_policy_rl.serving.clock_watch import ClockWatch
from flow_policy_rl.serving.commander import Plan
from flow_policy_rl.serving.decode import stamp_ns
from flow_policy_rl.serving.safety import EmergencyStop, Rejected
from flow_policy_rl.serving.streams import MEASURED, NotReady
from flow_policy_rl.serving.tick_stream import TickStream
from flow_policy_ros import parameters
from flow_policy_ros.graph import Button, Input, clock_problem, input_type
from flow_policy_ros.gripper import action_class
from flow_policy_ros.outputs import Outputs
from flow_policy_ros.policy_parameters import PARAMETERS
from flow_policy_ros.process import Stop, run_node
from flow_policy_ros.reports import (
    Inference,
    InferenceReport,
    Order,
    Reasons,
    StatusReport,
    arrival,
    input_facts,
)
from flow_policy_ros.served import Served
from flow_policy_ros.slow_service import SlowService
from flow_policy_ros.worker import Worker

STOP_S = 1.5
END_S = 2.0  # for the inference under way, when the node ends
WATCHDOG_PERIOD_S = 0.05
DIAGNOSTICS_PERIOD_S = 1.0
NEIGHBOURS_PERIOD_S = 0.25
GRIPPER_PERIOD_S = 0.05
POLL_S = 0.001  # while an injected delay lasts
SWITCH_S = 0.0005  # how long the inference thread may wait for the interpreter while callbacks use it; 5 ms by default
SELDOM_S = 1.0  # a warning that could come with every message is logged no more often


class PolicyNode(LifecycleNode):
    """Callbacks, and the rules of who may command when.

    Attributes:
        problem: why it could not be configured.
        starting: whether it is configured by itself, before it serves anybody.
    """

    def __init__(self):
        super().__init__("policy_node")
        parameters.declare(self, PARAMETERS)
        self.problem = ""
        self.starting = False
        self._served: Served | None = None  # when it is configured
        self._active = self._holding = False
        self._lock = threading.Lock()  # between the executor and the inference thread
        self._worker: Worker | None = None
        self._run = 0  # counts activations, holds and clock jumps: an inference begun before is not for this run
        self._inputs: list[Input] = []
        self._outputs: Outputs | None = None  # none in a dry run
        self._ticker, self._ticks = None, None  # per-tick output
        self._obstacle = ""  # why nothing may be commanded, whatever the policy says
        self._clock_jumped = False
        self._clock_watch = ClockWatch(self._now)
        self._last_message = self._emptied = 0.0  # s, steady; when the streams were empty
        self._begins = 0  # ns; when the node was activated
        self._emergency = EmergencyStop()
        self._button: Button | None = None  # heard from the beginning, in every state
        self._status, self._inferences = StatusReport(self), InferenceReport(self)
        self._reasons = Reasons()
        self.create_service(Trigger, "~/emergency_stop", self._on_emergency_stop)
        self.create_service(Trigger, "~/reset_emergency_stop", self._on_reset_emergency_stop)
        SlowService(self, "~/reload", self._load_again, otherwise="the old policy stays")
        self._listen_for_stop()
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

    def _now(self) -> int:
        return self.get_clock().now().nanoseconds

    def _on_parameters(self, changes):
        verdict = parameters.check(PARAMETERS, changes, configured=self._served is not None)
        if verdict.successful and self._served is not None:
            new = {p.name: p.value for p in changes}
            try:
                with self._lock:
                    self._served.apply(lambda name: new.get(name, self._get(name)))
            except InputError as error:
                verdict.successful, verdict.reason = False, str(error)
        return verdict

    # --- lifecycle ---

    def on_configure(self, state) -> TransitionCallbackReturn:
        """Load and check everything, and warm up."""
        try:
            self._configure()
        except InputError as error:
            self.problem = str(error)
            # A node that starts itself ends with this as its last line.
            if not self.starting:
                self.get_logger().error(self.problem)
            self._set_state(DiagnosticStatus.ERROR, self.problem)
            self._release()
            return TransitionCallbackReturn.FAILURE
        self._set_state(DiagnosticStatus.OK, "configured")
        return TransitionCallbackReturn.SUCCESS

    def _configure(self) -> None:
        parameters.check_choices(PARAMETERS, self._get)
        self._listen_for_stop()
        served = Served.load(self._get, self._emergency)
        if served.robot.gripper_action is not None:
            action_class(served.robot.gripper_action)  # in a dry run too
        self._served = served
        for topic, fields in served.streams.fields.items():
            receive = lambda msg, topic=topic: self._receive(topic, msg)  # noqa: E731
            kind = input_type(topic, fields[0])
            joints = {name for f in fields for name in f.elements} if kind is JointState else ()
            self._inputs.append(Input(self, kind, topic, receive, joints))
        if self._get("armed"):
            per_tick = self._get("output") == "per_tick"
            names = served.policy.spec.joint_names
            self._outputs = Outputs(self, names, served.robot, per_tick, self._on_slowed)
            if per_tick:
                self._tick_due, steady = time.monotonic(), Clock(clock_type=ClockType.STEADY_TIME)
                period = 1 / self._get("tick_rate_hz")
                self._ticks = TickStream(served.commander, period, self._say_stalled)
                self._ticker = self.create_timer(period, self._tick, clock=steady)
        self._worker = Worker(self._try_to_infer)
        self._look_around()

    def on_activate(self, state) -> TransitionCallbackReturn:
        """Begin at the next complete observation."""
        with self._lock:
            self._begins = self._now()
            self._served.streams.clear()
            self._served.commander.begin_anew(self._begins)
            self._holding, self._active = False, True
            self._run += 1
            self._last_message = self._emptied = time.monotonic()
            if self._outputs is not None:
                self._outputs.doubt()
        self._say_active()
        spec, topics = self._served.policy.spec, self._served.robot.topics
        doing = (
            f"ARMED, commands go to {self.resolve_topic_name(topics.command)}"
            if self._outputs is not None
            else "dry run, nothing is commanded (armed:=true moves the arm)"
        )
        self.get_logger().info(f"active: '{spec.task}' on {self._served.robot.name}: {doing}")
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
        self.close()
        self._set_state(DiagnosticStatus.WARN, "shut down")
        return TransitionCallbackReturn.SUCCESS

    def on_error(self, state) -> TransitionCallbackReturn:
        """A callback failed: stop the arm; the node can be configured again."""
        self.close()
        self._set_state(DiagnosticStatus.ERROR, "error: see the log")
        return TransitionCallbackReturn.SUCCESS

    def close(self) -> None:
        """Stop the arm and let go of everything."""
        if self._active:
            self._stop()
        self._release()

    def _last_words(self) -> None:
        """See that the arm has heard where it ends, and tick by tick that it comes there."""
        commander, deadline = self._served.commander, time.monotonic() + STOP_S
        ends = self._ticker is None
        while not ends and time.monotonic() < deadline:
            ends = commander.plan is None or commander.plan.settled(self._now())
            self._tick()
            time.sleep(1 / self._get("tick_rate_hz"))
        self._outputs.last_words(commander.plan, self._now())

    def _release(self) -> None:
        """End motion and inference thread, and give back what configure took."""
        if self._outputs is not None:
            self._last_words()
        if self._worker is not None:
            self._worker.close(END_S)
            self._worker = None
        if self._ticker is not None:
            self.destroy_timer(self._ticker)
            self._ticker, self._ticks = None, None
        for neighbour in (*self._inputs, self._outputs):
            if neighbour is not None:
                neighbour.close()
        self._inputs, self._outputs, self._served = [], None, None

    # --- from message to inference (executor thread) ---

    def _receive(self, topic: str, msg) -> None:
        received = time.perf_counter_ns()
        now = self._now()
        with self._lock:
            if self._clock_was_set() or not self._active:
                return
            self._last_message = time.monotonic()
            streams, commander = self._served.streams, self._served.commander
            stamp = stamp_ns(msg) or now
            if 0 < self._begins - stamp <= streams.max_age:
                # Of before the run: a simulation may have been reset since. Older ones are let through, to be named as
                # stale.
                return
            streams.push(topic, stamp, msg)
            if streams.fields[topic][0].kind == "image":
                decoding = time.perf_counter_ns() - received
                self._status.latencies.add(arrival(topic, now - stamp, decoding))
            reference = streams.reference
            if self._obstacle or reference is None or not commander.due(reference):
                return
            try:
                snapshot = streams.take(now)
            except NotReady:
                return  # the watchdog says so if it lasts
            if commander.idle:  # who is there by now?
                self._obstacle = self._find_obstacle()
                if self._obstacle:
                    return
            commander.scheduler.started(snapshot.stamp)
            order = Order(snapshot, self._run, received, now, time.perf_counter_ns())
        self._worker.give(order)

    def _on_clock_jump(self, jump) -> None:
        """Simulated time went back, or the clock changed: come to rest from where the controller is now in the plan, or
        forget a plan that has no time any more."""
        with self._lock:
            if self._served is None:
                return
            commander, now = self._served.commander, self._now()
            if self._ticks is not None:
                self._ticks.stand(now, time.monotonic())
            elif commander.plan is not None and now < commander.plan.start:
                # The controller's trajectory lies in its future, and it holds; a stop from the plan, which is not where
                # the arm stands, would begin with a jump.
                commander.forget()
            elif self._active:
                self._hold()
            self._begins = 0
            self._served.streams.clear()
            self._run += 1
            self._last_message = self._emptied = time.monotonic()
        self._clock_jumped = True  # if that is because there are two clocks, it will again
        self.get_logger().warning(
            "the clock jumped: starting again from the next observation",
            throttle_duration_sec=SELDOM_S,
        )

    def _clock_was_set(self) -> bool:
        """Whether the system clock was, since the last call: then the plan goes on where it is, to rest, and a new run
        begins. Needs the lock."""
        step = 0 if self.get_clock().ros_time_is_active else self._clock_watch.step()
        if not step or self._served is None:
            return False
        self._served.commander.delay(step)
        if self._ticks is not None:
            self._ticks.clock_set(step)
        if self._active:
            self._hold()
        self._served.streams.clear()
        self._run += 1
        self._last_message = time.monotonic()
        self.get_logger().warning(
            f"the system clock was set by {step / 1e9:+.3f} s: starting again from the next observation"
        )
        return True

    # --- inference (its own thread; onnxruntime releases the interpreter) ---

    def _try_to_infer(self, order: Order) -> None:
        try:
            self._infer(order)
        except (InputError, Rejected) as error:
            self._status.counts["rejected_chunks"] += 1
            self._refuse(str(error))
        except Exception as error:  # the node must hold, not run on without its thread
            self.get_logger().error(f"inference failed: {error!r}")
            self._refuse(f"inference failed: {error!r}")

    def _infer(self, order: Order) -> None:
        begin, begin_at = time.perf_counter_ns(), self._now()
        served, snapshot = self._served, order.snapshot
        policy = served.policy
        with self._lock:
            inputs = served.inputs(snapshot)
        noise = served.noise(self._get("noise") == "random")
        chunk = policy.infer(inputs, noise)[0].astype(np.float64)  # (H, A)
        self._dawdle(order, begin_at)
        done = time.perf_counter_ns()
        with self._lock:
            self._clock_was_set()
            if not self._current(order) or policy is not served.policy:
                return
            if self._obstacle:
                raise Rejected(self._obstacle)
            commander, measured = served.commander, snapshot.obs[MEASURED]
            now = self._now()
            self._hold_back(now)
            commander.check_following(snapshot.stamp, measured)
            outcome = commander.accept(chunk, snapshot.stamp, now, measured)
            limited = time.perf_counter_ns()
            if self._emergency.tripped:
                raise Rejected(f"emergency stop: {self._emergency.reason}")
            self._status.count(outcome)
            self._command(outcome.plan, now)
            held, self._holding = self._holding, False
        published = time.perf_counter_ns()
        if held:
            self.get_logger().info("holding no longer")
        with self._lock:
            if self._current(order):
                self._say_active(served.familiarity.unusual(snapshot.obs))
        made = Inference(order, inputs, noise, chunk, outcome, begin, done, limited, published)
        stages = made.stages()
        self._status.latencies.add(stages)
        sequence = self._status.counts["commands"] if self._outputs is not None else 0
        self._inferences.publish(made, stages, served, sequence, self._get("debug"))

    def _current(self, order: Order) -> bool:
        """Whether the run that an inference was begun for is still under way."""
        return self._active and order.run == self._run

    def _dawdle(self, order: Order, begin: int) -> None:
        """The delay that a test injects, since `begin` (ROS time, ns)."""
        until = begin + self._get("inject_delay_s") * 1e9
        while self._now() < until and self._current(order):
            time.sleep(POLL_S)

    # --- commands out ---

    def _command(self, plan: Plan, now: int) -> None:
        """Send a plan, unless it goes out tick by tick. Needs the lock."""
        if self._outputs is not None and self._ticker is None:
            self._outputs.send(plan, now)
            self._status.counts["commands"] += 1

    def _tend_gripper(self) -> None:
        with self._lock:
            if self._outputs is not None and not self._obstacle:
                self._outputs.tend_gripper(self._served.commander.plan, self._now())

    def _tick(self) -> None:
        """The commanded position now, from the same plan; nothing when nothing is planned or it has long come to
        rest."""
        period, now = 1 / self._get("tick_rate_hz"), time.monotonic()
        self._status.counts["deadline_misses"] += now - self._tick_due > period
        self._tick_due = max(self._tick_due + period, now)
        with self._lock:
            self._clock_was_set()
            if self._ticks is None:
                return
            position = self._ticks.next(self._now(), time.monotonic(), self._active)
            if position is not None:
                self._outputs.tick(position)

    def _hold_back(self, now: int) -> None:
        """What ticks missed is not made up for. Before the plan is changed; needs the lock."""
        if self._ticks is not None:
            self._ticks.hold_back(now, time.monotonic())

    def _say_stalled(self) -> None:
        self.get_logger().warning(
            "no tick for too long: the arm goes on from where it was sent last, from rest",
            throttle_duration_sec=SELDOM_S,
        )

    # --- holding ---

    def _watch(self) -> None:
        """Stop the arm when input is missing for too long, and say which."""
        with self._lock:
            if self._clock_was_set() or not self._active:
                return
            silence, longest = time.monotonic() - self._last_message, self._get("max_silence_s")
            try:
                if self._emergency.tripped:
                    raise NotReady(f"emergency stop: {self._emergency.reason}")
                if self._obstacle:
                    raise NotReady(self._obstacle)
                if silence > longest:
                    unfit = [i.mismatch for i in self._inputs if i.mismatch]
                    raise NotReady(
                        "; ".join([f"no message on any input for {silence:.1f} s", *unfit])
                    )
                seen = self._served.streams.snapshot(self._now())
                self._served.commander.check_following(seen.stamp, seen.obs[MEASURED])
                return
            except Rejected as error:
                reason = str(error)
            except NotReady as error:
                settling = time.monotonic() - self._emptied < longest
                waits = self._served.commander.idle and settling
                if waits and not self._emergency.tripped:
                    return  # the first messages, and finding each other, may take a moment
                reason = str(error)
        self._refuse(reason)

    def _refuse(self, reason: str) -> None:
        """Hold, and say why. The next good observation starts again."""
        with self._lock:
            self._clock_was_set()
            if not self._active:
                return
            again, self._holding = self._holding, True
            self._run += not again
            self._hold(silent=again)
            if self._outputs is not None and not again:
                self._outputs.doubt()
            news = self._reasons.news(reason, time.monotonic(), begins=not again)
            # Before anything else is: who deactivates it meanwhile has the last word.
            self._set_state(DiagnosticStatus.ERROR, f"holding: {reason}")
        if news:
            self.get_logger().warning(f"holding: {reason}")

    def _stop(self) -> None:
        with self._lock:
            self._clock_was_set()
            self._active = False
            self._hold()

    def _hold(self, silent: bool = False) -> None:
        """Come to rest from where the arm is commanded to be. Needs the lock.

        A controller that follows somebody else, or nobody, is told nothing: where its reference is we do not know, and
        what it has of us ends at rest.
        """
        now = self._now()
        self._hold_back(now)
        commander = self._served.commander
        if silent or (self._obstacle and self._ticks is None):
            commander.leave()
            return
        plan = commander.stop(now)
        if plan is not None:
            self._command(plan, now)

    def _look_around(self) -> None:
        """Neighbours change: QoS of the inputs, rivals and controllers on the command topics, a second clock."""
        self._button.adapt()
        if self._served is None:
            return
        for stream in self._inputs:
            stream.adapt()
            self._served.streams.doubts[stream.topic] = stream.said_twice
        self._obstacle = self._find_obstacle()
        if self._outputs is not None and not self._outputs.heard:
            with self._lock:
                self._served.commander.forget()  # what comes to listen next stands where the arm is

    def _on_slowed(self, reason: str) -> None:
        """At once: what is sent to a controller in slowed time begins with a jump."""
        self._obstacle = reason

    def _find_obstacle(self) -> str:
        """Why nothing may be commanded, whatever the policy says; empty when it may."""
        obstacle = clock_problem(self) if self._clock_jumped else ""
        self._clock_jumped = bool(obstacle)
        if not obstacle and self._outputs is not None:
            obstacle = self._outputs.problem()
        return obstacle

    # --- emergency stop and reload ---

    def _listen_for_stop(self) -> None:
        """On the topic that the parameter names now."""
        topic, old = self._get("emergency_stop_topic"), self._button
        if old is None or old.topic != topic:
            self._button = Button(self, topic, lambda: self._trip(f"{topic} says so"))
            if old is not None:
                old.close()
        self._button.adapt()

    def _on_emergency_stop(self, request, response):
        self._trip("requested by service")
        response.success, response.message = True, "stopped until ~/reset_emergency_stop"
        return response

    def _trip(self, reason: str) -> None:
        self._emergency.trip(reason)
        self._refuse(f"emergency stop: {self._emergency.reason}")

    def _on_reset_emergency_stop(self, request, response):
        response.success = not self._button.pressed
        response.message = f"{self._button.topic} still says stop"
        if response.success:
            response.message = f"was: {self._emergency.reason or 'not tripped'}"
            self._emergency.reset()
        return response

    def _load_again(self) -> str:
        """Read the policy file again and serve it; the old one is served until then."""
        served = self._served
        if served is None:
            raise InputError("the node is not configured")
        policy = served.replacement(self._get("policy"))
        with self._lock:
            if self._served is not served:
                raise InputError("the node was configured anew meanwhile")
            served.replace(policy)
        return f"serving {policy.path}"

    # --- saying so ---

    def _say_active(self, unusual: str = "") -> None:
        """All is well, or nearly: what is unusual about an observation, what a test does to the node, and how the
        controller might follow better."""
        delay = self._get("inject_delay_s")
        parts = ["active, " + ("armed" if self._get("armed") else "dry run")]
        if delay:
            parts.append(f"every inference is delayed by {delay:g} s on purpose (inject_delay_s)")
        if unusual:
            parts.append(f"unusual input: {unusual}")
        if self._outputs is not None and self._outputs.caution:
            parts.append(self._outputs.caution)
        level = DiagnosticStatus.WARN if len(parts) > 1 else DiagnosticStatus.OK
        self._set_state(level, "; ".join(parts))

    def _set_state(self, level: bytes, text: str) -> None:
        if self._status.change(level, text):
            self._publish_status()

    def _publish_status(self) -> None:
        served, now = self._served, self._now()
        facts = {
            "policy": self._get("policy"),
            "robot": self._get("robot"),
            "armed": self._get("armed"),
            "joining": served.commander.scheduler.joining if served else "",
            "emergency_stops": self._emergency.trips,
            "emergency_stop": self._emergency.reason or "no",
        }
        if served is not None:
            facts["obstacle"] = (
                self._obstacle or "no"
            )  # in every state: whoever activates it can wait
            facts |= input_facts(self._inputs, served.streams, now)
        robot = served.robot.name if served else ""
        self._status.publish(facts, robot, now)


def spin(node: PolicyNode, executor: SingleThreadedExecutor, stop: Stop) -> None:
    """Start if asked to, then serve."""
    if node.get_parameter("autostart").value:
        node.starting = True
        if node.trigger_configure() != TransitionCallbackReturn.SUCCESS:
            raise InputError(node.problem)
        node.starting = False
        node.trigger_activate()
    while not stop.requested:
        try:
            executor.spin_once(timeout_sec=0.1)
        except rclpy_implementation.RCLError as error:
            # rclpy lets a lifecycle request that is impossible now (activate while active) escape from its service.
            node.get_logger().warning(f"request refused: {error}")


def main() -> int:
    """Entry point."""
    sys.setswitchinterval(SWITCH_S)
    return run_node(PolicyNode, spin)


if __name__ == "__main__":
    sys.exit(main())

"""`sim_node`: a task as a robot. Publishes what a robot publishes and follows commands as its controllers would.

    out  /clock, joint states, object poses, camera images with CameraInfo (topics of the robot file), /tf where
         tf2_msgs is installed, `~/success` (once per episode), `~/end_to_end_latency` (seconds from publishing a state
         to receiving the command it triggered)
    in   commands, see `sim_controller`; `~/reset` (std_srvs/Trigger) starts the next episode

Episode k starts from seed `first_seed` + k, exactly as `flow-policy eval` starts it. Its time limit
counts from the first command. With `randomization` each episode differs as the batched simulation's would.
"""

import json
import sys
import time
from collections import OrderedDict

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import PoseStamped
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import CameraInfo, Image, JointState
from std_msgs.msg import Bool, Float64
from std_srvs.srv import Trigger

from flow_policy_rl.errors import InputError
from flow_policy_ros import faults, messages, parameters, simulated_task
from flow_policy_ros.faults import Faults
from flow_policy_ros.parameters import Parameter
from flow_policy_ros.process import Stop, run_node
from flow_policy_ros.sim_controller import SimController
from sim.errors import SimulationError
from sim.live import LiveWorld
from sim.randomize import Randomizer, preset
from sim.render import Renderer
from sim.tasks.layout import ObsField

REMEMBERED = 512  # states whose publishing time is kept for the latency measurement
LATE_S = 0.05  # a loop further behind than this does not catch up


PARAMETERS = (
    *simulated_task.PARAMETERS,
    Parameter("first_seed", 10_000, "seed of the first episode", 0, 2**31 - 1, fixed=True),
    Parameter(
        "real_time_factor",
        1.0,
        "simulated seconds per second, where the machine keeps up",
        0.01,
        1000.0,
    ),
    Parameter(
        "state_rate_hz",
        100.0,
        "joint states, poses and clock, per simulated second",
        1.0,
        1000.0,
        fixed=True,
    ),
    Parameter(
        "image_rate_hz",
        10.0,
        "camera images per simulated second; 0 is none",
        0.0,
        100.0,
        fixed=True,
    ),
    Parameter(
        "image_size",
        96,
        "height of camera images, and width unless image_width is given",
        16,
        480,
        fixed=True,
    ),
    Parameter("image_width", 0, "width of camera images; 0 is square", 0, 640, fixed=True),
    Parameter(
        "randomization", "none", "none, mild, or another preset of sim.randomize", fixed=True
    ),
)


class SimNode(Node):
    """One environment in (scaled) real time."""

    def __init__(self):
        super().__init__("sim_node")
        parameters.declare(self, (*PARAMETERS, *faults.PARAMETERS))
        self.add_on_set_parameters_callback(
            lambda changes: parameters.check((*PARAMETERS, *faults.PARAMETERS), changes)
        )
        task, robot = simulated_task.load(self._get)
        self._task = task
        world = task.world
        robot.limit_array(world.joint_names, "position")  # the robot file must know every joint
        self._randomizer = self._make_randomizer()
        self._faults = Faults(self._get, np.random.default_rng(self._get("first_seed")))
        self._live = LiveWorld(world, self._initial_state(self._get("first_seed")))
        self.controller = SimController(
            robot,
            self.resolve_topic_name(robot.topics.command),
            world.joint_names,
            self._live.command,
            lambda: self._live.time,
            self._faults.hears_command,
            self._on_command,
        )
        self._episode = -1
        self._received: OrderedDict[int, int] = OrderedDict()
        self._published: OrderedDict[int, int] = OrderedDict()

        topics = robot.topics
        self._clock_pub = self.create_publisher(Clock, "/clock", 10)
        said = topics.speed_scaling
        self._speed_pub = self.create_publisher(Float64, said, 10) if said else None
        self._joint_pub = self.create_publisher(JointState, topics.joint_states, 10)
        self._poses = [
            (f, self.create_publisher(PoseStamped, topics.poses[f.source], 10))
            for f in task.obs_fields
            if f.kind == "pose" and self._known(f, topics.poses)
        ]
        self._frames: dict[str, Image] = {}
        self._images = self._image_publishers(topics.images)
        # Kept for who comes late: it is said once.
        kept = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        self._success_pub = self.create_publisher(Bool, "~/success", kept)
        self._latency_pub = self.create_publisher(Float64, "~/end_to_end_latency", 50)
        tf = messages.message_class("tf2_msgs/msg/TFMessage")
        self._tf_pub = self.create_publisher(tf, "/tf", 10) if tf else None
        self.create_subscription(DiagnosticArray, "policy_node/inference", self._on_inference, 50)
        self.create_service(Trigger, "~/reset", self._on_reset)
        said, heard = map(self.resolve_topic_name, (topics.joint_states, topics.command))
        self.get_logger().info(
            f"task '{task.name}' on {robot.name}: joint states on {said}, waiting for commands on {heard}"
        )

    def _get(self, name: str):
        return self.get_parameter(name).value

    def _known(self, f: ObsField, topics) -> bool:
        if f.source not in topics:
            raise InputError(
                f"the robot file has no topic for the {f.kind} of '{f.source}'; it has {list(topics)}"
            )
        return True

    def _image_publishers(self, topics) -> list:
        """(camera, publisher of images, of CameraInfo); none, and a line that says why, where nothing can be drawn."""
        cameras = [c for c in self._task.cameras if c in topics]
        if not cameras or self._get("image_rate_hz") == 0:
            return []
        height = self._get("image_size")
        try:
            self._renderer = Renderer(self._task.world, height, self._get("image_width") or height)
        except SimulationError as error:
            self.get_logger().warning(f"no camera images: {error}")
            return []
        return [
            (
                c,
                self.create_publisher(Image, topics[c], 2),
                self.create_publisher(CameraInfo, topics[c].rpartition("/")[0] + "/camera_info", 2),
            )
            for c in cameras
        ]

    def _make_randomizer(self) -> Randomizer | None:
        name = self._get("randomization")
        if name == "none":
            return None
        try:
            return Randomizer(self._task, preset(name, self._task))
        except SimulationError as error:
            raise InputError(str(error)) from None

    # --- episodes ---

    def _initial_state(self, seed: int) -> np.ndarray:
        self._seed = seed
        self._steps = self._held = 0
        self._running = self._over = False
        if self._randomizer is not None:
            self._randomizer.apply(self._task.world.model, self._randomizer.for_seed(seed))
        return self._task.initial_state(np.random.default_rng(seed))

    def _on_reset(self, request, response):
        self._episode += 1
        self._live.reset(self._initial_state(self._get("first_seed") + self._episode))
        self.controller.hold(self._live.command)
        response.success = True
        response.message = json.dumps(
            {
                "task": simulated_task.described(self._task),
                "episode": self._episode,
                "seed": self._seed,
                "time": self._live.time,
            }
        )
        return response

    def _after_control_step(self) -> None:
        """Success and time limit, judged as the batched simulation judges them."""
        if self._over or not self._running:
            return
        self._steps += 1
        self._held = self._held + 1 if bool(self._task.is_success(self._live.state)) else 0
        won = self._held >= self._task.success_hold_steps
        if won or self._steps >= self._task.episode_steps:
            self._over = True
            self._success_pub.publish(Bool(data=won))

    # --- commands in ---

    def _on_command(self, sequence: int | None, received: int) -> None:
        self._received[sequence] = received
        while len(self._received) > REMEMBERED:
            self._received.popitem(last=False)
        self._running = True

    def _on_inference(self, msg: DiagnosticArray) -> None:
        values = {pair.key: pair.value for pair in msg.status[0].values}
        sent = self._published.get(int(values["observation_stamp"]))
        received = self._received.get(int(values["command_sequence"]))
        if sent is not None and received is not None:
            self._latency_pub.publish(Float64(data=(received - sent) / 1e9))

    # --- state out ---

    def publish_state(self) -> None:
        """Clock and object poses first, so that they are there when the joint state arrives."""
        stamp, now = round(self._live.time * 1e9), time.monotonic()
        self._clock_pub.publish(Clock(clock=messages.to_time(stamp)))
        obs = self._task.observe(self._live.state)
        for f, publisher in self._poses:
            msg = messages.pose_stamped(obs[f.name], "world", stamp)
            self._faults.publish(publisher.publish, msg, now)
        if self._tf_pub is not None and self._poses:
            poses = {f.source: obs[f.name] for f, _ in self._poses}
            self._tf_pub.publish(messages.transforms(self._tf_pub.msg_type, poses, "world", stamp))
        self.controller.publish_state(stamp)
        if self._speed_pub is not None:
            self._speed_pub.publish(Float64(data=100.0))
        msg = messages.joint_state(self._live.moving_joints, *self._live.joint_state, stamp)
        self._published[stamp] = time.perf_counter_ns()
        self._faults.publish(self._joint_pub.publish, self._faults.joint_state(msg), now)
        while len(self._published) > REMEMBERED:
            self._published.popitem(last=False)

    def publish_images(self) -> None:
        """One frame of each camera, with how it sees."""
        stamp, now = round(self._live.time * 1e9), time.monotonic()
        model = self._task.world.model
        for camera, publisher, info_publisher in self._images:
            if not (self._get("fault_frozen_camera") and camera in self._frames):
                pixels = self._renderer.render(
                    self._live.state, camera, model if self._randomizer else None
                )
                self._frames[camera] = messages.image(pixels, camera, stamp)
            frame = self._frames[camera]
            fovy = float(np.radians(model.camera(camera).fovy[0]))
            info = messages.camera_info(frame.height, frame.width, fovy, camera, stamp)
            info.header.stamp = frame.header.stamp
            info_publisher.publish(info)
            self._faults.publish(publisher.publish, frame, now)

    def close(self) -> None:
        """Free the GL context and the controller."""
        if self._images:
            self._renderer.close()
        self.controller.destroy_node()

    def _steps_of(self, rate: str) -> int:
        """Physics steps between two of what a parameter names the rate of."""
        return max(1, round(1 / (self._get(rate) * self._task.world.physics_dt)))

    def spin(self, executor: SingleThreadedExecutor, stop: Stop) -> None:
        """Tick, publish, serve callbacks until the next tick is due."""
        executor.add_node(self.controller)
        world = self._task.world
        # In physics steps: a tick need not be a whole part of a control step, nor of what is between two images.
        per_tick = self._steps_of("state_rate_hz")
        per_image = self._steps_of("image_rate_hz") if self._images else 0
        after, due = 0, time.perf_counter()
        while not stop.requested:
            self._live.advance(per_tick, self.controller.reference)
            before, after = after, after + per_tick
            for _ in range(after // world.decimation - before // world.decimation):
                self._after_control_step()
            # Images first: the joint state that comes with them is what starts an inference.
            if per_image and after // per_image > before // per_image:
                self.publish_images()
            self.publish_state()
            due += per_tick * world.physics_dt / self._get("real_time_factor")
            now = time.perf_counter()
            if now - due > LATE_S:
                due = now
            self._faults.deliver(time.monotonic())
            executor.spin_once(timeout_sec=0.0)
            while (left := due - time.perf_counter()) > 0 and not stop.requested:
                executor.spin_once(timeout_sec=left)


def main() -> int:
    """Entry point."""
    return run_node(SimNode, SimNode.spin)


if __name__ == "__main__":
    sys.exit(main())

"""`sim_node`: a task as a robot. Publishes what a robot publishes and follows trajectories as its controller would.

    out  /clock, joint states, object pose, camera image (topics of the robot file), `~/success` (once per episode),
         `~/end_to_end_latency` (seconds from publishing a state to receiving the command it triggered)
    in   trajectories on the robot's command topic; `~/reset` (std_srvs/Trigger) starts the next episode

Episode k starts from seed `first_seed` + k, exactly as `flow-policy eval` starts it. Its time limit
counts from the first command.
"""

import json
import sys
import time
from collections import OrderedDict

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import PoseStamped
from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import QoSProfile
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import Bool, Float64
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory

from flow_policy_rl.errors import InputError
from flow_policy_rl.serving.robot import load_robot
from flow_policy_rl.serving.trajectory_controller import TrajectoryController, TrajectoryRejected
from flow_policy_ros import messages
from flow_policy_ros.process import Stop, run_node
from sim.errors import SimulationError
from sim.live import LiveWorld
from sim.render import Renderer
from sim.tasks import find_task, make_task
from sim.tasks.layout import ObsField

REMEMBERED = 512  # states whose publishing time is kept for the latency measurement
LATE_S = 0.05  # a loop further behind than this does not catch up


class SimNode(Node):
    """One environment in (scaled) real time."""

    def __init__(self):
        super().__init__("sim_node")
        self._declare("task", "lift", "name of the task")
        self._declare("robot", "panda", "name of a robot, or path of a robot file")
        self._declare("first_seed", 10_000, "seed of the first episode")
        self._range(
            "real_time_factor",
            1.0,
            0.01,
            1000.0,
            "simulated seconds per second, where the machine keeps up",
        )
        self._range(
            "state_rate_hz",
            100.0,
            1.0,
            1000.0,
            "joint states, poses and clock, per simulated second",
        )
        self._range(
            "image_rate_hz", 10.0, 0.0, 100.0, "camera images per simulated second; 0 is none"
        )
        size = ParameterDescriptor(
            description="height and width of camera images",
            integer_range=[IntegerRange(from_value=16, to_value=480, step=1)],
        )
        self.declare_parameter("image_size", 96, size)
        robot, name = load_robot(self._get("robot")), self._get("task")
        try:
            known = robot.name in getattr(find_task(name), "robots", ())
            self._task = task = make_task(name, robot=robot.name if known else None)
        except SimulationError as error:
            raise InputError(str(error)) from None
        world = task.world
        robot.limit_array(world.joint_names, "position")  # the robot file must know every joint
        self._live = LiveWorld(world, self._initial_state(self._get("first_seed")))
        self._controller = TrajectoryController(world.joint_names, self._live.command)
        self._episode = -1
        self._received: OrderedDict[int, int] = OrderedDict()
        self._published: OrderedDict[int, int] = OrderedDict()

        topics = robot.topics
        self._clock_pub = self.create_publisher(Clock, "/clock", 10)
        self._joint_pub = self.create_publisher(JointState, topics.joint_states, 10)
        self._poses = [
            (f, self.create_publisher(PoseStamped, topics.poses[f.source], 10))
            for f in task.obs_fields
            if f.kind == "pose" and self._known(f, topics.poses)
        ]
        self._images = self._image_publishers(topics.images)
        self._success_pub = self.create_publisher(Bool, "~/success", 10)
        self._latency_pub = self.create_publisher(Float64, "~/end_to_end_latency", 50)
        self.create_subscription(
            JointTrajectory, topics.command, self._on_command, QoSProfile(depth=10)
        )
        self.create_subscription(DiagnosticArray, "/policy_node/inference", self._on_inference, 50)
        self.create_service(Trigger, "~/reset", self._on_reset)

    def _declare(self, name: str, default, description: str) -> None:
        self.declare_parameter(name, default, ParameterDescriptor(description=description))

    def _range(self, name: str, default: float, low: float, high: float, description: str) -> None:
        bounds = FloatingPointRange(from_value=low, to_value=high)
        self.declare_parameter(
            name,
            default,
            ParameterDescriptor(description=description, floating_point_range=[bounds]),
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
        """(camera, publisher) pairs; none, and a line that says why, where nothing can be drawn."""
        if self._get("image_rate_hz") == 0:
            return []
        try:
            self._renderer = Renderer(
                self._task.world, self._get("image_size"), self._get("image_size")
            )
        except SimulationError as error:
            self.get_logger().warning(f"no camera images: {error}")
            return []
        return [
            (c, self.create_publisher(Image, topics[c], 2))
            for c in self._task.cameras
            if c in topics
        ]

    # --- episodes ---

    def _initial_state(self, seed: int) -> np.ndarray:
        self._seed = seed
        self._steps = self._held = 0
        self._running = self._over = False
        return self._task.initial_state(np.random.default_rng(seed))

    def _on_reset(self, request, response):
        self._episode += 1
        self._live.reset(self._initial_state(self._get("first_seed") + self._episode))
        self._controller.hold(self._live.command)
        response.success = True
        response.message = json.dumps(
            {"episode": self._episode, "seed": self._seed, "time": self._live.time}
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

    def _on_command(self, msg: JointTrajectory, info: dict) -> None:
        # NOTE: Humble's info has no sequence number; there the latency is not measured.
        self._received[info.get("publication_sequence_number")] = time.perf_counter_ns()
        while len(self._received) > REMEMBERED:
            self._received.popitem(last=False)
        times = np.array([messages.seconds(p.time_from_start) for p in msg.points])
        positions = np.array([p.positions for p in msg.points])
        velocities = (
            np.array([p.velocities for p in msg.points])
            if any(len(p.velocities) for p in msg.points)
            else None
        )
        try:
            self._controller.accept(msg.joint_names, times, positions, velocities, self._live.time)
        except (TrajectoryRejected, ValueError) as error:
            self.get_logger().warning(f"trajectory rejected: {error}")
            return
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
        stamp = round(self._live.time * 1e9)
        self._clock_pub.publish(Clock(clock=messages.to_time(stamp)))
        obs = self._task.observe(self._live.state)
        for f, publisher in self._poses:
            publisher.publish(messages.pose_stamped(obs[f.name], "world", stamp))
        msg = messages.joint_state(self._live.moving_joints, *self._live.joint_state, stamp)
        self._published[stamp] = time.perf_counter_ns()
        self._joint_pub.publish(msg)
        while len(self._published) > REMEMBERED:
            self._published.popitem(last=False)

    def publish_images(self) -> None:
        """One frame of each camera."""
        for camera, publisher in self._images:
            pixels = self._renderer.render(self._live.state, camera)
            publisher.publish(messages.image(pixels, camera, round(self._live.time * 1e9)))

    def close(self) -> None:
        """Free the GL context."""
        if self._images:
            self._renderer.close()

    def spin(self, executor: SingleThreadedExecutor, stop: Stop) -> None:
        """Tick, publish, serve callbacks until the next tick is due."""
        world = self._task.world
        per_tick = max(1, round(1 / (self._get("state_rate_hz") * world.physics_dt)))
        tick_s = per_tick * world.physics_dt
        image_every = round(1 / (self._get("image_rate_hz") * tick_s)) if self._images else 0
        step_every = max(1, round(world.control_dt / tick_s))
        ticks, due = 0, time.perf_counter()
        while not stop.requested:
            self._live.advance(per_tick, lambda at: self._controller.sample(at)[0])
            ticks += 1
            if ticks % step_every == 0:
                self._after_control_step()
            self.publish_state()
            if image_every and ticks % image_every == 0:
                self.publish_images()
            due += tick_s / self._get("real_time_factor")
            now = time.perf_counter()
            if now - due > LATE_S:
                due = now
            executor.spin_once(timeout_sec=0.0)
            while (left := due - time.perf_counter()) > 0 and not stop.requested:
                executor.spin_once(timeout_sec=left)


def main() -> int:
    """Entry point."""
    return run_node(SimNode, SimNode.spin)


if __name__ == "__main__":
    sys.exit(main())

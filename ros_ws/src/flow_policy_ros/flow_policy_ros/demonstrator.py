"""`demonstrator`: a scripted person with a remote control. Drives `sim_node` through the task, over topics only.

In the place of a teleoperator, to try recording, `flow-policy convert` and training without a robot: each control step
it sends one target on the command topic, as a leader arm or a joystick does. Ends after `episodes` episodes.
"""

import json
import sys
import time

import numpy as np
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from sensor_msgs.msg import JointState
from std_msgs.msg import Bool
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory

from flow_policy_rl.errors import InputError, RunFailed
from flow_policy_rl.serving.decode import stamp_ns
from flow_policy_ros import messages, parameters, simulated_task
from flow_policy_ros.parameters import Parameter
from flow_policy_ros.process import Stop, run_node
from sim.expert import has_expert, make_expert

PATIENCE_S = 30.0
PARAMETERS = (
    *simulated_task.PARAMETERS,
    Parameter("episodes", 20, "how many", 1, 1_000_000, fixed=True),
)


class Demonstrator(Node):
    """Reset, act until the simulation says how it went, again."""

    def __init__(self):
        super().__init__("demonstrator")
        parameters.declare(self, PARAMETERS)
        self._task, robot = simulated_task.load(self._get)
        if not has_expert(self._task):
            raise InputError(f"task '{self._task.name}' has no scripted expert")
        topics = robot.topics
        self._command_pub = self.create_publisher(JointTrajectory, topics.command, 1)
        self.create_subscription(JointState, topics.joint_states, self._on_joints, 5)
        self.create_subscription(Bool, "sim_node/success", self._on_success, 10)
        self._reset_client = self.create_client(Trigger, "sim_node/reset")
        self._expert = None
        self._next_step = 0
        self._heard = 0.0  # s, steady; the last joint state
        self._stamps: list[int] = []  # ns; of the episode's first joint state and the last
        self._result: bool | None = None

    def _get(self, name: str):
        return self.get_parameter(name).value

    def _on_joints(self, msg: JointState) -> None:
        """One target per control step of the simulation's clock."""
        stamp = stamp_ns(msg)
        self._heard = time.monotonic()
        if self._expert is None:
            return
        self._stamps = [*self._stamps[:1], stamp]
        if stamp < self._next_step:
            return
        dt = self._task.control_dt
        self._next_step = stamp + round(dt * 1e9) - 1_000_000
        target = self._expert.act(self._state)
        names = self._task.world.joint_names
        message = messages.joint_trajectory(names, np.array([dt]), target[None], None)
        self._command_pub.publish(message)

    def _on_success(self, msg: Bool) -> None:
        self._result = msg.data

    def spin(self, executor: SingleThreadedExecutor, stop: Stop) -> None:
        """All episodes."""
        if not self._reset_client.wait_for_service(timeout_sec=PATIENCE_S):
            raise InputError(f"no /sim_node/reset within {PATIENCE_S:.0f} s: is sim_node running?")
        total = self._get("episodes")
        for number in range(total):
            self._begin(executor, stop)
            while self._result is None and not stop.requested:
                executor.spin_once(timeout_sec=0.05)
                self._require_progress(number + 1)
            if stop.requested:
                return
            said = "success" if self._result else "failure"
            print(f"episode {number + 1}/{total} {said}", flush=True)

    def _require_progress(self, number: int) -> None:
        """Raise where an episode will not end.

        Raises:
            RunFailed: the simulation is gone, or goes on without us.
        """
        if time.monotonic() > self._heard + PATIENCE_S:
            raise RunFailed(
                f"no joint states for {PATIENCE_S:.0f} s in episode {number}: does sim_node still run?"
            )
        longest = self._task.episode_steps * self._task.control_dt
        if self._stamps and self._stamps[-1] - self._stamps[0] > 2e9 * longest:
            raise RunFailed(
                f"episode {number} should end after {longest:g} s, and goes on after twice that: does sim_node hear "
                f"commands on {self._command_pub.topic_name}?"
            )

    def _begin(self, executor: SingleThreadedExecutor, stop: Stop) -> None:
        """Reset the simulation; the script begins with what it sees then."""
        self._expert = None
        future = self._reset_client.call_async(Trigger.Request())
        while not future.done() and not stop.requested:
            executor.spin_once(timeout_sec=0.05)
        if stop.requested:
            return
        said = json.loads(future.result().message)
        theirs, ours = said["task"], simulated_task.described(self._task)
        if theirs != ours:
            raise InputError(f"sim_node has {theirs}, this node {ours}: give both the same")
        rng = np.random.default_rng(said["seed"])
        self._state = self._task.initial_state(rng)
        self._result, self._next_step, self._stamps = None, 0, []
        self._heard = time.monotonic()
        self._expert = make_expert(self._task, self._state, rng)


def main() -> int:
    """Entry point."""
    return run_node(Demonstrator, Demonstrator.spin)


if __name__ == "__main__":
    sys.exit(main())

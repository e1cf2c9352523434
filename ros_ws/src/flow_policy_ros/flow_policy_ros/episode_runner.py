"""`episode_runner`: closed-loop episodes over ROS. For each: stop the policy, reset the simulation,
start the policy, wait.

Writes one JSON file: success per seed, and the end-to-end latencies the simulation measured.
A stop that the policy node trips by itself, because its plans had to be limited, costs the episode. A stop
that somebody asked for ends the run and is left for them to reset.
"""

import json
import sys
import time
from pathlib import Path

from diagnostic_msgs.msg import DiagnosticArray
from lifecycle_msgs.msg import State, Transition
from lifecycle_msgs.srv import ChangeState, GetState
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from std_msgs.msg import Bool, Float64
from std_srvs.srv import Trigger

from flow_policy_rl.errors import InputError, RunFailed
from flow_policy_rl.serving.safety import tripped_by_itself
from flow_policy_ros import parameters
from flow_policy_ros.parameters import Parameter
from flow_policy_ros.process import Stop, run_node

START_UP_S = 20.0
CALL_S = 10.0
PARAMETERS = (
    Parameter("episodes", 100, "how many", 1, 1_000_000, fixed=True),
    Parameter("out", "episodes.json", "file to write", fixed=True),
    Parameter(
        "episode_timeout_s",
        60.0,
        "give up on an episode after this long (steady clock)",
        0.1,
        86_400.0,
        fixed=True,
    ),
)


class EpisodeRunner(Node):
    """Client of the simulation and of the policy node's lifecycle."""

    def __init__(self):
        super().__init__("episode_runner")
        parameters.declare(self, PARAMETERS)
        self._result: bool | None = None
        self._latencies: list[float] = []
        self._stopped_because, self._says = "no", "nothing in /diagnostics"
        self._obstacle = "it is not configured"
        self._policy = self.resolve_service_name("policy_node")
        self._reset = self.create_client(Trigger, "sim_node/reset")
        self._change = self.create_client(ChangeState, "policy_node/change_state")
        self._policy_state = self.create_client(GetState, "policy_node/get_state")
        self._release = self.create_client(Trigger, "policy_node/reset_emergency_stop")
        self.create_subscription(Bool, "sim_node/success", self._on_success, 10)
        self.create_subscription(DiagnosticArray, "/diagnostics", self._on_diagnostics, 50)
        self.create_subscription(Float64, "sim_node/end_to_end_latency", self._on_latency, 50)

    def _on_success(self, msg: Bool) -> None:
        self._result = msg.data

    def _on_latency(self, msg: Float64) -> None:
        self._latencies.append(msg.data)

    def _on_diagnostics(self, msg: DiagnosticArray) -> None:
        for status in msg.status:
            if status.name == self._policy:
                values = {v.key: v.value for v in status.values}
                self._stopped_because, self._says = values["emergency_stop"], status.message
                self._obstacle = values.get("obstacle", self._obstacle)

    def _call(self, client, request):
        future = client.call_async(request)
        deadline = time.monotonic() + CALL_S
        while not future.done():
            self._tick(0.05)
            if time.monotonic() > deadline:
                raise InputError(f"service {client.srv_name} did not answer within {CALL_S:.0f} s")
        return future.result()

    def _tick(self, timeout: float) -> None:
        if self._stop.requested:
            raise KeyboardInterrupt
        self._executor.spin_once(timeout_sec=timeout)

    def _transition(self, number: int) -> None:
        request = ChangeState.Request(transition=Transition(id=number))
        if not self._call(self._change, request).success:
            asked = "activate" if number == Transition.TRANSITION_ACTIVATE else "deactivate"
            raise InputError(f"{self._policy} refused to {asked}; it says: {self._says}")

    def _await_neighbours(self) -> None:
        """Nodes that have just started find each other first: what an episode misses meanwhile is not the policy's."""
        deadline = time.monotonic() + START_UP_S
        while self._obstacle != "no":
            self._tick(0.05)
            if time.monotonic() > deadline:
                raise InputError(f"{self._policy} would command nothing: {self._obstacle}")

    def spin(self, executor: SingleThreadedExecutor, stop: Stop) -> None:
        """Run all episodes and write the file."""
        self._executor, self._stop = executor, stop
        for client in (self._reset, self._change, self._policy_state, self._release):
            if not client.wait_for_service(timeout_sec=START_UP_S):
                raise InputError(
                    f"no {client.srv_name} within {START_UP_S:.0f} s: is its node running?"
                )
        self._await_neighbours()
        total = self.get_parameter("episodes").value
        episodes: list[dict] = []
        out = Path(self.get_parameter("out").value)
        partial = out.with_suffix(".partial")
        try:
            for number in range(total):
                episodes.append(self._episode())
                outcome = "success" if episodes[-1]["success"] else "failure"
                if episodes[-1]["emergency_stop"]:
                    outcome += f" (emergency stop: {episodes[-1]['emergency_stop']})"
                print(f"episode {number + 1}/{total} {outcome}", flush=True)
                partial.write_text(
                    json.dumps({"episodes": episodes, "end_to_end_s": self._latencies})
                )
        except KeyboardInterrupt:
            return
        self._deactivate()
        partial.rename(out)
        print(f"{sum(e['success'] for e in episodes)} of {total} succeeded: {out}", flush=True)

    def _deactivate(self) -> None:
        state = self._call(self._policy_state, GetState.Request()).current_state
        if state.id == State.PRIMARY_STATE_ACTIVE:
            self._transition(Transition.TRANSITION_DEACTIVATE)

    def _episode(self) -> dict:
        self._deactivate()
        self._release_own_stop()  # of before the run
        facts = json.loads(self._call(self._reset, Trigger.Request()).message)
        self._result = None
        self._transition(Transition.TRANSITION_ACTIVATE)
        deadline = time.monotonic() + self.get_parameter("episode_timeout_s").value
        while self._result is None:
            self._tick(0.05)
            check_stop(self._stopped_because)
            if time.monotonic() > deadline:
                raise InputError(
                    f"episode {facts['episode']} did not end; the policy node says: {self._says}"
                )
        self._deactivate()
        stopped = self._release_own_stop()
        return {"seed": facts["seed"], "success": self._result, "emergency_stop": stopped}

    def _release_own_stop(self) -> str:
        """Reset what the policy node, which is inactive now, tripped by itself; returns why it did, or nothing.

        Diagnostics may come late, so the node's answer decides, not they.
        """
        check_stop(self._stopped_because)
        reason = self._call(self._release, Trigger.Request()).message.removeprefix("was: ")
        reason = "" if reason == "not tripped" else reason
        check_stop(reason or "no")
        return reason


def check_stop(reason: str) -> None:
    """Raise if somebody asked for a stop; `no` is none."""
    if reason != "no" and not tripped_by_itself(reason):
        raise RunFailed(
            f"emergency stop: {reason}; call /policy_node/reset_emergency_stop and start again"
        )


def main() -> int:
    """Entry point."""
    return run_node(EpisodeRunner, EpisodeRunner.spin)


if __name__ == "__main__":
    sys.exit(main())

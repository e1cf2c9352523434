"""`trainer_node`: `flow-policy train` under ROS. The same command line as a child process, its progress on topics.

    out  `~/metrics` (DiagnosticArray: the newest row of the run's metrics.csv), `/diagnostics` (what it is doing)
    in   `~/start`, `~/stop`, `~/export` (std_srvs/Trigger)

Stopping is Ctrl-C to the training: what it has written stays. Exporting writes policy.onnx beside the checkpoint;
the policy node takes it over with its `~/reload`.
"""

import csv
import shlex
import signal
import subprocess
import sys
from pathlib import Path

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from rclpy.node import Node
from std_srvs.srv import Trigger

from flow_policy_rl.errors import InputError, output_folder
from flow_policy_ros import messages, parameters
from flow_policy_ros.parameters import Parameter
from flow_policy_ros.process import run_node

LOOK_EVERY_S = 0.5
END_S = 5.0
CHECKPOINT, METRICS, POLICY = "policy.safetensors", "metrics.csv", "policy.onnx"
PARAMETERS = (
    Parameter("algorithm", "bc", "flow-policy list algorithms names them"),
    Parameter("task", "lift", "name of the task"),
    Parameter("demos", "", "HDF5 demonstrations (bc)"),
    Parameter("checkpoint", "", "policy to fine-tune (RL)"),
    Parameter("run_dir", "", "folder to write; required"),
    Parameter("args", "", "further flags, as on the command line"),
    Parameter("autostart", False, "start at once"),
)


class TrainerNode(Node):
    """Starts, watches and ends one child process at a time."""

    def __init__(self):
        super().__init__("trainer_node")
        parameters.declare(self, PARAMETERS)
        if not self._get("run_dir"):
            raise InputError("parameter run_dir is empty: give the folder to write")
        self._child: subprocess.Popen | None = None
        self._doing, self._state = "", (DiagnosticStatus.OK, "idle")
        self._name = self.get_fully_qualified_name()
        self._metrics_pub = self.create_publisher(DiagnosticArray, "~/metrics", 10)
        self._status_pub = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        for name in ("start", "stop", "export"):
            self.create_service(Trigger, f"~/{name}", getattr(self, f"_on_{name}"))
        self.create_timer(LOOK_EVERY_S, self._look)
        if self._get("autostart"):
            self._run("training", self._training())

    def _get(self, name: str):
        return self.get_parameter(name).value

    @property
    def _folder(self) -> Path:
        return Path(self._get("run_dir"))

    def _training(self) -> list[str]:
        line = ["train", self._get("algorithm"), "--task", self._get("task")]
        for name in ("demos", "checkpoint", "run_dir"):
            if self._get(name):
                line += [f"--{name.replace('_', '-')}", self._get(name)]
        try:
            return line + shlex.split(self._get("args"))
        except ValueError as error:
            raise InputError(f"parameter args: {error}") from None

    def _run(self, doing: str, line: list[str]) -> None:
        self._log = output_folder(self._folder) / f"{doing}.log"
        with self._log.open("wb") as log:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "flow_policy_rl.cli", *line],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._doing, self._state = doing, (DiagnosticStatus.OK, doing)

    def _answer(self, response, problem: str, text: str):
        response.success, response.message = not problem, problem or text
        return response

    def _on_start(self, request, response):
        problem = f"{self._doing} is under way" if self._child is not None else ""
        if not problem:
            try:
                self._run("training", self._training())
            except InputError as error:
                problem = str(error)
        return self._answer(response, problem, f"training into {self._folder}")

    def _on_stop(self, request, response):
        problem = "" if self._child is not None else "nothing is under way"
        if not problem:
            self._child.send_signal(signal.SIGINT)
        return self._answer(response, problem, f"{self._doing} is being ended")

    def _on_export(self, request, response):
        checkpoint = self._folder / CHECKPOINT
        problem = f"{self._doing} is under way" if self._child is not None else ""
        if not problem and not checkpoint.is_file():
            problem = f"there is no {checkpoint} yet"
        out = self._folder / POLICY
        if not problem:
            self._run("export", ["export", "--checkpoint", str(checkpoint), "--out", str(out)])
        return self._answer(
            response, problem, f"exporting to {out}; /diagnostics says when it is done"
        )

    def _look(self) -> None:
        """Metrics and the end of the child."""
        stamp = self.get_clock().now().nanoseconds
        row = self._newest()
        if row:
            self._metrics_pub.publish(
                messages.diagnostics(f"{self._name}: metrics", DiagnosticStatus.OK, "", row, stamp)
            )
        if self._child is not None and self._child.poll() is not None:
            code, self._child = self._child.returncode, None
            if code == 0:
                self._state = DiagnosticStatus.OK, f"{self._doing} finished"
            elif code in (130, -signal.SIGINT):
                self._state = DiagnosticStatus.WARN, f"{self._doing} stopped"
            else:
                lines = self._log.read_text(errors="replace").strip().splitlines()
                last = lines[-1] if lines else "no output"
                self._state = DiagnosticStatus.ERROR, f"{self._doing} failed: {last}"
        level, text = self._state
        values = {"run_dir": self._folder, "algorithm": self._get("algorithm")}
        self._status_pub.publish(messages.diagnostics(self._name, level, text, values, stamp))

    def _newest(self) -> dict[str, str]:
        """The last whole row of the metrics; empty while there is none."""
        try:
            with (self._folder / METRICS).open(newline="") as file:
                rows = list(csv.DictReader(file))
        except OSError:
            return {}
        whole = [r for r in rows if None not in r.values() and None not in r]
        return {k: v for k, v in whole[-1].items() if v} if whole else {}

    def close(self) -> None:
        """End the child with the node."""
        if self._child is None:
            return
        self._child.send_signal(signal.SIGINT)
        try:
            self._child.wait(END_S)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()


def main() -> int:
    """Entry point."""
    return run_node(TrainerNode)


if __name__ == "__main__":
    sys.exit(main())

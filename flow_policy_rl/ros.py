"""ROS processes, started from outside of ROS: this file imports nothing of it. `flow-policy sim`
and `deploy` live here."""

import contextlib
import fcntl
import functools
import importlib.util
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import yaml

from flow_policy_rl.errors import InputError, RunFailed, existing_file, near_match
from flow_policy_rl.serving import model_file
from flow_policy_rl.serving.robot import load_robot, robot_names

# What an action is made of: a rule for its own name moves none of them.
ACTION_PARTS = ("send_goal", "cancel_goal", "get_result", "feedback", "status")
END_S = 1.0  # from asking a process to end to killing it


@dataclass(frozen=True)
class SimConfig:
    """ROS 2 simulation node: a task as a robot, until Ctrl-C.

    Example: flow-policy sim --task lift --robot ur5e

    Attributes:
        task: name of the task.
        task_options: names and values of the task's own options, e.g. `randomness med`.
        robot: name of a robot, or path of a robot file (None: that of the task).
        seed: of the first episode.
        real_time_factor: simulated seconds per second.
        json: no effect: a node has no result to print.
    """

    task: str = "lift"
    task_options: dict[str, str] = field(default_factory=dict)
    robot: str | None = None
    seed: int = 10_000
    real_time_factor: float = 1.0
    json: bool = False


@dataclass(frozen=True)
class DeployConfig:
    """ROS 2 policy node, until Ctrl-C. A dry run unless armed: chunks are computed and shown, the arm is not commanded.

    Example: flow-policy deploy --policy policy.onnx --use-sim-time --armed

    Attributes:
        policy: exported policy, or the name of one that ships (flow-policy list policies).
        robot: name of a robot, or path of a robot file (None: the one in the policy).
        armed: command the arm.
        use_sim_time: take time from /clock.
        joining: how consecutive chunks join: auto (rtc where the policy can, else replace), replace, crossfade,
            ensemble, rtc or sync.
        output: a whole chunk as JointTrajectory (trajectory), or Float64MultiArray (per_tick).
        params_file: YAML file with further parameters of policy_node (none that is a flag here).
        json: no effect: a node has no result to print.
    """

    policy: Path
    robot: str | None = None
    armed: bool = False
    use_sim_time: bool = False
    joining: Literal["auto", "replace", "crossfade", "ensemble", "rtc", "sync"] = "auto"
    output: Literal["trajectory", "per_tick"] = "trajectory"
    params_file: Path | None = None
    json: bool = False


def sim(config: SimConfig) -> None:
    """Run the simulation node in the foreground."""
    from sim.tasks import make_task

    parameters = {
        "task": config.task,
        "robot": config.robot or robot_of(make_task(config.task, **config.task_options)),
        "first_seed": config.seed,
        "real_time_factor": config.real_time_factor,
        **task_options(config.task_options),
    }
    foreground("sim_node", parameters)


def task_options(options: Mapping[str, object]) -> dict[str, str]:
    """The parameter of `sim_node` that says them, where there are any: names and values, as on a command line."""
    words = [word for name, value in options.items() for word in (name, _yaml(value))]
    return {"task_options": shlex.join(words)} if words else {}


def robot_of(task) -> str:
    """The robot of a task, by the name of its robot file.

    Raises:
        InputError: it has none, as a walker.
    """
    from sim.tasks import MANIPULATION

    if task.robot not in robot_names():
        valid = ", ".join(sorted(MANIPULATION))
        raise InputError(f"task '{task.name}' has no robot for ROS; of ours these have: {valid}")
    return task.robot


def deploy(config: DeployConfig) -> None:
    """Run the policy node in the foreground."""
    file = model_file.read(config.policy)
    parameters = {
        "policy": str(file.path.absolute()),
        "robot": config.robot or file.spec.robot,
        "armed": config.armed,
        "joining": config.joining,
        "output": config.output,
    }
    if config.params_file is not None:
        check_params_file(config.params_file, "policy_node", parameters)
    if config.use_sim_time:
        parameters["use_sim_time"] = True
    foreground("policy_node", parameters, config.params_file)


def check_params_file(path: Path, node: str, flags: Collection[str]) -> None:
    """Refuse a file that would do nothing, because it speaks of other nodes, and one that sets what flags set: it would
    come before them, and could arm a dry run.

    Raises:
        InputError: that, or no file, or not YAML with a section for each node.
    """
    where = f"parameter file '{path}'"
    try:
        sections = yaml.safe_load(existing_file(path, "parameter file").read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{where} is not YAML: {' '.join(str(error).split())}") from None
    sections = sections if isinstance(sections, dict) else {}
    ours = [sections[name] for name in (node, f"/{node}", "/**", "/*") if name in sections]
    if not ours:
        names = [str(name) for name in sections]
        raise InputError(
            f"{where} has no section '{node}'{near_match(node, names)}; it has: {', '.join(names) or 'nothing'}"
        )
    for section in ours:
        found = section.get("ros__parameters") if isinstance(section, dict) else None
        if not isinstance(found, dict):
            raise InputError(f"{where}: a section is a name, then ros__parameters, then parameters")
        for name in found:
            if name in flags:
                flag = f"--{name.replace('_', '-')}"
                raise InputError(f"{where} sets '{name}', which the flag {flag} says: leave it out")


def foreground(
    node: str, parameters: Mapping[str, object], params_file: Path | None = None
) -> None:
    """Become the node: its output, signals and exit code are those of this process."""
    file = ["--params-file", str(params_file.absolute())] if params_file else []
    os.execv(sys.executable, [*node_command(node, parameters), *file])


def node_command(node: str, parameters: Mapping[str, object]) -> list[str]:
    """Command line of a node of `flow_policy_ros`, started by module so that it works pip- and colcon-installed.

    Raises:
        InputError: ROS or the node package is not installed.
    """
    for package, mend in {
        "rclpy": "source a ROS 2 installation, or run: make setup",
        "flow_policy_ros": "pip install ros_ws/src/flow_policy_ros, or build it with colcon",
    }.items():
        if importlib.util.find_spec(package) is None:
            raise InputError(f"{package} is not installed: {mend}")
    command = [sys.executable, "-m", f"flow_policy_ros.{node}", "--ros-args"]
    for name, value in parameters.items():
        command += ["-p", f"{name}:={_yaml(value)}"]
    return command


def namespaced_topics(robot: str, namespace: str) -> list[tuple[str, str]]:
    """Remappings that move the names of a robot file, which are absolute, into a namespace; none for the root.

    Raises:
        InputError: no such robot.
    """
    space = namespace.strip("/")
    if not space:
        return []
    loaded = load_robot(robot)
    topics, action = loaded.topics, loaded.gripper_action
    plain = (topics.joint_states, topics.command, topics.forward_command, topics.gripper_command)
    images = topics.images.values()
    infos = [topic.rpartition("/")[0] + "/camera_info" for topic in images]
    parts = [f"{action.name}/_action/{part}" for part in ACTION_PARTS] if action else []
    told = (topics.controller_state, topics.speed_scaling)
    names = {*plain, *told, *topics.poses.values(), *images, *infos, *parts}
    names -= {""}
    return [(name, f"/{space}/{name.strip('/')}") for name in sorted(names)]


def _yaml(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return repr(value) if isinstance(value, float) else str(value)


@functools.cache
def private_domain() -> int:
    """A ROS domain (1 to 100) that no other process of ours on this machine uses, held until this process ends.

    Raises:
        RunFailed: all are taken.
    """
    folder = Path(tempfile.gettempdir()) / f"flow_policy_rl-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    for attempt in range(100):
        domain = 1 + (os.getpid() + attempt) % 100
        descriptor = os.open(folder / f"ros_domain_{domain}.lock", os.O_CREAT | os.O_RDWR)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            continue
        return domain
    raise RunFailed(f"ROS domains 1 to 100 are all in use by other runs (locks in {folder})")


def private_environment(log_dir: Path) -> dict[str, str]:
    """Environment for processes that talk to each other on this machine only, on a domain of their own."""
    log_dir.mkdir(parents=True, exist_ok=True)
    # Later distributions warn of the name that Humble knows, which knows no other.
    local = {"ROS_LOCALHOST_ONLY": "1"} if os.environ.get("ROS_DISTRO") == "humble" else {}
    return os.environ | {
        "ROS_DOMAIN_ID": os.environ.get("ROS_DOMAIN_ID") or str(private_domain()),
        "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST",
        **local,
        "ROS_LOG_DIR": str(log_dir),
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
    }


class Process:
    """One node as a child process, in a session of its own so that a Ctrl-C reaches it only through us."""

    def __init__(self, node: str, parameters: Mapping[str, object], log_dir: Path):
        self.node = node
        self.log = log_dir / f"{node}.log"
        environment = private_environment(log_dir)
        with self.log.open("wb") as log:
            self._child = subprocess.Popen(
                node_command(node, parameters),
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    def check(self) -> None:
        """Raise if it has ended by itself with an error.

        Raises:
            RunFailed: with the last line of its log.
        """
        code = self._child.poll()
        if code not in (None, 0):
            lines = self.log.read_text(errors="replace").strip().splitlines()
            raise RunFailed(
                f"{self.node} ended with exit code {code}: {lines[-1] if lines else 'no output'} ({self.log})"
            )

    @property
    def pid(self) -> int:
        """Number of the process."""
        return self._child.pid

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self._child.poll() is None

    def signal(self, number: int) -> None:
        """Send a signal, if it still runs."""
        if self.running:
            self._child.send_signal(number)

    def wait(self, timeout: float) -> int | None:
        """Exit code, or None when it runs on."""
        try:
            return self._child.wait(timeout)
        except subprocess.TimeoutExpired:
            return None

    def kill(self) -> None:
        """End it for sure."""
        if self.running:
            self._child.kill()
            self._child.wait()


@contextlib.contextmanager
def processes(
    nodes: Mapping[str, Mapping[str, object]], log_dir: Path
) -> Iterator[dict[str, Process]]:
    """Start nodes; at the end ask all of them to end, and kill what does not within a second."""
    started: dict[str, Process] = {}
    try:
        for node, parameters in nodes.items():
            started[node] = Process(node, parameters, log_dir)
        yield started
    finally:
        for process in started.values():
            process.signal(signal.SIGINT)
        deadline = time.monotonic() + END_S
        for process in started.values():
            process.wait(max(0.0, deadline - time.monotonic()))
            process.kill()

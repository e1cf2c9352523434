"""Real rclpy between real processes, on a domain of their own and on this machine only."""

import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path

import pytest

pytest.importorskip("rclpy", reason="rclpy is not installed: source a ROS 2, or make setup")
# The pytest of Humble does not know the setting `pythonpath`.
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[4] / "tests")]

import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.context import Context
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import QoSProfile
from robot_peer import Robot
from trajectory_msgs.msg import JointTrajectory

from flow_policy_rl.ros import Process, private_domain, processes

SOON_S = 60.0  # gives up only where something hangs; a busy machine is no failure
ON_THEIR_WAY = 4  # commands that a stop may still be followed by, its hold among them
# A shell starts background jobs with SIGINT ignored, and so would be the children of these tests, which must obey it.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def ros_environment(tmp_path, monkeypatch) -> None:
    """Isolation, and type checks on."""
    monkeypatch.setenv("ROS_DOMAIN_ID", str(private_domain()))
    monkeypatch.setenv("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    monkeypatch.setenv("ROS_LOG_DIR", str(tmp_path / "ros_log"))
    monkeypatch.setenv("ROS_PYTHON_CHECK_FIELDS", "1")
    (tmp_path / "ros_log").mkdir()


class Peer:
    """The other side of a conversation, in the test's process."""

    def __init__(self):
        self.context = Context()
        rclpy.init(context=self.context)
        self.node: Node = rclpy.create_node("peer", context=self.context)
        self._executor = SingleThreadedExecutor(context=self.context)
        self._executor.add_node(self.node)
        self._others: list[Node] = []

    def listen(self, kind: type, topic: str, depth: int | QoSProfile = 50) -> list:
        """Everything that arrives on a topic from now on."""
        received: list = []
        self.node.create_subscription(kind, topic, received.append, depth)
        return received

    def until(self, condition: Callable[[], bool], what: str, timeout: float = SOON_S) -> None:
        """Serve callbacks until the condition holds."""
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline:
                pytest.fail(f"{what}: not within {timeout:.0f} s")
            self._executor.spin_once(timeout_sec=0.02)

    def spin(self, seconds: float) -> None:
        """Serve callbacks for a while."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self._executor.spin_once(timeout_sec=0.02)

    def until_quiet(self, commands: list, what: str, seconds: float = 0.8) -> None:
        """Serve callbacks until no command has come for a while, in which a policy that goes on sends two.

        Before that come those that were on their way, and a hold: a few, however slow the machine is.
        """
        before, count, since = len(commands), len(commands), time.monotonic()
        while time.monotonic() < since + seconds:
            self._executor.spin_once(timeout_sec=0.02)
            if len(commands) > count:
                count, since = len(commands), time.monotonic()
            if count > before + ON_THEIR_WAY:
                pytest.fail(f"{what}: {count - before} commands more")

    def call(self, kind: type, name: str, request):
        """Call a service and return its response."""
        client = self.node.create_client(kind, name)
        self.until(client.service_is_ready, f"service {name}")
        future = client.call_async(request)
        self.until(future.done, f"answer of {name}")
        return future.result()

    def second_node(self, name: str) -> Node:
        """Another node of this process, served along."""
        node = rclpy.create_node(name, context=self.context)
        self._executor.add_node(node)
        self._others.append(node)
        return node

    def close(self) -> None:
        for node in self._others:
            node.destroy_node()
        self._executor.shutdown()
        self.node.destroy_node()
        rclpy.shutdown(context=self.context)


@pytest.fixture
def peer(ros_environment) -> Iterator[Peer]:
    """A node in this process."""
    peer = Peer()
    yield peer
    peer.close()


@pytest.fixture
def start(tmp_path, ros_environment) -> Iterator[Callable[..., dict[str, Process]]]:
    """Start nodes by name with parameters; all of them end with the test."""
    managers = []

    def begin(**nodes) -> dict[str, Process]:
        (tmp_path / "logs").mkdir(exist_ok=True)
        manager = processes(nodes, tmp_path / "logs")
        managers.append(manager)
        return manager.__enter__()

    yield begin
    for manager in managers:
        manager.__exit__(None, None, None)


@pytest.fixture
def robot(peer) -> Robot:
    return Robot(peer)


@pytest.fixture
def commands(peer) -> list[JointTrajectory]:
    """Trajectories sent to the arm."""
    return peer.listen(JointTrajectory, "/arm_controller/joint_trajectory")


@pytest.fixture
def status(peer) -> Callable[[], str]:
    """The newest text of the policy node's diagnostics."""
    received = peer.listen(DiagnosticArray, "/diagnostics")

    def newest() -> str:
        texts = [s.message for msg in received for s in msg.status if s.name == "/policy_node"]
        return texts[-1] if texts else ""

    return newest


@pytest.fixture
def weak_robot(tmp_path) -> Path:
    """A Panda that hardly moves: every plan is limited."""
    text = Path(str(resources.files("robots"))).joinpath("panda.yaml").read_text()
    weak, count = re.subn(r"velocity: [0-9.]+", "velocity: 0.01", text)
    assert count == 8
    (tmp_path / "weak.yaml").write_text(weak)
    return tmp_path / "weak.yaml"


@pytest.fixture(scope="session")
def policy_file(tmp_path_factory) -> Path:
    """A policy that went through the whole chain, in seconds: demonstrations, imitation, RL, export."""
    from flow_policy_rl import cli

    folder = tmp_path_factory.mktemp("chain")
    demos, base, tuned, out = (folder / n for n in ("demos.hdf5", "base", "tuned", "policy.onnx"))
    for line in (
        f"collect --task lift --episodes 4 --noise 0.01 --out {demos} --json",
        f"train bc --task lift --demos {demos} --run-dir {base} --bc.num-steps 120 --bc.batch-size 64 "
        "--network.width 64 --json",
        f"train score_flow --task lift --checkpoint {base}/policy.safetensors --run-dir {tuned} "
        "--ppo.num-iterations 1 --ppo.num-envs 8 --ppo.num-steps 4 --eval-every 1 --eval-episodes 2 --json",
        f"export --checkpoint {tuned}/policy.safetensors --out {out} --json",
    ):
        assert cli.main(line.split()) == 0, line
    return out

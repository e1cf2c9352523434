"""The launch files under real launch, with real nodes; skipped where launch_ros is not installed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("launch_ros", reason="launch_ros is not installed (it has no wheel)")

from diagnostic_msgs.msg import DiagnosticArray
from launch.launch_description_sources import get_launch_description_from_python_launch_file
from rcl_interfaces.srv import GetParameters
from rclpy.qos import DurabilityPolicy, QoSProfile
from std_msgs.msg import Bool
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory

from flow_policy_rl import cli

FOLDER = Path(__file__).resolve().parents[4] / "launch"
FILES = sorted(FOLDER.glob("*.launch.py"))
FAST = ("real_time_factor:=4", "image_rate_hz:=0")
END_S = 30.0
SERVICE = """
import sys
from launch import LaunchDescription, LaunchService
from launch.actions import IncludeLaunchDescription
from launch.launch_description_sources import PythonLaunchDescriptionSource

path, *arguments = sys.argv[1:]
source = PythonLaunchDescriptionSource(path)
pairs = [tuple(a.split(":=", 1)) for a in arguments]
service = LaunchService()
service.include_launch_description(
    LaunchDescription([IncludeLaunchDescription(source, launch_arguments=pairs)])
)
sys.exit(service.run())
"""


class Launched:
    """What `ros2 launch` does with a launch file, as a process group of its own."""

    def __init__(self, name: str, arguments: tuple[str, ...], out: Path):
        self._out = out
        with out.open("wb") as file:
            self.child = subprocess.Popen(
                [sys.executable, "-c", SERVICE, str(FOLDER / f"{name}.launch.py"), *arguments],
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def says(self) -> str:
        return self._out.read_text(errors="replace")

    def wait(self, timeout: float = END_S) -> str:
        """Its output, once it and all that it started have ended."""
        self.child.wait(timeout)
        deadline = time.monotonic() + timeout
        while self.alive:
            assert time.monotonic() < deadline, "launch left processes behind"
            time.sleep(0.05)
        assert "Traceback" not in self.says
        return self.says

    @property
    def alive(self) -> bool:
        try:
            os.killpg(self.child.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def interrupt(self) -> str:
        """Ctrl-C on a terminal reaches everybody at once; everybody must end cleanly."""
        os.killpg(self.child.pid, signal.SIGINT)
        says = self.wait()
        assert "process has died" not in says
        assert "finished cleanly" in says
        return says

    def kill(self) -> None:
        if self.alive:
            os.killpg(self.child.pid, signal.SIGKILL)
            self.child.wait()


@pytest.fixture
def launch(ros_environment, tmp_path):
    """Launch files by name, with arguments."""
    running: list[Launched] = []

    def begin(name: str, *arguments: str) -> Launched:
        running.append(Launched(name, arguments, tmp_path / f"{len(running)}_{name}.out"))
        return running[-1]

    yield begin
    for each in running:
        each.kill()


@pytest.fixture
def lifted(peer):
    """Wait for the end of an episode, and tell whether it was a success."""

    def judge(topic: str = "/sim_node/success") -> bool:
        kept = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        results = peer.listen(Bool, topic, kept)  # the episode may end before the two have met
        peer.until(lambda: results, f"the end of an episode on {topic}")
        return results[0].data

    return judge


def parameters(peer, node: str, *names: str) -> list:
    """Values of parameters of a running node."""
    answer = peer.call(
        GetParameters, f"{node}/get_parameters", GetParameters.Request(names=list(names))
    )
    kinds = {1: "bool_value", 2: "integer_value", 3: "double_value", 4: "string_value"}
    return [getattr(v, kinds[v.type]) for v in answer.values]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_arguments_can_be_shown(path):
    shown = get_launch_description_from_python_launch_file(str(path)).get_launch_arguments()
    assert shown
    assert all(a.description for a in shown)


def test_a_dry_run_shows_chunks_and_only_an_armed_run_lifts(launch, peer, lifted, commands):
    sim = launch("sim", *FAST)
    chunks = peer.listen(JointTrajectory, "/policy_node/planned_chunk")
    dry = launch("deploy", "policy:=lift", "use_sim_time:=true")
    peer.until(lambda: len(chunks) > 5, "chunks of the dry run")
    assert peer.node.count_publishers("/arm_controller/joint_trajectory") == 0
    assert not commands
    dry.interrupt()
    armed = launch("deploy", "policy:=lift", "use_sim_time:=true", "dry_run:=false")
    assert lifted()
    peer.until(lambda: commands, "commands of the armed run")
    armed.interrupt()
    sim.interrupt()


def test_a_namespace_holds_nodes_and_topics(launch, peer, lifted):
    left = "namespace:=left"
    sim = launch("sim", left, *FAST)
    armed = launch("deploy", left, "policy:=lift", "use_sim_time:=true", "dry_run:=false")
    assert lifted("/left/sim_node/success")

    def there() -> set[str]:
        nodes = peer.node.get_node_names_and_namespaces()
        return {f"{space.rstrip('/')}/{name}" for name, space in nodes}

    wanted = {"/left/sim_node", "/left/policy_node", "/left/arm_controller"}
    peer.until(lambda: wanted <= there(), f"nodes {wanted}")
    topics = {name for name, _ in peer.node.get_topic_names_and_types()}
    assert {"/left/joint_states", "/left/cube/pose"} <= topics
    assert not {"/joint_states", "/cube/pose", "/arm_controller/joint_trajectory"} & topics
    armed.interrupt()
    sim.interrupt()


def test_what_is_given_comes_before_the_file_and_the_file_before_the_node(launch, peer, tmp_path):
    file = tmp_path / "params.yaml"
    file.write_text(
        "policy_node: {ros__parameters: {joining: crossfade, lead_s: 0.02, armed: true, autostart: false}}\n"
        "sim_node: {ros__parameters: {image_rate_hz: 0.0, first_seed: 77, fault_noise: 0.001}}\n"
    )
    sim = launch("sim", f"params_file:={file}", "seed:=5")
    policy = launch(
        "deploy",
        "policy:=lift",
        f"params_file:={file}",
        "log_level:=debug",
        "autostart:=true",
        "use_sim_time:=true",
    )
    names = ("joining", "lead_s", "armed", "autostart", "use_sim_time", "robot")
    found = parameters(peer, "/policy_node", *names)
    assert found == ["crossfade", 0.02, False, True, True, "panda"]
    names = ("image_rate_hz", "first_seed", "fault_noise")
    assert parameters(peer, "/sim_node", *names) == [0.0, 5, 0.001]
    assert "[DEBUG]" in policy.interrupt()
    assert "[DEBUG]" not in sim.interrupt()


def test_the_demo_lifts(launch, lifted):
    demo = launch("demo", *FAST)
    assert lifted()
    demo.interrupt()


@pytest.mark.parametrize(
    ("name", "arguments", "reason"),
    [
        ("deploy", ("policy:=lift", "dry_run:=maybe"), "dry_run"),
        ("deploy", (), "policy"),
        ("deploy", ("policy:=nowhere.onnx",), "nowhere.onnx' does not exist"),
        ("demo", ("robot:=pander", "namespace:=left"), "did you mean 'panda'"),
        ("sim", ("task:=lifd",), "did you mean 'lift'"),
        ("train", ("as_node:=true",), "run_dir is empty"),
        ("replay", ("bag:=nowhere", "policy:=lift"), "nowhere"),
    ],
)
def test_a_wrong_argument_is_named_and_nothing_goes_on(launch, name, arguments, reason):
    assert reason in launch(name, *arguments).wait()


@pytest.fixture
def demos(tmp_path) -> Path:
    """Three demonstrations."""
    path = tmp_path / "demos.hdf5"
    assert cli.main(f"collect --task lift --episodes 3 --out {path} --json".split()) == 0
    return path


LITTLE = "--bc.batch-size 32 --network.width 32"


def test_training_is_the_command_line(launch, demos, tmp_path):
    run_dir = tmp_path / "run"
    told = (f"demos:={demos}", f"run_dir:={run_dir}", "seed:=3")
    launch("train", *told, f"args:=--bc.num-steps 20 {LITTLE}").wait(120.0)
    assert (run_dir / "policy.safetensors").exists()
    assert '"seed": 3' in (run_dir / "config.json").read_text()


def test_ctrl_c_ends_a_training(launch, demos, tmp_path):
    run_dir = tmp_path / "run"
    told = (f"demos:={demos}", f"run_dir:={run_dir}")
    training = launch("train", *told, f"args:=--bc.num-steps 100000 {LITTLE}")
    deadline = time.monotonic() + END_S
    while not (run_dir / "metrics.csv").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(training.child.pid, signal.SIGINT)
    assert "exit code 130" in training.wait()  # what a shell calls ended by Ctrl-C


def test_training_as_a_node_tells_its_progress_and_ends_with_the_launch(
    launch, peer, demos, tmp_path
):
    metrics = peer.listen(DiagnosticArray, "/trainer_node/metrics")
    told = (f"demos:={demos}", f"run_dir:={tmp_path / 'run'}", "as_node:=true", "seed:=3")
    node = launch("train", *told, f"args:=--bc.num-steps 100000 {LITTLE}")
    peer.until(lambda: metrics, "metrics")
    assert not peer.call(Trigger, "/trainer_node/start", Trigger.Request()).success  # under way
    node.interrupt()
    assert '"seed": 3' in (tmp_path / "run" / "config.json").read_text()


def test_replay_judges_a_recorded_launch(launch, lifted, start, peer, tmp_path):
    bag, out = tmp_path / "bag", tmp_path / "report"
    recorder = start(recorder={"bag": str(bag)})["recorder"]
    peer.until(lambda: "recorder" in peer.node.get_node_names(), "the recorder")
    demo = launch("demo", "image_rate_hz:=0")  # not fast: the recorder has to find the topics first
    assert lifted()
    demo.interrupt()
    recorder.signal(signal.SIGINT)
    assert recorder.wait(END_S) == 0
    says = launch("replay", f"bag:={bag}", "policy:=lift", f"out:={out}").wait(120.0)
    assert "finished cleanly" in says
    assert "report.html" in says
    assert (out / "report.html").exists()

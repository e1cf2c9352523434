"""Launch files: names agree with the nodes everywhere; run for real where launch_ros is installed."""

import ast
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from toys import ROOT

from flow_policy_rl.ros import private_domain

FILES = sorted((ROOT / "launch").glob("*.launch.py"))
NODES = ROOT / "ros_ws" / "src" / "flow_policy_ros" / "flow_policy_ros"
BUILT_IN = {"use_sim_time"}


def constants(node: ast.AST) -> set[str]:
    return {
        n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)
    }


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_parameters_are_declared_by_the_node_they_go_to(path):
    tree = ast.parse(path.read_text())
    for call in ast.walk(tree):
        if not (isinstance(call, ast.Call) and getattr(call.func, "id", "") == "Node"):
            continue
        keywords = {k.arg: k.value for k in call.keywords}
        module = next(
            c for c in constants(keywords["arguments"]) if c.startswith("flow_policy_ros.")
        )
        declared = constants(ast.parse((NODES / f"{module.rpartition('.')[2]}.py").read_text()))
        given = {
            k.value
            for d in ast.walk(keywords["parameters"])
            if isinstance(d, ast.Dict)
            for k in d.keys
        }
        assert given
        assert given - BUILT_IN <= declared


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_every_argument_is_documented(path):
    tree = ast.parse(path.read_text())
    calls = [c for c in ast.walk(tree) if isinstance(c, ast.Call)]
    arguments = [c for c in calls if getattr(c.func, "id", "") == "DeclareLaunchArgument"]
    assert arguments
    assert all("description" in {k.arg for k in c.keywords} for c in arguments)
    used = {
        c.args[0].value
        for c in calls
        if getattr(c.func, "id", "") == "LaunchConfiguration"
        and c.args
        and isinstance(c.args[0], ast.Constant)
    }
    assert used <= {c.args[0].value for c in arguments}


LAUNCH = """
import sys
from launch import LaunchDescription, LaunchService
from launch.actions import IncludeLaunchDescription
from launch.launch_description_sources import PythonLaunchDescriptionSource
path, *arguments = sys.argv[1:]
source = PythonLaunchDescriptionSource(path)
service = LaunchService()
pairs = [tuple(a.split(":=", 1)) for a in arguments]
service.include_launch_description(
    LaunchDescription([IncludeLaunchDescription(source, launch_arguments=pairs)])
)
sys.exit(service.run())
"""


@pytest.fixture
def launch(tmp_path):
    pytest.importorskip("launch_ros", reason="launch_ros is not installed (it is not on PyPI)")
    environment = os.environ | {
        "ROS_DOMAIN_ID": str(private_domain()),
        "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST",
        "ROS_LOG_DIR": str(tmp_path / "log"),
    }
    running = []

    def begin(name: str, *arguments: str) -> tuple[subprocess.Popen, Path]:
        out = tmp_path / f"{name}.out"
        command = [
            sys.executable,
            "-c",
            LAUNCH,
            str(ROOT / "launch" / f"{name}.launch.py"),
            *arguments,
        ]
        with out.open("w") as file:
            child = subprocess.Popen(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        running.append(child)
        return child, out

    yield begin
    for child in running:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)


@pytest.mark.parametrize("name", ["sim", "deploy", "demo"])
def test_a_launched_node_starts_and_ends_cleanly(launch, name, tmp_path):
    policy = tmp_path / "none.onnx"
    arguments = [] if name == "sim" else [f"policy:={policy}"]
    child, out = launch(name, *arguments)
    deadline = time.monotonic() + 20
    says = "process started" if name == "sim" else f"policy '{policy}' does not exist"
    while says not in out.read_text() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert says in out.read_text()
    time.sleep(2.0 if name == "sim" else 0.0)
    os.killpg(child.pid, signal.SIGINT)  # what Ctrl-C on a terminal does: to everybody at once
    child.wait(10)
    assert "Traceback" not in out.read_text()
    if name == "sim":
        assert "process has finished cleanly" in out.read_text()


def test_training_and_replay_are_the_command_line(launch, tmp_path):
    child, out = launch("train", "algorithm:=bc", f"demos:={tmp_path / 'none.hdf5'}")
    child.wait(60)
    assert "demonstrations" in out.read_text()
    assert "does not exist" in out.read_text()
    child, out = launch("replay", f"bag:={tmp_path / 'none'}", f"policy:={tmp_path / 'none.onnx'}")
    child.wait(60)
    assert "none.onnx' does not exist" in out.read_text()

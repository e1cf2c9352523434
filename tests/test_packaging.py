"""Both packages build with colcon, plain and with symlinks, and versions agree everywhere."""

import os
import re
import shutil
import subprocess
import sys
from xml.etree import ElementTree

import pytest
from toys import ROOT

import flow_policy_rl

ROS_PACKAGE = ROOT / "ros_ws" / "src" / "flow_policy_ros"
COLCON = (
    "colcon-core",
    "colcon-ros",
    "colcon-python-setup-py",
    "colcon-defaults",
    "colcon-recursive-crawl",
    "colcon-library-path",
    "colcon-metadata",
    "colcon-output",
    "colcon-parallel-executor",
    "setuptools<80",
)


def test_versions_agree():
    version = flow_policy_rl.__version__
    for path in (ROOT / "package.xml", ROS_PACKAGE / "package.xml"):
        assert ElementTree.parse(path).findtext("version") == version
    assert re.search(r'version="(.+?)"', (ROS_PACKAGE / "setup.py").read_text()).group(1) == version
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()


def test_nodes_depend_on_the_library_and_never_the_reverse():
    root = {e.text for e in ElementTree.parse(ROOT / "package.xml").iter("exec_depend")}
    nodes = {e.text for e in ElementTree.parse(ROS_PACKAGE / "package.xml").iter("exec_depend")}
    assert "flow_policy_ros" not in root
    assert "flow_policy_rl" in nodes


def test_everything_installed_is_pinned():
    pinned = {
        re.split(r"[=\[]", line)[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    }
    text = (ROOT / "setup.py").read_text()
    required = set(re.findall(r'"([a-z0-9-]+)"', text.partition("SIM =")[2].partition("setup(")[0]))
    assert required - pinned == set()


@pytest.fixture(scope="module")
def colcon(tmp_path_factory):
    """colcon from PyPI in an environment of its own."""
    folder = tmp_path_factory.mktemp("colcon")
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    done = subprocess.run(
        [python, "-m", "pip", "install", "-q", *COLCON], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"colcon cannot be installed: {done.stderr.strip().splitlines()[-1]}")
    return folder / "venv" / "bin"


@pytest.mark.parametrize("symlink", [False, True], ids=["plain", "symlink-install"])
def test_colcon_builds_both_packages(colcon, tmp_path, symlink):
    source = tmp_path / "source"
    ignore = shutil.ignore_patterns(
        ".venv", ".git", "runs", "build", "install", "log", "*.egg-info", "__pycache__"
    )
    shutil.copytree(ROOT, source, ignore=ignore)
    keep = ("HOME", "LANG", "TMPDIR")
    environment = {k: os.environ[k] for k in keep if k in os.environ} | {
        "PATH": f"{colcon}:/usr/bin:/bin"
    }
    command = [colcon / "colcon", "build", *(["--symlink-install"] if symlink else [])]
    done = subprocess.run(
        command, cwd=source / "ros_ws", env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "2 packages finished" in done.stdout + done.stderr
    install = source / "ros_ws" / "install"
    for name in ("sim", "deploy", "train", "replay", "demo"):
        assert (
            install / "flow_policy_rl" / "share" / "flow_policy_rl" / "launch" / f"{name}.launch.py"
        ).exists()
    for package in ("flow_policy_rl", "flow_policy_ros"):
        marker = (
            install / package / "share" / "ament_index" / "resource_index" / "packages" / package
        )
        assert marker.exists()
    for node in ("policy_node", "sim_node", "recorder", "player", "episode_runner"):
        assert (
            install / "flow_policy_ros" / "lib" / "flow_policy_ros" / node
        ).exists()  # where ros2 run looks
    paths = [
        p
        for p in install.rglob("*")
        if p.name in ("panda.yaml", "panda.xml", "fastdds.xml", "report.html")
    ]
    if not symlink:
        assert {p.name for p in paths} == {"panda.yaml", "panda.xml", "fastdds.xml", "report.html"}

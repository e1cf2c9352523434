"""Both packages build with colcon, plain and with symlinks, and versions agree everywhere."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import types
import zipfile
from pathlib import Path
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
def built(tmp_path_factory):
    """Wheel and source distribution of the tracked files, in a copy of them."""
    folder = tmp_path_factory.mktemp("built")
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in tracked.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / "source" / name)
    command = [sys.executable, folder / "source/scripts/build.py", folder / "dist"]
    subprocess.run(command, check=True, capture_output=True)
    return folder


def test_the_wheel_has_every_file_that_the_code_opens(built):
    (wheel,) = (built / "dist").glob("*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    missing = [
        name
        for top in ("flow_policy_rl", "sim", "robots")
        for path in (built / "source" / top).rglob("*")
        if path.is_file()
        and "__pycache__" not in path.parts
        and (name := str(path.relative_to(built / "source"))) not in inside
    ]
    assert missing == []
    assert not [name for name in inside if name.startswith(("tests", "examples", "docs"))]


def test_the_source_distribution_builds_the_same_wheel(built, tmp_path):
    (archive,) = (built / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    assert (source / "LICENSE").exists()
    code = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", code, tmp_path], cwd=source, check=True, capture_output=True
    )
    (wheel,) = (built / "dist").glob("*.whl")
    (again,) = tmp_path.glob("*.whl")
    names = lambda path: sorted(zipfile.ZipFile(path).namelist())  # noqa: E731
    assert names(again) == names(wheel)


def test_an_installed_wheel_works_away_from_the_source(built, tmp_path):
    (wheel,) = (built / "dist").glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import flow_policy_rl, sim, json; from flow_policy_rl import cli, report; from sim.tasks import make_task;"
        "assert flow_policy_rl.__file__.startswith(__import__('sys').argv[1]), flow_policy_rl.__file__;"
        "make_task('lift'); report.write(__import__('pathlib').Path('page.html'), 't', 's', []);"
        "raise SystemExit(cli.main(['list', 'robots']))"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "panda" in done.stdout


def test_every_dependency_has_a_licence_that_somebody_has_looked_at():
    spec = importlib.util.spec_from_file_location("licences", ROOT / "scripts/licences.py")
    licences = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(licences)
    names = licences.requirements()
    assert {"numpy", "torch", "mujoco", "onnxruntime"} <= set(names)
    assert [name for name in names if licences.unknown(name)] == []


def test_serving_needs_nothing_of_training():
    """Extras are honest: `serve` and `ros` name no torch and no mujoco, `all` has what every other one needs."""
    extras = {}
    fake = types.ModuleType("setuptools")
    fake.setup = lambda **given: extras.update(
        given["extras_require"], base=given["install_requires"]
    )
    fake.find_packages = lambda **given: []
    code = compile((ROOT / "setup.py").read_text(), str(ROOT / "setup.py"), "exec")
    saved = sys.modules.get("setuptools")
    sys.modules["setuptools"] = fake
    try:
        exec(code, {"__file__": str(ROOT / "setup.py")})
    finally:
        del sys.modules["setuptools"]
        if saved is not None:
            sys.modules["setuptools"] = saved
    heavy = {"torch", "mujoco", "plotly", "matplotlib", "onnx", "gymnasium"}
    for name in ("base", "serve", "ros", "bags", "gpu"):
        assert not heavy & set(extras[name])
    wanted = set().union(
        *(
            extras[name]
            for name in ("sim", "kitchen", "serve", "bags", "data", "report", "train", "ros")
        )
    )
    assert set(extras["all"]) == wanted
    assert set(extras) >= {"sim", "train", "serve", "ros", "gpu", "data", "docs"}


@pytest.mark.slow
@pytest.mark.parametrize("version", ["3.10", "3.11", "3.12", "3.13"])
def test_serving_installs_alone_small_and_quick_to_import(built, tmp_path, version):
    """In a clean environment: pip check, under 200 MB, and no torch."""
    own = map(
        str, Path.home().glob(f".pyenv/versions/{version}.*/bin/python")
    )  # before pyenv's shims
    found = next(own, None) or shutil.which(f"python{version}")
    if found is None:
        pytest.skip(f"no Python {version} on this machine")
    subprocess.run([found, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    (wheel,) = (built / "dist").glob("*.whl")
    size = lambda: sum(p.stat().st_size for p in (tmp_path / "venv/lib").rglob("*") if p.is_file())  # noqa: E731
    before = size()
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    done = subprocess.run(
        [*pip, "install", "-q", f"{wheel}[serve]"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"onnxruntime cannot be installed: {done.stderr.strip().splitlines()[-1]}")
    assert subprocess.run([*pip, "check"], check=False).returncode == 0
    assert (size() - before) / 1e6 < 200
    keep = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    code = "import sys, flow_policy_rl.serving.onnx_policy; print(sorted({'torch', 'mujoco'} & set(sys.modules)))"
    done = subprocess.run(
        [python, "-c", code], cwd=tmp_path, env=keep, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
    command = [tmp_path / "venv/bin/flow-policy", "eval", "--policy", "x.onnx"]
    done = subprocess.run(
        command, cwd=tmp_path, env=keep, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "this command needs" in done.stderr
    assert len(done.stderr.splitlines()) == 1


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
    for node in ("policy_node", "sim_node", "recorder", "player", "demonstrator", "episode_runner"):
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


def set_up_beside(tmp_path: Path, python_of_ros: str, numpy: str) -> tuple[int, str, str]:
    """Exit code, output and constraints of setup.sh beside a sourced ROS 2; pip does nothing."""
    root, log = tmp_path / "root", tmp_path / "pip.log"
    for name in ("scripts/setup.sh", "constraints.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    site = tmp_path / f"opt/lib/python{python_of_ros}/site-packages"
    for name, text in (("rclpy", "import yaml"), ("numpy", f"__version__ = '{numpy}'")):
        (site / name).mkdir(parents=True)
        (site / name / "__init__.py").write_text(text)
    python = root / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    # As in a new environment there is nothing beside the standard library.
    python.write_text(
        f'#!/bin/sh\ncase "$*" in *ctypes*) exit 0 ;; *"-m pip"*) echo "$*" >>{log}; exit 0 ;; esac\n'
        f'exec {sys.executable} -S "$@"\n'
    )
    python.chmod(0o755)
    ros = {"AMENT_PREFIX_PATH": str(tmp_path / "opt"), "PYTHONPATH": str(site), "ROS_DISTRO": "x"}
    run = subprocess.run(
        [root / "scripts" / "setup.sh"],
        env=os.environ | ros | {"PYTHON": str(python)},
        capture_output=True,
        text=True,
    )
    calls = log.read_text() if log.exists() else ""
    ours = root / ".venv" / "constraints.txt"
    constraints = ours.read_text() if ".venv/constraints.txt" in calls else ""
    return run.returncode, run.stdout + calls, constraints


def test_beside_a_sourced_ros_no_second_one_is_installed(tmp_path):
    """rclpy cannot be imported yet where there is no yaml; numpy is that of the messages."""
    here = "{}.{}".format(*sys.version_info)
    code, said, constraints = set_up_beside(tmp_path / "jazzy", here, "1.26.4")
    assert code == 0, said
    assert "using the sourced ROS 2" in said
    assert "[wheels]" not in said
    assert "numpy<2" in constraints
    code, said, constraints = set_up_beside(tmp_path / "lyrical", here, "2.3.5")
    assert code == 0, said
    assert "[wheels]" not in said
    assert "numpy<2" not in constraints


def test_a_ros_of_another_python_is_refused_in_one_line(tmp_path):
    code, said, _ = set_up_beside(tmp_path, "3.9", "1.26.4")
    assert code == 2
    assert "the sourced ROS 2 is for Python 3.9" in said
    assert "-m pip" not in said

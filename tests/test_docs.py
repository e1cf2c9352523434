"""The documentation is true: its commands parse, marked ones run, its links lead somewhere, its messages exist.

A block is run when a comment stands before it: `<!-- run -->`. In the comment may be smaller budgets, `s/long/short/`,
appended flags for one command, `s/$/--flags/train`, and after a word `runs` two invented run folders.
"""

import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import yaml
from toys import ROOT

from flow_policy_rl import cli
from flow_policy_rl.data import demonstrations
from flow_policy_rl.errors import InputError
from flow_policy_rl.serving.kinematics import Link
from flow_policy_rl.serving.robot import JointLimits, Robot, Topics, load_robot
from flow_policy_rl.train_bc import check_demos
from flow_policy_rl.train_config import default_config
from sim.tasks import make_task

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(
    r"(?:<!-- run(?P<run>.*?) ?-->\n)?```(?P<language>\w*)\n(?P<text>.*?)```", re.DOTALL
)


def blocks(page: Path):
    """(language, text, instructions or None) of every fenced block."""
    for found in BLOCK.finditer(page.read_text()):
        yield found["language"], found["text"], found["run"]


def commands(text: str) -> list[str]:
    """Command lines of a block, continuation lines joined, prompts and comments dropped."""
    lines = text.replace("\\\n", " ").splitlines()
    lines = [line.removeprefix("$ ").split("  # ")[0].split(" &")[0].strip() for line in lines]
    return [line for line in lines if line and not line.startswith("#")]


ALL = [
    (str(page.relative_to(ROOT)), line)
    for page in PAGES
    for language, text, _ in blocks(page)
    if language in ("", "sh")
    for line in commands(text)
    if line.startswith("flow-policy ") and "..." not in line
]


def test_there_are_commands_to_check():
    assert len(ALL) > 50


@pytest.mark.parametrize(("page", "line"), ALL, ids=[f"{p}: {c[:60]}" for p, c in ALL])
def test_every_command_in_the_documentation_parses(page, line, capsys, tmp_path, monkeypatch):
    """With `--dump-config` a command says what it would do and does nothing."""
    monkeypatch.chdir(tmp_path)
    for name in ("lift.yaml", "runs/rl1/config.json", "runs/rl/config.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("seed: 1\ntask: lift\n")
    words = shlex.split(line.split(" > ")[0])[1:]
    words = [
        "reach" if w == "point" else w for w in words
    ]  # the example package is not installed here
    if "--help" in words or words == ["--version"]:
        return
    assert cli.main([*words, "--dump-config"]) == 0, capsys.readouterr().err


RUN = [p for p in PAGES if any(run is not None for _, _, run in blocks(p))]


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN, ids=lambda p: p.stem)
def test_marked_commands_run(page, example_package, tmp_path):
    """In order, in one folder, as a reader would."""
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}:{example_package}:{os.environ.get('PYTHONPATH', '')}",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    for language, text, instructions in blocks(page):
        if instructions is None:
            continue
        if "runs" in instructions.split():
            invent_runs(tmp_path)
        if language == "python":
            lines = [f"{shlex.quote(sys.executable)} -c {shlex.quote(text)}"]
        else:
            lines = [shorter(line, instructions) for line in commands(text)]
        for line in lines:
            if line.startswith(("pip install", "cp -r", "source .venv")):
                continue  # the fixture's work
            done = subprocess.run(
                ["bash", "-c", line],
                cwd=tmp_path,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"


def test_a_set_of_robomimic_is_taken_over_as_the_tutorial_says(tmp_path, monkeypatch):
    """The code of the page, on a file in degrees: training takes what comes out, and not the file itself."""
    page = ROOT / "docs/tutorials/own_demonstrations.md"
    (code,) = (text for _, text, _ in blocks(page) if "theirs" in text)
    sizes = {"robot0_joint_pos": 7, "robot0_joint_vel": 7, "robot0_gripper_qpos": 2, "object": 10}
    with h5py.File(tmp_path / "theirs.hdf5", "w") as file:
        settings = {"env_name": "Lift", "env_kwargs": {"control_freq": 20}}
        file.create_group("data").attrs["env_args"] = json.dumps(settings)
        for i in range(2):
            file[f"data/demo_{i}/actions"] = np.full((300, 8), 90.0)
            for name, size in sizes.items():
                file[f"data/demo_{i}/obs/{name}"] = np.full((300, size), 90.0)
    monkeypatch.chdir(tmp_path)
    exec(code, {"__name__": "page"})
    task, config = make_task("reach"), default_config("bc", "reach")
    demos = demonstrations.load("demos.hdf5")
    check_demos(demos, task, config)
    episode = demos.episodes[1]
    assert np.allclose(episode.obs["joint_pos"], np.pi / 2)
    assert np.allclose(episode.actions, [*[np.pi / 2] * 7, 90.0])
    with pytest.raises(InputError, match=r"have task lift; task 'reach' has reach"):
        check_demos(demonstrations.load("theirs.hdf5"), task, config)


def shorter(line: str, instructions: str) -> str:
    """A command with the small budgets of its page."""
    for old, new, command in re.findall(r"s/([^/]+)/([^/]+)/(\w*(?: (?!s/)\w+)?)", instructions):
        if old == "$":
            line = f"{line} {new}" if f"flow-policy {command} " in line else line
        else:
            line = line.replace(old, new)
    return line


def invent_runs(folder: Path) -> None:
    """Run folders as training leaves them."""
    from test_report import make_run

    make_run(folder / "runs" / "rl")
    make_run(folder / "runs" / "bc", rate=0.3)


def test_the_robot_file_and_the_parameters_of_the_tutorial_are_real(tmp_path):
    """The file loads and shows every key there is; every parameter of the policy node is documented."""
    text = (ROOT / "docs/tutorials/own_robot.md").read_text()
    robot, parameters = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "my_robot.yaml").write_text(robot)
    loaded = load_robot(str(tmp_path / "my_robot.yaml"))
    assert set(loaded.limits) == {"joint_1", "joint_2", "finger"}
    assert loaded.workspace is not None
    for cls in (Robot, Topics, JointLimits, Link):
        for key in dataclasses.fields(cls):
            assert f"{key.name}:" in text, key.name
    node = ROOT / "ros_ws/src/flow_policy_ros/flow_policy_ros/policy_parameters.py"
    declared = re.findall(r'Parameter\(\s*"(\w+)",\s*("\w*"|[^,]+),', node.read_text())
    defaults = {name: yaml.safe_load(value) for name, value in declared}
    settings = yaml.safe_load(parameters)["policy_node"]["ros__parameters"]
    assert settings
    assert set(settings) <= set(defaults)
    assert {name: type(v) for name, v in settings.items()} == {
        name: type(defaults[name]) for name in settings
    }
    reference = (ROOT / "docs/ros.md").read_text()
    assert [name for name in defaults if f"`{name}`" not in reference] == []


def test_every_relative_link_leads_to_a_file():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            if not target.startswith(("http", "mailto:")):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_messages_in_troubleshooting_are_those_of_the_code():
    sources = "".join(
        path.read_text()
        for folder in (
            "flow_policy_rl",
            "sim",
            "ros_ws/src/flow_policy_ros/flow_policy_ros",
            "scripts",
        )
        for path in (ROOT / folder).rglob("*.*")
        if path.suffix in (".py", ".sh")
    )
    joined = re.sub(r'"\s*\n\s*f?"', "", sources)  # adjacent literals
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    quoted = re.findall(r"\*\*`(.+?)`\*\*", text)
    assert len(quoted) > 10
    assert [message for message in quoted if message not in joined] == []


def test_the_site_builds_without_a_warning(tmp_path):
    if shutil.which("mkdocs", path=str(Path(sys.executable).parent)) is None:
        pytest.skip("mkdocs is not installed: make docs")
    done = subprocess.run(
        [Path(sys.executable).parent / "mkdocs", "build", "--strict", "-d", tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "search/search_index.json").read_text())["docs"]

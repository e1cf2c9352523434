"""A package of the user's own: the one in examples/, installed elsewhere, adds a task, a robot, an encoder and an
algorithm."""

import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import torch
from toys import ROOT, small_spec

from flow_policy_rl import cli, collect, evaluation_report, export, plugins, ros
from flow_policy_rl.errors import InputError
from flow_policy_rl.policy import FlowPolicy, NetworkConfig
from flow_policy_rl.serving.robot import load_robot
from flow_policy_rl.spec import ObservationField
from sim import gym_env
from sim.errors import SimulationError
from sim.tasks import make_task
from sim.tasks.layout import ObsField

SOURCE = ROOT / "examples" / "my_arm"


@pytest.fixture
def example(example_package, monkeypatch):
    """The installed example on the path."""
    monkeypatch.syspath_prepend(example_package)


def run(capsys, line: str) -> dict:
    code = cli.main(line.split())
    out, err = capsys.readouterr()
    assert code == 0, err
    return json.loads(out)


def test_the_template_is_short():
    lines = [
        line
        for path in SOURCE.rglob("*")
        if path.suffix in (".py", ".toml", ".yaml", ".xml") and "build" not in path.parts
        for line in path.read_text().splitlines()
        if line.strip()
    ]
    assert len(lines) < 100


def test_what_a_package_registers_is_listed(example, capsys):
    names = run(capsys, "list --json")
    assert "point" in names["tasks"]
    assert "planar" in names["robots"]
    assert "thumbnail" in names["encoders"]
    assert "bc_shortest" in names["algorithms"]


def test_without_the_package_its_names_are_unknown():
    with pytest.raises(SimulationError, match="unknown task 'point'"):
        make_task("point")
    with pytest.raises(InputError, match="unknown robot 'planar'"):
        load_robot("planar")
    with pytest.raises(InputError, match="unknown encoder 'thumbnail'"):
        plugins.find("encoders", "thumbnail", {})


def test_own_task_robot_and_algorithm_from_demonstrations_to_onnx(example, tmp_path, capsys):
    demos, folder = tmp_path / "demos.hdf5", tmp_path / "run"
    collected = run(capsys, f"collect --task point --episodes 24 --out {demos} --json")
    assert collected["attempts"] < 2 * 24
    run(
        capsys,
        f"train bc_shortest --task point --demos {demos} --run-dir {folder} --keep 0.75 --bc.num-steps 300 "
        "--bc.batch-size 128 --network.width 64 --json",
    )
    policy = folder / "policy.safetensors"
    result = run(capsys, f"eval --policy {policy} --episodes 20 --json")
    assert result["success_rate"] > 0.2
    exported = run(capsys, f"export --checkpoint {policy} --out {tmp_path}/policy.onnx --json")
    assert exported["passed"]
    robot = load_robot("planar")
    assert robot.limit_array(("shoulder", "elbow"), "velocity").tolist() == [2.0, 2.0]


def test_own_arm_is_simulated_and_deployed_without_naming_its_robot(example, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(ros, "foreground", lambda node, parameters, *_: started.append(parameters))
    spec = small_spec().replace(robot="planar")
    policy = FlowPolicy(spec, NetworkConfig(width=8, depth=1)).eval()
    path = tmp_path / "policy.onnx"
    export.write(export.build(export.trace_policy(policy, spec), spec), spec, path)
    for line in (
        "sim --task point",
        f"deploy --policy {path}",
        f"deploy --policy {path} --robot mine.yaml",
    ):
        assert cli.main(line.split()) == 0
    assert [parameters["robot"] for parameters in started] == ["planar", "planar", "mine.yaml"]


def test_own_encoder_is_part_of_policy_and_checkpoint(example, tmp_path):
    from flow_policy_rl import checkpoint

    image = ObservationField("image", "image", (), "", source="front", resolution=(16, 24))
    spec = small_spec(observations=(image,))
    policy = FlowPolicy(spec, NetworkConfig(width=16, depth=2, encoder="thumbnail"))
    assert policy.num_features == 64
    checkpoint.save(tmp_path / "p.safetensors", policy)
    loaded = checkpoint.load(tmp_path / "p.safetensors")
    obs = {"image": torch.randint(0, 255, (2, 16, 24, 3), dtype=torch.uint8)}
    noise = torch.randn(2, *policy.chunk_shape)
    assert loaded.sample(obs, noise).equal(policy.eval().sample(obs, noise))


def test_a_package_that_cannot_be_imported_is_named(tmp_path, monkeypatch, capsys):
    info = tmp_path / "broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    kinds = ("tasks", "robots", "algorithms", "encoders")
    (info / "entry_points.txt").write_text(
        "".join(f"[flow_policy_rl.{kind}]\nbad = broken:thing\n" for kind in kinds)
    )
    (tmp_path / "broken.py").write_text("import no_such_module\n")
    monkeypatch.syspath_prepend(tmp_path)
    says = r"'bad' of package 'broken' \(broken:thing\) cannot be imported: ModuleNotFoundError: No module named"
    with pytest.raises(SimulationError, match=says):
        make_task("bad")
    with pytest.raises(InputError, match=says):
        load_robot("bad")
    with pytest.raises(InputError, match=says):
        plugins.find("encoders", "bad", {})
    assert cli.main(["train", "bad"]) == 2
    assert "no_such_module" in capsys.readouterr().err
    assert "bad" in run(capsys, "list tasks --json")["tasks"]  # names need no import


def _sees(**obs):
    return lambda self, state: {name: state[..., :size] for name, size in obs.items()}


MISTAKES = {
    "another key": (
        "observe",
        _sees(joint_pos=2, goal=7),
        "observe gives joint_pos, goal, not 'goal_pose'",
    ),
    "another size": (
        "observe",
        _sees(joint_pos=3, goal_pose=7),
        r"'joint_pos' has shape \(2, 3\), not \(2, 2\)",
    ),
    "positions for a state": (
        "initial_state",
        lambda self, rng: rng.random(9),
        r"a state has shape \(9,\), not \(1",
    ),
    "not for batches": (
        "is_success",
        lambda self, state: np.bool_(True),
        r"is_success has shape \(\), not \(2,\)",
    ),
    "no booleans": (
        "is_success",
        lambda self, state: state[..., 0],
        "is_success gives float64, not bool",
    ),
    "a scalar reward": (
        "reward_terms",
        lambda *_: {"near": 1.0},
        r"'near' has shape \(\), not \(2,\)",
    ),
    "its own error": (
        "observe",
        lambda self, state: {}["x"],
        r"observe fails: KeyError: 'x' \(test_plugins.py, line",
    ),
    "no robot": ("robot", None, "has no attribute 'robot'"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_in_a_task_is_one_line_before_work_begins(example, case, monkeypatch, capsys):
    from my_arm.task import Point

    what, wrong, says = MISTAKES[case]
    if wrong is None:
        monkeypatch.delattr(Point, what)
    else:
        monkeypatch.setattr(Point, what, wrong)
    with pytest.raises(SimulationError, match=rf"^task 'point' \(my_arm.task:Point\).*{says}"):
        make_task("point")
    assert cli.main(["collect", "--task", "point", "--episodes", "1"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_an_observation_of_a_joint_that_the_model_lacks_is_refused(example, monkeypatch):
    from my_arm import task

    monkeypatch.setattr(
        task,
        "ObsField",
        lambda name, kind, elements, *rest: ObsField(name, kind, ("shoulder", "elbo"), *rest),
    )
    with pytest.raises(
        SimulationError, match="observation 'joint_pos': unknown joint 'elbo' .did you mean 'elbow'"
    ):
        make_task("point")


def test_a_task_without_cameras_has_no_film_which_is_said(example, capsys):
    assert evaluation_report.films(make_task("point"), None, None, "cpu") is None
    assert capsys.readouterr().err == "no film: task 'point' names no cameras\n"


def test_an_expert_of_another_arm_is_refused(example, monkeypatch):
    from my_arm.task import Point

    monkeypatch.setattr(Point, "expert", lambda *_: SimpleNamespace(act=lambda state: np.zeros(3)))
    with pytest.raises(
        InputError, match=r"expert of task 'point' gives an action of shape \(3,\), not \(2,\)"
    ):
        collect.main(collect.Config("point", Path("demos.hdf5"), episodes=1))


def test_two_packages_with_one_name_are_both_named(example, tmp_path, monkeypatch):
    info = tmp_path / "other_arm-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other-arm\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[flow_policy_rl.robots]\nplanar = my_arm:ROBOT\n"
        "[flow_policy_rl.tasks]\npoint = my_arm.task:Point\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match="registered by my-arm and other-arm"):
        load_robot("planar")
    with pytest.raises(SimulationError, match="task 'point' is registered by my-arm and other-arm"):
        make_task("point")


def test_own_task_is_a_gymnasium_environment(example, monkeypatch):
    monkeypatch.setattr(gymnasium.envs.registration, "registry", {})
    importlib.reload(gym_env)
    assert gym_env.env_id("point") == "flow_policy/Point-v0"
    envs = gymnasium.make_vec("flow_policy/Point-v0", num_envs=2, flat=True)
    obs, _ = envs.reset(seed=0)
    assert obs.shape == (2, 9)
    envs.close()


def test_a_task_without_options_says_that_there_are_none(example):
    with pytest.raises(SimulationError, match="option of task 'point' 'cameras'; valid: none$"):
        make_task("point", cameras=True)

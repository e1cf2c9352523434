"""A trained policy comes with the package: inspect, eval and deploy work before any training."""

import json

import pytest

from flow_policy_rl import cli
from flow_policy_rl.errors import InputError
from flow_policy_rl.serving import shipped
from flow_policy_rl.serving.onnx_policy import OnnxPolicy
from flow_policy_rl.serving.robot import load_robot


@pytest.mark.parametrize("name", sorted(shipped.policies()))
def test_a_shipped_policy_is_sound_and_fits_its_robot(name, capsys):
    policy = OnnxPolicy(name)
    spec = policy.spec
    load_robot(spec.robot).limit_array(spec.joint_names, "velocity")
    assert spec.provenance["demos"]["sha256"]
    assert shipped.policies()[name].stat().st_size < 5e6
    assert cli.main(["inspect", name, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["spec"]["task"] == spec.task


@pytest.mark.parametrize(("name", "least"), [("lift", 0.85), ("lift_camera", 0.85)])
def test_they_lift(name, least, capsys):
    assert cli.main(["eval", "--policy", name, "--episodes", "20", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["success_rate"] >= least


def test_a_file_wins_over_a_name_and_other_names_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shipped.find("lift").name == "lift.onnx"
    (tmp_path / "lift").write_bytes(b"mine")
    assert shipped.find("lift").read_bytes() == b"mine"
    with pytest.raises(InputError, match="does not exist"):
        OnnxPolicy("lfit")


@pytest.mark.parametrize(
    "command", ["train score_flow --task lift", "export", "verify --policy lift"]
)
def test_a_policy_that_ships_is_no_checkpoint_and_says_so(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lift.yaml").touch()
    assert cli.main([*command.split(), "--checkpoint", "lift"]) == 2
    said = capsys.readouterr().err.strip()
    assert "'lift' is a policy that ships, and an export" in said
    assert "\n" not in said

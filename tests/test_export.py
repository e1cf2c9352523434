"""The exported file computes what torch computes, carries its spec, and says so when it is not ours."""

import numpy as np
import onnx
import pytest
import torch
from toys import random_obs, small_policy

from flow_policy_rl import checkpoint, export
from flow_policy_rl.errors import InputError, RunFailed
from flow_policy_rl.serving.onnx_policy import OnnxPolicy


@pytest.fixture(autouse=True)
def toy_observations(monkeypatch):
    """The toy policy belongs to no task: draw its observations instead of simulating them."""

    def draw(policy, rng):
        generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
        normal = {k: v.numpy() for k, v in random_obs(policy, 32, generator).items()}
        return [normal, {k: 10 * v for k, v in normal.items()}]

    monkeypatch.setattr(export, "observations_to_check", draw)


def trained_looking(**changes):
    """A policy whose every part matters: shifted normalisers, gain that depends on time."""
    policy = small_policy(**changes)
    generator = torch.Generator().manual_seed(5)
    obs = {k: 3 + 2 * v for k, v in random_obs(policy, 100, generator).items()}
    policy.normalizer.fit(obs)
    policy.fit_action_range(torch.randn(100, 2, generator=generator) * 0.3)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return policy


@pytest.mark.parametrize("integrator", ["euler", "midpoint", "heun", "rk4"])
@pytest.mark.parametrize("num_flow_steps", [1, 4])
@pytest.mark.parametrize("score_drift", [True, False])
def test_same_numbers_as_torch(tmp_path, integrator, num_flow_steps, score_drift, generator):
    policy = trained_looking(
        integrator=integrator, num_flow_steps=num_flow_steps, score_drift=score_drift
    )
    report = export.export_policy(policy, tmp_path / "policy.onnx")
    assert report["passed"]
    exported = OnnxPolicy(tmp_path / "policy.onnx")
    for batch in (1, 2, 7):
        obs, noise = (
            random_obs(policy, batch, generator),
            torch.randn(batch, 6, 2, generator=generator),
        )
        with torch.no_grad():
            expected = policy.sample(obs, noise).numpy()
        found = exported.infer({k: v.numpy() for k, v in obs.items()}, noise.numpy())
        assert np.abs(found - expected).max() < 1e-5


def test_spec_travels_in_the_file_at_full_precision(tmp_path):
    policy = trained_looking(control_dt=1 / 3, action_low=(-0.1 - 1e-15, -2.0))
    export.export_policy(policy, tmp_path / "policy.onnx")
    assert OnnxPolicy(tmp_path / "policy.onnx").spec == policy.spec


def test_the_score_drift_is_in_the_graph(tmp_path, generator):
    """Deployment needs v and the drift: without the gain the same file would give other actions."""
    policy = trained_looking(score_drift=True)
    export.export_policy(policy, tmp_path / "policy.onnx")
    obs, noise = random_obs(policy, 4, generator), torch.randn(4, 6, 2, generator=generator)
    exported = OnnxPolicy(tmp_path / "policy.onnx").infer(
        {k: v.numpy() for k, v in obs.items()}, noise.numpy()
    )
    policy.drift_gain = None
    with torch.no_grad():
        assert np.abs(policy.sample(obs, noise).numpy() - exported).max() > 1e-3


def test_a_file_that_computes_something_else_is_not_kept(tmp_path, monkeypatch):
    policy = trained_looking()
    real = OnnxPolicy.infer
    monkeypatch.setattr(OnnxPolicy, "infer", lambda self, obs, noise: real(self, obs, noise) + 1e-3)
    with pytest.raises(RunFailed, match="parity gate"):
        export.export_policy(policy, tmp_path / "policy.onnx")
    assert list(tmp_path.iterdir()) == []


def test_actions_stay_within_the_spec(tmp_path, generator):
    policy = trained_looking()
    export.export_policy(policy, tmp_path / "policy.onnx")
    obs = {k: 1e3 * v.numpy() for k, v in random_obs(policy, 64, generator).items()}
    chunk = OnnxPolicy(tmp_path / "policy.onnx").infer(obs, np.zeros((64, 6, 2), np.float32))
    assert (chunk >= np.float32(policy.spec.action_low)).all()
    assert (chunk <= np.float32(policy.spec.action_high)).all()
    assert (chunk == np.float32(policy.spec.action_high)).any()


@pytest.fixture
def exported(tmp_path):
    export.export_policy(trained_looking(), tmp_path / "policy.onnx")
    return tmp_path / "policy.onnx"


def test_foreign_and_broken_files_are_refused(exported, tmp_path):
    good = exported.read_bytes()
    cases = {
        "cut.onnx": (good[: len(good) // 2], "cannot be loaded"),
        "text.onnx": (b"not a model", "cannot be loaded"),
        "empty.onnx": (b"", "cannot be loaded"),
    }
    model = onnx.load(exported)
    del model.metadata_props[:]
    cases["foreign.onnx"] = (model.SerializeToString(), "not made by flow-policy export")
    model = onnx.load(exported)
    next(p for p in model.metadata_props if p.key == "flow_policy_rl.spec").value = "{}"
    cases["newer.onnx"] = (model.SerializeToString(), "schema_version")
    model = onnx.load(exported)
    prop = next(p for p in model.metadata_props if p.key == "flow_policy_rl.spec")
    prop.value = prop.value.replace('"action_horizon": 6', '"action_horizon": 9')
    cases["lying.onnx"] = (model.SerializeToString(), "the graph takes")
    for name, (data, says) in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError) as error:
            OnnxPolicy(tmp_path / name)
        assert says in str(error.value), name
        assert "\n" not in str(error.value)


def test_bad_observations_are_refused(exported, generator):
    policy = OnnxPolicy(exported)
    good = {"joint_pos": np.zeros((1, 3), np.float32), "object_pose": np.zeros((1, 7), np.float32)}
    noise = np.zeros((1, 6, 2), np.float32)
    policy.infer(good, noise)
    broken = good["joint_pos"].copy()
    broken[0, 1] = np.nan
    for obs, draw, says in (
        ({"joint_pos": good["joint_pos"]}, noise, "'object_pose' is missing"),
        ({**good, "joint_pos": np.zeros((1, 4), np.float32)}, noise, "shape (1, 4), not (1, 3)"),
        ({**good, "joint_pos": broken}, noise, "not finite"),
        (good, np.zeros((1, 6, 3), np.float32), "'noise' has shape"),
    ):
        with pytest.raises(InputError, match=None) as error:
            policy.infer(obs, draw)
        assert says in str(error.value)


def test_checkpoint_round_trip_is_bit_equal(tmp_path, generator):
    policy = trained_looking(score_drift=True)
    checkpoint.save(tmp_path / "p.safetensors", policy)
    again = checkpoint.load(tmp_path / "p.safetensors")
    assert again.spec == policy.spec
    obs, noise = random_obs(policy, 9, generator), torch.randn(9, 6, 2, generator=generator)
    with torch.no_grad():
        assert torch.equal(policy.sample(obs, noise), again.sample(obs, noise))


def test_broken_checkpoints_are_refused(tmp_path):
    checkpoint.save(tmp_path / "p.safetensors", small_policy())
    data = (tmp_path / "p.safetensors").read_bytes()
    for name, content in {"cut": data[:-100], "text": b"hello", "empty": b""}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match="not a safetensors file"):
            checkpoint.load(tmp_path / name)
    with pytest.raises(InputError, match=r"does not exist; that folder has: p\.safetensors"):
        checkpoint.load(tmp_path / "q.safetensors")

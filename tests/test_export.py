"""The exported file computes what torch computes, carries its spec, and says so when it is not ours."""

import copy
import dataclasses
import functools
import json

import numpy as np
import onnx
import pytest
import torch
from toys import looks_trained, random_obs, small_policy, small_spec

from flow_policy_rl import checkpoint, export, export_command
from flow_policy_rl.errors import InputError, RunFailed
from flow_policy_rl.policy import FlowPolicy, NetworkConfig
from flow_policy_rl.serving.onnx_policy import OnnxPolicy
from flow_policy_rl.spec import INTEGRATORS, ObservationField


@pytest.fixture(autouse=True)
def toy_observations(monkeypatch):
    """The toy policies belong to no task: draw their observations instead of simulating them."""
    monkeypatch.setattr(export, "observations_to_check", draw_observations)


def draw_observations(policy, rng, spec):
    seen = [export.extreme_observations(spec, 32, rng) for _ in range(2)]
    seen[0] = {k: v if v.dtype == np.uint8 else 0.1 * v for k, v in seen[0].items()}
    return [export.with_prefix(spec, obs, rng) for obs in seen]


def image_policy() -> FlowPolicy:
    camera = ObservationField("front_image", "image", (), "", "front", resolution=(24, 32))
    joints = ObservationField("joint_pos", "joint_position", ("a", "b"), "rad")
    torch.manual_seed(0)
    return FlowPolicy(small_spec(observations=(joints, camera)), NetworkConfig(width=16, depth=2))


def torch_chunk(policy, obs, noise, **options) -> np.ndarray:
    tensors = {k: torch.as_tensor(v) for k, v in obs.items()}
    with torch.no_grad():
        return policy.sample(tensors, torch.as_tensor(noise), **options).numpy()


@functools.cache
def traced(name: str) -> tuple[FlowPolicy, dict]:
    """A policy and its pieces: tracing takes seconds, assembling does not. Not to be changed."""
    changes = {
        "plain": {},
        "drift": {"score_drift": True},
        "base_score": {"score_drift": True, "base_score": True},
        "prefix": {"score_drift": True, "execute_horizon": 3, "prefix_horizon": 3},
        "chunk": {"predicts": "chunk", "execute_horizon": 3, "prefix_horizon": 3},
    }[name]
    policy = looks_trained(small_policy(**changes))
    return policy, export.trace_policy(policy, policy.spec)


@pytest.mark.parametrize("name", ["plain", "drift", "prefix", "base_score", "chunk"])
@pytest.mark.parametrize("integrator", INTEGRATORS)
@pytest.mark.parametrize("num_flow_steps", [1, 4, 10])
def test_same_numbers_as_torch(tmp_path, name, integrator, num_flow_steps):
    policy, pieces = traced(name)
    spec = policy.spec.replace(integrator=integrator, num_flow_steps=num_flow_steps)
    path = tmp_path / "policy.onnx"
    export.write(export.build(pieces, spec), spec, path)
    exported = OnnxPolicy(path, first_load_in_child=False)
    rng = np.random.default_rng(3)
    options = {"integrator": integrator, "num_flow_steps": num_flow_steps}
    for batch in (1, 2, 7):
        obs = export.with_prefix(spec, export.extreme_observations(spec, batch, rng), rng)
        obs = {k: v if v.dtype.kind == "i" else v.astype(np.float32) for k, v in obs.items()}
        noise = rng.standard_normal((batch, 6, 2), dtype=np.float32)
        found = exported.infer(obs, noise)
        assert np.abs(found - torch_chunk(policy, obs, noise, **options)).max() < 1e-5
        assert export.keeps_prefix(obs, found)


def test_the_report_of_an_export(tmp_path):
    policy, pieces = traced("prefix")
    report = export.export_policy(policy, tmp_path / "policy.onnx", pieces=pieces)
    assert report["passed"]
    assert report["prefix_exact"]
    assert report["max_error_in_action_range"] <= 1e-5
    assert report["onnx_reference_max_error_in_action_range"] <= 1e-5
    assert set(report["max_abs_error_by_joint"]) == {"a", "b"}
    inside = OnnxPolicy(tmp_path / "policy.onnx").spec.provenance["export"]
    assert inside["parity"] == report
    assert inside["versions"]["onnxruntime"]


def test_a_prefix_is_kept_bit_for_bit_and_no_prefix_is_a_delay_of_zero(tmp_path):
    policy, pieces = traced("prefix")
    export.export_policy(policy, tmp_path / "policy.onnx", pieces=pieces)
    exported = OnnxPolicy(tmp_path / "policy.onnx")
    rng = np.random.default_rng(0)
    obs = export.extreme_observations(policy.spec, 4, rng)
    noise = rng.standard_normal((4, 6, 2), dtype=np.float32)
    prefix = rng.uniform(-3, 3, (4, 3, 2)).astype(np.float32)  # beyond the limits as well
    delay = np.array([0, 1, 2, 3])
    chunk = exported.infer({**obs, "prefix": prefix, "inference_delay": delay}, noise)
    for row, known in enumerate(delay):
        assert np.array_equal(chunk[row, :known], prefix[row, :known])
    free = exported.infer(obs, noise)
    np.testing.assert_array_equal(free[0], chunk[0])
    assert np.abs(free[3, 3:] - chunk[3, 3:]).max() > 1e-3
    for bad, says in (
        ({"prefix": prefix}, "'inference_delay' is missing"),
        ({"prefix": prefix, "inference_delay": delay + 1}, "must be 0 to 3"),
        ({"prefix": prefix, "inference_delay": delay - 1}, "must be 0 to 3"),
        ({"prefix": prefix, "inference_delay": delay * 1.0}, "type float64"),
        (
            {"prefix": prefix * np.inf, "inference_delay": delay},
            "'prefix' has numbers that are not",
        ),
    ):
        with pytest.raises(InputError) as error:
            exported.infer({**obs, **bad}, noise)
        assert says in str(error.value)


@pytest.mark.parametrize("camera_size", [(24, 32), (60, 100)])
def test_pictures_go_in_as_the_camera_gives_them(tmp_path, camera_size):
    """uint8 (height, width, 3): crop, resize and scaling are in the graph."""
    policy = image_policy()
    joints, camera = policy.spec.observations
    camera = dataclasses.replace(camera, resolution=camera_size)
    spec = policy.spec.replace(observations=(joints, camera))
    assert export.export_policy(policy, tmp_path / "policy.onnx", spec=spec)["passed"]
    exported = OnnxPolicy(tmp_path / "policy.onnx")
    rng = np.random.default_rng(0)
    obs = {k: v for k, v in export.extreme_observations(spec, 3, rng).items()}
    obs["joint_pos"] = obs["joint_pos"].astype(np.float32)
    noise = exported.zero_noise(3)
    assert np.abs(exported.infer(obs, noise) - torch_chunk(policy, obs, noise)).max() < 1e-5
    with pytest.raises(InputError, match="type float32, not uint8"):
        exported.infer({**obs, "front_image": obs["front_image"].astype(np.float32)}, noise)
    with pytest.raises(InputError, match="has shape"):
        exported.infer({**obs, "front_image": obs["front_image"][:, ::2]}, noise)


def test_the_encoder_runs_once_outside_of_the_integration(tmp_path):
    policy = image_policy()
    spec = policy.spec.replace(num_flow_steps=10)
    model = export.build(export.trace_policy(policy, spec), spec)
    convolutions = [n.name for n in model.graph.node if n.op_type == "Conv"]
    assert len(convolutions) == 3
    assert all(name.startswith("embed/encoders/front_image/") for name in convolutions)


def test_half_precision_is_stated_and_only_where_it_belongs(tmp_path):
    policy = looks_trained(small_policy(score_drift=True), scale=0.03)
    report = export.export_policy(policy, tmp_path / "policy.onnx", kind="fp16")
    assert 1e-5 < report["max_error_in_action_range"] < 5e-3
    assert report["precision"] == "fp16"
    model = onnx.load_from_string((tmp_path / "policy.onnx").read_bytes())
    half = {t.name for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT16}
    full = {t.name for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT}
    assert any("head" in name for name in half)
    assert any("from_chunk" in name for name in half)
    for kept in ("normalizer", "action_scale", "from_time"):
        assert any(kept in name for name in full), kept
        assert not any(kept in name for name in half), kept


def test_a_fixed_batch_is_fixed(tmp_path):
    policy, pieces = traced("plain")
    export.export_policy(policy, tmp_path / "policy.onnx", batch=3, pieces=pieces)
    exported = OnnxPolicy(tmp_path / "policy.onnx")
    assert exported.batch == 3
    rng = np.random.default_rng(0)
    exported.infer(export.extreme_observations(policy.spec, 3, rng), exported.zero_noise(3))
    with pytest.raises(InputError, match="batch of 2; this policy takes 3"):
        exported.infer(
            export.extreme_observations(policy.spec, 2, rng), np.zeros((2, 6, 2), np.float32)
        )


def test_names_are_readable_and_tell_nothing_of_the_machine_that_made_them(tmp_path):
    policy = looks_trained(small_policy(num_flow_steps=3))
    export.export_policy(policy, tmp_path / "policy.onnx")
    data = (tmp_path / "policy.onnx").read_bytes()
    names = [n.name for n in onnx.load_from_string(data).graph.node]
    assert len(set(names)) == len(names)
    for step in range(3):
        assert any(n.startswith(f"step_{step:02d}/velocity_field/from_chunk/") for n in names)
    assert not any("from_time" in n for n in names)  # computed at export
    assert b"stack_trace" not in data
    assert b".py" not in data


def test_spec_travels_in_the_file_at_full_precision(tmp_path):
    policy = looks_trained(small_policy(control_dt=1 / 3, action_low=(-0.1 - 1e-15, -2.0)))
    export.export_policy(policy, tmp_path / "policy.onnx")
    spec = OnnxPolicy(tmp_path / "policy.onnx").spec
    assert spec.provenance.pop("export")
    assert spec == policy.spec


def test_the_score_drift_is_in_the_graph(tmp_path, generator):
    """Deployment needs v and the drift: without the gain the same file would give other actions."""
    policy, pieces = traced("drift")
    export.export_policy(policy, tmp_path / "policy.onnx", pieces=pieces)
    obs, noise = random_obs(policy, 4, generator), torch.randn(4, 6, 2, generator=generator)
    exported = OnnxPolicy(tmp_path / "policy.onnx").infer(
        {k: v.numpy() for k, v in obs.items()}, noise.numpy()
    )
    policy = copy.deepcopy(policy)
    policy.drift_gain = None
    with torch.no_grad():
        assert np.abs(policy.sample(obs, noise).numpy() - exported).max() > 1e-3


@pytest.mark.parametrize("error", [1e-3, np.nan])
def test_a_file_that_computes_something_else_is_not_kept(tmp_path, monkeypatch, error):
    policy, pieces = traced("plain")
    real = OnnxPolicy.infer
    monkeypatch.setattr(OnnxPolicy, "infer", lambda self, *given: real(self, *given) + error)
    with pytest.raises(RunFailed, match="parity gate"):
        export.export_policy(policy, tmp_path / "policy.onnx", pieces=pieces)
    assert list(tmp_path.iterdir()) == []


def test_actions_stay_within_the_spec(tmp_path, generator):
    policy, pieces = traced("plain")
    export.export_policy(policy, tmp_path / "policy.onnx", pieces=pieces)
    obs = {k: 1e3 * v.numpy() for k, v in random_obs(policy, 64, generator).items()}
    chunk = OnnxPolicy(tmp_path / "policy.onnx").infer(obs, np.zeros((64, 6, 2), np.float32))
    assert (chunk >= np.float32(policy.spec.action_low)).all()
    assert (chunk <= np.float32(policy.spec.action_high)).all()
    assert (chunk == np.float32(policy.spec.action_high)).any()


def test_export_and_verify_commands(tmp_path):
    """Results of the run folder travel along, and every K and integrator is compared."""
    policy = looks_trained(small_policy())
    checkpoint.save(tmp_path / "run/policy.safetensors", policy)
    (tmp_path / "run/metrics.csv").write_text("step,eval/success_rate\n5,0.5\n10,0.75\n")
    given = {"checkpoint": tmp_path / "run/policy.safetensors"}
    out = tmp_path / "policy.onnx"
    assert export_command.main(export_command.ExportConfig(**given, out=out, integrator="heun"))[
        "passed"
    ]
    facts = OnnxPolicy(out).spec.provenance
    assert facts["results"] == {"step": 10, "eval/success_rate": 0.75}
    assert len(facts["checkpoint_sha256"]) == 64
    result = export_command.verify(export_command.VerifyConfig(policy=out, **given, every=True))
    assert result["passed"]
    assert result["integrator"] == "heun"
    assert {(r["integrator"], r["num_flow_steps"]) for r in result["every"]} == {
        (i, k) for i in INTEGRATORS for k in (1, 2, 4, 10)
    }
    assert "same as torch" in export_command.text(result)
    json.dumps(result)
    other = looks_trained(small_policy(seed=1))
    checkpoint.save(tmp_path / "run/other.safetensors", other)
    assert not export_command.verify(
        export_command.VerifyConfig(policy=out, checkpoint=tmp_path / "run/other.safetensors")
    )["passed"]
    for change in ({"control_dt": 0.1}, {"execute_horizon": 1}, {"action_low": (-9.0, -9.0)}):
        checkpoint.save(tmp_path / "run/changed.safetensors", looks_trained(small_policy(**change)))
        changed = {"policy": out, "checkpoint": tmp_path / "run/changed.safetensors"}
        with pytest.raises(InputError, match=f"has {next(iter(change))} .* has "):
            export_command.verify(export_command.VerifyConfig(**changed))
    odd = tmp_path / "odd.onnx"
    model = onnx.load_from_string(out.read_bytes())
    export.write(model, export.with_export(OnnxPolicy(out).spec, {"precision": "bf16"}), odd)
    with pytest.raises(InputError, match="'bf16'.*valid: fp16, fp32"):
        export_command.verify(export_command.VerifyConfig(policy=odd, **given))
    blind = small_policy(observations=policy.spec.observations[:1])
    checkpoint.save(tmp_path / "run/blind.safetensors", blind)
    with pytest.raises(InputError, match="has observations .*object_pose.*, '.*blind.*' has "):
        export_command.verify(
            export_command.VerifyConfig(policy=out, checkpoint=tmp_path / "run/blind.safetensors")
        )


def test_results_that_are_no_numbers_do_not_end_an_export(tmp_path):
    checkpoint.save(tmp_path / "policy.safetensors", looks_trained(small_policy()))
    config = export_command.ExportConfig(tmp_path / "policy.safetensors", tmp_path / "policy.onnx")
    (tmp_path / "metrics.csv").write_text("step,eval/return,eval/success_rate\n5,nan,0.5\n")
    export_command.main(config)
    results = OnnxPolicy(config.out).spec.provenance["results"]
    assert results == {"step": 5, "eval/return": None, "eval/success_rate": 0.5}
    (tmp_path / "metrics.csv").write_text("step,eval/return\n5,much\n")
    with pytest.raises(InputError, match="metrics.csv' cannot be read: .*'much'"):
        export_command.main(config)


def test_checkpoint_round_trip_is_bit_equal(tmp_path, generator):
    policy = looks_trained(small_policy(score_drift=True))
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
    with pytest.raises(
        InputError,
        match=r"does not exist \(did you mean 'p\.safetensors'\?\); that folder has: p\.",
    ):
        checkpoint.load(tmp_path / "q.safetensors")


def test_sweep_evaluates_every_variant_and_draws_the_frontier(tmp_path, monkeypatch):
    """An untrained policy on a real task: what is measured is the sweep, not the policy."""
    from flow_policy_rl import sweep

    monkeypatch.undo()  # observations come from simulation here
    policy = untrained_lift()
    page = tmp_path / "sweep.html"
    result = sweep.run(policy, policy.spec, 2, page, steps=(1, 2), integrators=("euler", "rk4"))
    found = [(r["integrator"], r["num_flow_steps"], r["noise"]) for r in result["rows"]]
    noises = ("zero", "seeded", "fresh")
    expected = [("euler", k, n) for k in (1, 2) for n in noises]
    assert found == expected + [("rk4", k, "zero") for k in (1, 2)]
    assert all(r["episodes"] == 2 and r["success_ci95"] for r in result["rows"])
    assert any(r["frontier"] for r in result["rows"])
    assert "What a millisecond buys" in page.read_text()


def test_a_variant_that_fails_its_gate_is_left_out_and_the_sweep_goes_on(tmp_path, monkeypatch):
    from flow_policy_rl import sweep

    monkeypatch.undo()
    real = export.parity

    def parity(policy, exported, **options):
        report = real(policy, exported, **options)
        if exported.spec.integrator != failing:
            return report
        return report | {"passed": False, "max_error_in_action_range": 0.01}

    monkeypatch.setattr(export, "parity", parity)
    policy, page = untrained_lift(), tmp_path / "sweep.html"
    for failing, kept in (("rk4", 3), ("euler", 1)):
        result = sweep.run(policy, policy.spec, 2, page, steps=(1,), integrators=("euler", "rk4"))
        assert [f["integrator"] for f in result["failed"]] == [failing]
        assert len(result["rows"]) == kept
        says = f"{failing} K=1 failed its parity gate: error 1.0e-02 of the action range, allowed"
        assert says in page.read_text()
        exported = {"policy": "policy.onnx", "passed": True, "precision": "fp32", "cases": 1}
        exported |= {"max_abs_error": 0.0, "max_error_in_action_range": 0.0}
        exported |= {"allowed_in_action_range": 1e-4, "sweep": result}
        lines = export_command.text(exported)
        assert says in lines
        assert "'policy.onnx' itself is written and passed" in lines
    with pytest.raises(RunFailed, match="no variant passed: euler K=1 failed its parity gate"):
        sweep.run(policy, policy.spec, 2, page, steps=(1,), integrators=("euler",))


def untrained_lift() -> FlowPolicy:
    from sim.tasks import make_task

    task = make_task("lift")
    spec = small_spec(
        task="lift",
        robot="panda",
        joint_names=task.world.joint_names,
        action_low=tuple(task.world.target_low.tolist()),
        action_high=tuple(task.world.target_high.tolist()),
        observations=tuple(
            ObservationField(f.name, f.kind, f.elements, f.unit, f.source) for f in task.obs_fields
        ),
        action_horizon=30,
        execute_horizon=30,
    )
    torch.manual_seed(0)
    return FlowPolicy(spec, NetworkConfig(width=8, depth=2)).eval()


def test_the_frontier_is_what_nothing_beats():
    from flow_policy_rl.sweep import mark_frontier

    rows = [
        {"p50_ms": ms, "success_rate": rate, "noise": noise, "return_mean": 0.0}
        for ms, rate, noise in (
            (1.0, 0.5, "zero"),
            (2.0, 0.9, "zero"),
            (3.0, 0.9, "zero"),  # as good, slower
            (1.5, 0.4, "zero"),  # slower and worse
            (1.0, 1.0, "fresh"),  # another noise
        )
    ]
    mark_frontier(rows)
    assert [r["frontier"] for r in rows] == [True, True, False, False, False]

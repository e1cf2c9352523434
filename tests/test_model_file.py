"""A policy file is judged before it is parsed, first parsed in a child process, and damage of any kind is found."""

import json
import os
import sys
import time

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from toys import looks_trained, small_policy

from flow_policy_rl import export
from flow_policy_rl.errors import PolicyFileError
from flow_policy_rl.inspection import Config as InspectConfig
from flow_policy_rl.inspection import main as inspect
from flow_policy_rl.inspection import text as inspect_text
from flow_policy_rl.serving import model_file, trial
from flow_policy_rl.serving.onnx_policy import OnnxPolicy
from flow_policy_rl.spec import METADATA_KEY


@pytest.fixture(scope="module")
def data() -> bytes:
    """A small sealed policy file."""
    policy = looks_trained(small_policy(num_flow_steps=2))
    model = export.build(export.trace_policy(policy, policy.spec), policy.spec)
    helper.set_model_props(model, {METADATA_KEY: policy.spec.to_json()})
    return model_file.seal(model.SerializeToString())


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    """No file is known yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def write(tmp_path):
    def write(content: bytes):
        path = tmp_path / "policy.onnx"
        path.write_bytes(content)
        return path

    return write


def unsealed(data: bytes) -> onnx.ModelProto:
    model = onnx.load_from_string(data)
    kept = [p for p in model.metadata_props if p.key != model_file.SEAL_KEY]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    return model


def edited(data: bytes, edit) -> bytes:
    """The file after an edit of the model, sealed again."""
    model = unsealed(data)
    edit(model)
    return model_file.seal(model.SerializeToString())


def set_spec(**changes):
    def edit(model):
        (prop,) = (p for p in model.metadata_props if p.key == METADATA_KEY)
        for old, new in changes.values():
            assert old in prop.value
            prop.value = prop.value.replace(old, new)

    return edit


def external(location: str):
    def edit(model):
        tensor = model.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location)

    return edit


def external_attribute(model):
    tensor = helper.make_tensor("c", TensorProto.FLOAT, [1], [0.0])
    tensor.external_data.add(key="location", value="../../etc/passwd")
    model.graph.node.append(helper.make_node("Constant", [], ["c"], value=tensor))


def loop(model):
    body = helper.make_graph([], "body", [], [])
    model.graph.node.append(helper.make_node("Loop", [], ["c"], body=body))


def rename_input(model):
    model.graph.input[0].name = "joint_position"
    model.graph.node[0].input[0] = "joint_position"


CASES = {
    "missing spec": (lambda m: m.metadata_props.pop(), "not made by flow-policy export"),
    "newer spec": (
        set_spec(a=('"schema_version": ', '"schema_version": 9')),
        "schema_version 9",
    ),
    "broken spec": (set_spec(a=("{", "[[[")), "not JSON"),
    "deep spec": (set_spec(a=('"provenance": {', '"provenance": ' + "[" * 99999)), "not JSON"),
    "infinite time step": (set_spec(a=('"control_dt": 0.05', '"control_dt": 1e999')), "finite"),
    "other horizon": (
        set_spec(a=('"action_horizon": 6', '"action_horizon": 9')),
        "the graph takes",
    ),
    "old opset": (lambda m: setattr(m.opset_import[0], "version", 9), "opset 9; this version runs"),
    "new opset": (lambda m: setattr(m.opset_import[0], "version", 99), "opset 99"),
    "no opset": (lambda m: m.opset_import.pop(), "opset 0"),
    "foreign operators": (lambda m: m.opset_import.add(domain="evil", version=1), "domain 'evil'"),
    "functions": (lambda m: m.functions.add(name="f"), "functions"),
    "weights elsewhere": (external("weights.bin"), "external data"),
    "weights outside": (external("../../../etc/passwd"), "external data"),
    "weights outside in an attribute": (external_attribute, "external data"),
    "control flow": (loop, "control flow ('Loop')"),
    "sparse weights": (lambda m: m.graph.sparse_initializer.add(), "sparse"),
    "input of another name": (rename_input, "the graph takes"),
    "output of another name": (
        lambda m: setattr(m.graph.output[0], "name", "step_00/Add_22"),
        "",
    ),
    "no graph": (lambda m: m.ClearField("graph"), "0 graphs"),
    "unknown operator": (lambda m: setattr(m.graph.node[3], "op_type", "Nonsense"), "Nonsense"),
    "weights of another type": (
        lambda m: setattr(m.graph.initializer[0], "data_type", TensorProto.DOUBLE),
        "cannot be loaded",
    ),
}


@pytest.fixture(scope="module")
def child():
    """One child process for all cases."""
    with trial.Trial() as child:
        yield child


@pytest.fixture
def shared_child(child, monkeypatch):
    """Loading uses the child of the module; it is ended there."""
    monkeypatch.setattr(trial.Trial, "__enter__", lambda self: child)
    monkeypatch.setattr(trial.Trial, "__exit__", lambda self, *_: None)
    return child


@pytest.mark.parametrize("case", CASES)
def test_what_is_not_ours_is_refused_in_one_line(data, write, case, shared_child):
    edit, says = CASES[case]
    path = write(edited(data, edit))
    with pytest.raises(PolicyFileError) as error:
        OnnxPolicy(path)
    assert says in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda d: d[: len(d) // 2], "cut short"),
        (lambda d: d[:-1], "cut short"),
        (lambda d: b"", "0 graphs"),
        (lambda d: b"not a model", "not an ONNX model"),
        (lambda d: d + b"\x72\x00", "checksum does not match"),
        (lambda d: d[:2000] + bytes([d[2000] ^ 1]) + d[2001:], ""),
    ],
)
def test_damage_is_refused_in_one_line(data, write, damage, says):
    with pytest.raises(PolicyFileError) as error:
        OnnxPolicy(write(damage(data)))
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_one_flipped_bit_in_a_weight_is_found(data, write):
    weight = np.frombuffer(onnx.load_from_string(data).graph.initializer[0].raw_data, np.uint8)
    at = data.index(weight.tobytes()) + 5
    flipped = data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]
    with pytest.raises(PolicyFileError, match="checksum does not match"):
        model_file.read(write(flipped))


def test_a_file_that_is_too_large_is_not_read(data, write):
    with pytest.raises(PolicyFileError, match="the limit is 1,000"):
        model_file.read(write(data), max_bytes=1000)


def test_a_file_without_seal_is_refused(data, write):
    with pytest.raises(PolicyFileError, match="export it again"):
        model_file.read(write(unsealed(data).SerializeToString()))


def test_the_first_load_is_in_a_child_and_later_ones_are_not(data, write, monkeypatch):
    loads = []
    real = trial.Trial.load
    monkeypatch.setattr(trial.Trial, "load", lambda *given: (loads.append(given), real(*given)))
    path = write(data)
    OnnxPolicy(path)
    OnnxPolicy(path)
    assert len(loads) == 1
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")  # cannot be written: tried every time
    OnnxPolicy(path)
    assert len(loads) == 2


CHILD = "import os, sys, time\nsys.stdin.readline()\n"


@pytest.mark.parametrize(
    ("does", "says"), [("os.abort()", "crashed"), ("time.sleep(600)", "did not end within 0.5 s")]
)
def test_a_crash_or_hang_of_the_parser_stays_in_the_child(
    data, write, monkeypatch, tmp_path, does, says
):
    """The child is replaced by one that dies or never answers."""
    (tmp_path / "child.sh").write_text(f'#!/bin/sh\nexec {sys.executable} -c "{CHILD}{does}"\n')
    os.chmod(tmp_path / "child.sh", 0o755)
    monkeypatch.setattr(trial, "TIMEOUT_S", 0.5)
    monkeypatch.setattr(trial.Trial.__init__, "__defaults__", (0.5,))
    monkeypatch.setattr(trial.sys, "executable", str(tmp_path / "child.sh"))
    start = time.monotonic()
    with pytest.raises(PolicyFileError, match=says):
        OnnxPolicy(write(data))
    assert time.monotonic() - start < 30


def test_a_bomb_is_refused_by_the_child(data, write, shared_child):
    """A few bytes that ask for terabytes."""

    def bomb(model):
        size = helper.make_tensor("huge", TensorProto.INT64, [2], [1 << 21, 1 << 21])
        model.graph.initializer.append(size)
        model.graph.node.append(helper.make_node("ConstantOfShape", ["huge"], ["bomb"]))
        model.graph.node.append(helper.make_node("ReduceMax", ["bomb"], ["boom"], keepdims=0))
        last = model.graph.node[-3]
        last.output[0] = "before"
        model.graph.node.append(helper.make_node("Add", ["before", "boom"], ["action_chunk"]))

    with pytest.raises(PolicyFileError, match="cannot be loaded"):
        OnnxPolicy(write(edited(data, bomb)))


def test_inspect_needs_no_runtime(data, write, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    result = inspect(InspectConfig(write(data)))
    assert result["spec"]["action_horizon"] == 6
    assert result["opset"] == 20
    assert result["operators"]["Gemm"] == 7
    assert result["chunk_joining"] == "none"
    assert "not trained to continue" in inspect_text(result)


def test_inspect_tells_results_data_and_parity(write, monkeypatch):
    policy = looks_trained(small_policy(execute_horizon=3, prefix_horizon=3))
    policy.spec = policy.spec.replace(
        provenance={
            "results": {"step": 10, "eval/success_rate": 0.75},
            "demos": {"sha256": "ab" * 32, "episodes": 50},
            "environment": {"git_revision": "0123456789ab"},
        }
    )
    path = write(b"")
    monkeypatch.setattr(
        export,
        "observations_to_check",
        lambda _, rng, spec: [
            export.with_prefix(spec, export.extreme_observations(spec, 2, rng), rng)
        ],
    )
    export.export_policy(policy, path)
    text = inspect_text(inspect(InspectConfig(path)))
    for says in ("up to 3 actions", "success_rate 0.75", "50 episodes", "0123456789ab", "fp32"):
        assert says in text


@pytest.mark.parametrize("odd", ["x", 5, None, [1], {"sha256": 5}, {"max_abs_error": "x"}])
def test_inspect_stands_whatever_is_in_the_provenance(data, write, odd):
    """It is free: another tool may have written it."""
    for provenance in (
        dict.fromkeys(("export", "results", "demos", "environment"), odd),
        {"export": {"parity": odd}},
    ):
        change = '"provenance": {}', '"provenance": ' + json.dumps(provenance)
        path = write(edited(data, set_spec(a=change)))
        assert "chunk of 6 actions" in inspect_text(inspect(InspectConfig(path)))


# --- fuzz ---


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """One to four small damages: bits, bytes, cuts, insertions, copied pieces."""
    out = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        at, size = int(rng.integers(len(out))), int(rng.integers(1, 9))
        match rng.integers(6):
            case 0:
                out[at] ^= 1 << int(rng.integers(8))
            case 1:
                out[at : at + size] = rng.bytes(size)
            case 2:
                del out[at : at + size]
            case 3:
                out[at:at] = rng.bytes(size)
            case 4:
                source = int(rng.integers(len(out)))
                out[at : at + 64] = out[source : source + 64]
            case 5:
                out[at] = (0x00, 0x7F, 0x80, 0xFF)[int(rng.integers(4))]
        if rng.random() < 0.02:
            del out[at:]
        if not out:
            break
    return bytes(out)


def fuzz(data: bytes, path, cases: int, child: trial.Trial) -> dict[str, int]:
    """Load mutated files as a user would; counts of what came of it."""
    rng, counts = np.random.default_rng(0), {"refused": 0, "loaded": 0}
    body = data[: -len(model_file._seal_of(b""))]
    obs = None
    for case in range(cases):
        # Half with the checksum computed again, so that the mutation reaches what comes after it.
        content = model_file.seal(mutate(body, rng)) if case % 2 else mutate(data, rng)
        path.write_bytes(content)
        try:
            policy = OnnxPolicy(path)
        except PolicyFileError as error:
            if "\n" in str(error):
                raise
            counts["refused"] += 1
            continue
        counts["loaded"] += 1
        obs = {f.name: np.zeros((1, f.size), np.float32) for f in policy.spec.observations}
        policy.infer(obs, policy.zero_noise())
    return counts | {"children": child.starts}


def test_mutated_files_neither_crash_nor_hang_the_caller(data, tmp_path, shared_child):
    counts = fuzz(data, tmp_path / "mutated.onnx", 300, shared_child)
    assert counts["refused"] > 200
    assert counts["loaded"] > 3  # damage in weights, sealed again, is a policy like any other


@pytest.mark.slow
def test_ten_thousand_mutated_files(data, tmp_path, shared_child):
    counts = fuzz(data, tmp_path / "mutated.onnx", 10_000, shared_child)
    print(counts)
    assert counts["refused"] > 5_000

"""The bench of serving measures what it says: no claim about how fast, which is the machine's matter."""

import json
from pathlib import Path

import numpy as np
import pytest
from toys import documented

from flow_policy_rl import export
from flow_policy_rl.bench import serve
from flow_policy_rl.errors import InputError

KEYS = {
    "p50_ms",
    "p95_ms",
    "p99_ms",
    "max_ms",
    "torch_p50_ms",
    "floor_ms",
    "ratio_to_floor",
    "provider",
    "integrator",
    "num_flow_steps",
}


def test_the_bench_ends_with_its_keys(tmp_path):
    result = serve.main(serve.Config(calls=10, sweep=False, memory_calls=10))
    json.dumps(result)
    assert set(result) == documented("bench serve") >= KEYS
    assert result["p50_ms"] <= result["p95_ms"] <= result["p99_ms"] <= result["max_ms"]
    assert result["ratio_to_floor"] == pytest.approx(result["p50_ms"] / result["floor_ms"])
    assert (result["integrator"], result["num_flow_steps"]) == ("euler", 10)
    result["rows"] = [
        {"integrator": "euler", "num_flow_steps": k, "p50_ms": 0.1 * k, "p99_ms": 0.2 * k}
        for k in (1, 2)
    ]
    assert "torch eager" in serve.text(result)
    serve.write_report(tmp_path / "page.html", result)
    assert "Cost by K and integrator" in (tmp_path / "page.html").read_text()


def test_the_floor_is_the_products_of_the_graph(tmp_path):
    """Ten steps of chunk -> 512 -> 512 -> 512 -> chunk, and the observation once."""
    policy = serve.fresh_policy(vision=False)
    pieces = export.trace_policy(policy, policy.spec)
    export.write(export.build(pieces, policy.spec), policy.spec, tmp_path / "policy.onnx")
    products = serve.products(tmp_path / "policy.onnx")
    shapes = [matrix.shape for matrix, _, _ in products]
    step = [(512, 128), (512, 512), (512, 512), (128, 512)]
    assert shapes == [(512, 16), *step * 10]
    serve.multiply(products)
    for matrix, vector, result in products[:5]:
        np.testing.assert_allclose(result, matrix.astype(np.float64) @ vector, rtol=1e-3, atol=1e-3)


def test_bad_flags_are_refused(tmp_path):
    with pytest.raises(InputError, match="--calls must be at least 10"):
        serve.main(serve.Config(calls=3))
    with pytest.raises(InputError, match="--vision"):
        serve.main(serve.Config(vision=True, policy=tmp_path / "policy.onnx"))
    with pytest.raises(InputError, match="does not exist"):
        serve.main(serve.Config(policy=tmp_path / "policy.onnx", calls=10))


def test_a_policy_that_ships_is_timed_by_its_name():
    result = serve.main(serve.Config(policy=Path("lift"), calls=10))
    assert result["policy"].endswith("lift.onnx")
    assert result["floor_ms"]

"""`flow-policy bench serve`: how long one inference takes, next to torch and to the least that it could take.

Everything runs on one core, in a process of its own whose linear algebra has one thread. A round times the numpy floor,
the exported policy and torch one after the other, so that a busy host slows all three; of five rounds the one with the
best median counts. The floor is the bare matrix-vector products of the graph in numpy, nothing else.

Figures named `cpu` are processor time of the calling thread: they leave out what other processes took from the core, so
on a shared host they say more of the policy and less of its neighbours. The others are what a robot waits.
"""

import concurrent.futures
import dataclasses
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flow_policy_rl.errors import InputError, output_file
from flow_policy_rl.serving import shipped

ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
ROUNDS = 5
WALL, CPU = 0, 1
SWEEP = (1, 2, 4, 6, 8, 10)


@dataclass(frozen=True)
class Config:
    """Time one inference of an exported policy on one core, against torch eager and a numpy floor.

    Example: flow-policy bench serve --out runs/bench_serve.html

    Attributes:
        policy: exported policy, or the name of one that ships (None: a fresh MLP of 512 x 3, chunk 16 x 8, ten
            Euler steps).
        checkpoint: what it was exported from, for the comparison with torch and the cost by K and integrator.
        vision: without --policy: two cameras of 96 x 96, K = 4.
        calls: per round and contestant.
        sweep: also time every integrator at several K.
        memory_calls: so many calls more, with the memory of the process before and after.
        provider: tensorrt, cuda, cpu or auto.
        num_threads: of onnxruntime.
        spinning: let its idle threads poll.
        out: page with the plot of cost by K and integrator.
        json: print one JSON object.
    """

    policy: Path | None = None
    checkpoint: Path | None = None
    vision: bool = False
    calls: int = 1000
    sweep: bool = True
    memory_calls: int = 0
    provider: str = "cpu"
    num_threads: int = 1
    spinning: bool = False
    out: Path | None = None
    json: bool = False


def main(config: Config) -> dict:
    """Measure, in a child with one thread."""
    if config.calls < 10:
        raise InputError(f"--calls must be at least 10, not {config.calls}")
    if config.policy and config.vision:
        raise InputError("--vision is about the policy that is made when there is no --policy")
    if config.policy:
        config = dataclasses.replace(config, policy=shipped.existing(config.policy))
    if config.out:
        output_file(config.out, ".html")
    before = {name: os.environ.get(name) for name in ONE_THREAD}
    os.environ.update(dict.fromkeys(ONE_THREAD, "1"))
    try:
        spawn = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
            result = pool.submit(measure, config).result()
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    if config.out:
        write_report(config.out, result)
        result["report"] = str(config.out)
    return result


def measure(config: Config) -> dict:
    """All figures; see `main`."""
    import torch

    from flow_policy_rl import checkpoint, export, provenance
    from flow_policy_rl.serving.onnx_policy import OnnxPolicy

    core = max(os.sched_getaffinity(0))
    if config.num_threads == 1:
        os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    options = {
        "provider": config.provider,
        "num_threads": config.num_threads,
        "spinning": config.spinning,
    }
    with tempfile.TemporaryDirectory() as folder:
        path, policy = config.policy, None
        if config.checkpoint:
            policy = checkpoint.load(config.checkpoint)
        elif path is None:
            policy = fresh_policy(config.vision)
        pieces = export.trace_policy(policy, policy.spec) if policy else None
        if path is None:
            path = Path(folder) / "policy.onnx"
            export.write(export.build(pieces, policy.spec), policy.spec, path)
        start = time.perf_counter()
        exported = OnnxPolicy(path, **options)
        load_s = time.perf_counter() - start
        spec = exported.spec
        obs, noise = example(spec)
        contestants = {"onnx": lambda: exported.infer(obs, noise)}
        weights = products(path)
        if weights:
            contestants["floor"] = lambda: multiply(weights)
        if policy:
            policy.spec = spec
            contestants["torch"] = lambda: policy.act(obs, noise)
        exported.warm_up()
        with torch.inference_mode():
            rounds = [
                {name: times_ms(call, config.calls) for name, call in contestants.items()}
                for _ in range(ROUNDS)
            ]
        rows = []
        if config.sweep and pieces:
            rows = sweep(pieces, spec, Path(folder), options, config.calls)
        memory = None
        if config.memory_calls:
            memory = memory_over(contestants["onnx"], config.memory_calls)
    of = {name: [r[name] for r in rounds] for name in contestants}
    p50, p95, p99 = np.percentile(best(of["onnx"]), [50, 95, 99])
    cpu50, cpu99 = np.percentile(best(of["onnx"], CPU), [50, 99])
    floor, floor_cpu = median_of(of.get("floor")), median_of(of.get("floor"), CPU)
    eager, eager_cpu = median_of(of.get("torch")), median_of(of.get("torch"), CPU)
    return {
        "p50_ms": float(p50),
        "p95_ms": float(p95),
        "p99_ms": float(p99),
        "max_ms": float(best(of["onnx"]).max()),
        "torch_p50_ms": eager,
        "floor_ms": floor,
        "ratio_to_floor": ratio(p50, floor),
        "speedup_over_torch": ratio(eager, p50),
        "cpu": {
            "p50_ms": float(cpu50),
            "p99_ms": float(cpu99),
            "torch_p50_ms": eager_cpu,
            "floor_ms": floor_cpu,
            "ratio_to_floor": ratio(cpu50, floor_cpu),
            "speedup_over_torch": ratio(eager_cpu, cpu50),
        },
        "provider": exported.provider,
        "integrator": spec.integrator,
        "num_flow_steps": spec.num_flow_steps,
        "medians_ms_by_round": {
            name: [float(np.median(t[WALL])) for t in times] for name, times in of.items()
        },
        "rows": rows,
        "memory": memory,
        "load_s": load_s,
        "calls": config.calls,
        "num_threads": config.num_threads,
        "spinning": config.spinning,
        "policy": str(config.policy or ("fresh, two cameras" if config.vision else "fresh")),
        "machine": provenance.machine(),
        "versions": provenance.versions(),
    }


def fresh_policy(vision: bool):
    """The policy of the bench: freshly initialised, chunk 16 x 8."""
    import torch

    from flow_policy_rl.policy import FlowPolicy, NetworkConfig
    from flow_policy_rl.spec import ObservationField, PolicySpec

    joints = tuple(f"joint_{i}" for i in range(8))
    fields = [
        ObservationField("joint_pos", "joint_position", joints, "rad"),
        ObservationField("joint_vel", "joint_velocity", joints, "rad/s"),
    ]
    if vision:
        cameras = ("front", "wrist")
        fields += [
            ObservationField(f"{c}_image", "image", (), "", c, resolution=(96, 96)) for c in cameras
        ]
    spec = PolicySpec(
        task="bench",
        robot="bench",
        joint_names=joints,
        action_low=(-3.0,) * 8,
        action_high=(3.0,) * 8,
        observations=tuple(fields),
        control_dt=0.05,
        action_horizon=16,
        execute_horizon=8,
        num_flow_steps=4 if vision else 10,
    )
    torch.manual_seed(0)
    return FlowPolicy(spec, NetworkConfig(width=512, depth=3)).eval()


def example(spec) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """One observation and noise."""
    from flow_policy_rl.serving.onnx_policy import graph_inputs

    rng, obs = np.random.default_rng(0), {}
    for name, (shape, dtype) in graph_inputs(spec).items():
        if dtype == np.uint8:
            obs[name] = rng.integers(256, size=(1, *shape), dtype=np.uint8)
        elif dtype == np.int64:
            obs[name] = np.full((1, *shape), spec.prefix_horizon // 2)
        else:
            obs[name] = rng.standard_normal((1, *shape)).astype(np.float32)
    return obs, obs.pop("noise")


def products(path: Path) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The matrix-vector products of a graph, in order: (matrix, vector, result); none if it convolves as well."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load_from_string(Path(path).read_bytes()).graph
    if any(node.op_type == "Conv" for node in graph.node):
        return []
    weights = {t.name: numpy_helper.to_array(t).astype(np.float32) for t in graph.initializer}
    rng = np.random.default_rng(0)
    found = []
    for node in graph.node:
        if node.op_type == "Gemm":
            matrix = weights[
                node.input[1]
            ]  # (out, in): torch's layout, and the fastest one in numpy here
            vector = rng.standard_normal(matrix.shape[1]).astype(np.float32)
            found.append((matrix, vector, np.empty(len(matrix), np.float32)))
    return found


def multiply(products: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> None:
    """The floor."""
    for matrix, vector, result in products:
        np.dot(matrix, vector, out=result)


def times_ms(call: Callable, number: int) -> np.ndarray:
    """Milliseconds of each call, (2, number): on the clock, and of processor time. The first calls do not count."""
    for _ in range(max(5, number // 20)):
        call()
    times = np.empty((2, number))
    wall, cpu = time.perf_counter, time.thread_time
    for i in range(number):
        start, cpu_start = wall(), cpu()
        call()
        times[:, i] = wall() - start, cpu() - cpu_start
    return 1e3 * times


def best(rounds: list[np.ndarray], clock: int = 0) -> np.ndarray:
    """The times of the round with the lowest median."""
    return min((r[clock] for r in rounds), key=np.median)


def median_of(rounds: list[np.ndarray] | None, clock: int = 0) -> float | None:
    """Lowest median of the rounds."""
    return float(np.median(best(rounds, clock))) if rounds else None


def ratio(over: float | None, under: float | None) -> float | None:
    """A quotient, where both are there."""
    return float(over / under) if over and under else None


def sweep(pieces, spec, folder: Path, options: dict, calls: int) -> list[dict]:
    """Cost by integrator and K."""
    from flow_policy_rl import export
    from flow_policy_rl.serving.onnx_policy import OnnxPolicy
    from flow_policy_rl.spec import INTEGRATORS

    rows = []
    for integrator in INTEGRATORS:
        for steps in SWEEP:
            variant = spec.replace(integrator=integrator, num_flow_steps=steps)
            path = folder / f"{integrator}_{steps}.onnx"
            export.write(export.build(pieces, variant), variant, path)
            policy = OnnxPolicy(path, first_load_in_child=False, **options)
            obs, noise = example(variant)
            rounds = [
                times_ms(lambda p=policy, o=obs, n=noise: p.infer(o, n), max(10, calls // 10))
                for _ in range(3)
            ]
            row = {"integrator": integrator, "num_flow_steps": steps}
            rows.append(
                {
                    **row,
                    "p50_ms": median_of(rounds),
                    "p99_ms": float(np.percentile(best(rounds), 99)),
                    "cpu_p50_ms": median_of(rounds, CPU),
                    "bytes": path.stat().st_size,
                }
            )
    return rows


def memory_over(call: Callable, calls: int) -> dict:
    """Resident memory of this process, MB, settled and after so many calls more."""
    for _ in range(min(calls, 2000)):
        call()
    start = resident_mb()
    for _ in range(calls):
        call()
    return {"calls": calls, "start_mb": start, "end_mb": resident_mb()}


def resident_mb() -> float:
    """Resident set of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def write_report(path: Path, result: dict) -> None:
    """A page with the table and the plot."""
    import plotly.graph_objects as go

    from flow_policy_rl import report

    figure = go.Figure()
    for integrator in dict.fromkeys(row["integrator"] for row in result["rows"]):
        rows = [r for r in result["rows"] if r["integrator"] == integrator]
        figure.add_scatter(
            x=[r["num_flow_steps"] for r in rows],
            y=[r["p50_ms"] for r in rows],
            name=integrator,
            mode="lines+markers",
        )
    report.layout(figure, "K, integration steps", "ms per inference, median")
    names = ("p50_ms", "p95_ms", "p99_ms", "max_ms", "torch_p50_ms", "floor_ms")
    cells = [[n, "" if result[n] is None else f"{result[n]:.3f}"] for n in names]
    sections = [
        report.Table("One inference", ["figure", "ms"], cells),
        report.Figure("Cost by K and integrator", figure) if result["rows"] else None,
        report.Code("Command", " ".join(["flow-policy", *sys.argv[1:]])),
    ]
    machine = result["machine"]
    report.write(path, "Serving speed", f"{machine['cpu']}, {result['provider']}", sections)


def text(result: dict) -> str:
    """For people."""
    r, cpu = result, result["cpu"]
    lines = [
        f"{r['policy']}: {r['num_flow_steps']} {r['integrator']} steps on {r['provider']}, "
        f"{r['num_threads']} thread(s)",
        f"  p50 {r['p50_ms']:.3f}  p95 {r['p95_ms']:.3f}  p99 {r['p99_ms']:.3f}  max {r['max_ms']:.3f} ms"
        f"   (processor time: p50 {cpu['p50_ms']:.3f}  p99 {cpu['p99_ms']:.3f})",
    ]
    if r["floor_ms"]:
        lines.append(
            f"  numpy floor {r['floor_ms']:.3f} ms: {r['ratio_to_floor']:.2f} times that "
            f"(processor time: {cpu['ratio_to_floor']:.2f})"
        )
    if r["torch_p50_ms"]:
        lines.append(
            f"  torch eager {r['torch_p50_ms']:.3f} ms: {r['speedup_over_torch']:.2f} times faster "
            f"(processor time: {cpu['speedup_over_torch']:.2f})"
        )
    if r["memory"]:
        m = r["memory"]
        lines.append(
            f"  memory over {m['calls']:,} calls: {m['start_mb']:.1f} -> {m['end_mb']:.1f} MB"
        )
    lines += [
        f"  {row['integrator']:<9} K={row['num_flow_steps']:<3} p50 {row['p50_ms']:.3f}  p99 {row['p99_ms']:.3f} ms"
        for row in r["rows"]
    ]
    return "\n".join(lines)

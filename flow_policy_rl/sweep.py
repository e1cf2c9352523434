"""`flow-policy export --sweep`: what fewer integration steps cost in success and save in time, measured in simulation.

Every variant passes the parity gate and is then judged as the file that would be deployed, through onnxruntime. Three
ways to choose the noise: `zero`; `seeded`, one draw for all chunks; `fresh`, a draw per chunk.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import plotly.graph_objects as go

from flow_policy_rl import export, report
from flow_policy_rl.bench.serve import example, times_ms
from flow_policy_rl.errors import RunFailed
from flow_policy_rl.evaluate import ChunkFn, player, task_of
from flow_policy_rl.policy import FlowPolicy
from flow_policy_rl.progress import Progress
from flow_policy_rl.serving.onnx_policy import OnnxPolicy
from flow_policy_rl.spec import INTEGRATORS, PolicySpec
from sim.vec_env import VecEnv

STEPS = range(1, 11)
NOISES = ("zero", "seeded", "fresh")
FIRST_SEED = 70_000  # of the episodes; reported results of a policy use others
LATENCY_CALLS = 200


def run(
    policy: FlowPolicy,
    spec: PolicySpec,
    episodes: int,
    page: Path,
    kind: str = "fp32",
    steps: Sequence[int] = STEPS,
    integrators: Sequence[str] = INTEGRATORS,
) -> dict:
    """Evaluate every K and integrator, write the page, and return the rows.

    All integrators with zero noise; the integrator of `spec` with the other noises as well.

    A variant that does not compute what torch computes is left out, and listed with its error.

    Raises:
        RunFailed: none does.
    """
    pieces = export.trace_policy(policy, spec, kind)
    observations = export.observations_to_check(policy, np.random.default_rng(0), spec)
    env = VecEnv(task_of(spec), min(episodes, 100))
    seeds = range(FIRST_SEED, FIRST_SEED + episodes)
    rows, failed = [], []
    work = [(i, k, n) for i in integrators for k in steps for n in noises(i, spec)]
    with tempfile.TemporaryDirectory() as folder, Progress("sweep", len(work), "run") as progress:
        exported, parity, latency = None, {}, (0.0, 0.0)
        for integrator, k, noise in work:
            if noise == NOISES[0]:  # the first of this variant
                exported = variant(pieces, spec, integrator, k, kind, Path(folder))
                parity = export.parity(policy, exported, observations=observations)
                if not parity["passed"]:
                    failed.append(failure(parity))
            if not parity["passed"]:
                progress.update(1, f"{integrator} K={k} failed its parity gate")
                continue
            if noise == NOISES[0]:
                obs, draw = example(exported.spec)
                act = exported.infer
                times = times_ms(lambda a=act, o=obs, d=draw: a(o, d), LATENCY_CALLS)[0]
                latency = np.percentile(times, [50, 99])
            start = "random" if noise == "fresh" else "zero"
            outcome = player(spec, with_noise(exported, noise), start)(env, seeds)
            rows.append(
                {
                    "integrator": integrator,
                    "num_flow_steps": k,
                    "noise": noise,
                    "p50_ms": float(latency[0]),
                    "p99_ms": float(latency[1]),
                    "max_error_in_action_range": parity["max_error_in_action_range"],
                    **outcome.summary(),
                }
            )
            progress.update(1, f"{integrator} K={k} {noise}: {score(rows[-1]):.2f}")
    env.close()
    if not rows:
        raise RunFailed(f"sweep: no variant passed: {said(failed[0])}")
    mark_frontier(rows)
    write_page(page, spec, rows, episodes, failed)
    return {
        "rows": rows,
        "failed": failed,
        "report": str(page),
        "episodes": episodes,
        "first_seed": FIRST_SEED,
    }


def failure(parity: dict) -> dict:
    """What there is to say of a variant that failed its parity gate."""
    errors = ("max_error_in_action_range", "onnx_reference_max_error_in_action_range")
    return {
        "integrator": parity["integrator"],
        "num_flow_steps": parity["num_flow_steps"],
        "error": float(np.max([parity[e] for e in errors])),  # keeps a NaN
        "allowed": parity["allowed_in_action_range"],
    }


def said(failed: dict) -> str:
    """A variant that failed its parity gate, for people."""
    why = "it does not keep the prefix"
    if not failed["error"] <= failed["allowed"]:
        why = f"error {failed['error']:.1e} of the action range, allowed {failed['allowed']:.0e}"
    return f"{failed['integrator']} K={failed['num_flow_steps']} failed its parity gate: {why}"


def noises(integrator: str, spec: PolicySpec) -> tuple[str, ...]:
    """The noises to compare with an integrator."""
    return NOISES if integrator == spec.integrator else NOISES[:1]


def variant(pieces, spec: PolicySpec, integrator: str, k: int, kind: str, folder: Path):
    """One exported file, loaded."""
    changed = spec.replace(integrator=integrator, num_flow_steps=k)
    changed = export.with_export(changed, {"precision": kind})
    path = folder / f"{integrator}_{k}.onnx"
    export.write(export.build(pieces, changed), changed, path)
    return OnnxPolicy(path, first_load_in_child=False)


def with_noise(exported: OnnxPolicy, noise: str) -> ChunkFn:
    """The policy with its noise as given, or with one draw for all chunks."""
    if noise != "seeded":
        return exported.infer
    draw = np.random.default_rng(0).standard_normal(exported.chunk_shape, dtype=np.float32)

    def act(obs, given: np.ndarray) -> np.ndarray:
        return exported.infer(obs, np.broadcast_to(draw, given.shape))

    return act


def score(row: dict) -> float:
    """Success, or return where the task has no success."""
    return row["return_mean"] if row["success_rate"] is None else row["success_rate"]


def mark_frontier(rows: list[dict]) -> None:
    """Row by row: no other one with zero noise is as fast and better, or as good and faster."""
    for row in rows:
        others = (r for r in rows if r["noise"] == NOISES[0])
        row["frontier"] = row["noise"] == NOISES[0] and not any(
            (r["p50_ms"] <= row["p50_ms"] and score(r) > score(row))
            or (r["p50_ms"] < row["p50_ms"] and score(r) >= score(row))
            for r in others
        )


def write_page(
    page: Path, spec: PolicySpec, rows: list[dict], episodes: int, failed: Sequence[dict] = ()
) -> None:
    """The frontier, the noises, every figure, and what failed its gate."""
    what = "return" if rows[0]["success_rate"] is None else "success rate"
    plain = [r for r in rows if r["noise"] == NOISES[0]]
    frontier = go.Figure()
    for integrator in dict.fromkeys(r["integrator"] for r in plain):
        part = [r for r in plain if r["integrator"] == integrator]
        labels = [f"K={r['num_flow_steps']}" for r in part]
        x = [r["p50_ms"] for r in part]
        frontier.add_scatter(x=x, name=integrator, text=labels, mode="markers", **bars(part))
    best = sorted((r for r in plain if r["frontier"]), key=lambda r: r["p50_ms"])
    x, y = [r["p50_ms"] for r in best], [score(r) for r in best]
    line = {"dash": "dot", "shape": "hv", "color": "#5c6678"}
    frontier.add_scatter(x=x, y=y, name="frontier", mode="lines", line=line)
    report.layout(frontier, "ms per inference, median, one thread", what)
    frontier.update_layout(hovermode="closest").update_xaxes(type="log")
    noise = go.Figure()
    for kind in NOISES:
        part = [r for r in rows if r["noise"] == kind and r["integrator"] == spec.integrator]
        x = [r["num_flow_steps"] for r in part]
        if part:
            noise.add_scatter(x=x, name=kind, mode="lines+markers", **bars(part))
    report.layout(noise, f"K, {spec.integrator} steps", what)
    header = ["integrator", "K", "noise", what, "95 % interval", "p50 ms", "p99 ms", "frontier"]
    sections = [
        report.Text(
            f"{episodes} episodes of task {spec.task} for every row, the same ones, through onnxruntime. Fewer steps "
            f"are faster and follow the learned flow less closely. Trained with {spec.num_flow_steps} "
            f"{spec.integrator} steps."
        ),
        report.Figure("What a millisecond buys", frontier, "Zero noise; bars are 95 % intervals."),
        report.Figure("Noise", noise, "Where the flow starts: zero, one draw for all, or fresh."),
        report.Table("All figures", header, [cells(r) for r in rows]),
    ]
    if failed:
        sections.append(report.Text("Left out: " + "; ".join(map(said, failed))))
    report.write(page, "Steps and integrators", f"task {spec.task}", sections)


def bars(rows: list[dict]) -> dict:
    """Values and their intervals, for a scatter."""
    y = [score(r) for r in rows]
    if any(r["success_rate"] is None for r in rows):
        return {"y": y}
    low, high = zip(*(r["success_ci95"] for r in rows), strict=True)
    above = [h - v for h, v in zip(high, y, strict=True)]
    below = [v - w for v, w in zip(y, low, strict=True)]
    return {"y": y, "error_y": {"array": above, "arrayminus": below, "thickness": 1}}


def cells(row: dict) -> list[str]:
    """One row of the table."""
    low, high = row["success_ci95"] or (None, None)
    return [
        row["integrator"],
        str(row["num_flow_steps"]),
        row["noise"],
        f"{score(row):.3f}",
        "" if low is None else f"{low:.3f} to {high:.3f}",
        f"{row['p50_ms']:.3f}",
        f"{row['p99_ms']:.3f}",
        "yes" if row["frontier"] else "",
    ]

"""FlowPolicy -> one `policy.onnx`, and proof that it computes the same.

Graph: the observation fields by name and `noise` (B, H, A) -> `action_chunk` (B, H, A), all raw SI
units. Normalisation, K steps of the integrator and the score drift are inside; the spec is a JSON
string in the file's metadata.
"""

import tempfile
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from flow_policy_rl import flow, precision, provenance
from flow_policy_rl.errors import RunFailed, unknown_name
from flow_policy_rl.evaluate import task_of
from flow_policy_rl.graph import Builder, Function, Piece, Symbol, trace
from flow_policy_rl.inspection import group
from flow_policy_rl.policy import FlowPolicy
from flow_policy_rl.serving import model_file
from flow_policy_rl.serving.onnx_policy import OUTPUT, OnnxPolicy, graph_inputs
from flow_policy_rl.spec import INTEGRATORS, METADATA_KEY, PolicySpec
from sim.tasks import task_names
from sim.vec_env import VecEnv

TOLERANCES = {"fp32": 1e-5, "fp16": 5e-3}  # largest error, as a share of the action range
BATCH_SIZES = (1, 2, 7, 32)
REFERENCE_ROWS = 2  # onnx.reference is slow


# --- the graph ---


def trace_policy(policy: FlowPolicy, spec: PolicySpec, kind: str = "fp32") -> dict[str, Piece]:
    """Trace a policy whose inputs are those of `spec` (its own, but for the size of pictures).

    The pieces: `embed`, `velocity`, `finish`, and `known` where the policy continues a prefix.
    """
    policy = precision.converted(policy, kind)
    fields = {
        name: torch.from_numpy(np.zeros((2, *shape), dtype))
        for name, (shape, dtype) in graph_inputs(spec).items()
    }
    chunk = fields.pop("noise")
    start = {name: fields.pop(name) for name in ("prefix", "inference_delay") if name in fields}
    with torch.no_grad():
        context = policy.embed(fields)
    t = torch.zeros(1, spec.action_horizon)
    known = {"known": torch.zeros(chunk.shape[:2], dtype=torch.bool), "given": chunk}
    known = known if start else {}

    def velocity(x: Tensor, t: Tensor, context: Tensor, known=None, given=None) -> Tensor:
        return policy.velocity(*policy.hold(x, t, known, given), context)

    def finish(x: Tensor, known=None, given=None) -> Tensor:
        return policy.finish(x, known, given)

    functions = {
        "embed": Function(lambda **obs: policy.embed(obs), fields, ("context",)),
        "velocity": Function(velocity, {"x": chunk, "t": t, "context": context, **known}, ("v",)),
        "finish": Function(finish, {"x": chunk, **known}, ("chunk",)),
    }
    if start:
        given = Function(lambda **obs: policy.known_actions(obs), start, ("known", "given"))
        functions["known"] = given
    return trace(policy, functions)


def build(pieces: dict[str, Piece], spec: PolicySpec, batch: int | None = None) -> onnx.ModelProto:
    """The graph with the integrator and K of the spec, which goes along in the metadata."""
    inputs, builder = graph_inputs(spec), Builder()
    names = {name: name for name in inputs}
    builder.scope = "prefix"
    given = builder.call(pieces["known"], names) if "known" in pieces else {}
    builder.scope = "embed"
    context = builder.call(pieces["embed"], names)["context"]
    evaluations = flow.STAGES[spec.integrator]
    calls = 0

    def velocity(x: Symbol, t: Tensor) -> Symbol:
        nonlocal calls
        step, stage = divmod(calls, evaluations)
        builder.scope = f"step_{step:02d}" + (f"/{'abcd'[stage]}" if evaluations > 1 else "")
        calls += 1
        values = {"x": x.name, "t": builder.constant(t.numpy()), "context": context, **given}
        return Symbol(builder, builder.call(pieces["velocity"], values)["v"], x.shape[1:])

    noise = Symbol(builder, "noise", inputs["noise"][0])
    x = flow.integrate(velocity, noise, spec.num_flow_steps, spec.integrator)
    builder.scope = "finish"
    chunk = builder.call(pieces["finish"], {"x": x.name, **given})["chunk"]
    types = {
        name: (shape, helper.np_dtype_to_tensor_dtype(dtype))
        for name, (shape, dtype) in inputs.items()
    }
    model = builder.model(types, (OUTPUT, chunk, inputs["noise"][0]), batch)
    onnx.checker.check_model(model, full_check=True)
    return model


def write(model: onnx.ModelProto, spec: PolicySpec, path: Path) -> None:
    """Put the spec into the file, and seal it."""
    helper.set_model_props(model, {METADATA_KEY: spec.to_json()})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model_file.seal(model.SerializeToString()))


def export_policy(
    policy: FlowPolicy,
    out: Path,
    *,
    spec: PolicySpec | None = None,
    kind: str = "fp32",
    batch: int | None = None,
    pieces: dict[str, Piece] | None = None,
) -> dict:
    """Write `out` and return the parity report, which goes into the file as well.

    Args:
        spec: what the file promises (default: the policy's own); K, integrator and size of pictures may differ.
        kind: precision, a key of `TOLERANCES`.
        batch: fixed number of rows, or None for any.
        pieces: the traced policy, where there is one already.

    Raises:
        RunFailed: the file does not compute what torch computes; it is not kept.
    """
    spec = spec or policy.spec
    model = build(pieces or trace_policy(policy, spec, kind), spec, batch)
    facts = {
        "precision": kind,
        "versions": provenance.versions(),
        "git_revision": provenance.git_revision(),
    }
    partial = out.with_suffix(".partial")
    try:
        write(model, with_export(spec, facts), partial)
        report = parity(policy, OnnxPolicy(partial, first_load_in_child=False))
        if not report["passed"]:
            raise RunFailed(
                f"export of '{out}' failed its parity gate: error {report['max_error_in_action_range']:.2e} of the "
                f"action range, allowed {TOLERANCES[kind]:.0e}"
            )
        write(model, with_export(spec, {**facts, "parity": report}), partial)
        OnnxPolicy(partial, first_load_in_child=False)  # from now on this machine knows it
        partial.rename(out)
    finally:
        partial.unlink(missing_ok=True)
    return report


def with_export(spec: PolicySpec, facts: dict) -> PolicySpec:
    """The spec with facts about the export among its provenance."""
    return spec.replace(provenance={**spec.provenance, "export": facts})


# --- the gate ---


def parity(
    policy: FlowPolicy,
    exported: OnnxPolicy,
    seed: int = 0,
    observations: list[dict[str, np.ndarray]] | None = None,
) -> dict:
    """Largest differences of the exported file from torch, and from onnx.reference, over several batch sizes.

    Integrator, K and precision are those of the file. Observations are simulated where none are given.

    Raises:
        InputError: the file names a precision that there is not.
    """
    spec = exported.spec
    kind = str(group(spec.provenance, "export").get("precision", "fp32"))
    if kind not in TOLERANCES:
        raise unknown_name(f"precision in policy '{exported.path}':", kind, TOLERANCES)
    span = np.asarray(spec.action_high) - np.asarray(spec.action_low)
    rng = np.random.default_rng(seed)
    if observations is None:
        observations = observations_to_check(policy, rng, spec)
    policy_spec, policy.spec = policy.spec, spec
    by_joint, cases, exact = np.zeros(spec.num_joints), 0, True
    independent = 0.0
    evaluator = ReferenceEvaluator(onnx.load_from_string(exported.path.read_bytes()))
    try:
        for number, obs in enumerate(observations):
            rows = len(next(iter(obs.values())))
            for batch in sorted({min(b, rows) for b in BATCH_SIZES}):
                if exported.batch not in (None, batch):
                    batch = exported.batch
                part = {name: np.resize(v, (batch, *v.shape[1:])) for name, v in obs.items()}
                part = {
                    n: v if v.dtype.kind in "ui" else v.astype(np.float32) for n, v in part.items()
                }
                noise = rng.standard_normal((batch, *exported.chunk_shape), dtype=np.float32)
                chunk = exported.infer(part, noise)
                by_joint = np.maximum(
                    by_joint, np.abs(policy.act(part, noise) - chunk).max(axis=(0, 1))
                )
                exact &= keeps_prefix(part, chunk)
                cases += batch
            if number in (0, 1):
                few = exported.batch or REFERENCE_ROWS
                part = {n: np.resize(v, (few, *v.shape[1:])) for n, v in part.items()}
                noise = np.resize(noise, (few, *exported.chunk_shape))
                (reference,) = evaluator.run(None, {**part, "noise": noise})
                difference = np.abs(reference - exported.infer(part, noise)) / span
                independent = np.maximum(independent, difference.max())  # keeps a NaN
    finally:
        policy.spec = policy_spec
    relative = float((by_joint / span).max())
    return {
        "passed": bool(np.maximum(relative, independent) <= TOLERANCES[kind] and exact),
        "max_abs_error": float(by_joint.max()),
        "max_error_in_action_range": relative,
        "max_abs_error_by_joint": dict(zip(spec.joint_names, by_joint.tolist(), strict=True)),
        "onnx_reference_max_error_in_action_range": float(independent),
        "prefix_exact": exact,
        "allowed_in_action_range": TOLERANCES[kind],
        "precision": kind,
        "integrator": spec.integrator,
        "num_flow_steps": spec.num_flow_steps,
        "cases": cases,
    }


def keeps_prefix(obs: dict[str, np.ndarray], chunk: np.ndarray) -> bool:
    """Whether each chunk starts with the actions it was given, bit for bit."""
    if "prefix" not in obs:
        return True
    pairs = zip(chunk, obs["prefix"], obs["inference_delay"], strict=True)
    return all(np.array_equal(ours[:n], given[:n]) for ours, given, n in pairs)


def observations_to_check(
    policy: FlowPolicy, rng: np.random.Generator, spec: PolicySpec
) -> list[dict[str, np.ndarray]]:
    """What the policy meets in simulation, and observations far outside of it, as the file with `spec` takes them.

    Of a task that exists only as data: draws from the statistics of its training data instead.
    """
    if spec.task not in task_names():
        seen = [ordinary_observations(spec, 32, rng), extreme_observations(spec, 32, rng)]
        return [with_prefix(spec, obs, rng) for obs in seen]
    env = VecEnv(task_of(policy.spec), 32, seed=int(rng.integers(2**31)))
    obs, seen = env.reset(), []
    for _ in range(4):
        seen.append(obs)
        noise = rng.standard_normal((env.num_envs, *policy.chunk_shape), dtype=np.float32)
        obs = env.step(policy.act(obs, noise)[:, : policy.spec.execute_horizon]).obs
    env.close()
    seen.append(extreme_observations(spec, 32, rng))
    return [with_prefix(spec, sized(spec, obs), rng) for obs in seen]


def ordinary_observations(spec: PolicySpec, rows: int, rng: np.random.Generator) -> dict:
    """As the training data were, by mean and spread; pictures of noise."""
    return observations_of(spec, rows, rng, lambda size: rng.standard_normal((rows, size)))


def extreme_observations(spec: PolicySpec, rows: int, rng: np.random.Generator) -> dict:
    """Ten standard deviations off; pictures of black, white and noise."""
    obs = observations_of(spec, rows, rng, lambda size: 10 * rng.choice([-1, 0, 1], (rows, size)))
    for name in (f.name for f in spec.observations if f.kind == "image"):
        obs[name][0::3], obs[name][1::3] = 0, 255
    return obs


def observations_of(spec: PolicySpec, rows: int, rng: np.random.Generator, draw) -> dict:
    """Pictures of noise; of other fields the mean of the training data, and `draw(size)` times their spread."""
    obs = {}
    for f in spec.observations:
        if f.kind == "image":
            obs[f.name] = rng.integers(256, size=(rows, *f.shape), dtype=np.uint8)
        else:
            obs[f.name] = np.asarray(f.mean or (0.0,)) + np.asarray(f.std or (1.0,)) * draw(f.size)
    return obs


def sized(spec: PolicySpec, obs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The observation with its pictures at the size the spec promises (nearest pixel)."""
    resized = dict(obs)
    for f in spec.observations:
        if f.kind == "image":
            height, width, _ = f.shape
            image = obs[f.name]
            rows = np.arange(height) * image.shape[1] // height
            columns = np.arange(width) * image.shape[2] // width
            resized[f.name] = image[:, rows][:, :, columns]
    return resized


def with_prefix(spec: PolicySpec, obs: dict, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """The observation with actions under way, for a policy that continues them."""
    if not spec.prefix_horizon:
        return obs
    rows, low, high = len(next(iter(obs.values()))), spec.action_low, spec.action_high
    prefix = rng.uniform(low, high, (rows, spec.prefix_horizon, spec.num_joints))
    delay = rng.integers(spec.prefix_horizon + 1, size=rows)
    return {**obs, "prefix": prefix.astype(np.float32), "inference_delay": delay}


def verify_every(policy: FlowPolicy, spec: PolicySpec, kind: str) -> list[dict]:
    """Parity of every integrator with K of 1, 2, 4 and 10, from one trace."""
    pieces, rows = trace_policy(policy, spec, kind), []
    observations = observations_to_check(policy, np.random.default_rng(0), spec)
    with tempfile.TemporaryDirectory() as folder:
        for integrator in INTEGRATORS:
            for steps in (1, 2, 4, 10):
                variant = with_export(
                    spec.replace(integrator=integrator, num_flow_steps=steps), {"precision": kind}
                )
                path = Path(folder) / f"{integrator}_{steps}.onnx"
                write(build(pieces, variant), variant, path)
                exported = OnnxPolicy(path, first_load_in_child=False)
                rows.append(parity(policy, exported, observations=observations))
    return rows

"""`flow-policy export` and `verify`: what `export.py` does, for files."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flow_policy_rl import provenance
from flow_policy_rl.errors import InputError, RunFailed, output_file
from flow_policy_rl.logger import read_metrics
from flow_policy_rl.serving import shipped
from flow_policy_rl.serving.onnx_policy import OnnxPolicy
from flow_policy_rl.spec import INTEGRATORS, ObservationField, PolicySpec

MOST_FLOW_STEPS = 256  # with 1,000 the checks of a graph take five minutes
# What an export takes over from its checkpoint as it is, beside the observations.
PROMISES = (
    "task",
    "task_options",
    "robot",
    "joint_names",
    "action_kind",
    "action_low",
    "action_high",
    "control_dt",
    "action_horizon",
    "execute_horizon",
    "prefix_horizon",
)


@dataclass(frozen=True)
class ExportConfig:
    """One self-describing ONNX file from a checkpoint, checked against torch before it is kept.

    Example: flow-policy export --checkpoint runs/rl/policy.safetensors --out policy.onnx

    Attributes:
        checkpoint: trained policy.
        out: file to write.
        integrator: euler, midpoint, heun or rk4 (None: as trained).
        num_flow_steps: K (None: as trained).
        precision: of the large matrix products; time embedding, normalisation and integration stay in fp32.
        batch: fixed number of rows (None: any).
        camera_size: height and width of the pictures that will arrive (None: as trained); cropped and
            resized inside.
        sweep: also evaluate K of 1 to 10 with every integrator in simulation, and draw what each costs and brings.
        sweep_episodes: episodes of each.
        sweep_report: page to write (None: beside the policy).
        json: print one JSON object.
    """

    checkpoint: Path
    out: Path = Path("policy.onnx")
    integrator: str | None = None
    num_flow_steps: int | None = None
    precision: Literal["fp32", "fp16"] = "fp32"
    batch: int | None = None
    camera_size: tuple[int, int] | None = None
    sweep: bool = False
    sweep_episodes: int = 100
    sweep_report: Path | None = None
    json: bool = False


@dataclass(frozen=True)
class VerifyConfig:
    """Compare an exported policy with its checkpoint on observations from simulation and on extremes.

    Example: flow-policy verify --policy policy.onnx --checkpoint runs/rl/policy.safetensors

    Attributes:
        policy: exported file, or the name of one that ships (flow-policy list policies).
        checkpoint: what it was exported from.
        every: also export every integrator with K of 1, 2, 4 and 10, and compare each.
        json: print one JSON object.
    """

    policy: Path
    checkpoint: Path
    every: bool = False
    json: bool = False


def main(config: ExportConfig) -> dict:
    """Export."""
    check(config)
    from flow_policy_rl import checkpoint
    from flow_policy_rl.export import export_policy

    policy = checkpoint.load(config.checkpoint)
    spec = exported_spec(policy.spec, config)
    report = export_policy(policy, config.out, spec=spec, kind=config.precision, batch=config.batch)
    result = {"policy": str(config.out), **report}
    if config.sweep:
        from flow_policy_rl import sweep

        page = config.sweep_report or config.out.with_suffix(".sweep.html")
        try:
            result["sweep"] = sweep.run(policy, spec, config.sweep_episodes, page, config.precision)
        except RunFailed as error:
            raise RunFailed(f"{error}; '{config.out}' itself is written and passed") from None
    return result


def check(config: ExportConfig) -> None:
    """Refuse what can be refused before torch is loaded."""
    shipped.checkpoint(config.checkpoint)
    output_file(config.out, ".onnx")
    if config.sweep_report:
        output_file(config.sweep_report, ".html")
    if config.integrator is not None and config.integrator not in INTEGRATORS:
        raise InputError(
            f"--integrator must be one of {', '.join(INTEGRATORS)}, not '{config.integrator}'"
        )
    if (config.num_flow_steps or 0) > MOST_FLOW_STEPS:
        raise InputError(
            f"--num-flow-steps must be at most {MOST_FLOW_STEPS}, not {config.num_flow_steps}: a graph has each of them"
        )
    if config.batch is not None and config.batch < 1:
        raise InputError(f"--batch must be at least 1, not {config.batch}")
    if config.sweep_episodes < 1:
        raise InputError(f"--sweep-episodes must be at least 1, not {config.sweep_episodes}")


def exported_spec(spec: PolicySpec, config: ExportConfig) -> PolicySpec:
    """What the file will promise: the spec of training with what the flags change, and what is known of its results."""
    if config.camera_size:
        if not spec.cameras:
            raise InputError(f"--camera-size: policy '{config.checkpoint}' has no camera")
        fields = (
            dataclasses.replace(f, resolution=config.camera_size) if f.kind == "image" else f
            for f in spec.observations
        )
        spec = spec.replace(observations=tuple(fields))
    facts = {**spec.provenance, "checkpoint_sha256": provenance.file_hash(config.checkpoint)}
    metrics = config.checkpoint.parent / "metrics.csv"
    if metrics.is_file():
        results = [row for row in read_metrics(metrics) if any(k.startswith("eval/") for k in row)]
        if results:
            last = results[-1]
            facts["results"] = {
                k: v if math.isfinite(v) else None
                for k, v in last.items()
                if k.startswith(("eval/", "step"))
            }
    changes = {"integrator": config.integrator, "num_flow_steps": config.num_flow_steps}
    changes = {k: v for k, v in changes.items() if v is not None}
    return spec.replace(provenance=facts, **changes)


def verify(config: VerifyConfig) -> dict:
    """Compare."""
    shipped.checkpoint(config.checkpoint)
    exported = OnnxPolicy(config.policy)
    from flow_policy_rl import checkpoint
    from flow_policy_rl.export import parity, verify_every

    policy = checkpoint.load(config.checkpoint)
    mine, theirs = policy.spec, exported.spec
    for name in PROMISES:
        if getattr(mine, name) != getattr(theirs, name):
            raise InputError(
                f"'{config.policy}' has {name} {getattr(theirs, name)}, '{config.checkpoint}' has {getattr(mine, name)}"
            )
    seen = [[seen_of(f) for f in s.observations] for s in (theirs, mine)]
    if seen[0] != seen[1]:
        raise InputError(
            f"'{config.policy}' has observations {seen[0]}, '{config.checkpoint}' has {seen[1]}"
        )
    result = {"policy": str(config.policy), **parity(policy, exported)}
    if config.every:
        result["every"] = verify_every(policy, theirs, result["precision"])
        result["passed"] = result["passed"] and all(r["passed"] for r in result["every"])
    return result


def seen_of(field: ObservationField) -> str:
    """What an export takes over of an observation field: all but the size of pictures."""
    elements = " ".join(field.elements)
    return f"{field.name} ({field.kind}{' of ' * bool(field.source)}{field.source}: {elements})"


def text(result: dict) -> str:
    """For people."""
    verdict = "same as torch" if result["passed"] else "DIFFERS from torch"
    lines = [
        f"{result['policy']}: {verdict} ({result['precision']}); largest error {result['max_abs_error']:.1e} rad or m "
        f"({result['max_error_in_action_range']:.1e} of the action range, allowed "
        f"{result['allowed_in_action_range']:.0e}) in {result['cases']} cases"
    ]
    lines += [
        f"  {r['integrator']:<9} K={r['num_flow_steps']:<3} {r['max_error_in_action_range']:.1e} of the action range"
        for r in result.get("every", [])
    ]
    if "sweep" in result:
        from flow_policy_rl import sweep

        lines += [
            f"  {r['integrator']:<9} K={r['num_flow_steps']:<3} "
            f"{r['return_mean'] if r['success_rate'] is None else r['success_rate']:.3f} at {r['p50_ms']:.3f} ms"
            for r in result["sweep"]["rows"]
            if r["frontier"]
        ]
        if failed := result["sweep"]["failed"]:
            lines += [f"  {sweep.said(f)}" for f in failed]
            lines.append(f"left out above; '{result['policy']}' itself is written and passed")
        lines.append(f"sweep: {result['sweep']['report']} (above: what no other variant beats)")
    return "\n".join(lines)

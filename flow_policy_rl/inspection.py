"""`flow-policy inspect`: what a policy.onnx says of itself."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from flow_policy_rl.serving import model_file
from flow_policy_rl.spec import options_text


@dataclass(frozen=True)
class Config:
    """Print the spec inside an exported policy. Runs nothing of the graph.

    Example: flow-policy inspect policy.onnx

    Attributes:
        policy: exported file, or the name of one that ships (flow-policy list policies).
        json: print one JSON object.
    """

    policy: Annotated[Path, tyro.conf.Positional]
    json: bool = False


def main(config: Config) -> dict:
    """Read the spec."""
    file = model_file.read(config.policy)
    return {
        "file": str(file.path),
        "bytes": len(file.data),
        "sha256": file.sha256,
        "opset": file.opset,
        "operators": file.operators,
        "chunk_joining": "prefix" if file.spec.prefix_horizon else "none",
        "spec": dataclasses.asdict(file.spec),
    }


def text(result: dict) -> str:
    """For people."""
    spec = result["spec"]
    rate = 1 / spec["control_dt"]
    options = f" ({options_text(spec['task_options'])})" if spec["task_options"] else ""
    lines = [
        f"{result['file']} ({result['bytes'] / 1e6:.2f} MB, sha256 {result['sha256'][:16]}..., "
        f"opset {result['opset']})",
        f"task {spec['task']}{options}, robot {spec['robot']}, trained by {spec['algorithm'] or 'unknown'}",
        f"chunk of {spec['action_horizon']} actions at {rate:g} Hz, {spec['execute_horizon']} executed; "
        f"{spec['num_flow_steps']} {spec['integrator']} steps",
        f"continues up to {spec['prefix_horizon']} actions under way (training-time real-time chunking)"
        if spec["prefix_horizon"]
        else "not trained to continue actions under way",
        *provenance_lines(spec["provenance"]),
        "inputs",
        *(
            f"  {f['name']:<14} {f['kind']:<15} {shape_of(f)} {' '.join(f['elements'])}"
            + (f" (of {f['source']})" if f["source"] else "")
            for f in spec["observations"]
        ),
        f"  {'noise':<14} {'standard normal or zero':<15}, {spec['action_horizon']} x {len(spec['joint_names'])}",
        f"output: {spec['action_kind']} targets",
        *(
            f"  {name:<22} {low:8.4f} .. {high:.4f}"
            for name, low, high in zip(
                spec["joint_names"], spec["action_low"], spec["action_high"], strict=True
            )
        ),
    ]
    return "\n".join(lines)


def shape_of(field: dict) -> str:
    """How much of what an observation field is."""
    if field["kind"] == "image":
        height, width = field["resolution"]
        return f"{height} x {width} x 3 uint8 RGB"
    return f"{len(field['elements'])} x {field['unit']:<6}"


def provenance_lines(provenance: dict) -> list[str]:
    """What is known of results, data, code and the export, one line each; what is not as we write it is left to
    --json."""
    export, demos = group(provenance, "export"), group(provenance, "demos")
    results, parity = group(provenance, "results"), group(export, "parity")
    revision = group(provenance, "environment").get("git_revision")
    errors = [parity.get(key) for key in ("max_abs_error", "max_error_in_action_range")]
    facts = {
        "results": ", ".join(
            f"{k} {v:g}" for k, v in results.items() if isinstance(v, int | float)
        ),
        "data": f"{demos.get('episodes')} episodes, sha256 {str(demos['sha256'])[:16]}..."
        if "sha256" in demos
        else "",
        "code": f"revision {revision}" if revision else "",
        "parity": f"{export.get('precision')}, largest error {errors[0]:.1e} rad or m "
        f"({errors[1]:.1e} of the action range)"
        if all(isinstance(e, float) for e in errors)
        else "",
    }
    return [f"{name}: {value}" for name, value in facts.items() if value]


def group(facts: dict, name: str) -> dict:
    """Facts under a name, none where something else is there: what is in the provenance is anybody's."""
    found = facts.get(name)
    return found if isinstance(found, dict) else {}

"""`flow-policy inspect`: what a policy.onnx says of itself."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from flow_policy_rl.serving import model_file


@dataclass(frozen=True)
class Config:
    """Print the spec inside an exported policy. Runs nothing of the graph.

    Example: flow-policy inspect policy.onnx

    Attributes:
        policy: exported file.
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
        "spec": dataclasses.asdict(file.spec),
    }


def text(result: dict) -> str:
    """For people."""
    spec = result["spec"]
    rate = 1 / spec["control_dt"]
    lines = [
        f"{result['file']} ({result['bytes'] / 1e6:.2f} MB, sha256 {result['sha256'][:16]}...)",
        f"task {spec['task']}, robot {spec['robot']}, trained by {spec['algorithm']}",
        f"chunk of {spec['action_horizon']} actions at {rate:g} Hz, {spec['execute_horizon']} executed; "
        f"{spec['num_flow_steps']} {spec['integrator']} steps",
        "inputs",
        *(
            f"  {f['name']:<14} {f['kind']:<15} {len(f['elements'])} x {f['unit']:<6} {' '.join(f['elements'])}"
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

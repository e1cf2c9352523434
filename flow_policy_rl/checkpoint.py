"""Checkpoints: one file with the weights, and the spec and network size as JSON in its header."""

import dataclasses
import json
from pathlib import Path

from flow_policy_rl import tensor_file
from flow_policy_rl.errors import InputError
from flow_policy_rl.policy import FlowPolicy, NetworkConfig
from flow_policy_rl.serving import shipped
from flow_policy_rl.spec import PolicySpec

FORMAT = "flow_policy_rl.policy.1"


def save(path: Path, policy: FlowPolicy) -> None:
    """Weights and spec."""
    tensors = {name: value.contiguous() for name, value in policy.state_dict().items()}
    network = json.dumps(dataclasses.asdict(policy.network))
    tensor_file.write(path, tensors, FORMAT, spec=policy.spec.to_json(), network=network)


def load(path: str | Path) -> FlowPolicy:
    """Rebuild the policy, in evaluation mode.

    Raises:
        InputError: no such file, not a checkpoint of ours, or weights that do not fit.
    """
    path = shipped.checkpoint(path)
    if path.suffix == ".onnx":
        raise InputError(
            f"checkpoint '{path}' is an exported policy already: give the policy.safetensors of a run folder"
        )
    tensors, texts = tensor_file.read(path, "checkpoint", FORMAT)
    policy = FlowPolicy(
        PolicySpec.from_json(texts["spec"]), NetworkConfig(**json.loads(texts["network"]))
    )
    try:
        policy.load_state_dict(tensors)
    except RuntimeError as error:
        raise InputError(
            f"checkpoint '{path}': weights do not fit: {str(error).splitlines()[-1].strip()}"
        ) from None
    return policy.eval()

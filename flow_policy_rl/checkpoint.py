"""Checkpoints: one safetensors file with the weights, and the spec and network size in its JSON header. No pickle."""

import dataclasses
import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from flow_policy_rl.errors import InputError, existing_file
from flow_policy_rl.policy import FlowPolicy, NetworkConfig
from flow_policy_rl.spec import PolicySpec

FORMAT = "flow_policy_rl.policy.1"


def save(path: Path, policy: FlowPolicy) -> None:
    """Write to a neighbour and rename, so that an interruption leaves the old file whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {
        "format": FORMAT,
        "spec": policy.spec.to_json(),
        "network": json.dumps(dataclasses.asdict(policy.network)),
    }
    tensors = {name: value.contiguous() for name, value in policy.state_dict().items()}
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata=metadata)
    partial.rename(path)


def load(path: str | Path) -> FlowPolicy:
    """Rebuild the policy, in evaluation mode.

    Raises:
        InputError: no such file, not a checkpoint of ours, or weights that do not fit.
    """
    path = existing_file(path, "checkpoint")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise InputError(f"checkpoint '{path}' is not a safetensors file: {error}") from None
    if metadata.get("format") != FORMAT:
        raise InputError(
            f"checkpoint '{path}' has format {metadata.get('format')!r}; this version reads {FORMAT!r}"
        )
    policy = FlowPolicy(
        PolicySpec.from_json(metadata["spec"]), NetworkConfig(**json.loads(metadata["network"]))
    )
    try:
        policy.load_state_dict(tensors)
    except RuntimeError as error:
        raise InputError(
            f"checkpoint '{path}': weights do not fit: {str(error).splitlines()[-1].strip()}"
        ) from None
    return policy.eval()

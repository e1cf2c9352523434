"""Trained policies that come with the package, by name: something to deploy at once. Each was exported by `flow-policy
export`, and `flow-policy inspect NAME` tells how it was made."""

from importlib import resources
from pathlib import Path


def policies() -> dict[str, Path]:
    """Files by name."""
    files = Path(str(resources.files("flow_policy_rl"))).glob("policies/*.onnx")
    return {path.stem: path for path in sorted(files)}


def find(policy: str | Path) -> Path:
    """The file of that path, else the policy of that name, else the path as it is."""
    path = Path(policy)
    return path if path.exists() else policies().get(str(policy), path)

"""Trained policies that come with the package, by name: something to deploy at once. Each was exported by `flow-policy
export`, and `flow-policy inspect NAME` tells how it was made."""

from importlib import resources
from pathlib import Path

from flow_policy_rl.errors import InputError, existing_file


def policies() -> dict[str, Path]:
    """Files by name."""
    files = Path(str(resources.files("flow_policy_rl"))).glob("policies/*.onnx")
    return {path.stem: path for path in sorted(files)}


def find(policy: str | Path) -> Path:
    """The file of that path, else the policy of that name, else the path as it is."""
    path = Path(policy)
    return path if path.exists() else policies().get(str(policy), path)


def existing(policy: str | Path) -> Path:
    """What `find` finds.

    Raises:
        InputError: no file is there.
    """
    return existing_file(find(policy), "policy", policies())


def checkpoint(path: str | Path) -> Path:
    """The path of a checkpoint, which none that ships is.

    Raises:
        InputError: no file is there.
    """
    if not Path(path).exists() and str(path) in policies():
        raise InputError(
            f"checkpoint '{path}' is a policy that ships, and an export: it can be run, but neither trained further "
            "nor exported again; a checkpoint is the policy.safetensors of a training"
        )
    return existing_file(path, "checkpoint")

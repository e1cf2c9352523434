"""What tests of training build on: a small policy from scratch, a checkpoint that knows nothing, what a run left."""

import dataclasses
from pathlib import Path

import torch
from safetensors.torch import load_file

from flow_policy_rl import checkpoint, train
from flow_policy_rl.policy import NetworkConfig
from flow_policy_rl.run_folder import POLICY_FILE
from flow_policy_rl.train_config import ScratchConfig, default_config

SCRATCH = ScratchConfig(4, 4, num_flow_steps=2, network=NetworkConfig(width=16, depth=2))


def untrained(folder: Path, task: str = "hopper", **options) -> Path:
    """A checkpoint for what needs one."""
    config = default_config("fpo", task)
    config = dataclasses.replace(config, scratch=SCRATCH, task_options=options)
    torch.manual_seed(0)
    checkpoint.save(folder / "untrained.safetensors", train.starting_point(config)[1])
    return folder / "untrained.safetensors"


def weights(folder: Path, name: str = POLICY_FILE) -> dict[str, torch.Tensor]:
    """Tensors of a file in a run folder."""
    return load_file(folder / name)

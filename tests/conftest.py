"""Shared fixtures."""

import os
from pathlib import Path

import pytest
import torch
from toys import ROOT

import sim  # noqa: F401  (before mujoco, for which it chooses how to draw)

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)


@pytest.fixture
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture
def generator() -> torch.Generator:
    """Seeded randomness."""
    return torch.Generator().manual_seed(0)

"""Shared fixtures."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from toys import ROOT, scalar_policy

import sim  # noqa: F401  (before mujoco, for which it chooses how to draw)
from flow_policy_rl.algorithms import bc
from flow_policy_rl.policy import FlowPolicy

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
# A test says what is computed, never how fast: an example may take as long as a crowded machine needs. `make test` says
# the same of the same code, `make test-all` draws other examples each time (--hypothesis-profile explore).
settings.register_profile("explore", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("repeat", settings.get_profile("explore"), derandomize=True)
settings.load_profile("repeat")
# A shell starts background jobs with SIGINT ignored, and so would be the children of these tests, which must obey it.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture
def generator() -> torch.Generator:
    """Seeded randomness."""
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def bimodal() -> FlowPolicy:
    """Imitates demonstrations with two modes, at -0.6 and 0.6, both with a spread of 0.3."""
    policy, generator = scalar_policy(num_flow_steps=8, width=64), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-3)
    obs = {"joint_pos": torch.zeros(256, 1)}
    for _ in range(600):
        x_0, mode, rest = torch.randn(3, 256, 1, 1, generator=generator)
        t = torch.rand(256, 1, generator=generator)
        loss = bc.cfm_loss(policy, obs, 0.6 * mode.sign() + 0.3 * rest, x_0, t).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return policy


@pytest.fixture(scope="session")
def example_package(tmp_path_factory) -> Path:
    """A folder for the path with the package of examples/, installed by pip without network."""
    folder = tmp_path_factory.mktemp("example")
    shutil.copytree(ROOT / "examples" / "my_arm", folder / "source")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index"]
    command += ["--no-build-isolation", "--target", folder / "site", folder / "source"]
    subprocess.run(command, check=True, capture_output=True)
    return folder / "site"

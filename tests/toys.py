"""What several test modules build on: the repository's root, a small spec, a small policy, random observations."""

from pathlib import Path

import torch

from flow_policy_rl.policy import FlowPolicy, NetworkConfig
from flow_policy_rl.spec import ObservationField, PolicySpec

ROOT = Path(__file__).resolve().parent.parent


def small_spec(**changes) -> PolicySpec:
    """Two joints, six actions, one state field of three numbers and a pose."""
    values = {
        "task": "toy",
        "robot": "toy",
        "joint_names": ("a", "b"),
        "action_low": (-1.0, -2.0),
        "action_high": (1.0, 2.0),
        "observations": (
            ObservationField("joint_pos", "joint_position", ("a", "b", "c"), "rad"),
            ObservationField(
                "object_pose", "pose", ("x", "y", "z", "qx", "qy", "qz", "qw"), "m", "cube"
            ),
        ),
        "control_dt": 0.05,
        "action_horizon": 6,
        "execute_horizon": 4,
        "num_flow_steps": 3,
    }
    return PolicySpec(**(values | changes))


def small_policy(
    seed: int = 0, score_drift: bool = False, base_score: bool = False, **changes
) -> FlowPolicy:
    """A freshly initialised policy of a few hundred weights."""
    torch.manual_seed(seed)
    return FlowPolicy(
        small_spec(**changes),
        NetworkConfig(width=16, depth=2, score_drift=score_drift, base_score=base_score),
    )


def looks_trained(policy: FlowPolicy, scale: float = 0.1) -> FlowPolicy:
    """The policy with every part of it in use: shifted normalisers, a gain that depends on time."""
    generator = torch.Generator().manual_seed(5)
    obs = {k: 3 + 2 * v for k, v in random_obs(policy, 100, generator).items()}
    policy.normalizer.fit(obs)
    policy.fit_action_range(torch.randn(100, 2, generator=generator) * 0.3)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return policy


def random_obs(
    policy: FlowPolicy, batch: int, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Standard normal observation fields."""
    return {
        f.name: torch.randn(batch, f.size, generator=generator) for f in policy.spec.observations
    }

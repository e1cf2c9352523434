"""What several test modules build on: the repository's root, a small spec, a small policy, random observations."""

import re
from pathlib import Path

import torch

from flow_policy_rl import gradients
from flow_policy_rl.algorithms import ppo
from flow_policy_rl.policy import FlowPolicy, NetworkConfig
from flow_policy_rl.spec import ObservationField, PolicySpec

ROOT = Path(__file__).resolve().parent.parent


def documented(command: str, *only: str) -> set[str]:
    """Fields that docs/json.md says a command prints: always, and in the cases that its second column names."""
    text = (ROOT / "docs/json.md").read_text()
    section = text.partition(f"\n## {command}\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.+?) \| (.*?) ?\|", section, re.MULTILINE)
    assert {only for _, only in rows} >= {f"`{o}`" if o.startswith("-") else o for o in only}
    return {
        name
        for names, when in rows
        if not when or when.strip("`") in only
        for name in re.findall(r"`(\w+)`", names)
    }


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
    seed: int = 0,
    score_drift: bool = False,
    base_score: bool = False,
    predicts: str = "velocity",
    **changes,
) -> FlowPolicy:
    """A freshly initialised policy of a few hundred weights."""
    torch.manual_seed(seed)
    return FlowPolicy(
        small_spec(**changes),
        NetworkConfig(16, 2, predicts, score_drift=score_drift, base_score=base_score),
    )


def untrained_policy(task, action_horizon: int = 4, execute_horizon: int = 4) -> FlowPolicy:
    """A freshly initialised policy that fits a task."""
    from flow_policy_rl import train_config, train_run
    from flow_policy_rl.data.robomimic import DemoLayout

    horizons = train_config.ScratchConfig(action_horizon, execute_horizon)
    spec = train_run.policy_spec(task, DemoLayout.of_task(task).observations, horizons)
    return FlowPolicy(spec, NetworkConfig(width=16, depth=1))


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


def scalar_policy(num_flow_steps: int = 4, **network) -> FlowPolicy:
    """One joint, one action, one observed number; physical units are normalised units."""
    spec = small_spec(
        joint_names=("a",),
        action_low=(-1.0,),
        action_high=(1.0,),
        observations=(ObservationField("joint_pos", "joint_position", ("a",), "rad"),),
        action_horizon=1,
        execute_horizon=1,
        num_flow_steps=num_flow_steps,
    )
    torch.manual_seed(0)
    return FlowPolicy(spec, NetworkConfig(**({"width": 32, "depth": 3} | network)))


def draw(estimator, obs, generator, executed=4):
    """A sample of which the first `executed` of the chunk's actions ran."""
    chunk, trace = estimator.sample(obs, generator)
    horizon = estimator.policy.chunk_shape[0]
    return chunk, {**trace, "executed": torch.arange(horizon).expand(len(chunk), -1) < executed}


def surrogate_loss(
    log_ratio: torch.Tensor, advantage: torch.Tensor, clip_range: float, trust_region: str = "ppo"
) -> torch.Tensor:
    """Minus the mean surrogate, to be minimised."""
    return -ppo.surrogate(log_ratio, advantage, clip_range, trust_region).mean()


def gradient_step(
    optimizer: torch.optim.Optimizer, loss: torch.Tensor, max_grad_norm: float
) -> float:
    """One gradient step on a loss; returns the gradient's norm before clipping."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    return gradients.apply_gradient(optimizer, loss.item(), max_grad_norm, "loss")


def two_mode_bandit(estimator, trust_region: str, clip_range: float) -> tuple[float, float]:
    """Train on a reward with equal peaks at both modes: share of good actions, and of those the share to the right."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(estimator.parameter_groups(3e-4))
    obs = {"joint_pos": torch.zeros(512, 1)}
    for _ in range(50):
        _, trace = draw(estimator, obs, generator, executed=1)
        action = last_of(trace).flatten()
        reward = torch.exp(-((action.abs() - 0.6) ** 2) / (2 * 0.15**2))
        advantage = (reward - reward.mean()) / reward.std()
        for _ in range(4):
            log_ratio, _ = estimator.evaluate(obs, trace)
            loss = surrogate_loss(log_ratio, advantage, clip_range, trust_region)
            gradient_step(optimizer, loss, 1.0)
    good = (action.abs() - 0.6).abs() < 0.3
    return good.float().mean().item(), (action[good] > 0).float().mean().item()


def last_of(trace: dict[str, torch.Tensor]) -> torch.Tensor:
    """The normalised chunk that an estimator's trace keeps."""
    if "chain" in trace:
        return trace["chain"][:, -1]
    return trace["x_1" if "x_1" in trace else "x"]

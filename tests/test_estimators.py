"""What every ratio estimator of the on-policy loop must do, whatever its algorithm."""

import pytest
import torch
from toys import random_obs, small_policy

from flow_policy_rl.algorithms.fpo import FPO, FPOConfig
from flow_policy_rl.algorithms.gaussian import Gaussian, GaussianConfig
from flow_policy_rl.algorithms.score_flow import ScoreFlow, ScoreFlowConfig


def score_flow(policy, **kernel):
    config = ScoreFlowConfig(**kernel)
    return ScoreFlow(ScoreFlow.prepare(policy, config), config)


ESTIMATORS = {
    "fpo": lambda policy: FPO(policy, FPOConfig("per_action")),
    "fpo_plus_plus": lambda policy: FPO(policy, FPOConfig()),
    "gaussian_ppo": lambda policy: Gaussian(policy, GaussianConfig()),
    "score_flow": score_flow,
    "reinflow": lambda policy: score_flow(policy, drift="none"),
    "matched": lambda policy: score_flow(policy, drift="matched"),
    "last step noisy": lambda policy: score_flow(policy, noisy_steps=1),
    "base score": lambda policy: score_flow(policy, score="base"),
}
everyone = pytest.mark.parametrize("name", ESTIMATORS)


@everyone
def test_a_prefix_is_kept_and_does_not_count(name, generator):
    """Real-time chunking survives: known actions come out bit for bit, and nothing is learnt from them."""
    estimator = ESTIMATORS[name](small_policy(prefix_horizon=3, execute_horizon=3))
    policy = estimator.policy
    obs = random_obs(policy, 40, generator)
    obs["prefix"] = 0.5 * torch.randn(40, 3, 2, generator=generator)
    obs["inference_delay"] = torch.arange(40) % 4
    known = torch.arange(6) < obs["inference_delay"][:, None]
    chunk, trace = estimator.sample(obs, generator)
    expected = policy.denormalize_action(policy.normalize_action(obs["prefix"]))
    assert torch.allclose(chunk[:, :3][known[:, :3]], expected[known[:, :3]], atol=1e-6)

    trace["executed"] = torch.ones(40, 6, dtype=torch.bool)
    log_ratio, _ = estimator.evaluate(obs, trace)
    assert log_ratio.abs().max() < 2e-4
    with torch.no_grad():
        for parameter in estimator.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    log_ratio, _ = estimator.evaluate(obs, trace)
    assert log_ratio.abs().max() > 1e-3
    trace["executed"] = ~known
    assert torch.allclose(estimator.evaluate(obs, trace)[0], log_ratio, atol=1e-5)


@everyone
def test_diagnostics_are_finite_numbers(name, generator):
    estimator = ESTIMATORS[name](small_policy())
    obs = random_obs(estimator.policy, 5, generator)
    _, trace = estimator.sample(obs, generator)
    trace["executed"] = torch.ones(5, 6, dtype=torch.bool)
    numbers = estimator.diagnostics(obs, trace)
    assert numbers
    assert all(torch.isfinite(torch.tensor(v)) for v in numbers.values())
    assert all(key.startswith("train/") for key in numbers)

"""ScoRe-Flow's transition kernel, likelihood and learning, against independent derivations."""

import copy

import numpy as np
import pytest
import torch
from toys import random_obs, small_policy

from flow_policy_rl import flow
from flow_policy_rl.algorithms import ppo
from flow_policy_rl.algorithms.score_flow import ScoreFlow, ScoreFlowConfig


def draw(estimator, obs, generator):
    """A sample whose whole executed horizon ran."""
    chunk, trace = estimator.sample(obs, generator)
    horizon, execute = estimator.policy.chunk_shape[0], estimator.policy.spec.execute_horizon
    executed = torch.arange(horizon).expand(len(chunk), -1) < execute
    return chunk, {**trace, "executed": executed}


def make(drift: str = "learned", seed: int = 0, **kernel) -> ScoreFlow:
    config = ScoreFlowConfig(drift=drift, **kernel)
    estimator = ScoreFlow(ScoreFlow.prepare(small_policy(seed), config), config)
    policy = estimator.policy
    with torch.no_grad():  # a noise head and a gain that depend on their inputs
        for module in [estimator.noise_head, *([policy.drift_gain] if drift == "learned" else [])]:
            for parameter in module.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return estimator


@pytest.mark.parametrize("drift", ["learned", "none", "fixed", "matched"])
@pytest.mark.parametrize("likelihood", ["joint", "per_dim_mean"])
@pytest.mark.parametrize("score", ["current", "base"])
def test_ratio_is_one_right_after_collection_in_any_batch_split(
    drift, likelihood, score, generator
):
    estimator = make(drift, likelihood=likelihood, score=score)
    obs = random_obs(estimator.policy, 37, generator)
    _, trace = draw(estimator, obs, generator)
    for rows in torch.randperm(37, generator=generator).split(10):
        log_ratio, _ = estimator.evaluate(
            {k: v[rows] for k, v in obs.items()}, {k: v[rows] for k, v in trace.items()}
        )
        assert log_ratio.abs().max() < 2e-4  # a sum of 36 elements in float32
        assert ((log_ratio.exp() - 1).abs() < 0.2).all()


def test_log_probability_of_a_chain_is_what_numpy_says(generator):
    estimator = make()
    policy, steps = estimator.policy, estimator.num_flow_steps
    obs = random_obs(policy, 5, generator)
    chunk, trace = draw(estimator, obs, generator)
    chain = trace["chain"].numpy().astype(np.float64)
    features = policy.features(obs)
    context = policy.velocity_field.from_obs(features)
    total = np.zeros(5)
    for k in range(steps):
        t = torch.full((5, 6), k / steps)
        x = trace["chain"][:, k]
        with torch.no_grad():
            velocity = policy.velocity_field(x, t, context).numpy()
            gain = policy.drift_gain(t).numpy()
            std = estimator.noise_head(t[:, 0], features).view(5, 6, 2).numpy()
        time = k / steps
        alpha = (1 - time) * gain
        score = (time * velocity - chain[:, k]) / (1 - time)
        mean = chain[:, k] + (velocity + alpha * score) / steps
        density = (
            -0.5 * ((chain[:, k + 1] - mean) / std) ** 2 - np.log(std) - 0.5 * np.log(2 * np.pi)
        )
        counted = density[:, :4] if k == steps - 1 else density  # four of six actions are executed
        total += counted.sum((1, 2))
    nothing = {**trace, "log_prob": torch.zeros_like(trace["log_prob"])}
    found, _ = estimator.evaluate(obs, nothing)
    assert np.allclose(found.detach().numpy(), total, rtol=1e-5, atol=1e-4)
    assert torch.allclose(policy.denormalize_action(trace["chain"][:, -1]), chunk)


def test_actions_never_executed_drop_out_of_the_last_transition_only(generator):
    estimator = make()
    obs = random_obs(estimator.policy, 4, generator)
    _, trace = draw(estimator, obs, generator)
    base, _ = estimator.evaluate(obs, trace)
    tail = {**trace, "chain": trace["chain"].clone()}
    tail["chain"][:, -1, 4:] += 1.0
    assert torch.equal(estimator.evaluate(obs, tail)[0], base)
    middle = {**trace, "chain": trace["chain"].clone()}
    middle["chain"][:, 1, 4:] += 1.0
    assert not torch.allclose(estimator.evaluate(obs, middle)[0], base, atol=1.0)


def test_without_noise_the_chain_is_the_deployed_flow(generator):
    estimator = make(sigma_min=1e-13, sigma_max=2e-13)
    policy = estimator.policy
    obs = random_obs(policy, 8, generator)
    chunk, trace = draw(estimator, obs, generator)
    with torch.no_grad():
        deployed = policy.sample(obs, trace["chain"][:, 0])
    assert torch.allclose(chunk, deployed, atol=1e-5)


def test_zero_drift_is_reinflow(generator):
    estimator = make("none")
    policy = estimator.policy
    x = torch.randn(5, 6, 2, generator=generator)
    obs = random_obs(policy, 5, generator)
    features = policy.features(obs)
    context = policy.embed(obs)
    t = torch.full((5, 6), 1 / 3)
    mean, _ = estimator.mean_std(x, t, context, features)
    velocity = policy.velocity_field(x, t, context)
    assert torch.allclose(mean, x + velocity / 3)


def test_sigma_stays_in_its_bounds(generator):
    estimator = make()
    features = 100 * torch.randn(1000, 10, generator=generator)
    sigma = estimator.noise_head(torch.rand(1000, generator=generator), features)
    assert sigma.min() >= 0.05 * (1 - 1e-5)
    assert sigma.max() <= 0.12 * (1 + 1e-5)


def test_entropy_is_minus_the_mean_log_density(generator):
    estimator = make()
    obs = {k: v.expand(20_000, -1) for k, v in random_obs(estimator.policy, 1, generator).items()}
    _, trace = draw(estimator, obs, generator)
    _, entropy = estimator.evaluate(obs, trace)
    per_element = trace["log_prob"].mean().item() / 2  # two joints
    assert entropy[0].item() == pytest.approx(-per_element, rel=0.01)


def test_every_parameter_is_trained_and_held_by_the_optimiser_once(generator):
    estimator = make()
    obs = random_obs(estimator.policy, 16, generator)
    _, trace = draw(estimator, obs, generator)
    log_ratio, entropy = estimator.evaluate(obs, trace)
    (log_ratio * torch.randn(16, generator=generator)).sum().backward()
    without = [
        n for n, p in estimator.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0
    ]
    assert without == []
    held = [id(p) for group in estimator.parameter_groups(1e-3) for p in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {id(p) for p in estimator.parameters()}
    assert entropy.requires_grad


def test_gradient_agrees_with_finite_differences(generator):
    estimator = make().double()
    obs = {k: v.double() for k, v in random_obs(estimator.policy, 3, generator).items()}
    chain = torch.randn(3, 4, 6, 2, generator=generator, dtype=torch.float64)
    trace = {
        "chain": chain,
        "log_prob": torch.zeros(3, 3, 6, dtype=torch.float64),
        "executed": torch.ones(3, 6, dtype=torch.bool),
    }
    parameter = estimator.policy.drift_gain.net[-1].bias
    estimator.evaluate(obs, trace)[0].sum().backward()
    values = []
    for step in (1e-6, -2e-6):
        with torch.no_grad():
            parameter += step
            values.append(estimator.evaluate(obs, trace)[0].sum().item())
    assert float(parameter.grad) == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5)


def test_surrogate_has_no_gradient_without_advantage_and_stops_at_the_clip():
    log_ratio = torch.tensor([0.0, 0.5, -0.5], requires_grad=True)
    ppo.surrogate_loss(log_ratio, torch.zeros(3), 0.2).backward()
    assert torch.equal(log_ratio.grad, torch.zeros(3))
    log_ratio.grad = None
    ppo.surrogate_loss(log_ratio, torch.tensor([1.0, 1.0, -1.0]), 0.2).backward()
    assert log_ratio.grad[0] < 0  # raise the probability of what was good
    assert torch.equal(log_ratio.grad[1:], torch.zeros(2))  # already far enough


@pytest.mark.parametrize("drift", ["learned", "none"])
def test_learns_a_bandit(drift, generator):
    """Reward is nearness of the first action to (0.4, -0.8); the mean flow must move there."""
    estimator = make(drift, seed=1, sigma_min=0.2, sigma_max=0.4)
    policy = estimator.policy
    optimizer = torch.optim.Adam(estimator.parameters(), lr=3e-3)
    goal = torch.tensor([0.4, -0.8])
    obs = random_obs(policy, 256, generator)

    def distance() -> float:
        with torch.no_grad():
            chunk = policy.sample(obs, torch.zeros(256, 6, 2))
        return float((chunk[:, 0] - goal).norm(dim=-1).mean())

    before = distance()
    for _ in range(150):
        chunk, trace = draw(estimator, obs, generator)
        reward = -(chunk[:, 0] - goal).norm(dim=-1)
        advantage = (reward - reward.mean()) / reward.std()
        log_ratio, _ = estimator.evaluate(obs, trace)
        ppo.step(optimizer, ppo.surrogate_loss(log_ratio, advantage, 0.2), 1.0)
    assert distance() < 0.6 * before


def test_base_policy_is_not_touched(generator):
    policy = small_policy(score_drift=True)
    base = copy.deepcopy(policy)
    estimator = ScoreFlow(policy, ScoreFlowConfig())
    obs = random_obs(policy, 8, generator)
    _, trace = draw(estimator, obs, generator)
    optimizer = torch.optim.Adam(estimator.parameters(), lr=1e-2)
    ppo.step(optimizer, estimator.evaluate(obs, trace)[0].sum(), 1.0)
    with torch.no_grad():
        noise = flow.time_grid(1).new_zeros(8, 6, 2)
        assert not torch.allclose(policy.sample(obs, noise), base.sample(obs, noise))

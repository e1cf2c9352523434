"""ScoRe-Flow's transition kernel, likelihood and learning, against independent derivations."""

import copy

import numpy as np
import pytest
import torch
from toys import (
    draw,
    gradient_step,
    random_obs,
    scalar_policy,
    small_policy,
    surrogate_loss,
    two_mode_bandit,
)

from flow_policy_rl import checkpoint, flow, presets
from flow_policy_rl.algorithms.score_flow import ScoreFlow, ScoreFlowConfig
from flow_policy_rl.errors import InputError


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


@pytest.mark.parametrize("noisy_steps", [0, 1, 2])
def test_log_probability_of_a_chain_is_what_numpy_says(noisy_steps, generator):
    estimator = make(noisy_steps=noisy_steps)
    policy, steps = estimator.policy, estimator.num_flow_steps
    obs = random_obs(policy, 5, generator)
    chunk, trace = draw(estimator, obs, generator)
    chain = trace["chain"].numpy().astype(np.float64)
    features = policy.features(obs)
    context = policy.velocity_field.from_obs(features)
    total = np.zeros(5)
    first = steps - noisy_steps if noisy_steps else 0
    assert chain.shape[1] == steps - first + 1
    for k in range(steps - first):
        time = (first + k) / steps
        t = torch.full((5, 6), time)
        x = trace["chain"][:, k]
        with torch.no_grad():
            velocity = policy.velocity_field(x, t, context).numpy()
            gain = policy.drift_gain(t).numpy()
            std = estimator.noise_head(t[:, 0], features).view(5, 6, 2).numpy()
        alpha = (1 - time) * gain
        score = (time * velocity - chain[:, k]) / (1 - time)
        mean = chain[:, k] + (velocity + alpha * score) / steps
        density = (
            -0.5 * ((chain[:, k + 1] - mean) / std) ** 2 - np.log(std) - 0.5 * np.log(2 * np.pi)
        )
        is_last = first + k == steps - 1  # of which four of six actions are executed
        counted = density[:, :4] if is_last else density
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


@pytest.mark.parametrize("noisy_steps", [0, 1])
def test_without_noise_given_actions_are_continued_as_deployed(noisy_steps, generator):
    config = ScoreFlowConfig(1e-13, 2e-13, noisy_steps=noisy_steps, start_noise=0.0)
    base = small_policy(prefix_horizon=3, execute_horizon=3)
    estimator = ScoreFlow(ScoreFlow.prepare(base, config), config)
    policy = estimator.policy
    obs = random_obs(policy, 8, generator)
    obs["prefix"] = 0.3 * torch.randn(8, 3, 2, generator=generator)
    obs["inference_delay"] = torch.arange(8) % 4
    with torch.no_grad():
        deployed = policy.sample(obs, torch.zeros(8, 6, 2))
    assert torch.allclose(estimator.sample(obs, generator)[0], deployed, atol=1e-5)


@pytest.mark.parametrize("drift", ["learned", "matched"])
def test_steps_before_the_noisy_ones_are_those_of_the_deployed_flow(drift, generator):
    estimator = make(drift, noisy_steps=1, start_noise=0.0)
    policy = estimator.policy
    obs = random_obs(policy, 8, generator)
    _, trace = draw(estimator, obs, generator)
    context = policy.embed(obs)
    x = torch.zeros(8, *policy.chunk_shape)
    with torch.no_grad():
        for k in range(2):  # of three
            x = x + policy.velocity(x, torch.full((8, 6), k / 3), context) / 3
    assert torch.allclose(trace["chain"][:, 0], x, atol=1e-6)


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


@pytest.mark.parametrize("score", ["current", "base"])
def test_the_matched_drift_follows_the_score_it_was_told_to(score, generator):
    """alpha = sigma^2 K / 2, of a policy that has left its base behind."""
    estimator = make("matched", score=score)
    policy = estimator.policy
    with torch.no_grad():
        policy.velocity_field.head.bias += 0.5
    obs, x = random_obs(policy, 5, generator), torch.randn(5, 6, 2, generator=generator)
    features, t = policy.features(obs), torch.full((5, 6), 1 / 3)
    mean, std = estimator.mean_std(x, t, policy.context(features), features)
    velocity = policy.velocity_field(x, t, policy.velocity_field.from_obs(features))
    field = policy.base_field if score == "base" else policy.velocity_field
    score_at = flow.score(x, field(x, t, field.from_obs(features)), t)
    assert torch.allclose(mean, x + (velocity + 1.5 * std**2 * score_at) / 3, atol=1e-6)


def test_the_authors_normalisation_is_per_element_of_the_chain_with_its_start(generator):
    """Four states of 6 x 2 elements: clip ranges of the `paper` presets are in these units."""
    found = []
    for likelihood in ("joint", "per_dim_mean"):
        estimator = make(likelihood=likelihood)
        obs = random_obs(estimator.policy, 5, generator.manual_seed(0))
        _, trace = draw(estimator, obs, generator)
        trace["log_prob"] -= 0.1
        found.append(estimator.evaluate(obs, trace)[0])
    assert torch.allclose(found[0], found[1] * 4 * 6 * 2, rtol=1e-4)


def test_diagnostics_number_the_flow_steps_and_compare_the_drift_with_the_matched_one(generator):
    estimator = make("fixed", fixed_gain=0.3, noisy_steps=2)
    policy = estimator.policy
    with torch.no_grad():
        policy.velocity_field.head.bias += 2.0
    obs = random_obs(policy, 50, generator)
    _, trace = draw(estimator, obs, generator)
    numbers = estimator.diagnostics(obs, trace)
    features, context = policy.features(obs), policy.embed(obs)
    for k in (1, 2):  # of three, the first is quiet
        x, t = trace["chain"][:, k - 1], torch.full((50, 6), k / 3)
        mean, std = estimator.mean_std(x, t, context, features)
        alpha, matched = (1 - k / 3) * 0.3, 1.5 * std.square().mean().item()
        assert numbers[f"train/sigma_{k}"] == pytest.approx(std.mean().item(), rel=1e-4)
        assert numbers[f"train/alpha_{k}"] == pytest.approx(alpha, rel=1e-4)
        assert numbers[f"train/alpha_surplus_{k}"] == pytest.approx(alpha - matched, rel=1e-3)
    assert "train/sigma_0" not in numbers
    saturated = (mean.abs() > 1).float().mean().item()  # of the last step
    assert numbers["train/saturated_means"] == pytest.approx(saturated)
    assert 0.1 < saturated < 0.9


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
    field, heads = estimator.parameter_groups(1e-3)
    held = [id(p) for group in (field, heads) for p in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {id(p) for p in estimator.parameters()}
    assert (field["lr"], heads["lr"]) == (1e-3, 3e-4)
    assert {id(p) for p in estimator.noise_head.parameters()} < {id(p) for p in heads["params"]}
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
    surrogate_loss(log_ratio, torch.zeros(3), 0.2).backward()
    assert torch.equal(log_ratio.grad, torch.zeros(3))
    log_ratio.grad = None
    surrogate_loss(log_ratio, torch.tensor([1.0, 1.0, -1.0]), 0.2).backward()
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
        gradient_step(optimizer, surrogate_loss(log_ratio, advantage, 0.2), 1.0)
    assert distance() < 0.6 * before


def test_base_policy_is_not_touched(generator):
    policy = small_policy(score_drift=True)
    base = copy.deepcopy(policy)
    estimator = ScoreFlow(policy, ScoreFlowConfig())
    obs = random_obs(policy, 8, generator)
    _, trace = draw(estimator, obs, generator)
    optimizer = torch.optim.Adam(estimator.parameters(), lr=1e-2)
    gradient_step(optimizer, estimator.evaluate(obs, trace)[0].sum(), 1.0)
    with torch.no_grad():
        noise = flow.time_grid(1).new_zeros(8, 6, 2)
        assert not torch.allclose(policy.sample(obs, noise), base.sample(obs, noise))


# --- the distribution of the chain, on exact velocity fields of a scalar action ---


class Mixture(torch.nn.Module):
    """The exact marginal velocity of a scalar Gaussian mixture, in place of a network."""

    shape = (1, 1)

    def __init__(self, means, stds, weights):
        super().__init__()
        self.means, self.stds, self.weights = (
            torch.tensor(v, dtype=torch.float64) for v in (means, stds, weights)
        )

    def from_obs(self, features):
        return features

    def forward(self, x, t, context):
        t = t.unsqueeze(-1)
        variance = (1 - t) ** 2 + (t * self.stds) ** 2
        rest = x - t * self.means
        share = torch.softmax(
            torch.log(self.weights) - 0.5 * torch.log(variance) - 0.5 * rest**2 / variance, -1
        )
        velocity = self.means + (t * self.stds**2 - (1 - t)) / variance * rest
        return (share * velocity).sum(-1, keepdim=True)

    def draw(self, count, generator):
        component = torch.multinomial(self.weights, count, True, generator=generator)
        noise = torch.randn(count, generator=generator, dtype=torch.float64)
        return self.means[component] + self.stds[component] * noise


class Step(torch.nn.Module):
    """A noise head that gives sigma_k^2 = 2 c (1 - t) / K."""

    def __init__(self, coefficient: float, num_flow_steps: int):
        super().__init__()
        self.factor = 2 * coefficient / num_flow_steps

    def forward(self, t, features):
        return (self.factor * (1 - t)).sqrt().unsqueeze(-1)


def exact_chain(drift: str, field: Mixture, num_flow_steps: int, coefficient: float) -> ScoreFlow:
    config = ScoreFlowConfig(drift=drift, fixed_gain=coefficient or 1.0)
    estimator = ScoreFlow(
        ScoreFlow.prepare(scalar_policy(num_flow_steps=num_flow_steps), config), config
    ).double()
    estimator.policy.velocity_field = field
    estimator.noise_head = Step(coefficient, num_flow_steps)
    estimator.grid = flow.time_grid(num_flow_steps, dtype=torch.float64)
    return estimator


def ends(estimator: ScoreFlow, count: int, generator) -> torch.Tensor:
    """Final states of many chains, in float64."""
    torch.set_default_dtype(torch.float64)
    _, trace = estimator.sample({"features": torch.zeros(count, 1)}, generator)
    torch.set_default_dtype(torch.float32)
    return trace["chain"][:, -1, 0, 0]


def test_matched_drift_keeps_the_marginals_and_noise_alone_does_not(generator):
    """Distance (Wasserstein-2) to the mixture with 384 steps, against that of two sets of true samples."""
    field = Mixture([-0.8, 0.1, 0.9], [0.1, 0.2, 0.15], [0.3, 0.4, 0.3])
    count = 10_000
    target = [field.draw(count, generator).sort().values for _ in range(6)]
    distance = lambda a, b: (a - b).square().mean().sqrt().item()  # noqa: E731
    floor = max(distance(target[0], other) for other in target[1:])
    found = {
        drift: distance(
            ends(exact_chain(drift, field, 384, 0.3), count, generator).sort().values, target[0]
        )
        for drift in ("matched", "none")
    }
    assert found["matched"] < 2 * floor
    assert found["none"] > 4 * floor


def exact_variance(estimator: ScoreFlow, with_noise: bool = True) -> float:
    """Variance at the end of a chain whose kernel is linear in x, probed at x = 1."""
    variance, one = 1.0, torch.ones(1, 1, 1, dtype=torch.float64)
    features = torch.zeros(1, 1, dtype=torch.float64)
    for t in estimator.grid:
        mean, std = estimator.mean_std(one, t.view(1, 1), features, features)
        variance = mean.item() ** 2 * variance + with_noise * std.item() ** 2
    return variance


def test_variance_of_a_scalar_gaussian_is_that_of_the_recursion(generator):
    """Target 0.09, alpha = 0.2 (1 - t): the table of the research notes, and Monte Carlo."""
    field = Mixture([0.0], [0.3], [1.0])
    table = {  # drift, noise -> K = 4, K = 1024
        ("none", False): (0.031, 0.0897),
        ("matched", True): (0.054, 0.0898),
        ("none", True): (0.089, 0.145),
        ("fixed", False): (0.011, 0.048),
    }
    for (drift, noise), expected in table.items():
        for steps, value in zip((4, 1024), expected, strict=True):
            estimator = exact_chain(drift, field, steps, 0.2)
            assert exact_variance(estimator, noise) == pytest.approx(value, abs=6e-4)
    for drift in ("none", "matched"):
        estimator = exact_chain(drift, field, 4, 0.2)
        sampled = ends(estimator, 200_000, generator).var().item()
        assert sampled == pytest.approx(exact_variance(estimator), rel=0.02)


def test_error_of_the_matched_chain_is_of_first_order():
    field = Mixture([0.0], [0.3], [1.0])
    errors = [
        abs(exact_variance(exact_chain("matched", field, steps, 0.2)) - 0.09)
        for steps in (32, 64, 128, 256, 512)
    ]
    slopes = np.diff(np.log2(errors))
    assert np.allclose(slopes, -1, atol=0.15)


def test_matched_drift_is_flow_grpo_in_the_other_convention(generator):
    """tau = 1 - t, u = -v, std a sqrt(tau / (1 - tau)) (arXiv 2505.05470)."""
    steps, a = 8, 0.7
    x, v = torch.randn(2, 50, 1, 1, generator=generator, dtype=torch.float64)
    for k in range(1, steps):
        t = torch.tensor(k / steps, dtype=torch.float64)
        tau, u, dt = 1 - t, -v, -1 / steps
        std = a * torch.sqrt(tau / (1 - tau))
        theirs = x * (1 + std**2 / (2 * tau) * dt) + u * (1 + std**2 * (1 - tau) / (2 * tau)) * dt
        gain = 0.5 * steps * (std**2 / steps) / (1 - t)
        ours = x + flow.score_drift(x, v, t.view(1, 1), gain) / steps
        assert torch.allclose(ours, theirs, atol=1e-12)


def test_upper_bound_of_sigma_is_held_and_then_decays():
    estimator = make(sigma_decay=0.3)
    head = estimator.noise_head
    bounds = {}
    for progress in (0.0, 0.2, 0.35, 0.7, 1.0):
        head.anneal(progress)
        bounds[progress] = head.sigma_max.item()
        sigma = head(torch.rand(500), 100 * torch.randn(500, 10))
        assert sigma.max() <= head.sigma_max * (1 + 1e-5)
    assert bounds[0.0] == bounds[0.2] == bounds[0.35] == pytest.approx(0.12)
    assert bounds[1.0] == pytest.approx(0.3 * 0.05 + 0.7 * 0.12)
    assert bounds[1.0] < bounds[0.7] < 0.12
    assert "noise_head.sigma_max" in estimator.state_dict()


def test_a_small_step_makes_good_chains_more_likely(generator):
    estimator = make()
    obs = random_obs(estimator.policy, 200, generator)
    _, trace = draw(estimator, obs, generator)
    advantage = torch.randn(200, generator=generator)
    gain = lambda: (advantage * estimator.evaluate(obs, trace)[0]).mean().item()  # noqa: E731
    before = gain()
    optimizer = torch.optim.SGD(estimator.parameters(), lr=1e-3)
    gradient_step(optimizer, surrogate_loss(estimator.evaluate(obs, trace)[0], advantage, 0.2), 1.0)
    assert gain() > before


def test_gradient_of_a_gaussian_bandit_is_the_analytic_one(generator):
    """K = 1, where the mean of the chunk is mu: d E[-(x - 1)^2] / d mu = 2 (1 - mu)."""

    class Mean(torch.nn.Module):
        shape = (1, 1)

        def __init__(self):
            super().__init__()
            self.mu = torch.nn.Parameter(torch.tensor(0.4))

        def from_obs(self, features):
            return features

        def forward(self, x, t, context):
            return self.mu - x

    config = ScoreFlowConfig(drift="none", sigma_min=0.2, sigma_max=0.4)
    estimator = ScoreFlow(ScoreFlow.prepare(scalar_policy(num_flow_steps=1), config), config)
    field = estimator.policy.velocity_field = Mean()
    obs = {"joint_pos": torch.zeros(400_000, 1)}
    _, trace = draw(estimator, obs, generator, executed=1)
    reward = -((trace["chain"][:, -1].flatten() - 1) ** 2)
    log_ratio, _ = estimator.evaluate(obs, trace)
    surrogate_loss(log_ratio, reward - reward.mean(), 0.2).backward()
    assert -field.mu.grad.item() == pytest.approx(1.2, rel=0.02)


@pytest.mark.parametrize(
    "kernel",
    [{}, {"drift": "fixed"}, {"score": "base"}, {"drift": "matched", "score": "base"}],
    ids=str,
)
def test_a_checkpoint_keeps_all_that_the_robot_needs(kernel, tmp_path, generator):
    """Gain and frozen base field included: reloaded, the policy gives the same actions, bit for bit."""
    estimator = make(**kernel)
    with torch.no_grad():  # so that base and present field differ
        estimator.policy.velocity_field.head.weight += 0.1
    obs = random_obs(estimator.policy, 5, generator)
    noise = torch.randn(5, 6, 2, generator=generator)
    checkpoint.save(tmp_path / "p.safetensors", estimator.policy)
    loaded = checkpoint.load(tmp_path / "p.safetensors")
    with torch.no_grad():
        assert torch.equal(loaded.sample(obs, noise), estimator.policy.sample(obs, noise))


@pytest.mark.parametrize(
    ("was", "becomes"),
    [
        ({"drift": "none"}, {"drift": "none"}),
        ({"drift": "none"}, {"drift": "matched", "score": "base"}),
        ({"drift": "matched", "score": "base"}, {"drift": "none"}),
        ({"drift": "fixed"}, {"drift": "fixed"}),
        ({"drift": "fixed"}, {"drift": "learned"}),
        ({"drift": "learned"}, {"drift": "learned"}),
        ({"drift": "learned"}, {"drift": "learned", "score": "base"}),
        ({"drift": "learned", "score": "base"}, {"drift": "learned", "score": "base"}),
    ],
    ids=str,
)
def test_a_fine_tuned_policy_goes_on_as_it_is(was, becomes, generator):
    """Where the score of the present field becomes that of a base, they are the same at first."""
    estimator = make(**was)
    with torch.no_grad():  # trained
        estimator.policy.velocity_field.head.weight += 0.1
        if was["drift"] == "learned":
            estimator.policy.drift_gain.net[-1].weight += 0.3
    config = ScoreFlowConfig(**becomes)
    continued = ScoreFlow(ScoreFlow.prepare(estimator.policy, config), config).policy
    obs = random_obs(continued, 5, generator)
    noise = torch.randn(5, 6, 2, generator=generator)
    with torch.no_grad():
        before = estimator.policy.sample(obs, noise)
        torch.testing.assert_close(continued.sample(obs, noise), before, rtol=0, atol=1e-6)


def test_a_frozen_base_field_is_the_base_and_is_not_trained(generator):
    base = small_policy()
    config = ScoreFlowConfig(score="base")
    estimator = ScoreFlow(ScoreFlow.prepare(base, config), config)
    policy = estimator.policy
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            policy.base_field.parameters(), base.velocity_field.parameters(), strict=True
        )
    )
    held = {id(p) for group in estimator.parameter_groups(1e-3) for p in group["params"]}
    assert not held & {id(p) for p in policy.base_field.parameters()}
    x = torch.randn(4, 6, 2, generator=generator)
    t = torch.full((4, 6), 0.5)
    context = policy.embed(random_obs(policy, 4, generator))
    with torch.no_grad():
        plain = policy.velocity(x, t, context)
        policy.velocity_field.head.bias += 1.0
        moved = policy.velocity(x, t, context) - plain
    assert torch.allclose(moved, torch.ones_like(moved), atol=1e-5)  # the score did not move


@pytest.mark.parametrize("drift", ["none", "matched", "learned"])
def test_improves_a_policy_with_two_modes(bimodal, drift):
    """More good actions for every drift; ReinFlow and the matched drift keep both modes."""
    config = ScoreFlowConfig(drift=drift, sigma_min=0.05, sigma_max=0.15)
    estimator = ScoreFlow(ScoreFlow.prepare(copy.deepcopy(bimodal), config), config)
    good, right = two_mode_bandit(estimator, "ppo", clip_range=0.02)
    assert good > 0.75
    if drift != "learned":
        assert 0.25 < right < 0.75


@pytest.mark.parametrize("task", presets.PRECISE)
def test_where_parts_fit_by_millimetres_what_is_deployed_is_the_plain_flow(task, generator):
    """From any starting noise: a drift would leave gain / K of it in the action (tests/test_flow.py)."""
    base, kernel = small_policy(), presets.score_flow(task)["score_flow"]
    obs, noise = (
        random_obs(base, 8, generator),
        torch.randn(8, *base.chunk_shape, generator=generator),
    )
    with torch.no_grad():
        deployed = ScoreFlow.prepare(base, kernel).sample(obs, noise)
        assert torch.equal(deployed, base.sample(obs, noise))


def test_a_drift_is_not_dropped_and_bad_settings_are_refused():
    with pytest.raises(InputError, match="score drift.*--score-flow.drift learned"):
        ScoreFlow.prepare(small_policy(score_drift=True), ScoreFlowConfig(drift="none"))
    anchored = small_policy(score_drift=True, base_score=True)
    with pytest.raises(InputError, match="--score-flow.score base"):
        ScoreFlow.prepare(anchored, ScoreFlowConfig(score="current"))
    held = make(drift="fixed", fixed_gain=0.2).policy
    with pytest.raises(InputError, match="score drift"):
        ScoreFlow.prepare(held, ScoreFlowConfig(drift="fixed", fixed_gain=0.1))
    fixed = {"drift": "fixed", "fixed_gain": 0.0}
    for wrong in ({"sigma_min": 0.2}, fixed, {"sigma_min": 0.0}, {"noisy_steps": -1}):
        with pytest.raises(InputError):
            ScoreFlowConfig(**wrong)
    with pytest.raises(InputError, match="noisy_steps 4 is more than the 3 flow steps"):
        make(noisy_steps=4)

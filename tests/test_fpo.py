"""FPO's ratio against closed forms, Gaussian PPO as the control, and what both make of two modes."""

import copy
import math

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

from flow_policy_rl import flow
from flow_policy_rl.algorithms import ppo
from flow_policy_rl.algorithms.fpo import FPO, FPOConfig, loss_weight
from flow_policy_rl.algorithms.gaussian import Gaussian, GaussianConfig
from flow_policy_rl.errors import InputError


def rows_of(tensors, rows):
    return {k: v[rows] for k, v in tensors.items()}


@pytest.mark.parametrize("loss", ["velocity", "noise", "action", "elbo"])
@pytest.mark.parametrize("reduction", ["sum", "sqrt", "mean", "joint_mean"])
@pytest.mark.parametrize("ratio", ["per_action", "per_sample"])
def test_ratio_is_one_before_the_first_step(loss, reduction, ratio, generator):
    """T1: with clamps active, chunk masks and any batch split."""
    config = FPOConfig(ratio, loss=loss, reduction=reduction, loss_clamp=2.0, log_ratio_clamp=0.1)
    estimator = FPO(small_policy(), config)
    obs = random_obs(estimator.policy, 37, generator)
    _, trace = draw(estimator, obs, generator)
    trace["executed"] = torch.arange(6) < torch.randint(1, 5, (37, 1), generator=generator)
    for rows in torch.randperm(37, generator=generator).split(10):
        log_ratio, _ = estimator.evaluate(rows_of(obs, rows), rows_of(trace, rows))
        assert log_ratio.shape == ((len(rows),) if ratio == "per_action" else (len(rows), 8))
        assert log_ratio.abs().max() < 2e-5


@pytest.mark.parametrize("trust_region", ["ppo", "spo", "aspo"])
def test_gradient_at_ratio_one_is_that_of_the_loss(trust_region, generator):
    """T2: -mean(A grad(-l_new)) for all trust regions, per sample and per action."""
    advantage = torch.randn(16, generator=generator)
    gradients = []
    for ratio in ("per_sample", "per_action"):
        estimator = FPO(small_policy(), FPOConfig(ratio)).double()
        obs = {
            k: v.double()
            for k, v in random_obs(estimator.policy, 16, torch.Generator().manual_seed(1)).items()
        }
        torch.set_default_dtype(torch.float64)
        _, trace = draw(estimator, obs, torch.Generator().manual_seed(2))
        torch.set_default_dtype(torch.float32)
        log_ratio, _ = estimator.evaluate(obs, trace)
        surrogate_loss(log_ratio, advantage.double(), 0.05, trust_region).backward()
        gradients.append([p.grad.clone() for p in estimator.parameters()])
        estimator.zero_grad()
        new, _ = estimator._new_and_old(obs, trace)
        (advantage.double() * new.mean(1)).mean().backward()
        gradients.append([p.grad.clone() for p in estimator.parameters()])
    for others in gradients[1:]:
        for a, b in zip(gradients[0], others, strict=True):
            assert torch.allclose(a, b, atol=1e-9)


class Denoiser(torch.nn.Module):
    """The exact velocity field of N(mean, std^2), one action of one joint, in place of a network."""

    def __init__(self, mean: float, std: float):
        super().__init__()
        self.mean, self.std, self.shape = mean, std, (1, 1)

    def from_obs(self, features):
        return features

    def forward(self, x, t, context):
        t = t.unsqueeze(-1)
        variance = (1 - t) ** 2 + (t * self.std) ** 2
        rest = (x - t * self.mean) / variance
        return self.mean + t * self.std**2 * rest - (1 - t) * rest


def exact_log_ratio(loss: str, old: tuple, new: tuple, action: float) -> float:
    """Log-ratio of the code for exact denoisers, with quadrature over time and noise instead of draws."""
    estimator = FPO(
        scalar_policy(), FPOConfig(loss=loss, reduction="sum", loss_clamp=0, log_ratio_clamp=0)
    ).double()
    nodes = 2000
    t = (torch.arange(nodes, dtype=torch.float64) + 0.5) / nodes
    x_0 = torch.tensor([-1.0, 1.0], dtype=torch.float64)  # errors are quadratic in the noise
    t, x_0 = t.repeat_interleave(2)[None], x_0.repeat(nodes)[None, :, None, None]
    x_1 = torch.full((1, 1, 1), action, dtype=torch.float64)
    context = torch.zeros(1, 1, dtype=torch.float64)
    losses = []
    for mean, std in (old, new):
        estimator.policy.velocity_field = Denoiser(mean, std)
        losses.append(estimator.losses(context, x_1, x_0, t).mean().item())
    return losses[0] - losses[1]


GAUSSIANS = [  # old, new, action -> exact, velocity, noise, action (research notes, closed form)
    ((0.0, 1.0), (0.1, 1.0), 1.0, 0.0950, 0.1492, 0.0204, 0.0746),
    ((0.0, 0.2), (0.05, 0.2), 0.2, 0.2187, 0.0687, 0.0308, 0.0128),
    ((0.0, 0.2), (0.0, 0.15), 0.4, -1.2679, -0.1702, -0.1200, -0.0062),
    ((0.5, 0.3), (0.6, 0.25), 0.2, -0.5977, -0.2278, -0.0924, -0.0488),
]


@pytest.mark.parametrize(("old", "new", "action", "exact", "velocity", "noise", "clean"), GAUSSIANS)
def test_elbo_weight_gives_the_gaussian_likelihood_ratio(
    old, new, action, exact, velocity, noise, clean
):
    """T3, with the other weights as golden values."""
    density = lambda mean, std: -0.5 * ((action - mean) / std) ** 2 - math.log(std)  # noqa: E731
    assert density(*new) - density(*old) == pytest.approx(exact, abs=1e-3)
    assert exact_log_ratio("elbo", old, new, action) == pytest.approx(exact, abs=2e-3)
    for loss, golden in {"velocity": velocity, "noise": noise, "action": clean}.items():
        assert exact_log_ratio(loss, old, new, action) == pytest.approx(golden, abs=2e-4)


class Constant(torch.nn.Module):
    """A field whose predicted action is a free vector, whatever x_t and t are: v = (mu - x) / (1 - t)."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.mu = shape, torch.nn.Parameter(torch.zeros(shape))

    def from_obs(self, features):
        return features

    def forward(self, x, t, context):
        return (self.mu - x) / (1 - t).unsqueeze(-1)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_is_gaussian_ppo_when_the_field_predicts_a_fixed_action(reduction, generator):
    """T4: ratio, clip mask, loss and gradient of a Gaussian of fixed std; with the mean reduction the log-ratio / d."""
    std, batch = 0.3, 64
    policy = small_policy()
    policy.velocity_field = Constant(policy.chunk_shape)
    config = FPOConfig(
        "per_action",
        loss="action",
        reduction=reduction,
        temperature=0.5 / std**2,
        loss_clamp=0,
        log_ratio_clamp=0,
        action_noise=std,
    )
    estimator = FPO(policy, config)
    obs = random_obs(policy, batch, generator)
    x_1 = std * torch.randn(batch, *policy.chunk_shape, generator=generator)
    x_0, t = estimator.draw(batch, generator)
    loss = estimator.losses(policy.embed(obs), x_1, x_0, t).detach()
    trace = {"x_1": x_1, "x_0": x_0, "t": t, "loss": loss}
    trace["executed"] = torch.arange(6).expand(batch, -1) < 4
    with torch.no_grad():
        policy.velocity_field.mu += 0.05
    log_ratio, _ = estimator.evaluate(obs, trace)
    mu = policy.velocity_field.mu.detach().clone().requires_grad_(True)
    normal = torch.distributions.Normal
    change = normal(mu, std).log_prob(x_1) - normal(0.0, std).log_prob(x_1)
    expected = change[:, :4].sum((1, 2)) / (1 if reduction == "sum" else 8)
    assert torch.allclose(log_ratio, expected, atol=2e-4)
    advantage = torch.randn(batch, generator=generator)
    losses = [surrogate_loss(r, advantage, 0.05) for r in (log_ratio, expected)]
    assert torch.allclose(*losses, atol=1e-4)
    for one in losses:
        one.backward()
    assert torch.allclose(policy.velocity_field.mu.grad, mu.grad, atol=1e-4)
    assert mu.grad.abs().sum() > 0


def test_losses_of_noise_and_action_are_weighted_velocity_losses(generator):
    """T5: from their definitions, x_0 = x_t - t v and x_1 = x_t + (1 - t) v."""
    estimator = FPO(small_policy(), FPOConfig()).double()
    policy = estimator.policy
    x_1 = torch.randn(5, 6, 2, generator=generator, dtype=torch.float64)
    x_0 = torch.randn(5, 3, 6, 2, generator=generator, dtype=torch.float64)
    t = torch.rand(5, 3, generator=generator, dtype=torch.float64)
    context = torch.randn(5, 16, generator=generator, dtype=torch.float64)
    times = t[..., None].expand(5, 3, 6)
    x_t = flow.interpolate(x_0, x_1[:, None], times)
    velocity = policy.velocity_field(
        x_t.flatten(0, 1), times.flatten(0, 1), context.repeat_interleave(3, 0)
    ).view_as(x_0)
    noise = (x_t - times[..., None] * velocity - x_0).square().sum(-1)
    action = (x_t + (1 - times[..., None]) * velocity - x_1[:, None]).square().sum(-1)
    for name, expected in {"noise": noise, "action": action}.items():
        estimator.config = FPOConfig(loss=name)
        assert torch.allclose(estimator.losses(context, x_1, x_0, t), expected, atol=1e-9)


def test_sampler_carries_zero_noise_to_the_mean():
    """T6: on an exact field; the orders of the integrators are in test_flow."""
    policy = scalar_policy(num_flow_steps=200)
    policy.velocity_field = Denoiser(0.3, 0.2)
    obs = {"joint_pos": torch.zeros(4000, 1)}
    assert policy.sample(obs, torch.zeros(4000, 1, 1)).mean().item() == pytest.approx(0.3, abs=1e-3)
    estimator = FPO(policy, FPOConfig(action_noise=0.0))
    chunk, _ = estimator.sample(obs, torch.Generator().manual_seed(0))
    assert chunk.mean().item() == pytest.approx(0.3, abs=0.02)
    assert chunk.std().item() == pytest.approx(0.2, rel=0.05)


@pytest.mark.parametrize("trust_region", ["ppo", "spo", "aspo"])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_trust_regions_have_the_slopes_they_should(trust_region, advantage):
    """T7: d psi / d r, stationary points of SPO, no gradient where PPO clips."""
    clip, a = 0.1, advantage
    kind = {"aspo": "ppo" if a > 0 else "spo"}.get(trust_region, trust_region)
    for r in (0.5, 0.95, 1.05, 2.0, 1 + clip * a + 1e-4):
        ratio = torch.tensor([r], dtype=torch.float64, requires_grad=True)
        ppo.surrogate(ratio.log(), torch.tensor([a]).double(), clip, trust_region).sum().backward()
        spo = a - abs(a) * (r - 1) / clip
        clipped = (a > 0 and r > 1 + clip) or (a < 0 and r < 1 - clip)
        expected = spo if kind == "spo" else (0.0 if clipped else a)
        assert ratio.grad.item() == pytest.approx(expected, abs=1e-9)
    if kind == "spo":
        stationary = torch.tensor([1 + a * clip], dtype=torch.float64, requires_grad=True)
        ppo.surrogate(
            stationary.log(), torch.tensor([a]).double(), clip, trust_region
        ).sum().backward()
        assert stationary.grad.item() == pytest.approx(0.0, abs=1e-9)


def test_a_dual_clip_takes_the_gradient_of_bad_actions_that_became_far_likelier():
    """And of no other: d psi / d r is A up to d and 0 beyond, where in PPO alone one ratio may rule a step."""
    ratio = torch.tensor([0.5, 1.5, 2.9, 3.1, 1e9, 3.1], dtype=torch.float64, requires_grad=True)
    advantage = torch.tensor([-1.0, -1.0, -1.0, -1.0, -1.0, 1.0], dtype=torch.float64)
    worth = ppo.surrogate(ratio.log(), advantage, 0.2, dual_clip=3.0)
    worth.sum().backward()
    assert ratio.grad.tolist() == pytest.approx([0.0, -1.0, -1.0, 0.0, 0.0, 0.0])
    assert worth.tolist()[3:] == pytest.approx([-3.0, -3.0, 1.2])
    values = [ppo.surrogate(ratio.log(), advantage, 0.2, "aspo", dual_clip=d) for d in (0.0, 3.0)]
    assert torch.equal(*values)  # aspo pulls back what is bad


def test_an_advantage_touches_no_other_actions_gradient(generator):
    """T7: ASPO is per element, so it commutes with permutations and does not mix actions."""
    log_ratio = 0.2 * torch.randn(6, 4, generator=generator)
    advantage = torch.randn(6, generator=generator)

    def gradient(advantage):
        leaf = log_ratio.clone().requires_grad_(True)
        surrogate_loss(leaf, advantage, 0.05, "aspo").backward()
        return leaf.grad

    base = gradient(advantage)
    changed = advantage.clone()
    changed[2] = -changed[2]
    other = gradient(changed)
    keep = torch.arange(6) != 2
    assert torch.equal(base[keep], other[keep])
    assert not torch.allclose(base[2], other[2])
    order = torch.randperm(6, generator=generator)
    permuted = ppo.surrogate(log_ratio[order], advantage[order], 0.05, "aspo")
    assert torch.equal(permuted, ppo.surrogate(log_ratio, advantage, 0.05, "aspo")[order])


def test_clamps_are_symmetric_and_only_that_of_the_ratio_passes_a_gradient(generator):
    """T10."""
    estimator = FPO(small_policy(), FPOConfig(loss_clamp=1e-3))
    obs = random_obs(estimator.policy, 8, generator)
    _, trace = draw(estimator, obs, generator)
    trace["loss"] = trace["loss"] + 1.0  # the old loss differs, and both are above the cap
    log_ratio, _ = estimator.evaluate(obs, trace)
    assert torch.equal(log_ratio, torch.zeros(8, 8))
    log_ratio.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in estimator.parameters())
    estimator.config = FPOConfig(loss_clamp=0, log_ratio_clamp=0.5, reduction="sum")
    log_ratio, _ = estimator.evaluate(obs, trace)
    assert torch.allclose(log_ratio, torch.full((8, 8), 0.5))
    log_ratio.sum().backward()
    assert any(p.grad.any() for p in estimator.parameters())


@pytest.mark.parametrize("times", ["stratified", "uniform"])
@pytest.mark.parametrize("antithetic", [True, False])
def test_draws_are_unbiased_and_the_ratio_behaves_as_monte_carlo(times, antithetic, generator):
    """T11: the mean of the log-ratio does not depend on the number of draws or how they are made; variance falls."""
    policy = scalar_policy()
    reference = exact_log_ratio("velocity", (0.0, 0.2), (0.05, 0.2), 0.2)
    spread = {}
    for samples in (2, 16):
        config = FPOConfig(
            num_mc_samples=samples, times=times, antithetic=antithetic, t_min=0.0, reduction="sum"
        )
        estimator = FPO(policy, config)
        x_0, t = estimator.draw(20_000, generator)
        assert x_0.shape == (20_000, samples, 1, 1)
        losses = []
        for mean in (0.0, 0.05):
            policy.velocity_field = Denoiser(mean, 0.2)
            context = torch.zeros(20_000, 1)
            losses.append(
                estimator.losses(context, torch.full((20_000, 1, 1), 0.2), x_0, t).squeeze(-1)
            )
        log_ratio = losses[0] - losses[1]
        mean = log_ratio.mean(1)
        assert mean.mean().item() == pytest.approx(reference, abs=0.003)
        assert log_ratio.exp().mean() >= mean.exp().mean()  # Jensen
        spread[samples] = mean.var().item()
    if times == "uniform" and not antithetic:
        assert spread[2] / spread[16] == pytest.approx(8, rel=0.15)
    else:
        assert spread[2] / spread[16] > 8


def test_draws_have_the_distribution_they_say(generator):
    policy = scalar_policy()
    estimator = FPO(policy, FPOConfig(num_mc_samples=8, antithetic=True))
    x_0, t = estimator.draw(500, generator)
    assert torch.equal(x_0[:, :4], -x_0[:, 4:])
    assert torch.allclose(t[:, :4], 1 - t[:, 4:])
    strata = ((t - 0.005) / 0.99 * 8).floor().sort(dim=1).values
    assert torch.equal(strata, torch.arange(8.0).expand(500, 8))
    grid = FPO(policy, FPOConfig(times="grid", antithetic=False)).draw(500, generator)[1]
    assert set(grid.flatten().tolist()) == {0.0, 0.25, 0.5, 0.75}


def test_an_observation_is_encoded_once_whatever_the_number_of_draws(generator):
    """T13."""
    estimator = FPO(small_policy(), FPOConfig())
    obs = random_obs(estimator.policy, 5, generator)
    rows = []
    estimator.policy.velocity_field.from_obs.register_forward_hook(
        lambda module, given, out: rows.append(len(out))
    )
    _, trace = draw(estimator, obs, generator)
    estimator.evaluate(obs, trace)
    assert rows == [5, 5]


@pytest.mark.parametrize(
    "make", [lambda p: FPO(p, FPOConfig()), lambda p: Gaussian(p, GaussianConfig())]
)
def test_every_parameter_is_held_by_the_optimiser_once_and_gets_a_gradient(make, generator):
    estimator = make(small_policy())
    obs = random_obs(estimator.policy, 16, generator)
    _, trace = draw(estimator, obs, generator)
    log_ratio, _ = estimator.evaluate(obs, trace)
    log_ratio.square().sum().backward()  # at ratio one a square has no gradient ...
    estimator.zero_grad()
    log_ratio, _ = estimator.evaluate(obs, trace)
    (log_ratio * torch.randn(log_ratio.shape, generator=generator)).sum().backward()
    held = [p for group in estimator.parameter_groups(1e-3) for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in estimator.parameters()}
    assert len(held) == len({id(p) for p in held})
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in held)


def test_diagnostics_tell_the_loss_of_the_rollout_from_that_of_now(generator):
    """From a rollout without loss: what is there now is that of the draws, and beyond the clamp."""
    estimator = FPO(small_policy(), FPOConfig(reduction="sum", loss_clamp=1e-3))
    obs = random_obs(estimator.policy, 16, generator)
    _, trace = draw(estimator, obs, generator)
    before = {**trace, "loss": torch.zeros_like(trace["loss"])}
    numbers = estimator.diagnostics(obs, before)
    assert numbers["train/cfm_loss_before"] == 0
    now = trace["loss"][:, :, :4].sum(-1).mean().item()
    assert numbers["train/cfm_loss_after"] == pytest.approx(now, rel=1e-4)
    assert numbers["train/clamped_fraction"] == 1


@pytest.mark.parametrize(
    ("reduction", "expected"), [("sum", 4), ("sqrt", 4 / 8**0.5), ("mean", 0.5), ("joint_mean", 2)]
)
def test_losses_of_four_executed_actions_of_two_joints_are_reduced_as_named(reduction, expected):
    estimator = FPO(small_policy(), FPOConfig(reduction=reduction))
    loss, executed = torch.ones(3, 5, 6), (torch.arange(6) < 4).expand(3, -1)
    assert torch.allclose(estimator.reduce(loss, executed), torch.full((3, 5), float(expected)))


def test_what_is_executed_is_the_flow_and_its_noise_and_losses_have_noise_of_their_own(generator):
    for spread in (0.0, 0.1):
        config = FPOConfig(start_noise=0.0, action_noise=spread, antithetic=False)
        estimator = FPO(small_policy(action_low=(-9, -9), action_high=(9, 9)), config)
        policy = estimator.policy
        obs = random_obs(policy, 500, generator)
        chunk, trace = draw(estimator, obs, generator)
        with torch.no_grad():
            noise = policy.normalize_action(chunk - policy.sample(obs, torch.zeros(500, 6, 2)))
        assert noise.std().item() == pytest.approx(spread, rel=0.05, abs=1e-6)
        assert torch.equal(policy.denormalize_action(trace["x_1"]), chunk)
        assert trace["x_0"].std().item() == pytest.approx(1, rel=0.02)


def test_gaussian_ratio_is_that_of_its_density(generator):
    estimator = Gaussian(small_policy(), GaussianConfig())
    obs = random_obs(estimator.policy, 9, generator)
    _, trace = draw(estimator, obs, generator)
    log_ratio, entropy = estimator.evaluate(obs, trace)
    assert log_ratio.abs().max() < 1e-5
    with torch.no_grad():
        old_mean, old_std = estimator.mean_std(obs)
        for parameter in estimator.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
        mean, std = estimator.mean_std(obs)
    normal = torch.distributions.Normal
    change = normal(mean, std).log_prob(trace["x"]) - normal(old_mean, old_std).log_prob(trace["x"])
    log_ratio, _ = estimator.evaluate(obs, trace)
    assert torch.allclose(log_ratio, change[:, :4].sum((1, 2)), atol=1e-4)
    assert torch.allclose(entropy, normal(old_mean, old_std).entropy().mean((1, 2)))
    deployed = estimator.policy.sample(obs, torch.zeros(9, 6, 2))
    assert torch.allclose(estimator.policy.denormalize_action(mean), deployed, atol=1e-6)


@pytest.mark.parametrize(("ratio", "trust_region"), [("per_action", "ppo"), ("per_sample", "aspo")])
def test_fpo_keeps_both_modes_of_a_bandit(bimodal, ratio, trust_region):
    """R1: two thirds of the demonstrations are good; FPO makes it more and keeps either mode between 0.3 and 0.7."""
    estimator = FPO(copy.deepcopy(bimodal), FPOConfig(ratio, action_noise=0.05))
    good, right = two_mode_bandit(estimator, trust_region, clip_range=0.02)
    assert good > 0.82
    assert 0.3 < right < 0.7


def test_a_gaussian_picks_one_mode_of_a_bandit(bimodal):
    """The same start, reward and loop. Its mean begins between the modes."""
    estimator = Gaussian(copy.deepcopy(bimodal), GaussianConfig(sigma_min=0.05, sigma_max=2.0))
    good, right = two_mode_bandit(estimator, "ppo", clip_range=0.1)
    assert good > 0.6
    assert right < 0.02 or right > 0.98


@pytest.mark.parametrize(
    "make", [lambda p: FPO(p, FPOConfig()), lambda p: Gaussian(p, GaussianConfig())]
)
def test_moves_towards_what_is_good(make, generator):
    """A bandit over chunks: reward is nearness of the first action to (0.4, -0.8); the zero-noise chunk moves there."""
    estimator = make(small_policy(1))
    policy, goal = estimator.policy, torch.tensor([0.4, -0.8])
    optimizer = torch.optim.Adam(estimator.parameter_groups(3e-3))
    obs = random_obs(policy, 256, generator)

    def distance() -> float:
        with torch.no_grad():
            chunk = policy.sample(obs, torch.zeros(256, 6, 2))
        return (chunk[:, 0] - goal).norm(dim=-1).mean().item()

    before = distance()
    for _ in range(60):
        chunk, trace = draw(estimator, obs, generator)
        reward = -(chunk[:, 0] - goal).norm(dim=-1)
        advantage = (reward - reward.mean()) / reward.std()
        for _ in range(2):
            log_ratio, _ = estimator.evaluate(obs, trace)
            gradient_step(optimizer, surrogate_loss(log_ratio, advantage, 0.1), 1.0)
    assert distance() < 0.6 * before


def test_bad_settings_are_refused():
    for wrong in ({"num_mc_samples": 0}, {"num_mc_samples": 3}, {"t_min": 0.5}):
        with pytest.raises(InputError):
            FPOConfig(**wrong)
    with pytest.raises(InputError, match="score drift"):
        FPO(small_policy(score_drift=True), FPOConfig())
    with pytest.raises(KeyError):
        loss_weight("huber", torch.zeros(1))

"""The probability path against closed forms."""

import math

import pytest
import torch

from flow_policy_rl import flow


def exact_velocity(mean: torch.Tensor, std: torch.Tensor):
    """Marginal velocity of the straight path from N(0, 1) to N(mean, std^2), elementwise independent."""

    def velocity(x, t):
        t = t.unsqueeze(-1)
        variance = (1 - t) ** 2 + (t * std) ** 2
        x_1 = mean + t * std**2 / variance * (x - t * mean)
        x_0 = (1 - t) / variance * (x - t * mean)
        return x_1 - x_0

    return velocity


def log_density(x, t, means, stds, weights):
    """log p_t of a scalar Gaussian mixture carried along the path."""
    variance = (1 - t) ** 2 + (t * stds) ** 2
    terms = (
        torch.log(weights)
        - 0.5 * torch.log(2 * math.pi * variance)
        - 0.5 * (x[..., None] - t * means) ** 2 / variance
    )
    return torch.logsumexp(terms, -1)


def mixture_velocity(x, t, means, stds, weights):
    """E[x_1 - x_0 | x_t = x] of the same mixture."""
    variance = (1 - t) ** 2 + (t * stds) ** 2
    logits = (
        torch.log(weights)
        - 0.5 * torch.log(variance)
        - 0.5 * (x[..., None] - t * means) ** 2 / variance
    )
    share = torch.softmax(logits, -1)
    rest = x[..., None] - t * means
    return (share * (means + t * stds**2 / variance * rest - (1 - t) / variance * rest)).sum(-1)


@pytest.mark.parametrize("num_flow_steps", [1, 3, 4, 10])
def test_grid_is_k_over_K_and_never_one(num_flow_steps):
    grid = flow.time_grid(num_flow_steps, dtype=torch.float64)
    assert torch.equal(
        grid, torch.tensor([k / num_flow_steps for k in range(num_flow_steps)], dtype=torch.float64)
    )


def test_path_starts_at_noise_and_ends_at_action_with_constant_velocity(generator):
    x_0, x_1 = torch.randn(2, 5, 4, 3, generator=generator, dtype=torch.float64)
    t = torch.rand(5, 4, generator=generator, dtype=torch.float64)
    assert torch.equal(flow.interpolate(x_0, x_1, torch.zeros_like(t)), x_0)
    assert torch.equal(flow.interpolate(x_0, x_1, torch.ones_like(t)), x_1)
    step = 1e-6
    moved = (flow.interpolate(x_0, x_1, t + step) - flow.interpolate(x_0, x_1, t)) / step
    assert torch.allclose(moved, flow.velocity_target(x_0, x_1), atol=1e-8)


def test_the_velocity_towards_a_landing_point_lands_there_and_stays_finite(generator):
    x, landing = torch.randn(2, 5, 4, 3, generator=generator, dtype=torch.float64)
    t = 0.9 * torch.rand(5, 4, generator=generator, dtype=torch.float64)
    velocity = flow.velocity_towards(x, landing, t)
    torch.testing.assert_close(flow.landing_point(x, velocity, t), landing)
    at_the_end = flow.velocity_towards(x, landing, torch.ones_like(t))
    torch.testing.assert_close(at_the_end, 10 * (landing - x))


def test_each_action_of_a_chunk_has_its_own_time(generator):
    x_0, x_1 = torch.randn(2, 1, 3, 2, generator=generator)
    x_t = flow.interpolate(x_0, x_1, torch.tensor([[1.0, 0.5, 0.0]]))
    assert torch.equal(x_t[0, 0], x_1[0, 0])
    assert torch.allclose(x_t[0, 1], (x_0[0, 1] + x_1[0, 1]) / 2)
    assert torch.equal(x_t[0, 2], x_0[0, 2])


def test_flow_carries_noise_to_the_target_gaussian(generator):
    mean, std = torch.tensor([0.5, -1.0]), torch.tensor([0.3, 2.0])
    noise = torch.randn(20_000, 1, 2, generator=generator)
    x = flow.integrate(exact_velocity(mean, std), noise, num_flow_steps=200)
    assert torch.allclose(x.mean((0, 1)), mean, atol=0.03)
    assert torch.allclose(x.std((0, 1)), std, rtol=0.03)


@pytest.mark.parametrize(
    ("integrator", "order"), [("euler", 1), ("midpoint", 2), ("heun", 2), ("rk4", 4)]
)
def test_integrators_have_their_order(integrator, order):
    # x' = (1 + t^2) x has the solution x_0 exp(t + t^3 / 3).
    def velocity(x, t):
        return (1 + t**2).unsqueeze(-1) * x

    start = torch.full((1, 1, 1), 1.3, dtype=torch.float64)
    exact = start * math.exp(4 / 3)
    errors = [abs(float(flow.integrate(velocity, start, k, integrator) - exact)) for k in (16, 32)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize("t", [0.0, 0.1, 0.5, 0.9, 0.99])
def test_score_is_the_gradient_of_the_log_density(t):
    means, stds = torch.tensor([-1.0, 0.2, 2.0]).double(), torch.tensor([0.2, 0.5, 0.3]).double()
    weights = torch.tensor([0.3, 0.5, 0.2]).double()
    x = torch.linspace(-3, 3, 61, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(log_density(x, t, means, stds, weights).sum(), x)
    velocity = mixture_velocity(x, t, means, stds, weights)
    found = flow.score(
        x[:, None, None], velocity[:, None, None], torch.full((61, 1), t, dtype=torch.float64)
    )
    assert torch.allclose(found[:, 0, 0], expected, rtol=1e-6, atol=1e-8)


def test_score_drift_is_velocity_plus_alpha_times_score(generator):
    x, velocity = torch.randn(2, 7, 3, 2, generator=generator, dtype=torch.float64)
    t = torch.rand(7, 3, generator=generator, dtype=torch.float64) * 0.95
    gain = torch.rand(7, 3, 1, generator=generator, dtype=torch.float64)
    alpha = (1 - t).unsqueeze(-1) * gain
    expected = velocity + alpha * flow.score(x, velocity, t)
    assert torch.allclose(flow.score_drift(x, velocity, t, gain), expected, atol=1e-12)
    assert torch.isfinite(flow.score_drift(x, velocity, torch.ones_like(t), gain)).all()


def test_gaussian_log_prob_agrees_with_torch(generator):
    x, mean = torch.randn(2, 50, generator=generator)
    std = torch.rand(50, generator=generator) + 0.1
    expected = torch.distributions.Normal(mean, std).log_prob(x)
    assert torch.allclose(flow.gaussian_log_prob(x, mean, std), expected, atol=1e-5)


@pytest.mark.parametrize("num_flow_steps", [1, 4, 8])
def test_the_last_step_of_a_drift_leaves_its_share_of_the_noise(num_flow_steps):
    """Of a policy that knows its action: to first order gain / K of the noise, and nothing of zero noise."""
    noise, action = torch.randn(2, 3, 5, 2, dtype=torch.float64, generator=torch.manual_seed(0))
    gain = torch.tensor(1e-4, dtype=torch.float64)

    def velocity(x, t):
        to_action = (action - x) / (1 - t.unsqueeze(-1))
        return flow.score_drift(x, to_action, t, gain)

    left = flow.integrate(velocity, noise, num_flow_steps) - action
    torch.testing.assert_close(left, -gain / num_flow_steps * noise, rtol=1e-3, atol=1e-9)
    exact = flow.integrate(velocity, torch.zeros_like(noise), num_flow_steps)
    torch.testing.assert_close(exact, action)

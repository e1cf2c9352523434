"""The probability path and its integrators, written once. Everything that flows calls this file.

Convention: flow time t runs from 0 (noise) to 1 (action), on a straight line between the two (the conditional
optimal-transport path of Lipman et al., arXiv 2210.02747):

    x_t = (1 - t) x_0 + t x_1,   x_0 ~ N(0, I),   velocity target x_1 - x_0,   grid t_k = k / K, never 1.

Shapes: x (..., H, A); t (..., H), one flow time per action of the chunk, so that a known prefix of the chunk can sit at
t = 1 while the rest is still noise (training-time real-time chunking, arXiv 2512.05964). Plain
sampling uses one t for all.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

VelocityFn = Callable[[Tensor, Tensor], Tensor]  # (x (B, H, A), t (B, H)) -> (B, H, A)


def time_grid(num_flow_steps: int, device=None, dtype=torch.float32) -> Tensor:
    """Start of each step, (K,): 0, 1/K, ..., 1 - 1/K."""
    return torch.arange(num_flow_steps, device=device, dtype=dtype) / num_flow_steps


def interpolate(x_0: Tensor, x_1: Tensor, t: Tensor) -> Tensor:
    """x_t on the straight path."""
    t = t.unsqueeze(-1)
    return (1 - t) * x_0 + t * x_1


def velocity_target(x_0: Tensor, x_1: Tensor) -> Tensor:
    """Regression target of the velocity field."""
    return x_1 - x_0


def landing_point(x: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
    """Where a straight line from x_t would end: x_t + (1 - t) v, which is E[x_1 | x_t] for the marginal velocity."""
    return x + (1 - t.unsqueeze(-1)) * velocity


def velocity_towards(x: Tensor, landing: Tensor, t: Tensor, least: float = 0.1) -> Tensor:
    """The velocity that takes x_t to a landing point, the inverse of `landing_point`; 1 - t counts as at least `least`.

    The bound keeps the velocity finite where the action is nearly there (JiT, arXiv 2511.13720, has 0.05); Euler's last
    step arrives for up to 1 / least steps.
    """
    return (landing - x) / (1 - t.unsqueeze(-1)).clamp_min(least)


def score(x: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
    """Gradient of log p_t at x, from the marginal velocity: (t v - x) / (1 - t), for t < 1."""
    t = t.unsqueeze(-1)
    return (t * velocity - x) / (1 - t)


def score_drift(
    x: Tensor, velocity: Tensor, t: Tensor, gain: Tensor, score_velocity: Tensor | None = None
) -> Tensor:
    """v + alpha * score with alpha = (1 - t) * gain, in the form without a singularity: v + g (t v_score - x).

    ScoRe-Flow (arXiv 2604.10962) masks its drift coefficient with (1 - t); the mask cancels the score's 1 / (1 - t).
    The score belongs to the density that `score_velocity` carries, or else `velocity` itself.
    """
    t = t.unsqueeze(-1)
    return velocity + gain * (t * (velocity if score_velocity is None else score_velocity) - x)


def gaussian_log_prob(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Elementwise log N(x; mean, std)."""
    return -0.5 * ((x - mean) / std) ** 2 - torch.log(std) - 0.5 * math.log(2 * math.pi)


# --- fixed-step integrators: (stages in order) at times k/K, with K steps of 1/K ---


def integrate(
    velocity: VelocityFn, noise: Tensor, num_flow_steps: int, integrator: str = "euler"
) -> Tensor:
    """Carry noise (B, H, A) from t = 0 to t = 1 along a velocity, in K equal steps.

    Orders of accuracy: euler 1, midpoint 2, heun 2, rk4 4. The higher ones ask for the velocity at t = 1.
    """
    step = INTEGRATORS[integrator]
    x, dt = noise, 1.0 / num_flow_steps
    for t_k in time_grid(num_flow_steps, device="cpu").tolist():
        x = step(velocity, x, t_k, dt)
    return x


def euler_chain(velocity: VelocityFn, noise: Tensor, num_flow_steps: int) -> Tensor:
    """Every state of the Euler integration, (K + 1, B, H, A): the noise first, what `integrate` returns last."""
    chain = [noise]
    for t_k in time_grid(num_flow_steps, device="cpu").tolist():
        chain.append(_euler(velocity, chain[-1], t_k, 1.0 / num_flow_steps))
    return torch.stack(chain)


def _at(x: Tensor, t: float) -> Tensor:
    # One row for all: it broadcasts, and an exported graph keeps everything that follows from it as a constant.
    return torch.full((1, x.shape[1]), t, dtype=x.dtype, device=x.device)


def _euler(f: VelocityFn, x: Tensor, t: float, dt: float) -> Tensor:
    return x + dt * f(x, _at(x, t))


def _midpoint(f: VelocityFn, x: Tensor, t: float, dt: float) -> Tensor:
    half = x + 0.5 * dt * f(x, _at(x, t))
    return x + dt * f(half, _at(x, t + 0.5 * dt))


def _heun(f: VelocityFn, x: Tensor, t: float, dt: float) -> Tensor:
    first = f(x, _at(x, t))
    return x + 0.5 * dt * (first + f(x + dt * first, _at(x, t + dt)))


def _rk4(f: VelocityFn, x: Tensor, t: float, dt: float) -> Tensor:
    a = f(x, _at(x, t))
    b = f(x + 0.5 * dt * a, _at(x, t + 0.5 * dt))
    c = f(x + 0.5 * dt * b, _at(x, t + 0.5 * dt))
    d = f(x + dt * c, _at(x, t + dt))
    return x + dt / 6 * (a + 2 * b + 2 * c + d)


INTEGRATORS = {"euler": _euler, "midpoint": _midpoint, "heun": _heun, "rk4": _rk4}
STAGES = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4}  # velocities asked for in one step

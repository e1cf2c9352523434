"""The networks: a velocity field, a value function, and what they are made of."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

TIME_FEATURES = 8


def time_features(t: Tensor) -> Tensor:
    """Sines and cosines of the flow time, (...,) -> (..., 8): half a period to four periods over [0, 1]."""
    frequency = math.pi * 2.0 ** torch.arange(TIME_FEATURES // 2, dtype=t.dtype, device=t.device)
    angle = t.unsqueeze(-1) * frequency
    return torch.cat([torch.sin(angle), torch.cos(angle)], dim=-1)


class ResidualMLP(nn.Module):
    """`depth` residual blocks of one hidden layer each: h + W silu(norm(h))."""

    def __init__(self, width: int, depth: int, layer_norm: bool = False):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        norm = nn.LayerNorm if layer_norm else nn.Identity
        self.norms = nn.ModuleList(norm(width) for _ in range(depth))

    def forward(self, h: Tensor) -> Tensor:
        """(..., width) -> (..., width)."""
        for layer, norm in zip(self.layers, self.norms, strict=True):
            h = h + layer(nn.functional.silu(norm(h)))
        return h


class VelocityField(nn.Module):
    """v(x_t, t, obs embedding): an MLP on the flattened chunk, with one flow time per action.

    The first layer is a sum of three linear maps, so the part that depends on the observation alone is computed once
    per chunk, and the part that depends on the time grid alone is a constant of an exported graph.
    """

    def __init__(self, obs_dim: int, action_horizon: int, num_joints: int, width: int, depth: int):
        super().__init__()
        self.shape = (action_horizon, num_joints)
        self.from_obs = nn.Linear(obs_dim, width)
        self.from_chunk = nn.Linear(action_horizon * num_joints, width, bias=False)
        self.from_time = nn.Linear(action_horizon * TIME_FEATURES, width, bias=False)
        self.trunk = ResidualMLP(width, depth - 1)
        self.head = nn.Linear(width, action_horizon * num_joints)

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """x (B, H, A), t (B, H), context (B, width) from `from_obs` -> velocity (B, H, A)."""
        h = context + self.from_chunk(x.flatten(1)) + self.from_time(time_features(t).flatten(1))
        return self.head(nn.functional.silu(self.trunk(h))).unflatten(1, self.shape)


class ObservationNormalizer(nn.Module):
    """Puts the fields of an observation side by side, each number to zero mean and unit spread."""

    def __init__(self, fields: Mapping[str, int]):
        super().__init__()
        self.fields = dict(fields)
        total = sum(self.fields.values())
        self.register_buffer("mean", torch.zeros(total))
        self.register_buffer("std", torch.ones(total))

    @torch.no_grad()
    def fit(self, obs: Mapping[str, Tensor], min_std: float = 1e-2) -> None:
        """Take mean and spread from data, {name: (n, size)}; a spread below `min_std` counts as `min_std`."""
        flat = torch.cat([obs[name] for name in self.fields], dim=-1)
        self.mean.copy_(flat.mean(0))
        self.std.copy_(flat.std(0).clamp_min(min_std))

    def forward(self, obs: Mapping[str, Tensor]) -> Tensor:
        """{name: (B, size)} -> (B, O)."""
        return (torch.cat([obs[name] for name in self.fields], dim=-1) - self.mean) / self.std


class ValueFunction(nn.Module):
    """V(obs), on the policy's own normalised observation."""

    def __init__(self, obs_dim: int, width: int, depth: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(obs_dim, width), ResidualMLP(width, depth - 1), nn.SiLU(), nn.Linear(width, 1)
        )

    def forward(self, features: Tensor) -> Tensor:
        """(..., O) -> (...)."""
        return self.net(features).squeeze(-1)

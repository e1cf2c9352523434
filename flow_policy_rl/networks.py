"""The networks: a velocity field, a value function, and what they are made of."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from flow_policy_rl import flow

TIME_FEATURES = 8


def time_features(t: Tensor) -> Tensor:
    """Sines and cosines of the flow time, (...,) -> (..., 8): half a period to four periods over [0, 1]."""
    frequency = math.pi * 2.0 ** torch.arange(TIME_FEATURES // 2, dtype=t.dtype, device=t.device)
    angle = t.unsqueeze(-1) * frequency
    return torch.cat([torch.sin(angle), torch.cos(angle)], dim=-1)


class ResidualMLP(nn.Module):
    """`depth` residual blocks of one hidden layer each: h + W silu(h)."""

    def __init__(self, width: int, depth: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, h: Tensor) -> Tensor:
        """(..., width) -> (..., width)."""
        for layer in self.layers:
            h = h + layer(nn.functional.silu(h))
        return h


class VelocityField(nn.Module):
    """v(x_t, t, obs embedding): an MLP on the flattened chunk, with one flow time per action.

    Args:
        predicts: `velocity`, or `chunk`: the network gives the clean chunk, from which the velocity follows. A velocity
            holds the noise that is in x_t, and an MLP spends its width on passing that on; a chunk does not.

    The first layer is a sum of three linear maps, so the part that depends on the observation alone is computed once
    per chunk, and the part that depends on the time grid alone is a constant of an exported graph.
    """

    def __init__(
        self,
        obs_dim: int,
        action_horizon: int,
        num_joints: int,
        width: int,
        depth: int,
        predicts: str = "velocity",
    ):
        super().__init__()
        self.shape = (action_horizon, num_joints)
        self.predicts = predicts
        self.from_obs = nn.Linear(obs_dim, width)
        self.from_chunk = nn.Linear(action_horizon * num_joints, width, bias=False)
        self.from_time = nn.Linear(action_horizon * TIME_FEATURES, width, bias=False)
        self.trunk = ResidualMLP(width, depth - 1)
        self.head = nn.Linear(width, action_horizon * num_joints)

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """x (B, H, A), t (B, H), context (B, width) from `from_obs` -> velocity (B, H, A)."""
        # In this order the last addition is part of the matrix product in an exported graph.
        h = context + self.from_time(time_features(t).flatten(1))
        h = self.from_chunk(x.flatten(1)) + h
        out = self.head(nn.functional.silu(self.trunk(h))).unflatten(1, self.shape)
        return flow.velocity_towards(x, out, t) if self.predicts == "chunk" else out


class ImageEncoder(nn.Module):
    """Where things are in an image: 32 keypoints, each the centre of mass of one feature map (spatial softmax).

    Three small convolutions and the expected position of each map (Levine et al., arXiv 1504.00702), which localises
    an object to a fraction of a cell with few weights and data. Takes uint8 RGB as a camera gives it: a picture of
    another size is cropped about its middle to the right shape and resized, and scaling to [-1, 1] is part of it.
    """

    def __init__(self, resolution: tuple[int, int], keypoints: int = 32):
        super().__init__()
        self.resolution = resolution
        self.keypoints = keypoints
        self.convolutions = nn.Sequential(
            nn.Conv2d(3, 32, 6, stride=3, padding=2),
            nn.SiLU(),
            nn.Conv2d(32, 32, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(32, keypoints, 3, padding=1),
        )
        with torch.no_grad():
            height, width = self.convolutions(torch.zeros(1, 3, *resolution)).shape[-2:]
        rows = torch.linspace(-1, 1, height).repeat_interleave(width)
        columns = torch.linspace(-1, 1, width).repeat(height)
        self.register_buffer("positions", torch.stack([columns, rows], dim=-1), persistent=False)

    @property
    def size(self) -> int:
        """Numbers that come out."""
        return 2 * self.keypoints

    def forward(self, image: Tensor) -> Tensor:
        """(B, height, width, 3) uint8 -> (B, 2 * keypoints) in [-1, 1]."""
        x = fit(image.permute(0, 3, 1, 2).float(), self.resolution) / 127.5 - 1
        attention = self.convolutions(x).flatten(2).softmax(dim=-1)  # (B, keypoints, cells)
        return (attention @ self.positions).flatten(1)


def fit(image: Tensor, resolution: tuple[int, int]) -> Tensor:
    """Crop (B, C, h, w) about its middle to the shape of `resolution`, then resize; nothing where it fits already."""
    height, width = resolution
    have_h, have_w = image.shape[-2:]
    if (have_h, have_w) == (height, width):
        return image
    scale = min(have_h / height, have_w / width)
    crop_h, crop_w = round(height * scale), round(width * scale)
    top, left = (have_h - crop_h) // 2, (have_w - crop_w) // 2
    cropped = image[..., top : top + crop_h, left : left + crop_w]
    return nn.functional.interpolate(
        cropped, size=resolution, mode="bilinear", align_corners=False, antialias=True
    )


def random_shift(image: Tensor, pixels: int, generator: torch.Generator) -> Tensor:
    """Pictures (B, height, width, 3), each moved by up to so many pixels in both directions, edges repeated.

    The augmentation of DrQ (arXiv 2004.13649). Whole pixels, so that what comes out is again what a camera gives.
    """
    count, height, width = image.shape[:3]
    shift = torch.randint(
        -pixels, pixels + 1, (2, count, 1), generator=generator, device=generator.device
    ).to(image.device)
    rows = (torch.arange(height, device=image.device) + shift[0]).clamp(0, height - 1)
    columns = (torch.arange(width, device=image.device) + shift[1]).clamp(0, width - 1)
    each = torch.arange(count, device=image.device)[:, None, None]
    return image[each, rows[:, :, None], columns[:, None, :]]


def shift_images(
    obs: Mapping[str, Tensor], names: Iterable[str], pixels: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """An observation whose images are moved at random; the same numbers where `pixels` is 0."""
    moved = {n: random_shift(obs[n], pixels, generator) for n in names} if pixels else {}
    return {**obs, **moved}


ENCODERS = {"keypoints": ImageEncoder}


class ObservationNormalizer(nn.Module):
    """Puts the fields of an observation side by side, each number to zero mean and unit spread, held to a limit.

    What demonstrations hardly vary has a tiny spread: a cube that is knocked over in RL stands 50 spreads off, and
    the likelihood ratio of that one chunk ended whole updates (docs/log.md).
    """

    limit = 10.0  # spreads; the usual bound, e.g. of Stable-Baselines3's VecNormalize

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
        flat = torch.cat([obs[name] for name in self.fields], dim=-1)
        return ((flat - self.mean) / self.std).clamp(-self.limit, self.limit)


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


def bounded_std(z: Tensor, minimum: float, maximum: float | Tensor) -> Tensor:
    """A standard deviation between two bounds, squashed in log space; z = 0 gives their geometric mean."""
    low, high = math.log(minimum), torch.as_tensor(maximum, device=z.device).log()
    return torch.exp(low + (high - low) * (torch.tanh(z) + 1) / 2)


class CriticEnsemble(nn.Module):
    """Q_e(features, action) of E members at once: every layer is one batched matrix product.

    The first layer is a sum of two linear maps, so that the part of the features is computed once for
    many actions. Each hidden layer may be layer-normalised.
    """

    def __init__(
        self,
        feature_dim: int,
        action_dim: int,
        num_critics: int,
        width: int,
        depth: int,
        layer_norm: bool = False,
        init_std: float | None = None,
    ):
        super().__init__()
        self.num_critics, self.layer_norm = num_critics, layer_norm
        fan_in = feature_dim + action_dim
        self.from_features = self._weights(feature_dim, width, fan_in, init_std)
        self.from_action = self._weights(action_dim, width, fan_in, init_std)
        self.hidden = nn.ParameterList(
            self._weights(width, width, width, init_std) for _ in range(depth - 1)
        )
        self.biases = nn.ParameterList(torch.zeros(num_critics, 1, width) for _ in range(depth))
        self.head = self._weights(width, 1, width, init_std)
        self.head_bias = nn.Parameter(torch.zeros(num_critics, 1, 1))

    def _weights(self, inputs: int, outputs: int, fan_in: int, std: float | None) -> nn.Parameter:
        """(E, inputs, outputs), normal with the given spread, else 1 / sqrt(fan_in)."""
        scale = fan_in**-0.5 if std is None else std
        return nn.Parameter(scale * torch.randn(self.num_critics, inputs, outputs))

    def embed(self, features: Tensor) -> Tensor:
        """Features (B, F), or (E, B, F) where members see different ones -> (E, B, width)."""
        return torch.matmul(features, self.from_features) + self.biases[0]

    def forward(self, context: Tensor, action: Tensor) -> Tensor:
        """Context (E, B, width) from `embed`, action (B * R, D) or (E, B * R, D) -> Q (E, B * R).

        R actions per observation, one after the other.
        """
        h = torch.matmul(action, self.from_action).unflatten(1, (context.shape[1], -1))
        h = self._activate((h + context.unsqueeze(2)).flatten(1, 2))
        for weight, bias in zip(self.hidden, list(self.biases)[1:], strict=True):
            h = self._activate(torch.baddbmm(bias, h, weight))
        return torch.baddbmm(self.head_bias, h, self.head).squeeze(-1)

    def _activate(self, h: Tensor) -> Tensor:
        if self.layer_norm:
            h = nn.functional.layer_norm(h, h.shape[-1:])
        return nn.functional.silu(h)

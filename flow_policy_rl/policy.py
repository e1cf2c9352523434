"""`FlowPolicy`: raw SI observations in, a chunk of joint targets in SI units out. Normalisation is part of it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from flow_policy_rl import flow, plugins
from flow_policy_rl.errors import COUNT, check_settings
from flow_policy_rl.networks import ENCODERS, ObservationNormalizer, VelocityField
from flow_policy_rl.spec import PolicySpec

# Field name -> (B, size) raw SI units, or (B, height, width, 3) uint8. What goes with an observation travels in it:
# `prefix` (B, P, A) physical and `inference_delay` (B,) int64, actions under way that the chunk must start with;
# `features` (B, F) in place of the fields, where somebody has computed them already.
Obs = Mapping[str, Tensor]


@dataclass(frozen=True)
class NetworkConfig:
    """Size of the velocity field.

    Attributes:
        width: hidden units per layer.
        depth: hidden layers.
        predicts: `velocity`, or `chunk`: the network gives the clean chunk and the velocity follows. The better one for
            imitation; a policy that learns from scratch needs `velocity`, whose first samples are as wide as the noise.
        encoder: what images go through: `keypoints`, or an encoder of another package.
        score_drift: the policy has a score drift (ScoRe-Flow), which is then part of sampling and export.
        base_score: the drift follows the score of a frozen base policy, whose field is then part of it too.
    """

    width: int = 256
    depth: int = 3
    predicts: Literal["velocity", "chunk"] = "velocity"
    encoder: str = "keypoints"
    score_drift: bool = False
    base_score: bool = False

    def __post_init__(self):
        check_settings(self, "network", COUNT, "width", "depth")


class DriftGain(nn.Module):
    """g(t) >= 0, the coefficient of the score drift, (..., H) -> (..., H, 1).

    The AlphaNet of ScoRe-Flow's released code: 1-16-16-1 with SiLU and softplus, starting at softplus(-2) = 0.127 for
    every t.
    """

    def __init__(self, width: int = 16, initial_bias: float = -2.0):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1)
        )
        nn.init.zeros_(self.net[-1].weight)
        nn.init.constant_(self.net[-1].bias, initial_bias)

    @torch.no_grad()
    def hold(self, gain: float) -> None:
        """Make it a constant that is not trained."""
        self.net[-1].weight.zero_()
        self.net[-1].bias.fill_(math.log(math.expm1(gain)))
        self.requires_grad_(False)

    def holds(self, gain: float) -> bool:
        """Whether it is that constant."""
        level = math.log(math.expm1(gain))
        constant = not self.net[-1].weight.any()
        return constant and math.isclose(self.net[-1].bias.item(), level, rel_tol=1e-6)

    def forward(self, t: Tensor) -> Tensor:
        return nn.functional.softplus(self.net(t.unsqueeze(-1)))


class FlowPolicy(nn.Module):
    """A flow-matching policy over action chunks.

    Inside, actions are scaled so that [low, high] of the training data becomes [-1, 1]; noise, x_t and velocities live
    there. `action_chunk` is physical and held to the limits of the spec.
    """

    def __init__(self, spec: PolicySpec, network: NetworkConfig):
        super().__init__()
        self.spec = spec
        self.network = network
        self.normalizer = ObservationNormalizer(
            {f.name: f.size for f in spec.observations if f.kind != "image"}
        )
        images = [f for f in spec.observations if f.kind == "image"]
        encoder = plugins.find("encoders", network.encoder, ENCODERS) if images else None
        self.encoders = nn.ModuleDict({f.name: encoder(f.resolution) for f in images})
        size = (
            self.num_features,
            spec.action_horizon,
            spec.num_joints,
            network.width,
            network.depth,
            network.predicts,
        )
        self.velocity_field = VelocityField(*size)
        self.base_field = VelocityField(*size).requires_grad_(False) if network.base_score else None
        self.drift_gain = DriftGain() if network.score_drift else None
        for name, value in {"action_low": spec.action_low, "action_high": spec.action_high}.items():
            self.register_buffer(name, torch.tensor(value, dtype=torch.float32))
        self.register_buffer("action_center", (self.action_low + self.action_high) / 2)
        self.register_buffer("action_scale", (self.action_high - self.action_low) / 2)

    @property
    def chunk_shape(self) -> tuple[int, int]:
        """(H, A)."""
        return self.velocity_field.shape

    @torch.no_grad()
    def fit_action_range(self, actions: Tensor, min_scale: float = 1e-3) -> None:
        """Scale actions by the range seen in data (n, A)."""
        low, high = actions.amin(0), actions.amax(0)
        self.action_center.copy_((low + high) / 2)
        self.action_scale.copy_(((high - low) / 2).clamp_min(min_scale))

    def normalize_action(self, action_chunk: Tensor) -> Tensor:
        """Physical (..., A) -> normalised."""
        return (action_chunk - self.action_center) / self.action_scale

    def denormalize_action(self, x: Tensor) -> Tensor:
        """Normalised (..., A) -> physical, within the limits of the spec."""
        physical = x * self.action_scale + self.action_center
        return torch.clamp(physical, self.action_low, self.action_high)

    @property
    def num_features(self) -> int:
        """F, numbers that an observation comes to."""
        return len(self.normalizer.mean) + sum(e.size for e in self.encoders.values())

    def features(self, obs: Obs) -> Tensor:
        """Normalised fields and encoded images side by side, (B, F): what policy and critics are functions of."""
        if "features" in obs:
            return obs["features"]
        parts = [self.normalizer(obs)] if self.normalizer.fields else []
        return torch.cat([*parts, *(e(obs[name]) for name, e in self.encoders.items())], dim=-1)

    def embed(self, obs: Obs) -> Tensor:
        """What the flow needs to know of an observation, computed once per chunk, (B, width or twice that)."""
        return self.context(self.features(obs))

    def context(self, features: Tensor) -> Tensor:
        """The same from the features (B, F)."""
        context = self.velocity_field.from_obs(features)
        if self.base_field is None:
            return context
        return torch.cat([context, self.base_field.from_obs(features)], dim=-1)

    def velocities(self, x: Tensor, t: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """(B, H, A) each: of the velocity field, and of the field whose score the drift follows."""
        if self.base_field is None:
            velocity = self.velocity_field(x, t, context)
            return velocity, velocity
        own, base = context.chunk(2, dim=-1)
        return self.velocity_field(x, t, own), self.base_field(x, t, base)

    def velocity(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """(B, H, A): the velocity field, with the score drift where the policy was trained with one."""
        velocity, score_velocity = self.velocities(x, t, context)
        if self.drift_gain is None:
            return velocity
        return flow.score_drift(x, velocity, t, self.drift_gain(t), score_velocity)

    def sample(
        self,
        obs: Obs,
        noise: Tensor,
        num_flow_steps: int | None = None,
        integrator: str | None = None,
    ) -> Tensor:
        """Action chunk (B, H, A) in physical units from noise (B, H, A). Deterministic.

        With `prefix` and `inference_delay` in the observation the first `inference_delay` actions are those of the
        prefix, bit for bit, and the rest continues them.
        """
        known, prefix = self.known_actions(obs)
        x = self.carry(noise, self.embed(obs), known, prefix, num_flow_steps, integrator)
        return self.finish(x, known, prefix)

    @torch.no_grad()
    def act(self, obs: Mapping[str, np.ndarray], noise: np.ndarray) -> np.ndarray:
        """The same for numpy arrays of any precision."""
        device = self.action_low.device
        return (
            self.sample(to_tensors(obs, device), torch.as_tensor(noise, device=device))
            .cpu()
            .numpy()
        )

    def finish(self, x: Tensor, known: Tensor | None, prefix: Tensor | None) -> Tensor:
        """Normalised chunk at flow time 1 -> physical chunk, known actions bit for bit."""
        chunk = self.denormalize_action(x)
        return chunk if known is None else torch.where(known.unsqueeze(-1), prefix, chunk)

    def carry(
        self,
        noise: Tensor,
        context: Tensor,
        known: Tensor | None = None,
        prefix: Tensor | None = None,
        num_flow_steps: int | None = None,
        integrator: str | None = None,
    ) -> Tensor:
        """Noise to a normalised chunk, (B, H, A), along the velocity; `known` and `prefix` from `known_actions`."""
        return flow.integrate(
            lambda x, t: self.velocity(*self.hold(x, t, known, prefix), context),
            noise,
            num_flow_steps or self.spec.num_flow_steps,
            integrator or self.spec.integrator,
        )

    def hold(
        self, x: Tensor, t: Tensor, known: Tensor | None, prefix: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """x (B, H, A) with the known actions in place, and t (B, H) with theirs at 1."""
        if known is None:
            return x, t
        x = torch.where(known.unsqueeze(-1), self.normalize_action(prefix), x)
        return x, torch.where(known, 1.0, t)

    def known_actions(self, obs: Obs) -> tuple[Tensor | None, Tensor | None]:
        """Which actions of the chunk are given, (B, H) bool, and their values, (B, H, A) physical; or neither.

        Known actions sit at flow time 1 while the others are integrated (arXiv 2512.05964).
        """
        if "prefix" not in obs:
            return None, None
        prefix, delay = obs["prefix"], obs["inference_delay"]
        horizon = self.spec.action_horizon
        known = torch.arange(horizon, device=delay.device) < delay.unsqueeze(-1)
        return known, nn.functional.pad(prefix, (0, 0, 0, horizon - prefix.shape[1]))


def to_tensors(
    obs: Mapping[str, np.ndarray], device: torch.device | None = None
) -> dict[str, Tensor]:
    """Simulation observation (float64 numpy) to policy input (float32 torch). Images and counts stay integers."""
    return {
        name: torch.as_tensor(
            values, dtype=torch.float32 if values.dtype.kind == "f" else None, device=device
        )
        for name, values in obs.items()
    }

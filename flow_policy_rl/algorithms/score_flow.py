"""ScoRe-Flow (arXiv 2604.10962): the flow as a chain of Gaussian transitions with a score drift, trained by PPO.

    mean_k = x_k + dt * [ (1 + g t_k) v - g x_k ]     that is v + alpha * score, alpha = (1 - t) g
    x_{k+1} = mean_k + sigma_k * eps,  eps ~ N(0, I),  k = 0 .. K - 1,  dt = 1 / K,  t_k = k / K

sigma is the standard deviation of the step itself (no sqrt(dt)), from a learned head with bounds.
The likelihood of a chunk is that of its chain, exact for any K. With g = 0 this is ReinFlow (arXiv
2505.22094). The robot runs the means.

Deviations from the released code, each for a reason:
- The drift has no singularity, so no epsilon and no clamp of the score are needed.
- No clamp of means, of the noise or of the log-probability: they kill gradients and make the
  density wrong. Actions are held to their limits on the way to the robot, outside the chain.
- The gain is a parameter of the policy, hence in the optimiser, the checkpoint and the exported
  graph, for every task.
- The ratio is that of the joint density of what was executed. Actions of the chunk that are never
  executed drop out of the last transition (nothing depends on them any more); `per_dim_mean` gives
  the authors' normalisation instead.
- Time limits bootstrap; no sample duplication; K is folded into the batch.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from flow_policy_rl import flow
from flow_policy_rl.networks import time_features
from flow_policy_rl.policy import FlowPolicy, Obs


@dataclass(frozen=True)
class ScoreFlowConfig:
    """The transition kernel.

    Attributes:
        sigma_min, sigma_max: bounds of the step's standard deviation, in normalised action units.
        drift: `learned` (ScoRe-Flow) or `none` (ReinFlow).
        start_noise: scale of x_0 in rollouts. 1 is the published method; 0 starts every rollout where a
            policy deployed with zero noise starts, which is what evaluation then measures.
        head_learning_rate: of the noise head and the drift gain. They start from nothing, so they need
            more than the pre-trained field.
        likelihood: `joint` density of the executed chain, or its `per_dim_mean` as in the released code.
    """

    sigma_min: float = 0.05
    sigma_max: float = 0.12
    drift: Literal["learned", "none"] = "learned"
    start_noise: float = 1.0
    head_learning_rate: float = 3e-4
    likelihood: Literal["joint", "per_dim_mean"] = "joint"


class NoiseHead(nn.Module):
    """sigma(t, obs) per action element, squashed between two bounds in log space; starts at their geometric mean."""

    def __init__(self, context_dim: int, elements: int, config: ScoreFlowConfig, width: int = 64):
        super().__init__()
        self.low, self.high = math.log(config.sigma_min), math.log(config.sigma_max)
        self.net = nn.Sequential(
            nn.Linear(time_features(torch.zeros(1)).shape[-1] + context_dim, width),
            nn.Tanh(),
            nn.Linear(width, elements),
        )
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def forward(self, t: Tensor, context: Tensor) -> Tensor:
        """t (B,), context (B, C) -> sigma (B, elements)."""
        z = self.net(torch.cat([time_features(t), context], dim=-1))
        return torch.exp(self.low + (self.high - self.low) * (torch.tanh(z) + 1) / 2)


class ScoreFlow(nn.Module):
    """Ratio estimator of ScoRe-Flow: holds the policy it trains and the noise head it trains it with."""

    def __init__(self, policy: FlowPolicy, config: ScoreFlowConfig):
        super().__init__()
        self.policy, self.config = policy, config
        self.num_flow_steps = policy.spec.num_flow_steps
        horizon, joints = policy.chunk_shape
        self.noise_head = NoiseHead(policy.num_features, horizon * joints, config)
        self.register_buffer("grid", flow.time_grid(self.num_flow_steps))
        executed = (torch.arange(horizon) < policy.spec.execute_horizon).float()
        counted = torch.ones(self.num_flow_steps, horizon, joints)
        counted[-1] *= executed[:, None]
        self.register_buffer(
            "counted", counted
        )  # (K, H, A): what of the chain the executed actions depend on

    def parameter_groups(self, learning_rate: float) -> list[dict]:
        """For the optimiser: the field at the given rate, the new heads at their own."""
        field = list(self.policy.velocity_field.parameters())
        heads = [*self.noise_head.parameters()]
        if self.policy.drift_gain is not None:
            heads += self.policy.drift_gain.parameters()
        return [
            {"params": field, "lr": learning_rate},
            {"params": heads, "lr": self.config.head_learning_rate},
        ]

    def mean_std(
        self, x: Tensor, t: Tensor, context: Tensor, features: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The transition kernel, for sampling, likelihood and entropy alike.

        Args:
            x: (B, H, A). t: (B,). context: (B, width) from the policy's `embed`. features: (B, O) normalised obs.
        """
        velocity = self.policy.velocity(x, t[:, None].expand(x.shape[:2]), context)
        return x + velocity / self.num_flow_steps, self.noise_head(t, features).view_as(x)

    @torch.no_grad()
    def sample(self, obs: Obs, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Draw a chain; the chunk is its end, the trace its states (B, K + 1, H, A) and its log-probability."""
        features = self.policy.features(obs)
        context = self.policy.velocity_field.from_obs(features)
        shape = (len(features), *self.policy.chunk_shape)
        x = self.config.start_noise * torch.randn(shape, generator=generator)
        chain, log_prob = [x], 0.0
        for k, t in enumerate(self.grid):
            mean, std = self.mean_std(x, t.expand(len(x)), context, features)
            x = mean + std * torch.randn(x.shape, generator=generator)
            chain.append(x)
            log_prob = log_prob + (flow.gaussian_log_prob(x, mean, std) * self.counted[k]).sum(
                dim=(1, 2)
            )
        return self.policy.denormalize_action(x), {
            "chain": torch.stack(chain, 1),
            "log_prob": log_prob,
        }

    def evaluate(self, obs: Obs, trace: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Log-ratio (B,) of a chain under the present weights, and the chain's entropy per element (B,)."""
        chain, steps = trace["chain"], self.num_flow_steps
        features = self.policy.features(obs)
        context = self.policy.velocity_field.from_obs(features)
        x, x_next = chain[:, :-1].flatten(0, 1), chain[:, 1:].flatten(0, 1)  # (B * K, H, A)
        t = self.grid.repeat(len(chain))
        mean, std = self.mean_std(
            x, t, context.repeat_interleave(steps, 0), features.repeat_interleave(steps, 0)
        )
        log_prob = (
            flow.gaussian_log_prob(x_next, mean, std).unflatten(0, (-1, steps)) * self.counted
        )
        log_ratio = log_prob.sum(dim=(1, 2, 3)) - trace["log_prob"]
        if self.config.likelihood == "per_dim_mean":
            log_ratio = log_ratio / ((steps + 1) * self.counted[0].numel())
        entropy = torch.log(std).mean(dim=(1, 2)).unflatten(0, (-1, steps)).mean(1)
        return log_ratio, entropy + 0.5 * math.log(2 * math.pi * math.e)

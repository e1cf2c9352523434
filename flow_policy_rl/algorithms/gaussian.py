"""Gaussian PPO, the control experiment: the same loop and the same network, without a distribution over modes.

    chunk = flow(0, obs) + sigma * eps,   eps ~ N(0, I),   sigma learned per action and joint

The mean is the chunk that the flow reaches from zero noise, which is what a deployed policy runs, so
a pre-trained flow policy is a starting point and the result is exported like any other. With one flow step
it is the ordinary Gaussian policy on the same MLP. Gradients run through all K flow steps.

Deviation from common Gaussian PPO: sigma is held between bounds, in log space, as ScoRe-Flow's is.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flow_policy_rl import distributed, flow
from flow_policy_rl.errors import POSITIVE, InputError, check_settings
from flow_policy_rl.networks import bounded_std
from flow_policy_rl.policy import FlowPolicy, Obs


@dataclass(frozen=True)
class GaussianConfig:
    """The Gaussian around the zero-noise chunk.

    Attributes:
        sigma_min: lower bound of its standard deviation, in normalised action units.
        sigma_max: upper bound; it starts at the geometric mean of the two.
        sigma_learning_rate: of the standard deviation.
    """

    sigma_min: float = 0.03
    sigma_max: float = 0.08
    sigma_learning_rate: float = 1e-3

    def __post_init__(self):
        check_settings(self, "gaussian", POSITIVE, "sigma_min", "sigma_max", "sigma_learning_rate")
        if self.sigma_min > self.sigma_max:
            raise InputError(
                f"gaussian: need sigma_min <= sigma_max, not {self.sigma_min} and {self.sigma_max}"
            )


class Gaussian(nn.Module):
    """Ratio estimator of a Gaussian policy over chunks."""

    def __init__(self, policy: FlowPolicy, config: GaussianConfig):
        super().__init__()
        self.policy, self.config = policy, config
        self.squashed_std = nn.Parameter(torch.zeros(policy.chunk_shape))

    def parameter_groups(self, learning_rate: float) -> list[dict]:
        """For the optimiser: the field at the given rate, sigma at its own."""
        return [
            {"params": list(self.policy.parameters()), "lr": learning_rate},
            {"params": [self.squashed_std], "lr": self.config.sigma_learning_rate},
        ]

    def mean_std(self, obs: Obs) -> tuple[Tensor, Tensor]:
        """Normalised zero-noise chunk (B, H, A), and sigma (H, A)."""
        policy = self.policy
        context = policy.embed(obs)
        noise = context.new_zeros(len(context), *policy.chunk_shape)
        mean = policy.carry(noise, context, *policy.known_actions(obs))
        return mean, bounded_std(self.squashed_std, self.config.sigma_min, self.config.sigma_max)

    @torch.no_grad()
    def sample(self, obs: Obs, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """A chunk; the trace is it in normalised units and its log-probability per action (B, H)."""
        mean, std = self.mean_std(obs)
        x = mean + std * distributed.randn(mean.shape, generator)
        known, prefix = self.policy.known_actions(obs)
        x, _ = self.policy.hold(x, x[..., 0], known, prefix)
        log_prob = flow.gaussian_log_prob(x, mean, std).sum(-1)
        return self.policy.denormalize_action(x), {"x": x, "log_prob": log_prob}

    def evaluate(self, obs: Obs, trace: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Log-ratio (B,) of the executed actions, and the entropy per element (B,)."""
        mean, std = self.mean_std(obs)
        log_prob = flow.gaussian_log_prob(trace["x"], mean, std).sum(-1)
        counted = trace["executed"]
        known, _ = self.policy.known_actions(obs)
        if known is not None:
            counted = counted & ~known
        log_ratio = ((log_prob - trace["log_prob"]) * counted).sum(-1)
        entropy = torch.log(std).mean() + 0.5 * math.log(2 * math.pi * math.e)
        return log_ratio, entropy.expand(len(mean))

    def anneal(self, progress: float) -> None:
        """Nothing changes over a run."""

    @torch.no_grad()
    def diagnostics(self, obs: Obs, trace: dict[str, Tensor]) -> dict[str, float]:
        """The mean standard deviation."""
        _, std = self.mean_std(obs)
        return {"train/sigma": std.mean().item()}

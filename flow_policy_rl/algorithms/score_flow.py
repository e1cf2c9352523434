"""ScoRe-Flow (arXiv 2604.10962): the flow as a chain of Gaussian transitions with a score drift, trained by PPO.

    mean_k = x_k + dt * [ v + g (t_k v_score - x_k) ]     that is v + alpha * score, alpha = (1 - t) g
    x_{k+1} = mean_k + sigma_k * eps,  eps ~ N(0, I),  k = 0 .. K - 1,  dt = 1 / K,  t_k = k / K

sigma is the standard deviation of the step itself (no sqrt(dt)), from a learned head with bounds.
The likelihood of a chunk is that of its chain, exact for any K. The drift is one of

    none      g = 0: ReinFlow (arXiv 2505.22094)
    learned   g = softplus(net(t)), the published method
    fixed     g = `fixed_gain`
    matched   alpha = sigma^2 K / 2 per element: as K grows the chain keeps the marginals of the plain flow

and the score that of the present field or of the frozen base policy, then an anchor to demonstrations.
The robot runs the means, for `matched` those of the plain flow.

Deviations from the released code, each for a reason:
- The drift has no singularity, so no epsilon and no clamp of the score are needed.
- No clamp of means, of the noise or of the log-probability: they kill gradients and make the
  density wrong. Actions are held to their limits on the way to the robot, outside the chain.
- The gain is a parameter of the policy, hence in the optimiser, the checkpoint and the exported
  graph, for every task.
- The ratio is that of the joint density of what was executed. Actions of the chunk that are never
  executed drop out of the last transition (nothing depends on them any more); `per_dim_mean` gives
  the authors' normalisation instead. The initial noise cancels in the ratio and is left out.
- Time limits bootstrap; no sample duplication (more steps on near-full batches instead); K is folded into the batch.
- Known actions of a prefix (real-time chunking) stay where they are and do not count in the ratio.
- Shortcut models are not here, so presets of their tasks (kitchen, transport) run on a plain flow.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from flow_policy_rl import distributed, flow
from flow_policy_rl.errors import (
    DECAY,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    InputError,
    check_settings,
)
from flow_policy_rl.networks import bounded_std, time_features
from flow_policy_rl.policy import FlowPolicy, Obs


@dataclass(frozen=True)
class ScoreFlowConfig:
    """The transition kernel.

    Attributes:
        sigma_min: lower bound of the step's standard deviation, in normalised action units.
        sigma_max: its upper bound.
        sigma_hold: share of the run for which sigma_max is held; then a cosine takes it towards sigma_min.
        sigma_decay: share of the distance to sigma_min that it goes.
        drift: `learned` (ScoRe-Flow), `none` (ReinFlow), `fixed` or `matched`.
        fixed_gain: g of the `fixed` drift.
        score: whose score the drift follows: that of the `current` field or of the `base` policy.
        noisy_steps: how many of the last flow steps are noisy (0: all K, as published). Those before run as they are
            deployed and do not count in the ratio, as DPPO (arXiv 2409.00588) fine-tunes only the last ones.
        start_noise: scale of x_0 in rollouts. 1 is the published method; 0 starts every rollout where a
            policy deployed with zero noise starts, which is what evaluation then measures.
        head_learning_rate: of the noise head and the drift gain. They start from nothing, so they need
            more than the pre-trained field.
        likelihood: `joint` density of the executed chain, or its `per_dim_mean` as in the released code.
    """

    sigma_min: float = 0.05
    sigma_max: float = 0.12
    sigma_hold: float = 0.35
    sigma_decay: float = 0.0
    drift: Literal["learned", "none", "fixed", "matched"] = "learned"
    fixed_gain: float = 0.127
    score: Literal["current", "base"] = "current"
    noisy_steps: int = 0
    start_noise: float = 1.0
    head_learning_rate: float = 3e-4
    likelihood: Literal["joint", "per_dim_mean"] = "joint"

    def __post_init__(self):
        check_settings(self, "score_flow", POSITIVE, "sigma_min", "sigma_max", "head_learning_rate")
        check_settings(self, "score_flow", NOT_NEGATIVE, "start_noise")
        check_settings(self, "score_flow", DECAY, "sigma_hold")
        check_settings(self, "score_flow", SHARE, "sigma_decay")
        if self.sigma_min >= self.sigma_max:
            raise InputError(
                f"score_flow: need sigma_min < sigma_max, not {self.sigma_min} and {self.sigma_max}"
            )
        if self.noisy_steps < 0:
            raise InputError(
                f"score_flow.noisy_steps must be at least 0 (all), not {self.noisy_steps}"
            )
        if self.drift == "fixed" and not 0 < self.fixed_gain < math.inf:
            raise InputError(
                f"score_flow.fixed_gain must be positive and finite, not {self.fixed_gain} (drift `none` is 0)"
            )


class NoiseHead(nn.Module):
    """sigma(t, obs) per action element, squashed between two bounds in log space; starts at their geometric mean."""

    def __init__(self, context_dim: int, elements: int, config: ScoreFlowConfig, width: int = 64):
        super().__init__()
        self.config = config
        self.register_buffer("sigma_max", torch.tensor(config.sigma_max))
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
        return bounded_std(z, self.config.sigma_min, self.sigma_max)

    def anneal(self, progress: float) -> None:
        """Lower the upper bound as `sigma_hold` and `sigma_decay` say."""
        config = self.config
        done = min(max(progress - config.sigma_hold, 0) / (1 - config.sigma_hold), 1)
        share = config.sigma_decay * 0.5 * (1 - math.cos(math.pi * done))
        self.sigma_max.fill_(config.sigma_max + share * (config.sigma_min - config.sigma_max))


class ScoreFlow(nn.Module):
    """Ratio estimator of ScoRe-Flow: holds the policy it trains and the noise head it trains it with."""

    def __init__(self, policy: FlowPolicy, config: ScoreFlowConfig):
        super().__init__()
        self.policy, self.config = policy, config
        self.num_flow_steps = policy.spec.num_flow_steps
        if config.noisy_steps > self.num_flow_steps:
            raise InputError(
                f"noisy_steps {config.noisy_steps} is more than the {self.num_flow_steps} flow steps of the policy"
            )
        horizon, joints = policy.chunk_shape
        self.noise_head = NoiseHead(policy.num_features, horizon * joints, config)
        grid = flow.time_grid(self.num_flow_steps)
        first = self.num_flow_steps - (config.noisy_steps or self.num_flow_steps)
        self.register_buffer("quiet_grid", grid[:first], persistent=False)
        self.register_buffer("grid", grid[first:])
        if config.drift == "fixed":
            policy.drift_gain.hold(config.fixed_gain)

    @staticmethod
    def prepare(base: FlowPolicy, config: ScoreFlowConfig) -> FlowPolicy:
        """The same policy with room for what the drift needs.

        Raises:
            InputError: it would be another one: the drift that `base` has is not among those of `config`.
        """
        if base.drift_gain is not None:
            held = config.drift == "fixed" and base.drift_gain.holds(config.fixed_gain)
            if config.drift != "learned" and not held:
                raise InputError(
                    f"the checkpoint has a score drift, which drift `{config.drift}` would drop: train it with "
                    "--score-flow.drift learned"
                )
            if base.network.base_score and config.score != "base":
                raise InputError(
                    f"the checkpoint's drift follows the score of a base policy, which score `{config.score}` would "
                    "drop: train it with --score-flow.score base"
                )
        drifts = config.drift in ("learned", "fixed")
        anchored = config.score == "base" and config.drift != "none"
        policy = FlowPolicy(
            base.spec,
            dataclasses.replace(base.network, score_drift=drifts, base_score=anchored),
        )
        weights = base.state_dict()
        if anchored and base.base_field is None:
            weights |= {
                f"base_field.{name}": value
                for name, value in base.velocity_field.state_dict().items()
            }
        policy.load_state_dict(weights, strict=False)
        return policy

    def parameter_groups(self, learning_rate: float) -> list[dict]:
        """For the optimiser: the field at the given rate, the new heads at their own."""
        field = [*self.policy.velocity_field.parameters(), *self.policy.encoders.parameters()]
        heads = [*self.noise_head.parameters()]
        if self.config.drift == "learned":
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
            x: (B, H, A). t: (B, H), 1 where an action is known. context: from the policy's `context`.
            features: (B, F) of the observation.
        """
        policy, steps = self.policy, self.num_flow_steps
        now = t.amin(dim=1)  # (B,), the step's time
        std = self.noise_head(now, features).view_as(x)
        if self.config.drift == "matched":
            velocity, score_velocity = policy.velocities(x, t, context)
            gain = 0.5 * steps * std.square() / (1 - now).view(-1, 1, 1)
            velocity = flow.score_drift(x, velocity, t, gain, score_velocity)
        else:
            velocity = policy.velocity(x, t, context)
        return x + velocity / steps, std

    @torch.no_grad()
    def sample(self, obs: Obs, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Draw a chain. The chunk is its end; the trace the states (B, n + 1, H, A) and log-probabilities (B, n, H) of
        its n noisy steps.
        """
        policy = self.policy
        features = policy.features(obs)
        context = policy.context(features)
        known, prefix = policy.known_actions(obs)
        shape = (len(features), *policy.chunk_shape)
        x = self.config.start_noise * distributed.randn(shape, generator)
        for t in self.quiet_grid:
            x, times = policy.hold(x, t.expand(shape[:2]), known, prefix)
            x = x + policy.velocity(x, times, context) / self.num_flow_steps
        chain, log_prob = [], []
        for t in self.grid:
            x, times = policy.hold(x, t.expand(shape[:2]), known, prefix)
            mean, std = self.mean_std(x, times, context, features)
            chain.append(x)
            x = mean + std * distributed.randn(shape, generator)
            log_prob.append(flow.gaussian_log_prob(x, mean, std).sum(-1))
        x, _ = policy.hold(x, times, known, prefix)
        return policy.denormalize_action(x), {
            "chain": torch.stack([*chain, x], 1),
            "log_prob": torch.stack(log_prob, 1),
        }

    def evaluate(self, obs: Obs, trace: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Log-ratio (B,) of a chain under the present weights, and the chain's entropy per element (B,)."""
        mean, std = self._kernel(obs, trace["chain"])
        log_prob = flow.gaussian_log_prob(trace["chain"][:, 1:], mean, std).sum(-1)
        change = log_prob - trace["log_prob"]  # (B, n, H)
        known, _ = self.policy.known_actions(obs)
        if known is not None:
            change = change * ~known.unsqueeze(1)
        last = (change[:, -1] * trace["executed"]).sum(-1)
        log_ratio = change[:, :-1].sum((1, 2)) + last
        if self.config.likelihood == "per_dim_mean":
            log_ratio = log_ratio / ((len(self.grid) + 1) * mean[0, 0].numel())
        entropy = torch.log(std).mean(dim=(1, 2, 3)) + 0.5 * math.log(2 * math.pi * math.e)
        return log_ratio, entropy

    def _kernel(self, obs: Obs, chain: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and std of every transition of a chain (B, n + 1, H, A), with n folded into the batch: (B, n, H, A)."""
        steps = len(self.grid)
        features = self.policy.features(obs)
        context = self.policy.context(features)
        known, _ = self.policy.known_actions(obs)
        t = self.grid.view(1, steps, 1).expand(chain[:, 1:, :, 0].shape)
        if known is not None:
            t = torch.where(known.unsqueeze(1), 1.0, t)
        mean, std = self.mean_std(
            chain[:, :-1].flatten(0, 1),
            t.flatten(0, 1),
            context.repeat_interleave(steps, 0),
            features.repeat_interleave(steps, 0),
        )
        return mean.unflatten(0, (-1, steps)), std.unflatten(0, (-1, steps))

    def anneal(self, progress: float) -> None:
        """Schedule of the noise head's bound."""
        self.noise_head.anneal(progress)

    @torch.no_grad()
    def diagnostics(self, obs: Obs, trace: dict[str, Tensor]) -> dict[str, float]:
        """sigma and drift coefficient alpha of each step, alpha's surplus over the matched one, means out of bounds."""
        mean, std = self._kernel(obs, trace["chain"])
        gain = torch.zeros_like(self.grid)
        if self.policy.drift_gain is not None:
            gain = self.policy.drift_gain(self.grid[:, None]).flatten()
        matched = 0.5 * self.num_flow_steps * std.square().mean((0, 2, 3))
        alpha = matched if self.config.drift == "matched" else (1 - self.grid) * gain
        numbers = {"train/saturated_means": (mean[:, -1].abs() > 1).float().mean().item()}
        for i in range(len(self.grid)):
            k = len(self.quiet_grid) + i
            numbers[f"train/sigma_{k}"] = std[:, i].mean().item()
            numbers[f"train/alpha_{k}"] = alpha[i].item()
            numbers[f"train/alpha_surplus_{k}"] = (alpha - matched)[i].item()
        return numbers

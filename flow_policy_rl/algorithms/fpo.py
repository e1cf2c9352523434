"""FPO (arXiv 2507.21053) and FPO++ (arXiv 2602.02481): PPO whose ratio comes from flow-matching losses.

A flow has no cheap likelihood, but its conditional flow-matching (CFM) loss bounds one. For S draws of
noise x_0 and flow time t per executed chunk x_1, kept from the rollout to the end of the update,

    l_i = w(t_i) | v(x_t, t_i, obs) - (x_1 - x_0,i) |^2
    FPO:    log r   = mean_i l_old,i - mean_i l_new,i        one ratio per action
    FPO++:  log r_i = l_old,i - l_new,i                      one ratio per draw, sharing the advantage

and the rest is PPO, for FPO++ with the trust region `aspo` of `ppo.surrogate`. Evaluation and
deployment start the flow at zero noise (FPO++).

Deviations from the released code, each for a reason:
- Flow time runs from 0 (noise) to 1 (action); theirs runs the other way in two of three code bases.
- Clamps of the loss act on old and new alike, so the ratio is exactly 1 before the first step. The clamp
  of the log-ratio lets the gradient through, so an action that drifted out is still pulled back.
- The squared error counts the actions that were executed and no others; the flow still sees the
  whole chunk. `reduction` says how the sum over their joints scales: `sqrt` (FPO++ locomotion) keeps one
  clip range right for any chunk length, `mean` is FPO, `joint_mean` is FPO++ manipulation.
- Flow times are stratified over the draws, and draws come in antithetic pairs (noise mirrored in sign, time
  in 1/2) if asked: less variance for the same expectation. `paper` presets switch both off.
- ASPO picks per element; in the first release for manipulation the PPO branch was a batch mean.
- Time limits bootstrap, terminations at chunk ends count, masks are made anew for each rollout.
- `action_noise` is executed and stored, as in the code; it is not in the paper.
- Known actions of a prefix (real-time chunking) sit at flow time 1 and do not count.
- Not here: Huber loss, k-NN entropy bonus, learning rate from the KL (all off or of no effect there).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from flow_policy_rl import distributed, flow
from flow_policy_rl.errors import NOT_NEGATIVE, POSITIVE, InputError, check_settings
from flow_policy_rl.policy import FlowPolicy, Obs


@dataclass(frozen=True)
class FPOConfig:
    """The ratio from flow-matching losses.

    Attributes:
        ratio: `per_action` (FPO) or `per_sample` (FPO++).
        num_mc_samples: S, draws of (noise, flow time) per chunk.
        loss: weight w(t): `velocity` 1; `noise` t^2, the error of the predicted noise; `action` (1 - t)^2, that of the
            predicted action; `elbo` t / (1 - t), an unbiased but noisy likelihood bound.
        reduction: over the executed actions and joints: `sum`, or divided by their number (`mean`), its root
            (`sqrt`) or the number of joints (`joint_mean`).
        times: flow times of the draws: `stratified` or `uniform` in [t_min, 1 - t_min], or the sampler's `grid`.
        t_min: margin of the flow time at both ends.
        antithetic: draw in mirrored pairs.
        temperature: factor on the log-ratio.
        loss_clamp: cap of each loss, old and new alike (0: none).
        log_ratio_clamp: cap of the log-ratio on both sides; the gradient passes (0: none).
        start_noise: scale of the noise that rollouts start from. 1 is the published method.
        action_noise: spread of what is added to executed actions, in normalised units.
    """

    ratio: Literal["per_action", "per_sample"] = "per_sample"
    num_mc_samples: int = 8
    loss: Literal["velocity", "noise", "action", "elbo"] = "velocity"
    reduction: Literal["sum", "sqrt", "mean", "joint_mean"] = "sqrt"
    times: Literal["stratified", "uniform", "grid"] = "stratified"
    t_min: float = 0.005
    antithetic: bool = True
    temperature: float = 1.0
    loss_clamp: float = 20.0
    log_ratio_clamp: float = 10.0
    start_noise: float = 1.0
    action_noise: float = 0.02

    def __post_init__(self):
        if self.num_mc_samples < 1 or (self.antithetic and self.num_mc_samples % 2):
            raise InputError(
                f"num_mc_samples must be at least 1, and even with antithetic pairs, not {self.num_mc_samples}"
            )
        if not 0 <= self.t_min < 0.5:
            raise InputError(f"t_min must be in [0, 0.5), not {self.t_min}")
        check_settings(self, "fpo", POSITIVE, "temperature")
        noises = ("start_noise", "action_noise")
        check_settings(self, "fpo", NOT_NEGATIVE, *noises, "loss_clamp", "log_ratio_clamp")


class FPO(nn.Module):
    """Ratio estimator of FPO and FPO++ for the policy it holds."""

    def __init__(self, policy: FlowPolicy, config: FPOConfig):
        super().__init__()
        if policy.drift_gain is not None:
            raise InputError(
                "FPO compares flow-matching losses and cannot train a policy with a score drift; "
                "start from one trained by bc, fpo or reinflow"
            )
        self.policy, self.config = policy, config

    def parameter_groups(self, learning_rate: float) -> list[dict]:
        """For the optimiser."""
        return [{"params": list(self.policy.parameters()), "lr": learning_rate}]

    @torch.no_grad()
    def sample(self, obs: Obs, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Integrate the flow from noise. The trace: normalised chunk, draws (B, S, ...) and their losses (B, S, H)."""
        policy, config = self.policy, self.config
        context = policy.embed(obs)
        known, prefix = policy.known_actions(obs)
        shape = (len(context), *policy.chunk_shape)
        x_0 = config.start_noise * distributed.randn(shape, generator)
        x_1 = policy.carry(x_0, context, known, prefix)
        x_1 = x_1 + config.action_noise * distributed.randn(shape, generator)
        x_1, _ = policy.hold(x_1, x_1[..., 0], known, prefix)
        x_0, t = self.draw(len(context), generator)
        loss = self.losses(context, x_1, x_0, t, known)
        return policy.denormalize_action(x_1), {"x_1": x_1, "x_0": x_0, "t": t, "loss": loss}

    def draw(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Noise x_0 (B, S, H, A) and flow times t (B, S) at which losses are compared."""
        config = self.config
        count = config.num_mc_samples // (2 if config.antithetic else 1)
        x_0 = distributed.randn((batch, count, *self.policy.chunk_shape), generator)
        t = distributed.rand((batch, count), generator)
        if config.times == "stratified":
            t = (torch.arange(count, device=t.device) + t) / config.num_mc_samples
        if config.antithetic:
            x_0 = torch.cat([x_0, -x_0], dim=1)
            t = torch.cat([t, 1 - t], dim=1)
        if config.times == "grid":
            steps = self.policy.spec.num_flow_steps
            return x_0, (t * steps).floor().clamp_max(steps - 1) / steps
        return x_0, config.t_min + (1 - 2 * config.t_min) * t

    def losses(
        self, context: Tensor, x_1: Tensor, x_0: Tensor, t: Tensor, known: Tensor | None = None
    ) -> Tensor:
        """Weighted CFM loss of each draw and action, summed over joints, (B, S, H); 0 for `known` actions (B, H).

        The observation is encoded once, whatever the number of draws.
        """
        t = t.unsqueeze(-1).expand(x_0.shape[:3])
        weight = loss_weight(self.config.loss, t)
        if known is not None:
            known = known.unsqueeze(1)
            t, weight = torch.where(known, 1.0, t), torch.where(known, 0.0, weight)
        x_1 = x_1.unsqueeze(1)
        velocity = self.policy.velocity_field(
            flow.interpolate(x_0, x_1, t).flatten(0, 1),
            t.flatten(0, 1),
            context.repeat_interleave(t.shape[1], 0),
        ).view_as(x_0)
        return (velocity - flow.velocity_target(x_0, x_1)).square().sum(-1) * weight

    def reduce(self, loss: Tensor, counted: Tensor) -> Tensor:
        """Over the actions that count: (B, S, H), (B, H) -> (B, S)."""
        joints = self.policy.chunk_shape[1]
        elements = counted.sum(-1, keepdim=True).clamp_min(1) * joints
        divisor = {
            "sum": 1.0,
            "sqrt": elements.sqrt(),
            "mean": elements,
            "joint_mean": joints,
        }[self.config.reduction]
        return (loss * counted.unsqueeze(1)).sum(-1) / divisor

    def evaluate(self, obs: Obs, trace: dict[str, Tensor]) -> tuple[Tensor, None]:
        """Log-ratio, (B, S) per sample or (B,) per action. There is no entropy to give."""
        new, old = self._new_and_old(obs, trace)
        cap = self.config.loss_clamp
        if cap:
            new, old = new.clamp_max(cap), old.clamp_max(cap)
        log_ratio = self.config.temperature * (old - new)
        if self.config.ratio == "per_action":
            log_ratio = log_ratio.mean(1)
        limit = self.config.log_ratio_clamp
        if limit:
            log_ratio = log_ratio + (log_ratio.clamp(-limit, limit) - log_ratio).detach()
        return log_ratio, None

    def _new_and_old(self, obs: Obs, trace: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        known, _ = self.policy.known_actions(obs)
        context = self.policy.embed(obs)
        loss = self.losses(context, trace["x_1"], trace["x_0"], trace["t"], known)
        counted = trace["executed"] if known is None else trace["executed"] & ~known
        return self.reduce(loss, counted), self.reduce(trace["loss"], counted)

    def anneal(self, progress: float) -> None:
        """Nothing changes over a run."""

    @torch.no_grad()
    def diagnostics(self, obs: Obs, trace: dict[str, Tensor]) -> dict[str, float]:
        """Loss on the stored draws before and after the update, and the share that the clamp hides."""
        new, old = self._new_and_old(obs, trace)
        cap = self.config.loss_clamp or float("inf")
        return {
            "train/cfm_loss_before": old.mean().item(),
            "train/cfm_loss_after": new.mean().item(),
            "train/clamped_fraction": (torch.maximum(new, old) > cap).float().mean().item(),
        }


def loss_weight(loss: str, t: Tensor) -> Tensor:
    """w(t): turns the squared error of the velocity into that of the noise or the action it predicts, or into the ELBO.

    x_0 = x_t - t v and x_1 = x_t + (1 - t) v give t^2 and (1 - t)^2; the signal-to-noise ratio t^2 / (1 - t)^2
    of the path gives the ELBO's t / (1 - t) (Kingma and Gao, arXiv 2303.00848).
    """
    weights = {
        "velocity": lambda: torch.ones_like(t),
        "noise": lambda: t.square(),
        "action": lambda: (1 - t).square(),
        "elbo": lambda: t / (1 - t),
    }
    return weights[loss]()

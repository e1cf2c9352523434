"""The one on-policy loop (PPO, Schulman et al., arXiv 1707.06347) on action chunks.

An algorithm brings a ratio estimator, an `nn.Module` with these verbs:

    sample(obs, generator) -> (action_chunk (B, H, A), trace)
        trace: dict of tensors (B, ...), which the rollout keeps without knowing what they are
    evaluate(obs, trace) -> (log_ratio (B,) or (B, S), entropy (B,) or None)
        differentiable, and 0 at unchanged parameters; the trace has grown `executed` (B, H), bool: the
        actions of the chunk that the environment ran before the episode ended or the next chunk took over
    parameter_groups(learning_rate) -> list for the optimiser, with every parameter once
    anneal(progress)
        after each update, with the share of the run that is done: what a schedule needs
    diagnostics(obs, trace) -> dict of numbers worth watching, once per iteration

This file does the rest: rollout, advantages, epochs, surrogate, value loss.
"""

import math
import time
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from flow_policy_rl.advantages import generalized_advantages
from flow_policy_rl.errors import RunFailed
from flow_policy_rl.networks import ValueFunction
from flow_policy_rl.policy import FlowPolicy
from flow_policy_rl.rollout import Collector, Rollout, TensorDict, flatten, select
from sim.vec_env import VecEnv

TrustRegion = Literal["ppo", "spo", "aspo"]
LOSS_LIMIT = 1e8  # a loss beyond this has exploded
SPREAD_OBS, SPREAD_SAMPLES = 32, 16  # what the mode-collapse alarm looks at


@dataclass(frozen=True)
class PPOConfig:
    """The on-policy loop.

    Attributes:
        num_iterations: rollouts and updates.
        num_envs: N, environments side by side.
        num_steps: T, chunks per environment and iteration.
        num_epochs: passes over a rollout.
        num_minibatches: gradient steps per pass.
        gamma: discount per control step.
        gae_lambda: of advantage estimation, per chunk.
        clip_range: of the ratio.
        trust_region: `ppo` clips, `spo` pulls back quadratically, `aspo` is ppo for good and spo for bad actions.
        actor_learning_rate, critic_learning_rate: of AdamW.
        entropy_coef: weight of the entropy bonus.
        max_grad_norm: of actor and critic, each.
        target_kl: an update stops early when the ratio's KL estimate passes it.
        learning_rate_floor: a cosine takes both rates to this share of their value over `learning_rate_cycle`
            iterations (0: over the whole run), and then starts again.
        learning_rate_cycle, learning_rate_warmup: see there; iterations of linear growth at the start of each cycle.
        critic_warmup: first iterations, in which only the critic learns.
        value_width, value_depth: size of the critic.
        train_encoder: also train what turns images into features. Otherwise each observation is encoded once, when it
            is seen, and the features are all that a rollout keeps.
    """

    num_iterations: int = 40
    num_envs: int = 128
    num_steps: int = 15
    num_epochs: int = 5
    num_minibatches: int = 4
    gamma: float = 0.995
    gae_lambda: float = 0.95
    clip_range: float = 0.2
    trust_region: TrustRegion = "ppo"
    actor_learning_rate: float = 1e-4
    critic_learning_rate: float = 1e-3
    entropy_coef: float = 0.0
    max_grad_norm: float = 1.0
    target_kl: float = 1.0
    learning_rate_floor: float = 1.0
    learning_rate_cycle: int = 0
    learning_rate_warmup: int = 0
    critic_warmup: int = 1
    value_width: int = 256
    value_depth: int = 3
    train_encoder: bool = False


class PPO:
    """Estimator, critic and their optimisers; `iterate` is one rollout and one update."""

    def __init__(
        self,
        policy: FlowPolicy,
        estimator: nn.Module,
        env: VecEnv,
        config: PPOConfig,
        generator: torch.Generator,
    ):
        self.policy, self.estimator, self.config, self.generator = (
            policy,
            estimator,
            config,
            generator,
        )
        policy.encoders.requires_grad_(config.train_encoder)
        self.critic = ValueFunction(policy.num_features, config.value_width, config.value_depth)
        self.collector = Collector(
            env,
            policy.spec.execute_horizon,
            config.gamma,
            self._raw if config.train_encoder else self._features,
            policy.spec.prefix_horizon,
        )
        self.actor_optimizer = torch.optim.AdamW(
            estimator.parameter_groups(config.actor_learning_rate), weight_decay=0.0
        )
        self.critic_optimizer = torch.optim.AdamW(
            self.critic.parameters(), lr=config.critic_learning_rate, weight_decay=1e-5
        )
        self.iteration = 0

    def _raw(self, obs: TensorDict) -> TensorDict:
        return obs

    def _features(self, obs: TensorDict) -> TensorDict:
        return {"features": self.policy.features(obs)}

    def iterate(self) -> dict[str, float]:
        """One rollout and one update. Returns metrics.

        Raises:
            RunFailed: a loss or a gradient is not finite or has exploded; the weights are those of before that step.
        """
        start = time.perf_counter()
        rollout = self.collector.collect(
            lambda obs: self.estimator.sample(obs, self.generator), self.config.num_steps
        )
        middle = time.perf_counter()
        self._set_learning_rates()
        metrics = self.update(rollout)
        self.iteration += 1
        self.estimator.anneal(self.iteration / self.config.num_iterations)
        return {
            "rollout/success_rate": rollout.successes / max(rollout.episodes, 1),
            "rollout/return": rollout.episode_return,
            "rollout/episodes": float(rollout.episodes),
            "rollout/env_steps": float(rollout.num_env_steps),
            **metrics,
            "time/rollout_s": middle - start,
            "time/update_s": time.perf_counter() - middle,
        }

    def update(self, rollout: Rollout) -> dict[str, float]:
        """Fit actor and critic to one rollout."""
        config = self.config
        with torch.no_grad():
            value = self.critic(self.policy.features(rollout.obs))
            next_value = self.critic(self.policy.features(rollout.final_obs))
        advantage, returns = generalized_advantages(
            rollout.reward,
            value,
            next_value,
            rollout.discount,
            rollout.terminated,
            rollout.truncated,
            config.gae_lambda,
        )
        explained = 1 - (returns - value).var() / returns.var().clamp_min(1e-8)
        advantage = ((advantage - advantage.mean()) / (advantage.std() + 1e-8)).flatten()
        returns = returns.flatten()
        obs = flatten(rollout.obs)
        trace = flatten({**rollout.trace, "executed": rollout.executed})

        train_actor = self.iteration >= config.critic_warmup
        size = -(-len(returns) // config.num_minibatches)
        seen: dict[str, list[float]] = {}
        approx_kl, actor_steps = 0.0, 0
        for _ in range(config.num_epochs):
            for rows in torch.randperm(len(returns), generator=self.generator).split(size):
                batch = select(obs, rows)
                metrics = self._critic_step(batch, returns[rows])
                if train_actor and approx_kl <= config.target_kl:
                    actor = self._actor_step(batch, select(trace, rows), advantage[rows])
                    approx_kl, actor_steps = actor["train/approx_kl"], actor_steps + 1
                    metrics |= actor
                for name, number in metrics.items():
                    seen.setdefault(name, []).append(number)
        few = torch.arange(min(SPREAD_OBS, len(returns)))
        return {name: sum(numbers) / len(numbers) for name, numbers in seen.items()} | {
            "train/actor_steps": float(actor_steps),
            "train/explained_variance": explained.item(),
            "train/sample_spread": self.sample_spread(select(obs, few)),
            **self.estimator.diagnostics(select(obs, few), select(trace, few)),
        }

    def _set_learning_rates(self) -> None:
        factor = learning_rate_factor(self.config, self.iteration)
        for optimizer in (self.actor_optimizer, self.critic_optimizer):
            for group in optimizer.param_groups:
                group["lr"] = factor * group.setdefault("peak_lr", group["lr"])

    @torch.no_grad()
    def sample_spread(self, obs: TensorDict) -> float:
        """Spread of the chunks drawn for one observation, in normalised units: near zero, the modes have collapsed."""
        repeated = {k: v.repeat_interleave(SPREAD_SAMPLES, 0) for k, v in obs.items()}
        chunk, _ = self.estimator.sample(repeated, self.generator)
        chunk = self.policy.normalize_action(chunk).unflatten(0, (-1, SPREAD_SAMPLES))
        return chunk.std(dim=1).mean().item()

    def _critic_step(self, obs: TensorDict, returns: Tensor) -> dict[str, float]:
        loss = 0.5 * (self.critic(self.policy.features(obs)) - returns).square().mean()
        step(self.critic_optimizer, loss, self.config.max_grad_norm, "value loss")
        return {"train/value_loss": loss.item()}

    def _actor_step(
        self, obs: TensorDict, trace: TensorDict, advantage: Tensor
    ) -> dict[str, float]:
        config = self.config
        log_ratio, entropy = self.estimator.evaluate(obs, trace)
        loss = surrogate_loss(log_ratio, advantage, config.clip_range, config.trust_region)
        metrics = {"train/policy_loss": loss.item()}
        if entropy is not None:
            loss = loss - config.entropy_coef * entropy.mean()
            metrics["train/entropy"] = entropy.mean().item()
        norm = step(self.actor_optimizer, loss, config.max_grad_norm, "policy loss")
        with torch.no_grad():
            ratio = log_ratio.exp()
            clipped = (ratio - 1).abs() > config.clip_range
            metrics |= {
                "train/approx_kl": (ratio - 1 - log_ratio).mean().item(),
                "train/clip_fraction": clipped.float().mean().item(),
                "train/actor_grad_norm": norm,
            }
        return metrics


def learning_rate_factor(config: PPOConfig, iteration: int) -> float:
    """Share of the peak rates in an iteration: a linear start, then half a cosine to the floor, cycle after cycle."""
    cycle, warmup = config.learning_rate_cycle or config.num_iterations, config.learning_rate_warmup
    phase = iteration % cycle
    if phase < warmup:
        return (phase + 1) / warmup
    done = (phase - warmup) / max(cycle - warmup, 1)
    return config.learning_rate_floor + (1 - config.learning_rate_floor) * 0.5 * (
        1 + math.cos(math.pi * done)
    )


def surrogate(
    log_ratio: Tensor, advantage: Tensor, clip_range: float, trust_region: TrustRegion = "ppo"
) -> Tensor:
    """What each ratio r is worth, to be maximised; elementwise, so that no action's advantage touches another's.

    ppo: min(r A, clip(r, 1 - c, 1 + c) A). spo (arXiv 2401.16025): r A - |A| (r - 1)^2 / (2 c), stationary at
    r = 1 + sign(A) c. aspo (FPO++, arXiv 2602.02481): ppo where A >= 0, spo where A < 0.

    Args:
        log_ratio: (B,), or (B, S) with S ratios that share an action's advantage.
        advantage: (B,).
    """
    advantage = advantage.view(-1, *(1,) * (log_ratio.dim() - 1))
    ratio = log_ratio.exp()
    clipped = torch.min(ratio * advantage, ratio.clamp(1 - clip_range, 1 + clip_range) * advantage)
    if trust_region == "ppo":
        return clipped
    pulled = ratio * advantage - advantage.abs() * (ratio - 1).square() / (2 * clip_range)
    return pulled if trust_region == "spo" else torch.where(advantage >= 0, clipped, pulled)


def surrogate_loss(
    log_ratio: Tensor, advantage: Tensor, clip_range: float, trust_region: TrustRegion = "ppo"
) -> Tensor:
    """Minus the mean surrogate, to be minimised."""
    return -surrogate(log_ratio, advantage, clip_range, trust_region).mean()


def step(
    optimizer: torch.optim.Optimizer, loss: Tensor, max_grad_norm: float, term: str = "loss"
) -> float:
    """One gradient step; returns the gradient's norm before clipping.

    Raises:
        RunFailed: the loss or its gradient is not finite, or the loss has exploded. Nothing was changed.
    """
    require_sound(loss.item(), term)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, max_grad_norm).item()
    require_sound(norm, f"gradient of the {term}")
    optimizer.step()
    return norm


def require_sound(value: float, term: str) -> None:
    """Refuse a number that is not finite or has exploded."""
    if not math.isfinite(value) or abs(value) > LOSS_LIMIT:
        raise RunFailed(f"{term} is {value:.4g}")

"""The one on-policy loop (PPO, Schulman et al., arXiv 1707.06347) on action chunks.

An algorithm brings a ratio estimator, an `nn.Module` with three verbs:

    sample(obs, generator) -> (action_chunk (B, H, A), trace)
        trace: dict of tensors (B, ...), which the rollout keeps without knowing what they are
    evaluate(obs, trace) -> (log_ratio (B,), entropy (B,) or None)
        differentiable, and 0 at unchanged parameters
    parameter_groups(learning_rate) -> list for the optimiser, with every parameter once

This file does the rest: rollout, advantages, epochs, clipped surrogate, value loss.
"""

import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flow_policy_rl.advantages import generalized_advantages
from flow_policy_rl.networks import ValueFunction
from flow_policy_rl.policy import FlowPolicy
from flow_policy_rl.rollout import Collector, Rollout, flatten
from sim.vec_env import VecEnv


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
        actor_learning_rate, critic_learning_rate: of AdamW.
        entropy_coef: weight of the entropy bonus.
        max_grad_norm: of actor and critic, each.
        target_kl: an update stops early when the ratio's KL estimate passes it.
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
    actor_learning_rate: float = 1e-4
    critic_learning_rate: float = 1e-3
    entropy_coef: float = 0.0
    max_grad_norm: float = 1.0
    target_kl: float = 1.0
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
        self.critic = ValueFunction(policy.num_features, config.value_width, config.value_depth)
        self.collector = Collector(
            env,
            policy.spec.execute_horizon,
            config.gamma,
            self._raw if config.train_encoder else self._features,
        )
        self.actor_optimizer = torch.optim.AdamW(
            estimator.parameter_groups(config.actor_learning_rate), weight_decay=0.0
        )
        self.critic_optimizer = torch.optim.AdamW(
            self.critic.parameters(), lr=config.critic_learning_rate, weight_decay=1e-5
        )
        self.iteration = 0

    def _raw(self, obs: dict[str, Tensor]) -> dict[str, Tensor]:
        return obs

    def _features(self, obs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"features": self.policy.features(obs)}

    def iterate(self) -> dict[str, float]:
        """One rollout and one update. Returns metrics."""
        start = time.perf_counter()
        rollout = self.collector.collect(
            lambda obs: self.estimator.sample(obs, self.generator), self.config.num_steps
        )
        middle = time.perf_counter()
        metrics = self.update(rollout)
        self.iteration += 1
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
        obs, trace = flatten(rollout.obs), flatten(rollout.trace)

        train_actor = self.iteration >= config.critic_warmup
        size = -(-len(returns) // config.num_minibatches)
        seen: dict[str, list[float]] = {}
        approx_kl, actor_steps = 0.0, 0
        for _ in range(config.num_epochs):
            for rows in torch.randperm(len(returns), generator=self.generator).split(size):
                batch = {name: values[rows] for name, values in obs.items()}
                metrics = self._critic_step(batch, returns[rows])
                if train_actor and approx_kl <= config.target_kl:
                    kept = {name: values[rows] for name, values in trace.items()}
                    actor = self._actor_step(batch, kept, advantage[rows])
                    approx_kl, actor_steps = actor["train/approx_kl"], actor_steps + 1
                    metrics |= actor
                for name, number in metrics.items():
                    seen.setdefault(name, []).append(number)
        return {name: sum(numbers) / len(numbers) for name, numbers in seen.items()} | {
            "train/actor_steps": float(actor_steps),
            "train/explained_variance": explained.item(),
        }

    def _critic_step(self, obs: dict[str, Tensor], returns: Tensor) -> dict[str, float]:
        loss = 0.5 * (self.critic(self.policy.features(obs)) - returns).square().mean()
        step(self.critic_optimizer, loss, self.config.max_grad_norm)
        return {"train/value_loss": loss.item()}

    def _actor_step(
        self, obs: dict[str, Tensor], trace: dict[str, Tensor], advantage: Tensor
    ) -> dict[str, float]:
        config = self.config
        log_ratio, entropy = self.estimator.evaluate(obs, trace)
        loss = surrogate_loss(log_ratio, advantage, config.clip_range)
        metrics = {"train/policy_loss": loss.item()}
        if entropy is not None:
            loss = loss - config.entropy_coef * entropy.mean()
            metrics["train/entropy"] = entropy.mean().item()
        norm = step(self.actor_optimizer, loss, config.max_grad_norm)
        with torch.no_grad():
            ratio = log_ratio.exp()
            metrics |= {
                "train/approx_kl": (ratio - 1 - log_ratio).mean().item(),
                "train/clip_fraction": ((ratio - 1).abs() > config.clip_range)
                .float()
                .mean()
                .item(),
                "train/actor_grad_norm": norm,
            }
        return metrics


def surrogate_loss(log_ratio: Tensor, advantage: Tensor, clip_range: float) -> Tensor:
    """Clipped surrogate, to be minimised: -E min(r A, clip(r, 1 - c, 1 + c) A)."""
    ratio = log_ratio.exp()
    return -torch.min(
        ratio * advantage, ratio.clamp(1 - clip_range, 1 + clip_range) * advantage
    ).mean()


def step(optimizer: torch.optim.Optimizer, loss: Tensor, max_grad_norm: float) -> float:
    """One gradient step; returns the gradient's norm before clipping."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    optimizer.step()
    return norm.item()

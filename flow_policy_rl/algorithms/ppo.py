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

import copy
import math
import time
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from flow_policy_rl import distributed
from flow_policy_rl.advantages import generalized_advantages
from flow_policy_rl.errors import (
    COUNT,
    DECAY,
    LIMIT,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    InputError,
    check_settings,
)
from flow_policy_rl.gradients import apply_gradient
from flow_policy_rl.networks import ValueFunction, shift_images
from flow_policy_rl.policy import FlowPolicy
from flow_policy_rl.rollout import Collector, Rollout, TensorDict, flatten, select
from flow_policy_rl.statistics import RunningStatistics
from sim.vec_env import VecEnv

TrustRegion = Literal["ppo", "spo", "aspo"]
KL_SHARE = 10.0
STATEFUL = (
    "estimator",
    "critic",
    "average",
    "actor_optimizer",
    "critic_optimizer",
    "obs_statistics",
    "return_statistics",
)
SPREAD_OBS, SPREAD_SAMPLES = 32, 16  # what the mode-collapse alarm looks at


@dataclass(frozen=True)
class PPOConfig:
    """The on-policy loop.

    Attributes:
        num_iterations: rollouts and updates.
        num_envs: N, environments side by side, over all processes.
        num_steps: T, chunks per environment and iteration.
        num_epochs: passes over a rollout.
        num_minibatches: gradient steps per pass.
        micro_batch: chunks whose gradients are computed at once and added up; no effect but on speed and memory.
        gamma: discount per control step.
        gae_lambda: of advantage estimation, per chunk.
        clip_range: of the ratio.
        trust_region: `ppo` clips, `spo` pulls back quadratically, `aspo` is ppo for good and spo for bad actions.
        dual_clip: a bad action whose ratio is beyond this has no gradient (dual-clip PPO, arXiv 1912.09729; 0: it has,
            as in plain PPO). Where demonstrations say nothing a small step moves a chunk far, and one ratio of e^20
            would make the whole step its own. For trust region `ppo`.
        actor_learning_rate: of AdamW.
        critic_learning_rate: of AdamW.
        entropy_coef: weight of the entropy bonus.
        max_grad_norm: of actor and critic, each.
        target_kl: an update stops early when the ratio's KL estimate passes it. A single ratio adds at most
            ten times this to the mean.
        learning_rate_floor: a cosine takes both rates to this share of their value over `learning_rate_cycle`
            iterations (0: over the whole run), and then starts again.
        learning_rate_cycle: iterations of one such cosine (0: the whole run).
        learning_rate_warmup: iterations of linear growth from that share at the start of each cycle.
        critic_warmup: first iterations, in which only the critic learns.
        value_width: hidden units per layer of the critic.
        value_depth: its hidden layers.
        scale_rewards: divide rewards by the running spread of the discounted return.
        ema_decay: moving average of the weights over iterations, which is what is evaluated and saved (0: the weights
            themselves); rollouts use the raw ones.
        train_encoder: also train what turns images into features. Otherwise each observation is encoded once, when it
            is seen, and the features are all that a rollout keeps.
        random_shift: move each picture of a rollout by up to so many pixels. The policy acts on the moved picture and
            learns from the same one, so the ratio right after collection is 1.
    """

    num_iterations: int = 40
    num_envs: int = 128
    num_steps: int = 15
    num_epochs: int = 5
    num_minibatches: int = 4
    micro_batch: int = 512
    gamma: float = 0.995
    gae_lambda: float = 0.95
    clip_range: float = 0.2
    trust_region: TrustRegion = "ppo"
    dual_clip: float = 3.0
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
    scale_rewards: bool = False
    ema_decay: float = 0.0
    train_encoder: bool = False
    random_shift: int = 0

    def __post_init__(self):
        counts = ("num_iterations", "num_envs", "num_steps", "num_epochs", "num_minibatches")
        check_settings(self, "ppo", COUNT, *counts, "micro_batch", "value_width", "value_depth")
        rates = ("actor_learning_rate", "critic_learning_rate")
        check_settings(self, "ppo", POSITIVE, *rates, "clip_range")
        check_settings(self, "ppo", LIMIT, "max_grad_norm", "target_kl")
        check_settings(self, "ppo", DECAY, "gamma", "ema_decay")
        check_settings(self, "ppo", SHARE, "gae_lambda", "learning_rate_floor")
        spans = ("learning_rate_cycle", "learning_rate_warmup", "critic_warmup")
        check_settings(self, "ppo", NOT_NEGATIVE, *spans, "random_shift")
        if self.dual_clip and self.dual_clip <= 1 + self.clip_range:
            raise InputError(
                f"dual_clip must be 0 (none) or more than 1 + clip_range, not {self.dual_clip}"
            )
        if self.num_minibatches > self.num_envs * self.num_steps:
            raise InputError(
                f"num_minibatches {self.num_minibatches} is more than the "
                f"{self.num_envs * self.num_steps} chunks of a rollout (num_envs x num_steps)"
            )


class PPO:
    """Estimator, critic and their optimisers; `iterate` is one rollout and one update.

    Args:
        from_scratch: the policy has no normaliser from demonstrations, so its own follows the rollouts, between an
            update and the next rollout.

    Raises:
        InputError: `random_shift` in several processes.
    """

    def __init__(
        self,
        policy: FlowPolicy,
        estimator: nn.Module,
        env: VecEnv,
        config: PPOConfig,
        generator: torch.Generator,
        from_scratch: bool = False,
    ):
        if config.random_shift and distributed.world_size() > 1:
            # Each would draw as many shifts as episodes of its own ended, and then other minibatches than its peers.
            raise InputError(
                "ppo.random_shift needs one process: leave it out, or start without torchrun"
            )
        self.from_scratch = from_scratch
        self.policy, self.estimator, self.config, self.generator = (
            policy,
            estimator,
            config,
            generator,
        )
        policy.encoders.requires_grad_(config.train_encoder)
        device = policy.action_low.device
        self.critic = ValueFunction(policy.num_features, config.value_width, config.value_depth)
        self.critic.to(device)
        keeps_raw = config.train_encoder or from_scratch
        self.collector = Collector(
            env,
            policy.spec.execute_horizon,
            config.gamma,
            self._raw if keeps_raw else self._features,
            policy.spec.prefix_horizon,
            device,
        )
        self.actor_optimizer = torch.optim.AdamW(
            estimator.parameter_groups(config.actor_learning_rate), weight_decay=0.0, fused=True
        )
        self.critic_optimizer = torch.optim.AdamW(
            self.critic.parameters(), lr=config.critic_learning_rate, weight_decay=1e-5, fused=True
        )
        self.average = copy.deepcopy(policy) if config.ema_decay else policy
        self.obs_statistics = RunningStatistics(len(policy.normalizer.mean))
        self.return_statistics = RunningStatistics(1)
        self.discounted_return = torch.zeros(env.num_envs, device=device)
        self.iteration = 0

    def _raw(self, obs: TensorDict) -> TensorDict:
        return shift_images(obs, self.policy.encoders, self.config.random_shift, self.generator)

    def _features(self, obs: TensorDict) -> TensorDict:
        return {"features": self.policy.features(self._raw(obs))}

    def _features_of(self, obs: TensorDict) -> Tensor:
        """Features (T, N, F) of what a rollout saw (T, N, ...), one step at a time: pictures are large."""
        steps = len(next(iter(obs.values())))
        return torch.stack([self.policy.features(select(obs, step)) for step in range(steps)])

    def collect(self) -> Rollout:
        """One rollout with the present weights."""
        return self.collector.collect(
            lambda obs: self.estimator.sample(obs, self.generator), self.config.num_steps
        )

    def iterate(self) -> dict[str, float]:
        """One rollout and one update. Returns metrics.

        Raises:
            RunFailed: a loss or a gradient is not finite or has exploded; the weights are those of before that step.
        """
        config = self.config
        start, looked_at = time.perf_counter(), 0
        if self.from_scratch and self.policy.normalizer.fields and not self.obs_statistics.count:
            first = self.collect()  # only to see what observations look like
            self._update_normalizer(first)
            looked_at = first.num_env_steps
        rollout = self.collect()
        middle = time.perf_counter()
        self._set_learning_rates()
        metrics = self.update(rollout)
        self.iteration += 1
        self.estimator.anneal(self.iteration / config.num_iterations)
        if self.from_scratch:
            self._update_normalizer(rollout)
        if config.ema_decay:
            self._update_average()
        counts = rollout.metrics(looked_at)
        end = time.perf_counter()
        return {
            **counts,
            **metrics,
            "time/rollout_s": middle - start,
            "time/update_s": end - middle,
            "time/steps_per_second": counts["rollout/env_steps"] / (end - start),
        }

    def update(self, rollout: Rollout) -> dict[str, float]:
        """Fit actor and critic to one rollout."""
        config = self.config
        trace = flatten({**rollout.trace, "executed": rollout.executed})
        obs = rollout.obs
        with torch.no_grad():
            features = self._features_of(rollout.obs)
            if not config.train_encoder:  # encode and normalise once, not in every epoch
                obs = {k: v for k, v in obs.items() if k in ("prefix", "inference_delay")}
                obs["features"] = features
            value = self.critic(features)
            next_value = self.critic(self._features_of(rollout.final_obs))
        advantage, returns = generalized_advantages(
            self._scaled(rollout),
            value,
            next_value,
            rollout.discount,
            rollout.terminated,
            rollout.truncated,
            config.gae_lambda,
        )
        mean, std = mean_std(advantage)
        advantage = ((advantage - mean) / (std + 1e-8)).flatten()
        explained = 1 - (mean_std(returns - value)[1] / mean_std(returns)[1].clamp_min(1e-4)) ** 2
        num_envs = returns.shape[1]
        obs, returns = flatten(obs), returns.flatten()

        train_actor = self.iteration >= config.critic_warmup
        total = len(returns) * distributed.world_size()
        size = -(-total // config.num_minibatches)
        seen: dict[str, list[float]] = {}
        approx_kl, actor_steps = 0.0, 0
        for _ in range(config.num_epochs):
            order = torch.randperm(total, generator=self.generator, device=self.generator.device)
            for batch in order.split(size):
                rows = own_rows(batch, num_envs)
                metrics = self._critic_step(obs, returns, rows, len(batch))
                if train_actor and approx_kl <= config.target_kl:
                    actor = self._actor_step(obs, trace, advantage, rows, len(batch))
                    approx_kl, actor_steps = actor["train/approx_kl"], actor_steps + 1
                    metrics |= actor
                for name, number in metrics.items():
                    seen.setdefault(name, []).append(number)
        few = torch.arange(min(SPREAD_OBS, len(returns)), device=returns.device)
        return {name: sum(numbers) / len(numbers) for name, numbers in seen.items()} | {
            "train/actor_steps": float(actor_steps),
            "train/explained_variance": explained.item(),
            "train/sample_spread": self.sample_spread(select(obs, few)),
            **self.estimator.diagnostics(select(obs, few), select(trace, few)),
        }

    def state_dict(self) -> dict:
        """Everything that the next iteration depends on, but the environments."""
        return {name: getattr(self, name).state_dict() for name in STATEFUL} | {
            "generator": self.generator.get_state(),
            "discounted_return": self.discounted_return,
            "iteration": self.iteration,
        }

    def load_state_dict(self, state: dict) -> None:
        """Undo `state_dict`."""
        for name in STATEFUL:
            getattr(self, name).load_state_dict(state[name])
        self.generator.set_state(state["generator"])
        self.discounted_return = state["discounted_return"].to(self.discounted_return.device)
        self.iteration = state["iteration"]

    def _scaled(self, rollout: Rollout) -> Tensor:
        """Rewards (T, N), divided by the spread of the discounted return up to and with this rollout."""
        if not self.config.scale_rewards:
            return rollout.reward
        seen = []
        ended = rollout.terminated | rollout.truncated
        for reward, discount, end in zip(rollout.reward, rollout.discount, ended, strict=True):
            self.discounted_return = discount * self.discounted_return + reward
            seen.append(self.discounted_return)
            self.discounted_return = torch.where(end, 0.0, self.discounted_return)
        self.return_statistics.add(torch.stack(seen).flatten()[:, None])
        return rollout.reward / self.return_statistics.std.clamp_min(1e-4).to(rollout.reward)

    def _update_normalizer(self, rollout: Rollout) -> None:
        normalizer = self.policy.normalizer
        if not normalizer.fields:  # images only
            return
        flat = torch.cat([rollout.obs[name] for name in normalizer.fields], dim=-1).flatten(0, 1)
        self.obs_statistics.add(flat)
        normalizer.mean.copy_(self.obs_statistics.mean)
        normalizer.std.copy_(self.obs_statistics.std.clamp_min(1e-2))

    @torch.no_grad()
    def _update_average(self) -> None:
        """A short memory at first; statistics are copied, not averaged."""
        decay = min(self.config.ema_decay, (1 + self.iteration) / (10 + self.iteration))
        for mean, parameter in zip(
            self.average.parameters(), self.policy.parameters(), strict=True
        ):
            mean.lerp_(parameter, 1 - decay)
        for mine, theirs in zip(self.average.buffers(), self.policy.buffers(), strict=True):
            mine.copy_(theirs)

    def _set_learning_rates(self) -> None:
        factor = learning_rate_factor(self.config, self.iteration)
        for optimizer in (self.actor_optimizer, self.critic_optimizer):
            for group in optimizer.param_groups:
                group["lr"] = factor * group.setdefault("peak_lr", group["lr"])

    @torch.no_grad()
    def sample_spread(self, obs: TensorDict) -> float:
        """Spread of the chunks drawn for one observation, in normalised units: near zero, the modes have collapsed."""
        generator = torch.Generator(self.generator.device).manual_seed(self.iteration)
        repeated = {k: v.repeat_interleave(SPREAD_SAMPLES, 0) for k, v in obs.items()}
        chunk, _ = self.estimator.sample(repeated, generator)
        chunk = self.policy.normalize_action(chunk).unflatten(0, (-1, SPREAD_SAMPLES))
        return chunk.std(dim=1).mean().item()

    def _critic_step(
        self, obs: TensorDict, returns: Tensor, rows: Tensor, count: int
    ) -> dict[str, float]:
        """One step on rows of this process, of `count` over all processes."""
        self.critic_optimizer.zero_grad(set_to_none=True)
        loss = returns.new_zeros(())
        for part in parts(rows, self.config.micro_batch):
            with torch.no_grad():  # the critic does not train the encoder
                features = self.policy.features(select(obs, part))
            one = 0.5 * (self.critic(features) - returns[part]).square().sum() / count
            one.backward()
            loss += one.detach()
        value = distributed.total(loss).item()
        apply_gradient(self.critic_optimizer, value, self.config.max_grad_norm, "value loss")
        return {"train/value_loss": value}

    def _actor_step(
        self, obs: TensorDict, trace: TensorDict, advantage: Tensor, rows: Tensor, count: int
    ) -> dict[str, float]:
        config = self.config
        self.actor_optimizer.zero_grad(set_to_none=True)
        sums = advantage.new_zeros(4)  # of surrogate, entropy, KL estimate, clipped
        has_entropy = False
        for part in parts(rows, config.micro_batch):
            log_ratio, entropy = self.estimator.evaluate(select(obs, part), select(trace, part))
            gain = surrogate(
                log_ratio,
                advantage[part],
                config.clip_range,
                config.trust_region,
                config.dual_clip,
            )
            log_ratio = log_ratio.detach().view(len(part), -1)
            loss = -gain.view(len(part), -1).mean(1).sum() / count
            bonus = loss.new_zeros(())
            if entropy is not None:
                has_entropy, bonus = True, entropy.sum() / count
            (loss - config.entropy_coef * bonus).backward()
            ratio = log_ratio.exp()
            clipped = ((ratio - 1).abs() > config.clip_range).float()
            kl = (ratio - 1 - log_ratio).clamp_max(KL_SHARE * config.target_kl)
            sums += torch.stack(
                [
                    loss.detach(),
                    bonus.detach(),
                    kl.mean(1).sum() / count,
                    clipped.mean(1).sum() / count,
                ]
            )
        loss, entropy, approx_kl, clip_fraction = distributed.total(sums).tolist()
        norm = apply_gradient(self.actor_optimizer, loss, config.max_grad_norm, "policy loss")
        return {
            "train/policy_loss": loss,
            "train/approx_kl": approx_kl,
            "train/clip_fraction": clip_fraction,
            "train/actor_grad_norm": norm,
        } | ({"train/entropy": entropy} if has_entropy else {})


def own_rows(rows: Tensor, num_envs: int) -> Tensor:
    """Rows of this process's flattened rollout (T * N), from numbers into the rollout of all (T * R * N)."""
    if distributed.world_size() == 1:
        return rows
    everywhere = num_envs * distributed.world_size()
    step, env = rows // everywhere, rows % everywhere
    mine = env // num_envs == distributed.rank()
    return (step * num_envs + env % num_envs)[mine]


def parts(rows: Tensor, size: int) -> tuple[Tensor, ...]:
    """Rows in parts of a size; none where this process has no row of a minibatch."""
    return rows.split(size) if len(rows) else ()


def mean_std(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased standard deviation over all processes."""
    count = values.numel() * distributed.world_size()
    mean = distributed.total(values.sum()).to(values.device) / count
    squares = distributed.total((values - mean).square().sum()).to(values.device)
    return mean, (squares / max(count - 1, 1)).sqrt()


def learning_rate_factor(config: PPOConfig, iteration: int) -> float:
    """Share of the peak rates in an iteration: linear from the floor, half a cosine back to it, cycle after cycle."""
    cycle, warmup = config.learning_rate_cycle or config.num_iterations, config.learning_rate_warmup
    phase, floor = iteration % cycle, config.learning_rate_floor
    if phase < warmup:
        return floor + (1 - floor) * (phase + 1) / warmup
    done = (phase - warmup) / max(cycle - warmup, 1)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))


def surrogate(
    log_ratio: Tensor,
    advantage: Tensor,
    clip_range: float,
    trust_region: TrustRegion = "ppo",
    dual_clip: float = 0.0,
) -> Tensor:
    """What each ratio r is worth, to be maximised; elementwise, so that no action's advantage touches another's.

    ppo: min(r A, clip(r, 1 - c, 1 + c) A), and with a dual clip d (arXiv 1912.09729) at least d A where A < 0.
    spo (arXiv 2401.16025): r A - |A| (r - 1)^2 / (2 c), stationary at r = 1 + sign(A) c. aspo (FPO++, arXiv
    2602.02481): ppo where A >= 0, spo where A < 0.

    Args:
        log_ratio: (B,), or (B, S) with S ratios that share an action's advantage.
        advantage: (B,).
    """
    advantage = advantage.view(-1, *(1,) * (log_ratio.dim() - 1))
    ratio = log_ratio.exp()
    clipped = torch.min(ratio * advantage, ratio.clamp(1 - clip_range, 1 + clip_range) * advantage)
    if dual_clip:
        clipped = torch.where(advantage < 0, torch.max(clipped, dual_clip * advantage), clipped)
    if trust_region == "ppo":
        return clipped
    pulled = ratio * advantage - advantage.abs() * (ratio - 1).square() / (2 * clip_range)
    return pulled if trust_region == "spo" else torch.where(advantage >= 0, clipped, pulled)

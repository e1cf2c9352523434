"""RLDT, density transport (arXiv 2606.08602): particles of the flow move along Stein's field of a learned critic.

    a†    = x_t + (1 - t) v(x_t, t)                            landing point of a state of the Euler chain
    phi_i = 1/P sum_j [ k_ij g_j + T k_ij (x_i - a_j) / h_i ]  field at the landing points x_i, from the P final
            k_ij = exp(-|x_i - a_j|^2 / (2 h_i)),              actions a_j of the same observation, with
            h_i  = median_j |x_i - a_j|^2 / (2 ln(P + 1))      g_j = grad_a Q(s, a_j)
    loss  = - <v, phi> w  +  l1 |a† - a|^2 w^2  +  l2 |v(x') - v_ref(x')|^2,     w = 1 / (K (1 - t))

Gradient flows through two calls of the network per particle, v at (x_t, t) and at (x', t') on a fresh straight line
to the final action, never through the chain. Norms are sums over the chunk. The critic Q is in `rldt_critic.py`.

Deviations from the paper and the released code; the `paper` presets undo those that are settings:
- Time limits bootstrap from the final observation (`time_limit_is_terminal` for the released rule). Rewards are
  discounted inside a chunk, and by gamma ** (executed steps) across it.
- The critic sees actions as they are executed, held to the joint limits, its next ones as well; its gradient never
  pushes beyond them.
- Steps of the chain and t' are stratified over the particles of a state: the same expectation, less variance.
- v_ref is the policy of the previous iteration, as in the code, in the `paper` presets; the paper's words suggest the
  base policy, which is what `clean` takes: without it success on `lift` falls again after its peak.
- Values of next states are held to no range, but on `insert`; the released code holds them to that of returns on
  sparse tasks.
- Rollouts know no inference delay, also of a policy that continues given actions: only the prefix loss keeps that.
- The landing point is that of the differentiated call: no second call, the same number.
- Actions of a chunk that are not executed get no field (the released code pads the wrong axis; it never showed).
- Segments of a block are dealt to the members of the ensemble in turn, so that each sees fresh and old ones.
- Exploration noise is scaled per element, not by the norm of the whole chunk, unless `explore_by_norm`.
- Not built: x-prediction, the `hybrid` field, Langevin and resampling exploration (off in every published config).
"""

import copy
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from flow_policy_rl import distributed, flow
from flow_policy_rl.algorithms.rldt_critic import Critic, CriticConfig
from flow_policy_rl.buffers import ChunkReplay, draw, flat, nested, rollout_segments
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
from flow_policy_rl.gradients import apply_gradient, require_sound
from flow_policy_rl.policy import FlowPolicy, Obs
from flow_policy_rl.rollout import Collector
from sim.vec_env import VecEnv

COLLAPSED = 0.1  # share of the base policy's sample spread below which a warning is printed
STATEFUL = ("policy", "reference", "base", "actor_optimizer", "replay")
SPREAD_STATES = 128  # on which the variety of the policy is compared with that of the base policy


@dataclass(frozen=True)
class TransportConfig:
    """Stein's transport field.

    Attributes:
        kernel: `rbf` over the executed chunk; `per_action`, one per control step of it (block-diagonal), for long
            chunks; `delta`, no kernel: the critic's gradient at the landing point.
        temperature: T, weight of the repulsion between particles.
        temperature_mode: `relative` to the mean norm of the gradients; `unit_gradient`: they are divided by it;
            `absolute`.
        row_normalized: divide by the sum of a particle's kernel weights instead of P, so that the step is as long
            for any P.
        bandwidth: h (None: the median rule).
    """

    kernel: Literal["rbf", "per_action", "delta"] = "rbf"
    temperature: float = 1e-3
    temperature_mode: Literal["relative", "unit_gradient", "absolute"] = "relative"
    row_normalized: bool = False
    bandwidth: float | None = None

    def __post_init__(self):
        check_settings(self, "rldt.transport", NOT_NEGATIVE, "temperature")
        check_settings(self, "rldt.transport", POSITIVE, "bandwidth")


@dataclass(frozen=True)
class RLDTConfig:
    """Density transport.

    Attributes:
        num_iterations: rollouts and updates.
        num_envs: N, environments side by side, over all processes.
        num_steps: T, chunks per environment and iteration (a segment of the replay).
        num_blocks: draws from the replay per iteration.
        segments_per_block: of each draw (None: num_envs).
        critic_steps: gradient steps of the critic per block.
        actor_steps: gradient steps of the actor per block.
        actor_share: share of a block's segments whose states an actor step sees.
        critic_warmup: first iterations, in which only the critic learns.
        replay_iterations: how many rollouts the replay holds.
        fresh_share: at least this share of a draw is from the latest rollout.
        balanced_replay: draw older segments equally often by their reward (sparse tasks).
        gamma: discount per control step.
        num_particles: P, actions per state.
        consistency_coef: l1, weight of the loss that straightens paths (landing point against action).
        constraint_coef: l2, weight of the hold on `reference`.
        reference: v_ref is the policy of the previous iteration, or the base policy.
        actor_learning_rate: of Adam.
        actor_warmup_steps: gradient steps in which it grows linearly to that.
        max_grad_norm: of the actor (inf: no clipping).
        exploration: noise on the executed chunk: by the `landing_gap` of a late step, `gaussian`, or `none`.
        exploration_scale: factor on the gap, or the standard deviation.
        explore_last_steps: the gap is measured at a random one of these last steps; at the last it is zero.
        explore_by_norm: the gap is the norm over the chunk (released code) instead of the mean square per element.
        start_noise: spread of x_0 in rollouts and particles, drawn per chunk between these two. The paper's is 1; from
            0 on, it includes where a policy deployed without noise starts.
        prefix_coef: weight of the prefix loss, for a policy that continues given actions (`spec.prefix_horizon`).
        train_encoder: image encoders learn as well, and the replay keeps images; else it keeps their features.
        transport: the transport field.
        critic: the critic ensemble.
    """

    num_iterations: int = 40
    num_envs: int = 128
    num_steps: int = 15
    num_blocks: int = 16
    segments_per_block: int | None = None
    critic_steps: int = 32
    actor_steps: int = 2
    actor_share: float = 0.125
    critic_warmup: int = 2
    replay_iterations: int = 20
    fresh_share: float = 0.33
    balanced_replay: bool = False
    gamma: float = 0.995
    num_particles: int = 8
    consistency_coef: float = 0.5
    constraint_coef: float = 0.2
    reference: Literal["previous", "base"] = "previous"
    actor_learning_rate: float = 2e-5
    actor_warmup_steps: int = 32
    max_grad_norm: float = math.inf
    exploration: Literal["landing_gap", "gaussian", "none"] = "landing_gap"
    exploration_scale: float = 1.0
    explore_last_steps: int = 2
    explore_by_norm: bool = False
    start_noise: tuple[float, float] = (1.0, 1.0)
    prefix_coef: float = 0.2
    train_encoder: bool = False
    transport: TransportConfig = field(default_factory=TransportConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)

    def __post_init__(self):
        counts = ("num_iterations", "num_envs", "num_steps", "num_blocks", "segments_per_block")
        counts += ("num_particles", "replay_iterations", "actor_steps", "critic_steps")
        check_settings(self, "rldt", COUNT, *counts, "explore_last_steps")
        check_settings(self, "rldt", POSITIVE, "actor_learning_rate")
        check_settings(self, "rldt", LIMIT, "max_grad_norm")
        weights = ("consistency_coef", "constraint_coef", "prefix_coef", "exploration_scale")
        spans = ("critic_warmup", "actor_warmup_steps")
        check_settings(self, "rldt", NOT_NEGATIVE, *weights, *spans)
        check_settings(self, "rldt", DECAY, "gamma")
        check_settings(self, "rldt", SHARE, "actor_share", "fresh_share")
        if not 0 <= self.start_noise[0] <= self.start_noise[1]:
            raise InputError(f"rldt: start_noise must be 0 <= low <= high, not {self.start_noise}")

    @property
    def num_segments(self) -> int:
        """S, segments per block."""
        return self.segments_per_block or self.num_envs

    @property
    def num_actor_segments(self) -> int:
        """Segments of a block whose states an actor step sees."""
        return max(1, round(self.actor_share * self.num_segments))


# --- the field ---


def transport_field(
    queries: Tensor, centers: Tensor, gradient: Tensor, config: TransportConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """Stein's field at `queries` (B, P, H, A), from `centers` and the critic's gradient there, of the same shape.

    Returns:
        the field, and the mean norms of its two parts.
    """
    if config.kernel == "delta":
        return gradient, {"attraction": gradient.flatten(2).norm(dim=-1).mean()}
    batch, particles = queries.shape[:2]
    per_action = config.kernel == "per_action"
    x, a, g = (
        v.transpose(1, 2).flatten(0, 1)
        if per_action
        else v.flatten(2)  # (B * H, P, A), (B, P, H * A)
        for v in (queries, centers, gradient)
    )
    origin = a.mean(1, keepdim=True)  # the field does not depend on it; float32 does
    x, a = x - origin, a - origin
    scale = g.norm(dim=-1).mean(1)[:, None, None]
    temperature = config.temperature * (scale if config.temperature_mode == "relative" else 1.0)
    if config.temperature_mode == "unit_gradient":
        g = g / scale.clamp_min(1e-12)

    square = (  # (B, P, P), all pairs by one batched product
        x.square().sum(-1, keepdim=True) + a.square().sum(-1)[:, None] - 2 * x @ a.transpose(1, 2)
    ).clamp_min(0.0)
    h = (
        median_bandwidth(square)
        if config.bandwidth is None
        else torch.full_like(square[..., :1], config.bandwidth)
    )
    k = torch.exp(-square / (2 * h))
    total = k.sum(-1, keepdim=True)
    pulled, crowd = (k @ torch.cat([g, a], -1)).chunk(2, dim=-1)
    divisor = total if config.row_normalized else particles
    attraction = pulled / divisor
    repulsion = temperature * (x * total - crowd) / h / divisor
    phi = attraction + repulsion
    if per_action:
        phi = phi.unflatten(0, (batch, -1)).transpose(1, 2)
    norms = {"attraction": attraction, "repulsion": repulsion}
    return phi.reshape(queries.shape), {n: v.norm(dim=-1).mean() for n, v in norms.items()}


def median_bandwidth(square: Tensor) -> Tensor:
    """h_i (B, P, 1) of squared distances (B, P, P): a centre at the (lower) median distance weighs 1 / (P + 1)."""
    particles = square.shape[-1]
    rank = (particles - 1) // 2
    median = square.sort(dim=-1).values[..., rank : rank + 1]  # sorting is deterministic everywhere
    return (median / (2 * math.log(particles + 1))).clamp_min(1e-8)


# --- the actor's loss ---

# (landing points, final actions) -> field, (B, P, H, A) each
TransportFn = Callable[[Tensor, Tensor], Tensor]


def actor_loss(
    policy: FlowPolicy,
    reference: FlowPolicy,
    obs: Obs,
    transport: TransportFn,
    config: RLDTConfig,
    generator: torch.Generator,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Transport, consistency and constraint of P particles per observation (B, ...)."""
    steps, particles = policy.spec.num_flow_steps, config.num_particles
    context = policy.embed(obs).repeat_interleave(particles, 0)  # encoded once per state
    count, horizon, device = len(context), policy.chunk_shape[0], context.device
    with torch.no_grad():
        noise = start_noise((count, *policy.chunk_shape), config, generator)
        fixed = context.detach()
        chain = flow.euler_chain(lambda x, t: policy.velocity(x, t, fixed), noise, steps)
        final = chain[-1]  # (B * P, H, A)
        index = stratified_steps(count, particles, steps, generator)
        t = (index / steps)[:, None].expand(-1, horizon)
        x = chain[index, torch.arange(count, device=device)]
        t_line = stratified_steps(count, particles, steps, generator) / steps
        t_line = t_line[:, None].expand(-1, horizon)
        fresh = distributed.randn(final.shape, generator)
        x_line = flow.interpolate(fresh, final, t_line)
        longest = policy.spec.prefix_horizon if config.prefix_coef else 0
        delay = draw_below(longest + 1, count, generator)[:, None]
        # (B * P, H): given in advance, clean, at t = 1
        known = torch.arange(horizon, device=device) < delay
        v_reference = reference.velocity(
            x_line, t_line, reference.embed(obs).repeat_interleave(particles, 0)
        )
    # One call for every place at which the velocity is differentiated.
    places = [(x, t), (x_line, t_line)]
    if longest:
        t_known = torch.where(known, 1.0, t_line)
        places.append((flow.interpolate(fresh, final, t_known), t_known))
    at, when = (torch.cat(parts) for parts in zip(*places, strict=True))
    v, v_line, *v_known = policy.velocity(at, when, context.repeat(len(places), 1)).chunk(
        len(places)
    )
    landing = flow.landing_point(x, v, t)
    grouped = (-1, particles)
    phi = transport(landing.detach().unflatten(0, grouped), final.unflatten(0, grouped))
    weight = 1.0 / (steps - index)  # 1 / (K (1 - t))
    curved = square_norm(landing - final) * weight.square()
    terms = {
        "transport_loss": -((v * phi.flatten(0, 1)).sum((1, 2)) * weight).mean(),
        "consistency_loss": config.consistency_coef * curved.mean(),
        "constraint_loss": config.constraint_coef * square_norm(v_line - v_reference).mean(),
    }
    if longest:
        error = (v_known[0] - flow.velocity_target(fresh, final)) * ~known.unsqueeze(-1)
        terms["prefix_loss"] = config.prefix_coef * square_norm(error).mean()
    with torch.no_grad():
        health = {
            "landing_error": (landing - final).square().mean().sqrt(),
            "reference_distance": (v_line - v_reference).square().mean().sqrt(),
            "sample_spread": sample_spread(final.unflatten(0, grouped)),
        }
    return sum(terms.values()), terms | health


def start_noise(
    shape: tuple[int, int, int], config: RLDTConfig, generator: torch.Generator
) -> Tensor:
    """x_0 (B, H, A): standard normal, scaled per chunk."""
    low, high = config.start_noise
    scale = low
    if low != high:
        scale = low + (high - low) * distributed.rand((shape[0], 1, 1), generator)
    return scale * distributed.randn(shape, generator)


def draw_below(limit: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` integers from 0 to limit - 1."""
    return (limit * distributed.rand((count,), generator)).long().clamp_max(limit - 1)


def square_norm(x: Tensor) -> Tensor:
    """Sum of squares over a chunk, (B, H, A) -> (B,)."""
    return x.square().sum((1, 2))


def stratified_steps(
    count: int, particles: int, num_flow_steps: int, generator: torch.Generator
) -> Tensor:
    """A step of the chain for each of `count` particles, spread evenly over the P particles of a state."""
    shift = distributed.rand((count,), generator)
    offset = torch.arange(count, device=shift.device) % particles + shift
    return (offset * num_flow_steps / particles).long().clamp_max(num_flow_steps - 1)


def sample_spread(actions: Tensor) -> Tensor:
    """Root mean square distance per element of the particles (B, P, H, A) of a state from their mean."""
    return (actions - actions.mean(1, keepdim=True)).square().mean().sqrt()


# --- the learner ---


class RLDT:
    """Policy, reference, critics, replay and optimisers; `iterate` is one rollout and one update.

    Several processes share environments and gradient steps. The replay of each has what all of them have seen, and
    all draw the same blocks, of which each takes its own segments.

    Raises:
        InputError: the segments of a block do not divide by processes and members.
    """

    def __init__(
        self, policy: FlowPolicy, env: VecEnv, config: RLDTConfig, generator: torch.Generator
    ):
        self.policy, self.config, self.generator = policy, config, generator
        self.average = policy  # what is evaluated: the weights themselves
        self.execute_horizon = policy.spec.execute_horizon
        device = policy.action_low.device
        require_shares(config)
        self.base = copy.deepcopy(policy).requires_grad_(False)
        self.reference = copy.deepcopy(self.base)
        self.critic = Critic(
            policy.num_features + config.critic.stage_input,
            self.execute_horizon * policy.chunk_shape[1],
            config.critic,
            device,
        )
        self.replay = ChunkReplay(config.replay_iterations * config.num_envs, device)
        encode = {} if config.train_encoder else {"encode": self._encode}
        self.collector = Collector(env, self.execute_horizon, config.gamma, **encode, device=device)
        self.actor_optimizer = torch.optim.Adam(
            [p for p in policy.parameters() if p.requires_grad],
            lr=config.actor_learning_rate,
            fused=True,
        )
        self.iteration = 0
        self.actor_updates = 0

    def _encode(self, obs: Obs) -> dict[str, Tensor]:
        return {"features": self.policy.features(obs)}

    def iterate(self) -> dict[str, float]:
        """One rollout and one update. Returns metrics."""
        start = time.perf_counter()
        rollout = self.collector.collect(self.explore, self.config.num_steps)
        middle = time.perf_counter()
        own = rollout_segments(rollout)
        everybodys = {n: distributed.gather(v, dim=1) for n, v in flat(own).items()}
        self.replay.add(everybodys)
        self.critic.observe_rewards(everybodys["reward"])
        metrics = distributed.average(self.health(own) | self.update())
        if metrics["train/spread_ratio"] < COLLAPSED:
            logging.getLogger(__name__).warning(
                "mode collapse: samples of a state keep %.1f %% of the base policy's spread",
                100 * metrics["train/spread_ratio"],
            )
        self.iteration += 1
        return {
            **rollout.metrics(),
            "rollout/exploration_std": rollout.trace["exploration_std"].mean().item(),
            **metrics,
            "time/rollout_s": middle - start,
            "time/update_s": time.perf_counter() - middle,
        }

    @torch.no_grad()
    def explore(self, obs: Obs) -> tuple[Tensor, dict[str, Tensor]]:
        """The policy's chunk with noise; the trace keeps the executed part, normalised."""
        config, policy, steps = self.config, self.policy, self.policy.spec.num_flow_steps
        chain = self._chain(policy, policy.embed(obs), self.generator)
        final = chain[-1]
        count = len(final)
        std = final.new_full((count,), config.exploration_scale)
        if config.exploration == "none":
            std = final.new_zeros(count)
        elif config.exploration == "landing_gap":
            last = min(config.explore_last_steps, steps)
            index = steps - 1 - draw_below(last, count, self.generator)
            rows = torch.arange(count, device=final.device)
            velocity = steps * (chain[index + 1, rows] - chain[index, rows])
            t = (index / steps)[:, None].expand(-1, final.shape[1])
            gap = (flow.landing_point(chain[index, rows], velocity, t) - final).flatten(1)
            size = gap.norm(dim=1) if config.explore_by_norm else gap.square().mean(1).sqrt()
            std = config.exploration_scale * size
        noise = distributed.randn(final.shape, self.generator)
        chunk = policy.denormalize_action(final + std[:, None, None] * noise)
        executed = policy.normalize_action(chunk)[:, : self.execute_horizon]
        return chunk, {"action": executed, "exploration_std": std}

    def update(self) -> dict[str, float]:
        """Blocks of critic and actor steps on the replay, then a new reference."""
        config = self.config
        train_actor = self.iteration >= config.critic_warmup
        seen: dict[str, list[Tensor]] = {}
        for _ in range(config.num_blocks):
            block = self.replay.sample(
                config.num_segments, self.generator, config.fresh_share, config.balanced_replay
            )
            batch = self.critic_batch(
                nested({n: distributed.own_rows(v, dim=1) for n, v in flat(block).items()}),
                self.generator,
            )
            for _ in range(config.critic_steps):
                record(seen, self.critic.step(batch))
            for _ in range(config.actor_steps if train_actor else 0):
                record(seen, self.actor_step(block))
        if train_actor:
            self.update_reference()
        return {f"train/{name}": torch.stack(v).mean().item() for name, v in seen.items()}

    # --- what the critic is told ---

    @torch.no_grad()
    def features(self, obs: Obs, stage: Tensor) -> Tensor:
        """What the critic sees of observations (T, S, ...), (T, S, F): the policy's features, the stage if asked."""
        features = self.policy.features({name: v.flatten(0, 1) for name, v in obs.items()})
        features = features.unflatten(0, stage.shape)
        if not self.config.critic.stage_input:
            return features
        return torch.cat([features, stage.unsqueeze(-1)], dim=-1)

    @torch.no_grad()
    def next_actions(self, final_obs: Obs, generator: torch.Generator) -> Tensor:
        """Samples of the policy after each chunk, as they would be executed: (T, S, ...) -> (T, S, M, D)."""
        obs = {name: by_segment(value) for name, value in final_obs.items()}
        segments = next(iter(final_obs.values())).shape[1]
        count = self.config.critic.num_target_actions
        context = self.policy.embed(obs).repeat_interleave(count, 0)
        action = self._held(self._chain(self.policy, context, generator)[-1]).flatten(1)
        return action.unflatten(0, (segments, -1, count)).transpose(0, 1)

    def critic_batch(self, block: dict, generator: torch.Generator) -> dict[str, Tensor]:
        """A block of segments as the critic takes it."""
        return self.critic.batch(
            block,
            self.features(block["obs"], block["return_before"]),
            self.features(block["final_obs"], block["return_after"]),
            self.next_actions(block["final_obs"], generator),
        )

    @torch.no_grad()
    def health(self, segments: dict) -> dict[str, float]:
        """How the critic judges the latest rollout before it learns from it, and how much of its variety is left."""
        generator = torch.Generator(self.generator.device).manual_seed(self.iteration)
        judged = self.critic.health(self.critic_batch(segments, generator))
        obs = {name: v.flatten(0, 1)[:SPREAD_STATES] for name, v in segments["obs"].items()}
        spread = {}
        for policy in (self.policy, self.base):
            context = policy.embed(obs).repeat_interleave(self.config.num_particles, 0)
            final = self._chain(policy, context, generator)[-1]
            spread[policy] = sample_spread(final.unflatten(0, (-1, self.config.num_particles)))
        return judged | {"train/spread_ratio": (spread[self.policy] / spread[self.base]).item()}

    # --- the actor ---

    def actor_step(self, block: dict) -> dict[str, Tensor]:
        """One gradient step on all states of a share of a block's segments."""
        config, field_metrics = self.config, {}
        rows = draw(
            torch.arange(config.num_segments, device=self.generator.device),
            config.num_actor_segments,
            self.generator,
        )
        rows = distributed.own_rows(rows)
        obs = {name: value[:, rows] for name, value in block["obs"].items()}
        features = by_segment(self.features(obs, block["return_before"][:, rows]))
        obs = {name: by_segment(value) for name, value in obs.items()}

        def transport(landing: Tensor, final: Tensor) -> Tensor:
            centers = self._executed(landing if config.transport.kernel == "delta" else final)
            gradient, agreement = self.critic.gradient(features, centers, *self._limits)
            phi, norms = transport_field(
                self._executed(landing), centers, gradient, config.transport
            )
            field_metrics.update(norms, gradient_agreement=agreement)
            idle = final.shape[2] - self.execute_horizon
            return torch.nn.functional.pad(phi, (0, 0, 0, idle))

        loss, metrics = actor_loss(
            self.policy, self.reference, obs, transport, config, self.generator
        )
        self.actor_updates += 1
        ready = min(1.0, self.actor_updates / max(1, config.actor_warmup_steps))
        self.actor_optimizer.param_groups[0]["lr"] = ready * config.actor_learning_rate
        metrics = {n: v.detach() for n, v in (metrics | field_metrics).items()}
        for name, value in metrics.items():
            require_sound(value.item(), name.replace("_", " "))
        self.actor_optimizer.zero_grad(set_to_none=True)
        (loss / distributed.world_size()).backward()
        norm = apply_gradient(self.actor_optimizer, loss.item(), config.max_grad_norm, "actor loss")
        return metrics | {"actor_grad_norm": loss.new_tensor(norm)}

    @torch.no_grad()
    def update_reference(self) -> None:
        """v_ref after an iteration."""
        if self.config.reference == "previous":
            self.reference.load_state_dict(self.policy.state_dict())

    def _executed(self, chunk: Tensor) -> Tensor:
        return chunk[..., : self.execute_horizon, :]

    @property
    def _limits(self) -> tuple[Tensor, Tensor]:
        """Joint limits (A,), normalised."""
        normalize = self.policy.normalize_action
        return normalize(self.policy.action_low), normalize(self.policy.action_high)

    def _held(self, chunk: Tensor) -> Tensor:
        """What of a normalised chunk is executed, as it would be."""
        return self._executed(chunk).clamp(*self._limits)

    def _chain(self, policy: FlowPolicy, context: Tensor, generator: torch.Generator) -> Tensor:
        """Euler chain (K + 1, B, H, A) from fresh noise."""
        noise = start_noise((len(context), *policy.chunk_shape), self.config, generator)
        return flow.euler_chain(
            lambda x, t: policy.velocity(x, t, context), noise, policy.spec.num_flow_steps
        )

    # --- resume ---

    def state_dict(self) -> dict:
        """Everything that the next iteration depends on, but the environments."""
        return {name: getattr(self, name).state_dict() for name in STATEFUL} | {
            **self.critic.state_dict(),
            "generator": self.generator.get_state(),
            "iteration": self.iteration,
            "actor_updates": self.actor_updates,
        }

    def load_state_dict(self, state: dict) -> None:
        """Undo `state_dict`."""
        for name in STATEFUL:
            getattr(self, name).load_state_dict(state[name])
        self.critic.load_state_dict(state)
        self.generator.set_state(state["generator"])
        self.iteration, self.actor_updates = state["iteration"], state["actor_updates"]


def require_shares(config: RLDTConfig) -> None:
    """Every process gets as many segments as the others, and of these every member of the ensemble.

    Raises:
        InputError: they do not divide.
    """
    processes = distributed.world_size()
    members = config.critic.num_critics if config.critic.split_data else 1
    if config.num_segments % (processes * members):
        raise InputError(
            f"rldt: {config.num_segments} segments per block do not split into {processes * members} equal shares "
            f"({processes} processes x {members} critics, critic.split_data)"
        )
    if config.num_actor_segments % processes:
        raise InputError(
            f"rldt: the {config.num_actor_segments} segments of an actor step (actor_share {config.actor_share:g} of "
            f"{config.num_segments}) do not divide by {processes} processes"
        )


def by_segment(values: Tensor) -> Tensor:
    """(T, S, ...) -> (S * T, ...): a process's segments stay together, as `distributed` wants rows."""
    return values.transpose(0, 1).flatten(0, 1)


def record(seen: dict[str, list[Tensor]], metrics: dict[str, Tensor]) -> None:
    """Keep the metrics of a gradient step for their mean."""
    for name, value in metrics.items():
        seen.setdefault(name, []).append(value)

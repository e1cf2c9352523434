"""The critic of RLDT: an ensemble on (features of the observation, executed chunk), fitted by TD(lambda).

    y     = r + gamma^h [ (1 - lambda) V(s') + lambda y' ]     along replayed segments, `advantages.lambda_returns`
    V(s') = min_e or mean_e Q_e(s', a'), mean over a' ~ policy, Q of the target network
    loss  = sum_e mean |Q_e(s, a) - y|^2                        each member on its own share of the segments

It knows tensors alone: what an observation's features are and what the policy would do next, `rldt.py` says.
Its deviations from the released code are listed there.
"""

import copy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flow_policy_rl import distributed
from flow_policy_rl.advantages import lambda_returns
from flow_policy_rl.errors import COUNT, DECAY, POSITIVE, SHARE, InputError, check_settings
from flow_policy_rl.gradients import require_sound
from flow_policy_rl.networks import CriticEnsemble


@dataclass(frozen=True)
class CriticConfig:
    """The critic ensemble.

    Attributes:
        num_critics: members of the ensemble.
        width: hidden units per layer.
        depth: hidden layers.
        layer_norm: normalise each hidden layer.
        init_std: spread of the initial weights (None: 1 / sqrt(inputs)).
        learning_rate: of AdamW.
        target_decay: of the target network, per gradient step.
        split_data: each member is fitted to its own share of the segments.
        target: how the members' values become one target.
        value_low: what next states are worth is held to at least this (None: not; divided as rewards are, with
            `normalize_reward`), e.g. the least that returns can be: the released rule on sparse tasks, which taught
            less on two of ours (docs/log.md).
        value_high: the same for at most.
        num_target_actions: policy samples per next state.
        td_lambda: per chunk.
        normalize_reward: divide by a running mean of |chunk reward|.
        stage_input: the critic also sees the reward that the episode has collected so far.
        time_limit_is_terminal: the released rule; biased.
    """

    num_critics: int = 2
    width: int = 256
    depth: int = 3
    layer_norm: bool = False
    init_std: float | None = None
    learning_rate: float = 1e-3
    target_decay: float = 0.995
    split_data: bool = True
    target: Literal["min", "mean"] = "min"
    value_low: float | None = None
    value_high: float | None = None
    num_target_actions: int = 2
    td_lambda: float = 0.5
    normalize_reward: bool = False
    stage_input: bool = False
    time_limit_is_terminal: bool = False

    def __post_init__(self):
        counts = ("num_critics", "width", "depth", "num_target_actions")
        check_settings(self, "rldt.critic", COUNT, *counts)
        check_settings(self, "rldt.critic", POSITIVE, "learning_rate", "init_std")
        check_settings(self, "rldt.critic", DECAY, "target_decay")
        check_settings(self, "rldt.critic", SHARE, "td_lambda")
        low, high = self.value_low, self.value_high
        if low is not None and high is not None and not low < high:
            raise InputError(f"rldt.critic: need value_low < value_high, not {low:g} and {high:g}")


class Critic:
    """The ensemble with its optimiser, its target network and the scale of rewards.

    T chunks of S segments, F features, D numbers in an executed chunk (h * A, normalised), M actions per next state.

    Args:
        num_features, action_size: F and D.
    """

    def __init__(
        self, num_features: int, action_size: int, config: CriticConfig, device: torch.device
    ):
        self.config = config
        self.ensemble = CriticEnsemble(
            num_features,
            action_size,
            config.num_critics,
            config.width,
            config.depth,
            config.layer_norm,
            config.init_std,
        ).to(device)
        self.target = copy.deepcopy(self.ensemble).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self.ensemble.parameters(), lr=config.learning_rate, weight_decay=0.0, fused=True
        )
        self.reward_scale = 0.0

    def observe_rewards(self, reward: Tensor, rate: float = 0.01) -> None:
        """Let the scale follow the chunk rewards (T, S) of a rollout, with `normalize_reward`."""
        if not self.config.normalize_reward:
            return
        for row in reward.abs().mean(1).tolist():
            if row > 0:
                self.reward_scale = (
                    (1 - rate) * self.reward_scale + rate * row if self.reward_scale else row
                )

    def batch(
        self, block: dict, features: Tensor, next_features: Tensor, next_action: Tensor
    ) -> dict[str, Tensor]:
        """What is the same in every gradient step on a block of segments.

        Args:
            block: from the replay, `action` (T, S, h, A), `reward`, `discount`, `terminated`, `truncated` (T, S).
            features, next_features: (T, S, F).
            next_action: (T, S, M, D).
        """
        terminated, truncated = block["terminated"], block["truncated"]
        if self.config.time_limit_is_terminal:
            terminated = terminated | truncated
        return {
            "features": features,
            "action": block["action"].flatten(2),
            "reward": block["reward"] / (self.reward_scale or 1.0),
            "discount": block["discount"],
            "terminated": terminated,
            "truncated": truncated,
            "next_features": next_features,
            "next_action": next_action,
        }

    @torch.no_grad()
    def targets(self, batch: dict[str, Tensor]) -> Tensor:
        """TD(lambda) targets (T, S)."""
        config = self.config
        shape = batch["reward"].shape
        context = self.target.embed(batch["next_features"].flatten(0, 1))
        q = self.target(context, batch["next_action"].flatten(0, 2))
        value = q.amin(0) if config.target == "min" else q.mean(0)
        value = value.unflatten(0, (*shape, -1)).mean(-1)
        if config.value_low is not None or config.value_high is not None:
            value = value.clamp(config.value_low, config.value_high)
        ends = batch["terminated"], batch["truncated"]
        return lambda_returns(batch["reward"], value, batch["discount"], *ends, config.td_lambda)

    def step(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """One gradient step of every member, and of the target network. Returns metrics.

        Raises:
            RunFailed: the loss is not finite or has exploded; no weight was changed.
        """
        config = self.config
        targets = self.targets(batch)
        shares = config.num_critics if config.split_data else 1

        def share(x: Tensor) -> Tensor:
            """(T, S, ...) to one part per member, (E, T * S / E, ...), or to (1, T * S, ...) for all."""
            return x.unflatten(1, (-1, shares)).movedim(2, 0).flatten(1, 2)

        context = self.ensemble.embed(share(batch["features"]))
        q = self.ensemble(context, share(batch["action"]))
        loss = (q - share(targets)).square().mean(1).sum()
        require_sound(loss.item(), "critic loss")
        self.optimizer.zero_grad(set_to_none=True)
        (loss / distributed.world_size()).backward()
        distributed.sum_gradients(self.ensemble.parameters())
        self.optimizer.step()
        torch._foreach_lerp_(
            list(self.target.parameters()),
            list(self.ensemble.parameters()),
            1 - config.target_decay,
        )
        return {"critic_loss": loss.detach(), "q_mean": q.detach().mean()}

    @torch.no_grad()
    def health(self, batch: dict[str, Tensor]) -> dict[str, float]:
        """How it judges a rollout that it has not learned from, against what that rollout achieved."""
        shape = batch["reward"].shape

        def mean_q(features: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
            q = self.ensemble(self.ensemble.embed(features.flatten(0, 1)), action)
            return q.mean(0).view(shape), (q - q.mean(0)).square().mean().sqrt()

        q, disagreement = mean_q(batch["features"], batch["action"].flatten(0, 1))
        beyond, _ = mean_q(batch["next_features"], batch["next_action"][:, :, 0].flatten(0, 1))
        ends = batch["terminated"], batch["truncated"]
        achieved = lambda_returns(batch["reward"], beyond, batch["discount"], *ends, 1.0)
        explained = 1 - (achieved - q).var() / achieved.var().clamp_min(1e-8)
        return {
            "train/q_bias": (q - achieved).mean().item(),
            "train/q_explained_variance": explained.item(),
            "train/q_disagreement": disagreement.item(),
        }

    def gradient(
        self, features: Tensor, actions: Tensor, low: Tensor, high: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradient of the members' mean at actions, of the same shape, and the mean cosine between members.

        The critic is asked at the action that would be executed; where that is the joint limit, no push beyond it.

        Args:
            features: (B, F).
            actions: (B, P, h, A), normalised.
            low, high: (A,), joint limits, normalised.
        """
        with torch.no_grad():
            context = self.ensemble.embed(features)
        held = actions.clamp(low, high)
        members = held.flatten(0, 1).flatten(1).expand(len(context), -1, -1).clone()
        q = self.ensemble(context, members.requires_grad_())
        (parts,) = torch.autograd.grad(q.mean(0).sum(), members)  # (E, B * P, D)
        gradient = parts.sum(0).view_as(actions)
        outward = ((held >= high) & (gradient > 0)) | ((held <= low) & (gradient < 0))
        unit = torch.nn.functional.normalize(parts, dim=-1)
        pairs = max(1, len(parts) * (len(parts) - 1))
        agreement = (unit.sum(0).square().sum(-1).mean() - len(parts)) / pairs
        return gradient.masked_fill(outward, 0.0), agreement

    def state_dict(self) -> dict:
        """What the next step depends on."""
        return {
            "critic": self.ensemble.state_dict(),
            "target": self.target.state_dict(),
            "critic_optimizer": self.optimizer.state_dict(),
            "reward_scale": self.reward_scale,
        }

    def load_state_dict(self, state: dict) -> None:
        """Undo `state_dict`; other entries are somebody else's."""
        self.ensemble.load_state_dict(state["critic"])
        self.target.load_state_dict(state["target"])
        self.optimizer.load_state_dict(state["critic_optimizer"])
        self.reward_scale = state["reward_scale"]

"""Flow-matching imitation: regress the velocity field on demonstrated chunks (Lipman et al., arXiv 2210.02747).

    loss = E | v(x_t, t, obs) - (x_1 - x_0) |^2,   x_1 a demonstrated chunk, x_0 ~ N(0, I), t ~ 2 (1 - t) on (0, 1)

Flow times near the noise count more, as in pi_0 (arXiv 2410.24164): there the observation has to say what the chunk is.

With a prefix horizon P (training-time real-time chunking, arXiv 2512.05964) the first d ~ U{0..P} actions of a chunk
are clean, at flow time 1, and do not count in the loss.

The weights that count are an exponential moving average of those that are trained.
"""

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flow_policy_rl import flow
from flow_policy_rl.data.demonstrations import ChunkDataset
from flow_policy_rl.errors import COUNT, DECAY, NOT_NEGATIVE, POSITIVE, check_settings
from flow_policy_rl.networks import shift_images
from flow_policy_rl.policy import FlowPolicy, Obs


@dataclass(frozen=True)
class BCConfig:
    """Flow-matching pre-training.

    Attributes:
        num_steps: gradient steps.
        batch_size: chunks per step.
        learning_rate: peak; a cosine takes it to a tenth.
        weight_decay: of AdamW.
        ema_decay: of the moving average of the weights.
        held_out: share of episodes kept out of training for the held-out loss.
        random_shift: move each training picture by up to so many pixels.
    """

    num_steps: int = 3000
    batch_size: int = 256
    learning_rate: float = 1e-3
    weight_decay: float = 1e-6
    ema_decay: float = 0.995
    held_out: float = 0.1
    random_shift: int = 0

    def __post_init__(self):
        check_settings(self, "bc", COUNT, "num_steps", "batch_size")
        check_settings(self, "bc", POSITIVE, "learning_rate")
        check_settings(self, "bc", NOT_NEGATIVE, "weight_decay", "random_shift")
        check_settings(self, "bc", DECAY, "ema_decay", "held_out")


def cfm_loss(policy: FlowPolicy, obs: Obs, x_1: Tensor, x_0: Tensor, t: Tensor) -> Tensor:
    """Conditional flow-matching loss per sample, (B,): mean square over the chunk. x in normalised units, t (B, H).

    Actions at t = 1 are known and do not count.
    """
    velocity = policy.velocity_field(flow.interpolate(x_0, x_1, t), t, policy.embed(obs))
    error = (velocity - flow.velocity_target(x_0, x_1)).square().mean(dim=2)
    counts = (t < 1).float()
    return (error * counts).sum(dim=1) / counts.sum(dim=1)


def flow_times(batch: int, generator: torch.Generator) -> Tensor:
    """Where the loss is taken, (batch, 1) in [0, 1), density 2 (1 - t)."""
    return 1 - (1 - torch.rand(batch, 1, generator=generator)).sqrt()


class Imitation:
    """Raw and averaged weights, their optimiser and random numbers; `step` is one gradient step.

    Normalisers and action range are those of the training episodes.
    """

    def __init__(
        self,
        policy: FlowPolicy,
        data: ChunkDataset,
        config: BCConfig,
        generator: torch.Generator,
    ):
        self.policy, self.config, self.generator = policy, config, generator
        self.training, self.held_out = data.split(config.held_out)
        if policy.normalizer.fields:
            policy.normalizer.fit(self.training.obs)
        policy.fit_action_range(self.training.actions)
        self.average = copy.deepcopy(policy).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            policy.parameters(),
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.num_steps = 0

    def step(self) -> Tensor:
        """One gradient step; returns the loss before it."""
        config = self.config
        done = min(self.num_steps / config.num_steps, 1)
        rate = config.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))
        self.optimizer.param_groups[0]["lr"] = rate
        rows = torch.randint(len(self.training), (config.batch_size,), generator=self.generator)
        obs, chunk = self.training.batch(rows)
        obs = shift_images(obs, self.policy.encoders, config.random_shift, self.generator)
        loss = _loss(self.policy, obs, chunk, self.generator).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.num_steps += 1
        # A short memory at first, so that the average forgets the initial weights.
        decay = min(config.ema_decay, (1 + self.num_steps) / (10 + self.num_steps))
        for mean, parameter in zip(
            self.average.parameters(), self.policy.parameters(), strict=True
        ):
            mean.lerp_(parameter.detach(), 1 - decay)
        return loss.detach()

    def losses(self, loss: Tensor) -> dict[str, float]:
        """Metrics: the batch's loss, and that of the averaged weights on unseen episodes."""
        metrics = {"train/cfm_loss": loss.item()}
        if len(self.held_out):
            metrics["eval/cfm_loss"] = held_out_loss(self.average, self.held_out)
        return metrics

    def state_dict(self) -> dict:
        """Everything that the next step depends on."""
        return {
            "policy": self.policy.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "num_steps": self.num_steps,
        }

    def load_state_dict(self, state: dict) -> None:
        """Undo `state_dict`."""
        for name in ("policy", "average", "optimizer"):
            getattr(self, name).load_state_dict(state[name])
        self.generator.set_state(state["generator"])
        self.num_steps = state["num_steps"]


@torch.no_grad()
def held_out_loss(policy: FlowPolicy, data: ChunkDataset, seed: int = 0) -> float:
    """Loss on unseen episodes, with the same noise and times at every call."""
    generator = torch.Generator().manual_seed(seed)
    # An encoder's activations are larger than its pictures.
    rows = torch.arange(len(data)).split(128 if policy.encoders else 1024)
    losses = [_loss(policy, *data.batch(part), generator) for part in rows]
    return torch.cat(losses).mean().item()


def _loss(policy: FlowPolicy, obs: Obs, chunk: Tensor, generator: torch.Generator) -> Tensor:
    x_1 = policy.normalize_action(chunk)
    x_0 = torch.randn(x_1.shape, generator=generator)
    t = flow_times(len(x_1), generator).expand(x_1.shape[:2])
    if policy.spec.prefix_horizon:
        delay = torch.randint(policy.spec.prefix_horizon + 1, (len(x_1), 1), generator=generator)
        t = torch.where(torch.arange(x_1.shape[1]) < delay, 1.0, t)
    return cfm_loss(policy, obs, x_1, x_0, t)

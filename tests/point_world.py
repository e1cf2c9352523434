"""A world without physics, for algorithms: a point between two goals, on a saddle of value."""

from dataclasses import dataclass

import numpy as np
import torch

from flow_policy_rl.algorithms.bc import cfm_loss
from flow_policy_rl.policy import FlowPolicy, NetworkConfig
from flow_policy_rl.spec import ObservationField, PolicySpec
from sim.vec_env import ChunkStep

GOALS = np.array([[-1.0, 0.0], [1.0, 0.0]])
REACH = 0.2
STRIDE = 0.25  # longest move per control step


@dataclass
class PointEnv:
    """N points that start near the origin; reaching a goal is worth 1 and ends the episode, as do eight steps."""

    num_envs: int
    seed: int = 0
    episode_steps: int = 8
    first_env: int = 0

    def __post_init__(self):
        self.rng = np.random.default_rng(self.seed)
        self.position = np.zeros((self.num_envs, 2))
        self.age = np.zeros(self.num_envs, int)
        self.reached = []  # which goal, of every episode that reached one

    def reset(self, seeds=None) -> dict[str, np.ndarray]:
        self._start(np.ones(self.num_envs, bool))
        return self._observe()

    def stagger(self) -> None:
        """Time limits stay as they are: all episodes count."""

    @property
    def time_limit(self) -> int:
        return self.episode_steps

    @property
    def elapsed(self) -> np.ndarray:
        return self.age.copy()

    def _start(self, who: np.ndarray) -> None:
        self.position[who] = self.rng.uniform(-0.1, 0.1, (who.sum(), 2))
        self.age[who] = 0

    def _observe(self) -> dict[str, np.ndarray]:
        return {"position": self.position.copy()}

    def step(self, action_chunk: np.ndarray) -> ChunkStep:
        horizon, rows = action_chunk.shape[1], np.arange(self.num_envs)
        reward, valid = np.zeros((self.num_envs, horizon)), np.zeros((self.num_envs, horizon), bool)
        success, truncated = np.zeros(self.num_envs, bool), np.zeros(self.num_envs, bool)
        for h in range(horizon):
            alive = ~(success | truncated)
            move = action_chunk[:, h]
            move = move * np.minimum(1.0, STRIDE / np.linalg.norm(move, axis=1).clip(1e-9))[:, None]
            self.position += move * alive[:, None]
            self.age += alive
            distance = np.linalg.norm(self.position[:, None] - GOALS, axis=-1)
            won = alive & (distance.min(1) < REACH)
            self.reached += distance.argmin(1)[won].tolist()
            valid[:, h], reward[:, h] = alive, won
            success |= won
            truncated |= alive & ~won & (self.age >= self.episode_steps)
        final_obs = self._observe()
        self._start(success | truncated)
        nothing = np.zeros((self.num_envs, horizon, 1))
        return ChunkStep(
            obs=self._observe(),
            final_obs=final_obs,
            reward=reward,
            reward_terms={},
            valid=valid,
            terminated=success,
            truncated=truncated,
            success=success,
            diverged=np.zeros_like(success)[rows],
            states=nothing,
            commands=nothing,
        )


def point_policy(**network) -> FlowPolicy:
    """A fresh policy for the point: chunks of two moves, both executed."""
    spec = PolicySpec(
        task="point",
        robot="point",
        joint_names=("x", "y"),
        action_low=(-0.5, -0.5),
        action_high=(0.5, 0.5),
        observations=(ObservationField("position", "state", ("x", "y"), "m"),),
        control_dt=0.1,
        action_horizon=2,
        execute_horizon=2,
        num_flow_steps=4,
    )
    return FlowPolicy(spec, NetworkConfig(**network))


def demonstrated(count: int, noise: float, generator: torch.Generator):
    """Positions, and noisy chunks towards either goal, whichever: a base policy that is bimodal at the saddle."""
    position = torch.rand(count, 2, generator=generator) * torch.tensor([2.4, 1.0])
    position = position - torch.tensor([1.2, 0.5])
    side = (torch.randint(2, (count, 1), generator=generator) * 2 - 1).float()
    beyond = position[:, :1].abs() > 0.3  # past the saddle: on to the near goal
    side = torch.where(beyond, position[:, :1].sign(), side)
    way = torch.cat([side - position[:, :1], -position[:, 1:]], dim=1)
    move = STRIDE * way / way.norm(dim=1, keepdim=True).clamp_min(STRIDE)
    chunk = move[:, None] + noise * torch.randn(count, 2, 2, generator=generator)
    return {"position": position}, chunk


def weak_point_policy(generator: torch.Generator) -> FlowPolicy:
    """Imitates wavering demonstrations: it reaches a goal less than half the time."""
    torch.manual_seed(0)
    policy = point_policy(width=64, depth=2)
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    for _ in range(500):
        obs, chunk = demonstrated(256, 0.25, generator)
        x_1 = policy.normalize_action(chunk)
        t = torch.rand(256, 1, generator=generator).expand(-1, 2)
        loss = cfm_loss(policy, obs, x_1, torch.randn(x_1.shape, generator=generator), t).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return policy

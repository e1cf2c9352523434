"""Demonstrations as training windows. What they are on disk: `robomimic.py`, `lerobot.py`, `minari.py`."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from flow_policy_rl.data.robomimic import DemoLayout, Demonstrations, Episode, save
from flow_policy_rl.data.sources import load

__all__ = ["ChunkDataset", "DemoLayout", "Demonstrations", "Episode", "load", "save"]


def _tensor(values: np.ndarray) -> Tensor:
    return torch.as_tensor(values, dtype=None if values.dtype == np.uint8 else torch.float32)


class ChunkDataset:
    """Windows of H actions that follow each observation; past an episode's end its last action repeats."""

    def __init__(self, episodes: Sequence[Episode], action_horizon: int):
        self.episodes = list(episodes)
        self.action_horizon = action_horizon
        names = self.episodes[0].obs if self.episodes else {}
        self.obs = {
            name: _tensor(np.concatenate([e.obs[name] for e in self.episodes])) for name in names
        }
        lengths = [len(e.actions) for e in self.episodes]
        if not lengths:
            self.actions, self._index = (
                torch.zeros(0),
                torch.zeros(0, action_horizon, dtype=torch.long),
            )
            return
        self.actions = torch.as_tensor(
            np.concatenate([e.actions for e in self.episodes]), dtype=torch.float32
        )  # (n, A)
        ends = np.repeat(np.cumsum(lengths) - 1, lengths)
        index = np.arange(sum(lengths))[:, None] + np.arange(action_horizon)
        self._index = torch.as_tensor(np.minimum(index, ends[:, None]))  # (n, H)

    def __len__(self) -> int:
        return len(self._index)

    def batch(self, rows: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Observations {name: (B, size)} and the action chunks (B, H, A) that follow."""
        return {name: values[rows] for name, values in self.obs.items()}, self.actions[
            self._index[rows]
        ]

    def split(self, held_out: float) -> tuple["ChunkDataset", "ChunkDataset"]:
        """Whole episodes apart: the first ones for training, the last `held_out` share for validation."""
        kept = max(1, len(self.episodes) - int(len(self.episodes) * held_out))
        return (
            ChunkDataset(self.episodes[:kept], self.action_horizon),
            ChunkDataset(self.episodes[kept:], self.action_horizon),
        )

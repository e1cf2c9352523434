"""Demonstrations as training windows. What they are on disk: `robomimic.py`, `lerobot.py`, `minari.py`."""

import copy
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from flow_policy_rl.data.robomimic import DemoLayout, Demonstrations, Episode, save
from flow_policy_rl.data.sources import load

__all__ = ["ChunkDataset", "DemoLayout", "Demonstrations", "Episode", "load", "save"]


class ChunkDataset:
    """Windows of H actions that follow each observation; past an episode's end its last action repeats.

    Observations are taken out of the episodes, so that pictures are in memory once: they lie one behind another in one
    tensor per field.
    """

    def __init__(self, episodes: Sequence[Episode], action_horizon: int):
        lengths = [len(e.actions) for e in episodes]
        self.action_horizon, self._ends = action_horizon, np.cumsum(lengths).tolist()
        names = list(episodes[0].obs) if episodes else []
        self.obs = {name: _stacked(episodes, name) for name in names}
        actions = [e.actions for e in episodes] or [np.zeros(0)]
        self.actions = torch.as_tensor(np.concatenate(actions), dtype=torch.float32)  # (n, A)
        index = np.arange(sum(lengths))[:, None] + np.arange(action_horizon)
        ends = np.repeat(np.array(self._ends, int), lengths)
        self._index = torch.as_tensor(np.minimum(index, ends[:, None] - 1))  # (n, H)

    def __len__(self) -> int:
        return len(self._index)

    def batch(self, rows: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Observations {name: (B, size)} and the action chunks (B, H, A) that follow."""
        return {name: values[rows] for name, values in self.obs.items()}, self.actions[
            self._index[rows]
        ]

    def split(self, held_out: float) -> tuple["ChunkDataset", "ChunkDataset"]:
        """Whole episodes apart, without a copy: the first ones for training, the last `held_out` share for
        validation."""
        number = len(self._ends)
        kept = max(1, number - int(number * held_out))
        row = self._ends[kept - 1] if number else 0
        return self._part(0, row), self._part(row, len(self))

    def _part(self, first: int, last: int) -> "ChunkDataset":
        part = copy.copy(self)
        part.obs = {name: values[first:last] for name, values in self.obs.items()}
        part.actions = self.actions[first:last]
        part._index = self._index[first:last] - first
        part._ends = [end - first for end in self._ends if first < end <= last]
        return part


def _stacked(episodes: Sequence[Episode], name: str) -> Tensor:
    """One field, taken out of all episodes, one behind another: (n, ...) float32, or uint8 as it is."""
    first = episodes[0].obs[name]
    dtype = np.uint8 if first.dtype == np.uint8 else np.float32
    stack = np.empty((sum(len(e.actions) for e in episodes), *first.shape[1:]), dtype)
    del first
    row = 0
    for episode in episodes:
        values = episode.obs.pop(name)
        stack[row : row + len(values)] = values
        row += len(values)
    return torch.from_numpy(stack)

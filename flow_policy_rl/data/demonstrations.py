"""Demonstrations on disk, in robomimic's HDF5 layout, and as training windows.

    data/demo_0/obs/<field>  (T, size)      data/demo_0/actions (T, A)     data/demo_0/{rewards,dones,states}
    data attributes: `env_args` (JSON: task, robot, joint names, control_dt, fields), `provenance` (JSON), `total`

Observation t is what was seen before action t.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor

from flow_policy_rl.errors import InputError, existing_file
from flow_policy_rl.spec import ObservationField


@dataclass(frozen=True)
class Episode:
    """One demonstration of T steps: observations before each action, and the actions (T, A) in SI units."""

    obs: dict[str, np.ndarray]
    actions: np.ndarray
    rewards: np.ndarray
    states: np.ndarray


@dataclass(frozen=True)
class DemoLayout:
    """What the numbers of a file mean."""

    task: str
    robot: str
    joint_names: tuple[str, ...]
    control_dt: float
    observations: tuple[ObservationField, ...]


@dataclass(frozen=True)
class Demonstrations:
    """All of a file."""

    layout: DemoLayout
    episodes: list[Episode]
    provenance: dict

    @property
    def num_steps(self) -> int:
        """Over all episodes."""
        return sum(len(e.actions) for e in self.episodes)


def save(path: Path, demos: Demonstrations) -> None:
    """Write to a neighbour and rename, so that an interruption leaves no half file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with h5py.File(partial, "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = json.dumps(dataclasses.asdict(demos.layout))
        data.attrs["provenance"] = json.dumps(demos.provenance)
        data.attrs["total"] = demos.num_steps
        for i, episode in enumerate(demos.episodes):
            group = data.create_group(f"demo_{i}")
            group.attrs["num_samples"] = len(episode.actions)
            group["actions"] = episode.actions
            group["rewards"] = episode.rewards
            group["dones"] = np.arange(len(episode.actions)) == len(episode.actions) - 1
            group["states"] = episode.states
            for name, values in episode.obs.items():
                images = {"compression": "lzf", "chunks": (1, *values.shape[1:])}
                group.create_dataset(
                    f"obs/{name}", data=values, **(images if values.dtype == np.uint8 else {})
                )
    partial.rename(path)


def load(path: str | Path) -> Demonstrations:
    """Read a file.

    Raises:
        InputError: missing, not HDF5, without demonstrations, or with numbers that are not finite.
    """
    path = existing_file(path, "demonstrations")
    try:
        with h5py.File(path) as file:
            data = file["data"]
            layout = _layout(json.loads(data.attrs["env_args"]))
            provenance = json.loads(data.attrs.get("provenance", "{}"))
            names = sorted(data, key=lambda name: int(name.rpartition("_")[2]))
            episodes = [_episode(data[name], layout) for name in names]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"demonstrations '{path}' cannot be read: {error}") from None
    if not episodes:
        raise InputError(f"demonstrations '{path}' hold no episode")
    for i, episode in enumerate(episodes):
        for name, values in {**episode.obs, "actions": episode.actions}.items():
            if not np.isfinite(values).all():
                raise InputError(
                    f"demonstrations '{path}': demo_{i}/{name} has numbers that are not finite"
                )
    return Demonstrations(layout, episodes, provenance)


def _layout(raw: dict) -> DemoLayout:
    observations = tuple(
        ObservationField(**{key: tuple(v) if isinstance(v, list) else v for key, v in f.items()})
        for f in raw.pop("observations")
    )
    return DemoLayout(
        **{**raw, "joint_names": tuple(raw["joint_names"])}, observations=observations
    )


def _episode(group: h5py.Group, layout: DemoLayout) -> Episode:
    return Episode(
        obs={f.name: group[f"obs/{f.name}"][()] for f in layout.observations},
        actions=group["actions"][()],
        rewards=group["rewards"][()],
        states=group["states"][()] if "states" in group else np.zeros((len(group["actions"]), 0)),
    )


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

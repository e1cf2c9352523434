"""Data sets of Minari (one group per episode) and D4RL (flat arrays), read with h5py alone."""

import json
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np

from flow_policy_rl.data.robomimic import (
    UNREADABLE,
    Demonstrations,
    Episode,
    check_episodes,
    generic_layout,
)
from flow_policy_rl.errors import InputError

DEFAULT_DT = 0.05  # s; neither format tells


def load_minari(path: Path) -> Demonstrations:
    """Minari: observations may be nested dictionaries, and have one entry more than the actions.

    Raises:
        InputError: not such a file, or without episodes.
    """
    file_path = path if path.is_file() else path / "data" / "main_data.hdf5"
    file_path = file_path if file_path.is_file() else path / "main_data.hdf5"
    metadata = {}
    if (file_path.parent / "metadata.json").is_file():
        try:
            metadata = json.loads((file_path.parent / "metadata.json").read_text())
            if not isinstance(metadata, dict):
                raise ValueError("no JSON object")
        except (OSError, ValueError) as error:
            raise InputError(
                f"'{file_path.parent}/metadata.json' cannot be read: {error}"
            ) from None
    try:
        with h5py.File(file_path) as file:
            names = [n for n in file if n.startswith("episode_")]
            names.sort(key=lambda name: int(name.rpartition("_")[2]))
            episodes = [_minari_episode(file[name]) for name in names]
    except UNREADABLE as error:
        raise InputError(f"demonstrations '{path}' cannot be read: {error}") from None
    name = str(metadata.get("dataset_id", path.stem))
    return _demonstrations(path, name, episodes, {"format": "minari", "dataset_id": name}, names)


def _minari_episode(group: h5py.Group) -> Episode:
    actions = _flat(group["actions"])["actions"]
    steps = len(actions)
    obs = _flat(group["observations"])
    # What came after the last action is not needed; other lengths are refused later.
    obs = {name: v[:steps] if len(v) == steps + 1 else v for name, v in obs.items()}
    return Episode(obs, actions, np.asarray(group["rewards"]), np.zeros((steps, 0)))


def _flat(item: h5py.Group | h5py.Dataset, prefix: str = "") -> dict[str, np.ndarray]:
    """Arrays of a nested group by joined names; columns of a single number become (T, 1)."""
    name = prefix or item.name.rpartition("/")[2]
    if isinstance(item, h5py.Dataset):
        values = item[()]
        if values.dtype != np.uint8:
            values = values.astype(np.float64)
        return {name: values[:, None] if values.ndim == 1 else values}
    result: dict[str, np.ndarray] = {}
    for key, child in item.items():
        result |= _flat(child, f"{prefix}_{key}" if prefix else key)
    return result


def load_d4rl(path: Path) -> Demonstrations:
    """D4RL: `observations`, `actions`, `rewards`, `terminals` and `timeouts` of all episodes in a row.

    Raises:
        InputError: not such a file.
    """
    try:
        with h5py.File(path) as file:
            arrays = {name: file[name][()] for name in ("observations", "actions", "terminals")}
            steps = len(arrays["actions"])
            ended = arrays["terminals"].astype(bool)
            if "timeouts" in file:
                ended |= file["timeouts"][()].astype(bool)
            rewards = file["rewards"][()] if "rewards" in file else np.zeros(steps)
            if not len(arrays["observations"]) == len(ended) == len(rewards) == steps:
                raise ValueError("its arrays are of different lengths")
    except UNREADABLE as error:
        raise InputError(f"demonstrations '{path}' cannot be read: {error}") from None
    episodes, begin = [], 0
    for end in [*(np.flatnonzero(ended) + 1), steps]:
        if end > begin:
            part = slice(begin, end)
            observations = arrays["observations"][part].astype(np.float64)
            actions = arrays["actions"][part].astype(np.float64)
            states = np.zeros((end - begin, 0))
            episodes.append(Episode({"observations": observations}, actions, rewards[part], states))
        begin = end
    return _demonstrations(path, path.stem, episodes, {"format": "d4rl"})


def _demonstrations(
    path: Path, name: str, episodes: list[Episode], provenance: dict, names: Sequence[str] = ()
) -> Demonstrations:
    if not episodes:
        raise InputError(f"demonstrations '{path}' hold no episode")
    shapes = {key: values.shape[1:] for key, values in episodes[0].obs.items()}
    num_actions = episodes[0].actions.shape[1] if episodes[0].actions.ndim == 2 else 1
    layout = generic_layout(name, shapes, num_actions, DEFAULT_DT)
    kept = {f.name for f in layout.observations}
    episodes = [
        Episode({k: v for k, v in e.obs.items() if k in kept}, e.actions, e.rewards, e.states)
        for e in episodes
    ]
    check_episodes(path, layout, episodes, names)
    return Demonstrations(layout, episodes, provenance)

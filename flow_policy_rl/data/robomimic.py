"""Demonstrations on disk in robomimic's HDF5 layout. Pictures are written one by one; no torch.

    data/demo_0/obs/<field>  (T, size)      data/demo_0/actions (T, A)     data/demo_0/{rewards,dones,states}
    data/demo_0/randomization/<name>        what the episode drew, where it was randomised
    data attributes: `env_args` (JSON: task, robot, joint names, control_dt, fields), `provenance` (JSON), `total`

Observation t is what was seen before action t.
"""

import dataclasses
import io
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np

from flow_policy_rl.errors import InputError, RunFailed, existing_file
from flow_policy_rl.spec import CONTROL_DT, ObservationField

LOG = logging.getLogger(__name__)
HDF5 = (".hdf5", ".h5")  # endings of its files
LARGEST = np.finfo(np.float32).max  # what is computed with is float32
# What comes of files whose parts are not what they should be.
UNREADABLE = (
    OSError,
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    RuntimeError,
    MemoryError,
)


@dataclass(frozen=True)
class Episode:
    """One demonstration of T steps: observations before each action, and the actions (T, A) in SI units.

    `success` is None where nobody said. `randomization` is what the episode drew, by name (`sim/randomize.py`).
    """

    obs: dict[str, np.ndarray]
    actions: np.ndarray
    rewards: np.ndarray
    states: np.ndarray
    success: bool | None = None
    randomization: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def succeeded(self) -> bool | None:
        """`success`, or what rewards of 0 and 1 say where one was given; other rewards say nothing of it."""
        if self.success is not None or not np.isin(self.rewards, (0, 1)).all():
            return self.success
        return bool(self.rewards[-1]) if self.rewards.any() else None


@dataclass(frozen=True)
class DemoLayout:
    """What the numbers of a file mean."""

    task: str
    robot: str
    joint_names: tuple[str, ...]
    control_dt: float
    observations: tuple[ObservationField, ...]

    @classmethod
    def of_task(cls, task) -> "DemoLayout":
        """Of a simulated task."""
        fields = tuple(ObservationField(**dataclasses.asdict(f)) for f in task.obs_fields)
        return cls(task.name, task.robot, task.world.joint_names, task.control_dt, fields)

    @classmethod
    def from_dict(cls, raw: Mapping) -> "DemoLayout":
        """Back from JSON.

        Raises:
            KeyError, TypeError: keys are missing or unknown.
        """
        fields = tuple(
            ObservationField(**{k: tuple(v) if isinstance(v, list) else v for k, v in f.items()})
            for f in raw["observations"]
        )
        names = tuple(raw["joint_names"])
        return cls(**{**raw, "joint_names": names, "observations": fields})


@dataclass(frozen=True)
class Demonstrations:
    """All of a data set."""

    layout: DemoLayout
    episodes: list[Episode]
    provenance: dict

    @property
    def num_steps(self) -> int:
        """Over all episodes."""
        return sum(len(e.actions) for e in self.episodes)


class _Disk(io.FileIO):
    """What HDF5 writes to. It crashes where a file cannot be closed because the disk is full; here it never learns of
    that: what does not go to the disk is dropped, and `failure` says why."""

    failure: OSError | None = None

    def write(self, data) -> int:
        size, rest = len(data), memoryview(data)
        try:
            while len(rest) and self.failure is None:
                rest = rest[super().write(rest) :]
        except OSError as error:
            self.failure = error
        return size

    def truncate(self, size: int | None = None) -> int:
        try:
            return super().truncate(size)
        except OSError as error:
            self.failure = error
            return size or 0


class RobomimicWriter:
    """Writes to a neighbour and renames at the end, so that an interruption leaves no half file.

    Raises:
        RunFailed: any method: the disk is full.
    """

    def __init__(self, path: Path, layout: DemoLayout):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.layout = path, layout
        self._partial = path.with_name(path.name + ".partial")
        self._disk = _Disk(self._partial, "w+")
        self._file = h5py.File(self._disk, "w")
        self._data = self._file.create_group("data")
        self._data.attrs["env_args"] = json.dumps(dataclasses.asdict(layout))
        self.num_episodes = self.num_steps = 0
        self._steps = 0
        self._group: h5py.Group | None = None
        self._numbers: dict[str, list[np.ndarray]] = {}

    def frame(self, obs: Mapping[str, np.ndarray], action: np.ndarray) -> None:
        """One step of the open episode; the first opens it."""
        if self._group is None:
            self._group = self._data.create_group(f"demo_{self.num_episodes}")
            self._steps = 0
            self._numbers = {}
        rows = {f"obs/{name}": np.asarray(values) for name, values in obs.items()}
        rows["actions"] = np.asarray(action)
        for name, values in rows.items():
            if values.dtype != np.uint8:
                self._numbers.setdefault(name, []).append(values)
                continue
            if name not in self._group:
                self._group.create_dataset(
                    name,
                    shape=(0, *values.shape),
                    maxshape=(None, *values.shape),
                    chunks=(1, *values.shape),
                    compression="lzf",
                    dtype=np.uint8,
                )
            self._group[name].resize(self._steps + 1, axis=0)
            self._group[name][self._steps] = values
        self._steps += 1
        self._require_room()

    def _require_room(self) -> None:
        if self._disk.failure is not None:
            self._file.close()
            self._partial.unlink(missing_ok=True)
            raise RunFailed(f"'{self.path}' cannot be written: {self._disk.failure.strerror}")

    def end(self, keep: bool = True, success: bool | None = None) -> None:
        """Close the episode, or throw it away."""
        group, self._group = self._group, None
        if group is None:
            return
        if not keep:
            del self._data[group.name]
            return
        steps = self._steps
        for name, rows in self._numbers.items():
            group[name] = np.stack(rows)
        rewards = np.zeros(steps)
        rewards[-1] = 1.0 if success else 0.0
        self._finish(group, Episode({}, np.zeros(steps), rewards, np.zeros((steps, 0)), success))

    def episode(self, episode: Episode) -> None:
        """A whole episode at once."""
        group = self._data.create_group(f"demo_{self.num_episodes}")
        group["actions"] = episode.actions
        for name, values in episode.obs.items():
            images = {"compression": "lzf", "chunks": (1, *values.shape[1:])}
            group.create_dataset(
                f"obs/{name}", data=values, **(images if values.dtype == np.uint8 else {})
            )
        self._finish(group, episode)

    def _finish(self, group: h5py.Group, episode: Episode) -> None:
        """All but observations and actions."""
        steps = len(episode.actions)
        group["rewards"], group["states"] = episode.rewards, episode.states
        if episode.success is not None:
            group.attrs["success"] = episode.success
        for name, values in episode.randomization.items():
            group[f"randomization/{name}"] = values
        group["dones"] = np.arange(steps) == steps - 1
        group.attrs["num_samples"] = steps
        self.num_episodes += 1
        self.num_steps += steps
        self._require_room()

    def discard(self) -> None:
        """Leave nothing: the work was given up."""
        self._file.close()
        self._partial.unlink(missing_ok=True)

    def close(self, provenance: Mapping) -> None:
        """Write what is known at the end, and give the file its name."""
        self.end(keep=False)
        self._data.attrs["provenance"] = json.dumps(provenance)
        self._data.attrs["total"] = self.num_steps
        self._file.close()
        self._disk.close()
        self._require_room()
        self._partial.rename(self.path)


def save(path: str | Path, demos: Demonstrations) -> None:
    """Write a data set."""
    writer = RobomimicWriter(Path(path), demos.layout)
    for episode in demos.episodes:
        writer.episode(episode)
    writer.close(demos.provenance)


def load(path: str | Path) -> Demonstrations:
    """Read a file.

    Raises:
        InputError: missing, not HDF5, without demonstrations, or with numbers that are not finite.
    """
    path = existing_file(path, "demonstrations")
    try:
        with h5py.File(path) as file:
            data = file["data"]
            layout = layout_of(data)
            provenance = json.loads(data.attrs.get("provenance", "{}"))
            if not isinstance(provenance, dict):
                raise ValueError("its provenance is no JSON object")
            names = sorted(data, key=lambda name: int(name.rpartition("_")[2]))
            episodes = [_episode(data[name], layout) for name in names]
    except UNREADABLE as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"demonstrations '{path}' cannot be read: {text}") from None
    check_episodes(path, layout, episodes, names)
    return Demonstrations(layout, episodes, provenance)


def check_episodes(
    path: Path, layout: DemoLayout, episodes: list[Episode], names: Sequence[str] = ()
) -> None:
    """Refuse a data set without episodes, and arrays of other lengths, shapes or types than they should be, or with
    numbers that are not finite.

    Args:
        names: of the episodes, for the error (default: demo_0, demo_1 ...).

    Raises:
        InputError: names the episode and the field.
    """
    if not episodes:
        raise InputError(f"demonstrations '{path}' hold no episode")
    if not CONTROL_DT[0] <= layout.control_dt <= CONTROL_DT[1]:
        raise InputError(
            f"demonstrations '{path}' have a control step of {layout.control_dt:g} s; "
            f"valid: from {CONTROL_DT[0]:g} to {CONTROL_DT[1]:g} s"
        )
    shapes = {f.name: f.shape for f in layout.observations}
    pictures = {f.name for f in layout.observations if f.kind == "image"}
    for i, episode in enumerate(episodes):
        steps = len(episode.actions)
        where = f"demonstrations '{path}': {names[i] if names else f'demo_{i}'}"
        if not steps:
            raise InputError(f"{where} has no step")
        wanted = {"actions": (steps, len(layout.joint_names)), "rewards": (steps,)}
        wanted |= {name: (steps, *shape) for name, shape in shapes.items()}
        arrays = {"actions": episode.actions, "rewards": episode.rewards, **episode.obs}
        for name, shape in wanted.items():
            if name not in arrays:
                raise InputError(f"{where} has no {name}")
            values = arrays[name]
            if values.shape != shape:
                raise InputError(f"{where}/{name} has shape {values.shape}, not {shape}")
            if values.dtype != np.uint8 and (name in pictures or values.dtype.kind not in "biuf"):
                kind = "uint8" if name in pictures else "real numbers"
                raise InputError(f"{where}/{name} is of type {values.dtype}, not {kind}")
            # False for what is not a number, too.
            if values.dtype.kind == "f" and not (np.abs(values) <= LARGEST).all():
                raise InputError(f"{where}/{name} has numbers that are not finite")


def layout_of(data: h5py.Group) -> DemoLayout:
    """Ours as written; of a file of robomimic itself (its `env_args` know no joints) by the shapes of its arrays."""
    if "env_args" not in data.attrs:
        raise ValueError("its group 'data' has no attribute 'env_args', as robomimic writes it")
    raw = json.loads(data.attrs["env_args"])
    if "joint_names" in raw:
        return DemoLayout.from_dict(raw)
    names = sorted(data, key=lambda name: int(name.rpartition("_")[2]))
    if not names:
        raise ValueError("it holds no episode")
    first = data[names[0]]
    control = (raw.get("env_kwargs") or {}).get("control_freq", 20)
    if not control > 0:
        raise ValueError(f"its control_freq must be more than 0, not {control}")
    shapes = {name: getattr(values, "shape", (0, 0))[1:] for name, values in first["obs"].items()}
    return generic_layout(
        str(raw.get("env_name", "unknown")).lower(), shapes, first["actions"].shape[1], 1 / control
    )


def generic_layout(
    task: str,
    shapes: Mapping[str, tuple[int, ...]],
    num_actions: int,
    control_dt: float,
) -> DemoLayout:
    """Of data that does not say what its numbers are: every number gets a name, every image is a camera.

    What is neither (depth, pictures with their channels first, groups) is left out, which is said.
    """
    fields = []
    for name, shape in shapes.items():
        if len(shape) == 3 and shape[2] == 3:
            camera = name.removesuffix("_image")
            fields.append(ObservationField(name, "image", (), "", camera, resolution=shape[:2]))
        elif shape == () or (len(shape) == 1 and shape[0]):
            elements = tuple(f"{name}_{k}" for k in range(*(shape or (1,))))
            fields.append(ObservationField(name, "joint_position", elements, "unknown"))
        else:
            left_out(name, shape)
    names = tuple(f"action_{k}" for k in range(num_actions))
    return DemoLayout(task, "unknown", names, control_dt, tuple(fields))


def left_out(name: str, shape: Sequence[int]) -> None:
    """Say that an observation is not read."""
    LOG.warning(
        "observation '%s' of shape %s is left out: neither numbers in a row nor a picture (height, width, 3)",
        name, tuple(shape),
    )  # fmt: skip


def _episode(group: h5py.Group, layout: DemoLayout) -> Episode:
    steps = len(group["actions"])
    obs = {f.name: group[f"obs/{f.name}"][()] for f in layout.observations}
    return Episode(
        # A number per step may be stored without an axis of its own.
        obs={name: v[:, None] if v.ndim == 1 else v for name, v in obs.items()},
        actions=group["actions"][()],
        rewards=group["rewards"][()] if "rewards" in group else np.zeros(steps),
        states=group["states"][()] if "states" in group else np.zeros((steps, 0)),
        success=bool(group.attrs["success"]) if "success" in group.attrs else None,
        randomization={name: v[()] for name, v in group.get("randomization", {}).items()},
    )

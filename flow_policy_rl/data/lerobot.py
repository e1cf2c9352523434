"""LeRobot data sets of format v3.0 by pyarrow and PyAV alone: tables in Parquet, one H.264 film per camera.

    meta/info.json stats.json tasks.parquet   meta/episodes/chunk-000/file-000.parquet
    data/chunk-000/file-000.parquet           videos/<key>/chunk-000/file-000.mp4
    meta/flow_policy_rl.json                  our layout: kinds, units and sources, which the format has no place for

`observation.state` is all fields that are not images, in a row; a camera is `observation.images.<camera>`.
"""

import dataclasses
import json
import logging
import shutil
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from flow_policy_rl.data.robomimic import (
    UNREADABLE,
    DemoLayout,
    Demonstrations,
    Episode,
    check_episodes,
    left_out,
)
from flow_policy_rl.data.statistics import ArrayStatistics, ImageStatistics, summarise
from flow_policy_rl.errors import InputError
from flow_policy_rl.spec import ObservationField

LOG = logging.getLogger(__name__)
VERSION = "v3.0"
STATE, ACTION, IMAGES = "observation.state", "action", "observation.images."
REWARD, SUCCESS = "next.reward", "next.success"  # of each frame, in the data sets of others
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
EPISODES_PATH = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
OWN = "meta/flow_policy_rl.json"
CODEC = {"crf": "23", "preset": "veryfast", "g": "2"}  # a key frame every two: any frame is near
FILE_MB = {"chunks_size": 1000, "data_files_size_in_mb": 100, "video_files_size_in_mb": 200}
DEFAULTS = {
    "timestamp": {"dtype": "float32", "shape": [1], "names": None},
    "frame_index": {"dtype": "int64", "shape": [1], "names": None},
    "episode_index": {"dtype": "int64", "shape": [1], "names": None},
    "index": {"dtype": "int64", "shape": [1], "names": None},
    "task_index": {"dtype": "int64", "shape": [1], "names": None},
}


class _Film:
    """One camera's MP4. Frames of discarded episodes stay in it; no episode refers to them."""

    def __init__(self, path: Path, height: int, width: int, fps: int):
        path.parent.mkdir(parents=True)
        self._container = av.open(str(path), "w")
        self._stream = self._container.add_stream("libx264", rate=fps, options=CODEC)
        self._stream.width, self._stream.height = width, height
        self._stream.pix_fmt = "yuv420p"
        self._stream.time_base = Fraction(1, fps)
        self.frames = 0

    def add(self, pixels: np.ndarray) -> None:
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
        frame.pts = self.frames
        self._container.mux(self._stream.encode(frame))
        self.frames += 1

    def close(self) -> None:
        self._container.mux(self._stream.encode())
        self._container.close()


class LeRobotWriter:
    """Writes a data set frame by frame into a neighbour folder that gets its name at the end.

    Raises:
        InputError: the folder exists, the rate is not a whole number of frames per second, or a picture has an odd
            side.
    """

    def __init__(self, folder: Path, layout: DemoLayout):
        if folder.exists():
            raise InputError(f"output '{folder}' exists already")
        for f in layout.observations:
            if f.kind == "image" and any(side % 2 for side in f.resolution):
                raise InputError(
                    f"'{f.name}' is {f.resolution[0]} x {f.resolution[1]}, and H.264 films need an even height and "
                    f"width: write a file that ends in .hdf5, which keeps any size"
                )
        fps = round(1 / layout.control_dt)
        if abs(fps * layout.control_dt - 1) > 1e-6:
            raise InputError(
                f"LeRobot needs a whole number of frames per second, not {1 / layout.control_dt:.3f} "
                f"(control_dt {layout.control_dt} s)"
            )
        self.folder, self.layout, self.fps = folder, layout, fps
        # Absolute: what stands before a colon would be taken for a protocol.
        self._partial = folder.absolute().with_name(folder.name + ".partial")
        shutil.rmtree(self._partial, ignore_errors=True)
        self._partial.mkdir(parents=True)
        self._state = [f for f in layout.observations if f.kind != "image"]
        self._cameras = {IMAGES + f.source: f for f in layout.observations if f.kind == "image"}
        self._films: dict[str, _Film] = {}
        self._numbers = {
            STATE: ArrayStatistics(sum(f.size for f in self._state)),
            ACTION: ArrayStatistics(len(layout.joint_names)),
        }
        self._pictures = {key: ImageStatistics() for key in self._cameras}
        self._episode_pictures: dict[str, ImageStatistics] = {}
        self._episodes: list[dict] = []
        self._table: pq.ParquetWriter | None = None
        self.num_steps = 0
        self._begun: dict[str, int] | None = None

    @property
    def num_episodes(self) -> int:
        """Episodes kept so far."""
        return len(self._episodes)

    def frame(self, obs: Mapping[str, np.ndarray], action: np.ndarray) -> None:
        """One step of the open episode; the first opens it."""
        if self._begun is None:
            self._begun = {key: film.frames for key, film in self._films.items()}
            self._episode_pictures = {key: ImageStatistics() for key in self._cameras}
        if self._state:
            self._numbers[STATE].add(np.concatenate([obs[f.name] for f in self._state]))
        self._numbers[ACTION].add(action)
        for key, f in self._cameras.items():
            pixels = obs[f.name]
            if key not in self._films:
                path = self._partial / VIDEO_PATH.format(video_key=key, chunk_index=0, file_index=0)
                self._films[key] = _Film(path, *pixels.shape[:2], self.fps)
            self._films[key].add(pixels)
            self._episode_pictures[key].add(pixels)

    def end(self, keep: bool = True, success: bool | None = None) -> None:
        """Close the episode, or throw it away."""
        begun, self._begun = self._begun, None
        if begun is None:
            return
        if not keep:
            for statistics in self._numbers.values():
                statistics.cut(self.num_steps)
            return
        first = self.num_steps
        numbers = {k: s.since(first) for k, s in self._numbers.items() if s.size}
        steps = len(numbers[ACTION])
        index = self.num_episodes
        self._write_rows(numbers, first, steps, index)
        row = {
            "episode_index": index,
            "tasks": [self.layout.task],
            "length": steps,
            "data/chunk_index": 0,
            "data/file_index": 0,
            "dataset_from_index": first,
            "dataset_to_index": first + steps,
            "meta/episodes/chunk_index": 0,
            "meta/episodes/file_index": 0,
        }
        for key in self._cameras:
            start = begun.get(key, 0)
            row |= {
                f"videos/{key}/chunk_index": 0,
                f"videos/{key}/file_index": 0,
                f"videos/{key}/from_timestamp": start / self.fps,
                f"videos/{key}/to_timestamp": (start + steps) / self.fps,
            }
            self._pictures[key].merge(self._episode_pictures[key])
        summaries = {k: summarise(v) for k, v in numbers.items()}
        summaries |= {k: p.summary() for k, p in self._episode_pictures.items()}
        for key, summary in summaries.items():
            row |= {f"stats/{key}/{name}": values for name, values in summary.items()}
        if success is not None:
            row["success"] = success
        self._episodes.append(row)
        self.num_steps += steps

    def _write_rows(
        self, numbers: dict[str, np.ndarray], first: int, steps: int, episode: int
    ) -> None:
        columns = {
            key: pa.FixedSizeListArray.from_arrays(
                pa.array(np.ascontiguousarray(v).ravel()), v.shape[1]
            )
            for key, v in numbers.items()
        }
        counts = np.arange(steps)
        columns |= {
            "timestamp": pa.array((counts / self.fps).astype(np.float32)),
            "frame_index": pa.array(counts),
            "episode_index": pa.array(np.full(steps, episode)),
            "index": pa.array(first + counts),
            "task_index": pa.array(np.zeros(steps, np.int64)),
        }
        table = pa.table(columns)
        if self._table is None:
            path = self._partial / DATA_PATH.format(chunk_index=0, file_index=0)
            path.parent.mkdir(parents=True)
            self._table = pq.ParquetWriter(path, table.schema)
        self._table.write_table(table)

    def discard(self) -> None:
        """Leave nothing: the work was given up."""
        shutil.rmtree(self._partial, ignore_errors=True)

    def close(self, provenance: Mapping) -> None:
        """Write tables and films to their end, and give the folder its name."""
        self.end(keep=False)
        for film in self._films.values():
            film.close()
        if self._table is not None:
            self._table.close()
        stats = {key: s.summary() for key, s in self._numbers.items() if s.size}
        stats |= {key: p.summary() for key, p in self._pictures.items()}
        count = np.arange(self.num_steps)[:, None].astype(float)
        if self.num_steps:
            stats["index"] = summarise(count)
        self._json("meta/stats.json", stats)
        self._json("meta/info.json", self._info())
        own = {"layout": dataclasses.asdict(self.layout), "provenance": dict(provenance)}
        self._json(OWN, own)
        self._write_tasks()
        if self._episodes:
            path = self._partial / EPISODES_PATH.format(chunk_index=0, file_index=0)
            path.parent.mkdir(parents=True)
            names = {name for row in self._episodes for name in row}
            rows = [{name: row.get(name) for name in sorted(names)} for row in self._episodes]
            pq.write_table(pa.Table.from_pylist(rows), path)
        self._partial.rename(self.folder)

    def _json(self, name: str, content: Mapping) -> None:
        path = self._partial / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=4) + "\n")

    def _info(self) -> dict:
        names = [f"{f.name}.{e}" for f in self._state for e in f.elements]
        features: dict[str, dict] = {}
        if names:
            features[STATE] = {"dtype": "float32", "shape": [len(names)], "names": names}
        joints = list(self.layout.joint_names)
        features[ACTION] = {"dtype": "float32", "shape": [len(joints)], "names": joints}
        for key, f in self._cameras.items():
            features[key] = {
                "dtype": "video",
                "shape": [*f.resolution, 3],
                "names": ["height", "width", "channels"],
                "info": {
                    "video.height": f.resolution[0],
                    "video.width": f.resolution[1],
                    "video.codec": "h264",
                    "video.pix_fmt": "yuv420p",
                    "video.is_depth_map": False,
                    "video.fps": self.fps,
                    "video.channels": 3,
                    "has_audio": False,
                },
            }
        return {
            "codebase_version": VERSION,
            "robot_type": self.layout.robot,
            "total_episodes": self.num_episodes,
            "total_frames": self.num_steps,
            "total_tasks": 1,
            **FILE_MB,
            "fps": self.fps,
            "splits": {"train": f"0:{self.num_episodes}"},
            "data_path": DATA_PATH,
            "video_path": VIDEO_PATH if self._cameras else None,
            "features": features | DEFAULTS,
        }

    def _write_tasks(self) -> None:
        """A table whose index is the task's text, in the way that pandas marks an index."""
        table = pa.table(
            {"task_index": pa.array([0], pa.int64()), "task": pa.array([self.layout.task])}
        )
        column = {
            "field_name": "task",
            "name": "task",
            "pandas_type": "unicode",
            "numpy_type": "object",
        }
        number = {
            "field_name": "task_index",
            "name": "task_index",
            "pandas_type": "int64",
            "numpy_type": "int64",
        }
        marks = {
            "index_columns": ["task"],
            "column_indexes": [],
            "columns": [number | {"metadata": None}, column | {"metadata": None}],
            "creator": {"library": "pyarrow", "version": pa.__version__},
            "pandas_version": "2.0.0",
        }
        table = table.replace_schema_metadata({b"pandas": json.dumps(marks).encode()})
        pq.write_table(table, self._partial / "meta" / "tasks.parquet")


# --- reading ---


def load(folder: Path) -> Demonstrations:
    """Read a data set of format v3.x, ours or another's.

    Raises:
        InputError: another version, or files missing or unreadable.
    """
    # Absolute, as for the writer.
    given, folder = folder, folder.absolute()
    try:
        info = json.loads((folder / "meta" / "info.json").read_text())
        version = str(info["codebase_version"])
        if not version.startswith("v3."):
            raise InputError(
                f"LeRobot data set '{given}' has version {version}; v3.x is read (lerobot converts older ones)"
            )
        layout, own = _layout(folder, info)
        episodes = _read_episodes(folder, info, layout)
        own_file = json.loads((folder / OWN).read_text()) if own else {}
    except (*UNREADABLE, ArithmeticError, pa.ArrowException, av.FFmpegError) as error:
        if isinstance(error, InputError):
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        text = f"it has no {text}" if isinstance(error, KeyError) else text
        raise InputError(f"LeRobot data set '{given}' cannot be read: {text}") from None
    check_episodes(given, layout, episodes)
    provenance = own_file.get("provenance", {"format": f"lerobot {version}"})
    return Demonstrations(layout, episodes, provenance)


def _layout(folder: Path, info: dict) -> tuple[DemoLayout, bool]:
    """The layout, and whether it is ours."""
    if (folder / OWN).is_file():
        return DemoLayout.from_dict(json.loads((folder / OWN).read_text())["layout"]), True
    fields = []
    for key, feature in info["features"].items():
        shape = tuple(feature["shape"])
        if feature["dtype"] in ("video", "image"):
            camera = key.removeprefix(IMAGES)
            names = feature.get("names") or ["height", "width", "channels"]
            height, width = (shape[1], shape[2]) if names[0].startswith("channel") else shape[:2]
            fields.append(
                ObservationField(
                    f"{camera}_image", "image", (), "", camera, resolution=(height, width)
                )
            )
        elif key.startswith("observation.") and len(shape) == 1:
            elements = _names(feature, key, shape[0])
            fields.append(ObservationField(key, "joint_position", elements, "unknown"))
        elif key.startswith("observation."):
            left_out(key, shape)
    action = info["features"][ACTION]
    tasks = pq.read_table(folder / "meta" / "tasks.parquet").to_pydict()
    texts = [v for k, values in tasks.items() if k != "task_index" for v in values]
    if len(texts) > 1:
        LOG.warning(
            "LeRobot data set '%s' has %d tasks: their episodes are read as one task, '%s'",
            folder, len(texts), texts[0],
        )  # fmt: skip
    return DemoLayout(
        task=str(texts[0]) if texts else "unknown",
        robot=str(info.get("robot_type") or "unknown"),
        joint_names=_names(action, ACTION, action["shape"][0]),
        control_dt=1 / info["fps"],
        observations=tuple(fields),
    ), False


def _names(feature: dict, key: str, size: int) -> tuple[str, ...]:
    names = feature.get("names")
    if isinstance(names, dict):
        names = next(iter(names.values()), None)
    if isinstance(names, list) and len(names) == size and len(set(names)) == size:
        return tuple(str(name) for name in names)
    return tuple(f"{key.rpartition('.')[2]}_{k}" for k in range(size))


def _read_episodes(folder: Path, info: dict, layout: DemoLayout) -> list[Episode]:
    rows = [
        row
        for path in sorted((folder / "meta" / "episodes").glob("*/*.parquet"))
        for row in pq.read_table(path).to_pylist()
    ]
    rows.sort(key=lambda row: row["episode_index"])
    tables: dict[tuple[int, int], pa.Table] = {}
    columns = [ACTION, "timestamp", *(k for k in info["features"] if k.startswith("observation."))]
    episodes = []
    for row in rows:
        place = row["data/chunk_index"], row["data/file_index"]
        if place not in tables:
            path = folder / info["data_path"].format(chunk_index=place[0], file_index=place[1])
            there = set(pq.read_schema(path).names)
            wanted = [c for c in (*columns, REWARD, SUCCESS) if c in there]
            wanted += ["episode_index", "frame_index"]
            tables = {place: pq.read_table(path, columns=wanted)}  # one file in memory at a time
        table = tables[place]
        table = table.filter(pa.compute.equal(table["episode_index"], row["episode_index"]))
        table = table.sort_by("frame_index")
        if len(table) != row["length"]:
            raise ValueError(
                f"episode {row['episode_index']} has {len(table)} rows, not {row['length']}"
            )
        if not len(table):
            raise ValueError(f"episode {row['episode_index']} has no frame")
        _check_times(table, row, info["fps"])
        arrays = {
            name: np.array(table[name].to_pylist(), np.float64).reshape(len(table), -1)
            for name in table.column_names
            if name in columns and not pa.types.is_struct(table.schema.field(name).type)
        }
        obs = _fields(layout, arrays)
        for f in layout.observations:
            if f.kind == "image":
                obs[f.name] = _pictures(folder, info, row, f, table)
        obs = {f.name: obs[f.name] for f in layout.observations}
        rewards, success = _outcome(table, row)
        episodes.append(Episode(obs, arrays[ACTION], rewards, np.zeros((len(table), 0)), success))
    return episodes


def _outcome(table: pa.Table, row: dict) -> tuple[np.ndarray, bool | None]:
    """Rewards (T,) and success of an episode: ours is in its row, others have columns for them, or say nothing."""
    told = {
        name: np.ravel(table[name].to_pylist())
        for name in (REWARD, SUCCESS)
        if name in table.column_names
    }
    success = row.get("success")
    if success is None and SUCCESS in told:
        success = bool(told[SUCCESS].any())
    rewards = np.zeros(len(table))
    rewards[-1] = 1.0 if success else 0.0
    return np.asarray(told.get(REWARD, rewards), float), success


def _check_times(table: pa.Table, row: dict, fps: float) -> None:
    """Refuse frames that are not one after the other at the rate of the data set.

    Raises:
        ValueError: names the first.
    """
    counts = np.arange(len(table))
    wrong = table["frame_index"].to_numpy() != counts
    if "timestamp" in table.column_names:
        # A number per frame, or a list of one.
        times = np.array(table["timestamp"].to_pylist(), float).reshape(len(table))
        wrong |= ~(np.abs(times * fps - counts) < 0.5)
    if wrong.any():
        raise ValueError(
            f"frame {np.argmax(wrong)} of episode {row['episode_index']} does not have the number or time of its "
            f"place at {fps:g} frames per second"
        )


def _fields(layout: DemoLayout, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """State fields, cut out of `observation.state` where it is ours."""
    fields = [f for f in layout.observations if f.kind != "image"]
    if all(f.name in arrays for f in fields):
        return {f.name: arrays[f.name] for f in fields}
    ends = np.cumsum([f.size for f in fields])
    parts = np.split(arrays[STATE], ends[:-1], axis=1)
    return {f.name: part for f, part in zip(fields, parts, strict=True)}


def _pictures(
    folder: Path, info: dict, row: dict, f: ObservationField, table: pa.Table
) -> np.ndarray:
    """Frames (T, height, width, 3) of one episode, from the film, or from pictures in the table."""
    key = IMAGES + f.source if IMAGES + f.source in info["features"] else f.source
    if info["features"][key]["dtype"] == "image":
        from flow_policy_rl.serving.decode import compressed_image

        cells = [_Cell(cell["bytes"]) for cell in table[key].to_pylist()]
        return np.stack([compressed_image(cell) for cell in cells])
    place = {n: row[f"videos/{key}/{n}"] for n in ("chunk_index", "file_index", "from_timestamp")}
    path = folder / info["video_path"].format(
        video_key=key, chunk_index=place["chunk_index"], file_index=place["file_index"]
    )
    near = 0.25 / info["fps"]
    frames = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        start = place["from_timestamp"]
        container.seek(int(start / stream.time_base), stream=stream, backward=True)
        for frame in container.decode(stream):
            wanted = start + len(frames) / info["fps"]
            if frame.time < wanted - near:
                continue
            if frame.time > wanted + near:
                raise ValueError(f"{path.name} of {key} has no frame at {wanted:.3f} s")
            frames.append(frame.to_ndarray(format="rgb24"))
            if len(frames) == row["length"]:
                return np.stack(frames)
    raise ValueError(f"{path.name} of {key} ends after {len(frames)} of {row['length']} frames")


class _Cell:
    """A picture of a table, in the shape of a CompressedImage."""

    def __init__(self, data: bytes):
        self.data, self.format = data, "table"

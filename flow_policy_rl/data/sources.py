"""Any data set that we can read, recognised by what is in it, and the two that we write, by their name."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py

from flow_policy_rl import provenance
from flow_policy_rl.data import lerobot, minari, robomimic
from flow_policy_rl.data.lerobot import LeRobotWriter
from flow_policy_rl.data.robomimic import (
    HDF5,
    UNREADABLE,
    DemoLayout,
    Demonstrations,
    RobomimicWriter,
)
from flow_policy_rl.errors import InputError, missing

READERS = {
    "robomimic": robomimic.load,
    "lerobot": lerobot.load,
    "minari": minari.load_minari,
    "d4rl": minari.load_d4rl,
}


def kind_of(path: str | Path) -> str:
    """robomimic, lerobot, minari, d4rl or bag.

    Raises:
        InputError: nothing there, or none of them.
    """
    path = Path(path)
    if not path.exists():
        raise missing(path, "demonstrations", path.parent.glob("*"))
    if path.is_dir():
        if (path / "meta" / "info.json").is_file():
            return "lerobot"
        if (path / "data" / "main_data.hdf5").is_file() or (path / "main_data.hdf5").is_file():
            return "minari"
        if (
            any(path.glob("*.mcap*"))
            or any(path.glob("*.db3*"))
            or (path / "metadata.yaml").is_file()
        ):
            return "bag"
        raise InputError(
            f"folder '{path}' is no data set: it has neither meta/info.json (LeRobot), data/main_data.hdf5 (Minari) "
            "nor a rosbag2"
        )
    if ".mcap" in path.suffixes or ".db3" in path.suffixes:
        return "bag"
    try:
        with h5py.File(path) as file:
            if "data" in file:
                return "robomimic"
            if "observations" in file:
                return "d4rl"
            if any(name.startswith("episode_") for name in file):
                return "minari"
            found = ", ".join(sorted(file)[:6]) or "nothing"
    except UNREADABLE as error:
        raise InputError(f"demonstrations '{path}' cannot be read: {error}") from None
    raise InputError(
        f"demonstrations '{path}' cannot be read: it has {found}, and is neither robomimic, D4RL nor Minari"
    )


def hash_of(path: str | Path) -> str:
    """SHA-256 of a data set: of its file, or of the names and contents of all files of its folder."""
    path = Path(path)
    if path.is_file():
        return provenance.file_hash(path)
    whole = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        whole.update(f"{file.relative_to(path)} {provenance.file_hash(file)}\n".encode())
    return whole.hexdigest()


def load(path: str | Path) -> Demonstrations:
    """Read a data set of any kind but a bag.

    Raises:
        InputError: missing, unreadable, empty, or a bag.
    """
    kind = kind_of(path)
    if kind == "bag":
        raise InputError(f"'{path}' is a bag: make demonstrations of it with flow-policy convert")
    return READERS[kind](Path(path))


@contextmanager
def writer_for(output: Path, layout: DemoLayout) -> Iterator[RobomimicWriter | LeRobotWriter]:
    """The format that the name asks for. What ends in an error or in Ctrl-C leaves nothing behind."""
    kind = RobomimicWriter if output.suffix in HDF5 else LeRobotWriter
    writer = kind(output, layout)
    try:
        yield writer
    except BaseException:
        writer.discard()
        raise

"""rosbag2 folders: read whatever can be read of them, and written so that a crash loses a second at most.

Reading: sqlite3 and MCAP, split, compressed by file or by message (zstd), with or without `metadata.yaml`,
whole or cut off. Types come from the definitions in the bag, else from the distribution it names. No ROS
needed. What cannot be used is counted in `Bag.problems`, with its place.
"""

import io
import os
import re
import shutil
import tempfile
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import yaml
import zstandard
from mcap.writer import CompressionType, Writer
from rosbags.typesys import (
    Stores,
    TypesysError,
    get_types_from_idl,
    get_types_from_msg,
    get_typestore,
)
from rosbags.typesys.store import Typestore

from flow_policy_rl.data import controller_state
from flow_policy_rl.data.mcap_file import Definition, NotMcap, Raw, read_mcap
from flow_policy_rl.data.problems import Problems
from flow_policy_rl.data.sqlite_file import NotSqlite, read_sqlite
from flow_policy_rl.errors import InputError

FLUSH_EVERY_S = 0.5
CHUNK_BYTES = 256 * 1024
TYPESTORE = get_typestore(Stores.ROS2_JAZZY)
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
STORAGE = (".mcap", ".db3")
IDL_SEPARATOR = "=" * 80 + "\n"


class Message(NamedTuple):
    """One recorded message.

    Attributes:
        log_time: ns, wall time at which the recorder received it.
        data: CDR bytes; `Bag.deserialize` makes a message of them.
    """

    topic: str
    type: str
    log_time: int
    data: bytes | memoryview


class BadMessage(ValueError):
    """A message that cannot be decoded; the text says why."""


def deserialize(message: Message):
    """A message of a standard type (attributes as in ROS, arrays as numpy)."""
    return TYPESTORE.deserialize_cdr(message.data, message.type)


class Bag:
    """A rosbag2 folder, or one storage file.

    Args:
        path: folder with `metadata.yaml` or without, or an .mcap or .db3 file, also with .zstd.
        problems: where to count what cannot be used.

    Raises:
        InputError: no such bag, or nothing in it that could be one.
    """

    def __init__(self, path: str | Path, problems: Problems | None = None):
        self.path = Path(path)
        self.problems = Problems() if problems is None else problems
        self._definitions: dict[str, Definition] = {}
        self._stores: dict[str, tuple[Typestore, ...]] = {}
        self._metadata = self._read_metadata()
        self.files = self._find_files()

    # --- what is there ---

    def _read_metadata(self) -> dict:
        file = self.path / "metadata.yaml"
        if not self.path.is_dir():
            return {}
        if not file.is_file():
            self.problems.add(
                "metadata.yaml", "missing: topics and files were looked for", "folder"
            )
            return {}
        try:
            raw = yaml.safe_load(file.read_bytes().decode("utf-8", "replace"))
            info = raw["rosbag2_bagfile_information"]
            if not isinstance(info, dict):
                raise TypeError("not a mapping")
        except (yaml.YAMLError, KeyError, TypeError, ValueError, RecursionError) as error:
            text = " ".join(str(error).split())
            self.problems.add("metadata.yaml", f"cannot be read: {text}", "folder")
            return {}
        return info

    def _find_files(self) -> list[Path]:
        if self.path.is_file():
            return [self.path]
        if not self.path.is_dir():
            raise InputError(f"bag '{self.path}' does not exist")
        found = [p for p in self.path.iterdir() if p.name.removesuffix(".zstd").endswith(STORAGE)]
        found.sort(key=lambda p: [int(t) if t.isdigit() else t for t in re.split(r"(\d+)", p.name)])
        if not found:
            raise InputError(f"bag '{self.path}' has no .mcap and no .db3 file")
        listed = self._metadata.get("relative_file_paths")
        if not isinstance(listed, list):
            return found
        names = [str(name).rpartition("/")[2] for name in listed]
        for name in names:
            if name not in {p.name for p in found}:
                self.problems.add(name, "listed in metadata.yaml but not there", "folder")
        known = {name.removesuffix(".zstd") for name in names}
        extra = [p for p in found if p.name.removesuffix(".zstd") not in known]
        for path in extra:
            self.problems.add(path.name, "not listed in metadata.yaml, read as well", "folder")
        there = {p.name: p for p in found}
        return [there[name] for name in names if name in there] + extra

    def topics(self) -> dict[str, str]:
        """Types by topic, those without a message included. Reads the bag through where `metadata.yaml` is missing.

        Raises:
            InputError: there are none: the bag is empty, or too damaged.
        """
        found: dict[str, str] = {}
        entries = self._metadata.get("topics_with_message_count")
        try:
            for entry in entries or []:
                found[entry["topic_metadata"]["name"]] = entry["topic_metadata"]["type"]
        except (KeyError, TypeError):
            found = {}
        if not found:
            scan = Bag(self.path)
            for message in scan.messages():
                found.setdefault(message.topic, message.type)
            if not found:
                raise InputError(
                    f"bag '{self.path}' has no message that can be read: {scan.problems or 'it is empty'}"
                )
        return found

    # --- messages ---

    def messages(self, topics: Iterable[str] | None = None) -> Iterator[Message]:
        """Messages in the order they were recorded, file by file.

        Args:
            topics: only these; None means all.

        Raises:
            InputError: none of the files is a bag file.
        """
        wanted = None if topics is None else set(topics)
        refused = []
        for path in self.files:
            try:
                for raw in self._read_file(path, wanted):
                    if raw.definition.type not in self._definitions:
                        self._definitions[raw.definition.type] = raw.definition
                    data = raw.data
                    if data[:4] == ZSTD_MAGIC:  # CDR begins with a zero
                        try:
                            data = zstandard.ZstdDecompressor().decompressobj().decompress(data)
                        except zstandard.ZstdError as error:
                            self.problems.add(raw.topic, f"decompression: {error}", raw.log_time)
                            continue
                    yield Message(raw.topic, raw.definition.type, raw.log_time, data)
            except (NotMcap, NotSqlite, OSError) as error:
                refused.append(f"bag file '{path}' cannot be read: {error}")
                self.problems.add(path.name, f"cannot be read: {error}", "begin")
        if len(refused) == len(self.files):
            raise InputError(refused[0])

    def _read_file(self, path: Path, topics: Collection[str] | None) -> Iterator[Raw]:
        with ExitStack() as stack:
            plain = path
            if path.suffix == ".zstd":
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="bag-"))
                plain = Path(folder) / path.stem
                self._decompress(path, plain)
            if plain.suffix == ".db3":
                yield from read_sqlite(plain, topics, self.problems)
            else:
                file = stack.enter_context(plain.open("rb", buffering=io.DEFAULT_BUFFER_SIZE))
                yield from read_mcap(path, file, topics, self.problems)

    def _decompress(self, path: Path, plain: Path) -> None:
        """Unpack a file, as far as it goes."""
        with path.open("rb") as packed, plain.open("wb") as out:
            reader = zstandard.ZstdDecompressor().stream_reader(packed, read_across_frames=True)
            try:
                shutil.copyfileobj(reader, out, 1 << 20)
            except zstandard.ZstdError as error:
                self.problems.add(
                    path.name, f"decompression ended early: {error}", f"byte {out.tell()}"
                )

    # --- types ---

    def deserialize(self, message: Message):
        """The message object (attributes as in ROS, arrays as numpy views).

        Raises:
            BadMessage: of an unknown type, or not what its type says.
        """
        kind, wrong = message.type, ""
        if kind not in self._stores:
            self._stores[kind] = self._stores_for(kind)
        stores = self._stores[kind]
        if not stores:
            raise BadMessage(f"type {kind} is neither defined in the bag nor known")
        for store in stores:
            try:
                msg = store.deserialize_cdr(message.data, kind)
            except Exception as error:  # anything can come of random bytes in a generated decoder
                wrong = " ".join(str(error).split())[:80]
                continue
            self._stores[kind] = (store,)
            return msg
        raise BadMessage(f"not a {kind}: {wrong}")

    def _stores_for(self, kind: str) -> tuple[Typestore, ...]:
        """Where a type may be described; the first that fits a message is kept."""
        definition = self._definitions.get(kind, Definition(kind, "", ""))
        if definition.text:
            try:
                store = get_typestore(Stores.EMPTY)
                store.register(_parse(definition))
                store.get_msgdef(kind)
                return (store,)
            except Exception as error:  # a parser generator's own kinds of errors
                text = " ".join(str(error).split())[:80]
                self.problems.add(kind, f"definition in the bag is unusable: {text}", "types")
        if kind == controller_state.NAME:
            return controller_state.stores()
        distro = str(self._metadata.get("ros_distro") or "")
        names = [f"ROS2_{distro.upper()}", "ROS2_JAZZY", "LATEST", "ROS2_HUMBLE", "ROS2_FOXY"]
        for name in names:
            if name in Stores.__members__:
                store = get_typestore(Stores[name])
                if kind in store.fielddefs:
                    return (store,)
        return ()


def _parse(definition: Definition) -> dict:
    if definition.encoding != "ros2idl":
        return get_types_from_msg(definition.text, definition.type)
    if not definition.text.startswith(IDL_SEPARATOR):
        return get_types_from_idl(definition.text)
    types = {}
    for part in definition.text.split(IDL_SEPARATOR)[1:]:
        types |= get_types_from_idl(part.partition("\n")[2])  # the first line names the file
    return types


def read_bag(path: str | Path, topics: Iterable[str] | None = None) -> Iterator[Message]:
    """Messages of a bag in the order they were recorded; see `Bag`."""
    return Bag(path).messages(topics)


class BagWriter:
    """Writes `<folder>/<name>_0.mcap` and `metadata.yaml`. Chunks are small and flushed twice a second.

    Raises:
        InputError: the folder exists already.
    """

    def __init__(self, folder: Path, ros_distro: str = "", compressed: bool = True):
        if folder.exists():
            raise InputError(f"bag '{folder}' exists already")
        folder.mkdir(parents=True)
        self._folder, self._ros_distro = folder, ros_distro
        self._file = (folder / f"{folder.name}_0.mcap").open("wb")
        compression = CompressionType.ZSTD if compressed else CompressionType.NONE
        self._writer = Writer(self._file, chunk_size=CHUNK_BYTES, compression=compression)
        self._writer.start(profile="ros2", library="flow_policy_rl")
        self._channels: dict[str, int] = {}
        self._topics: dict[str, dict] = {}
        self._first = self._last = 0
        self._flushed = time.monotonic()
        self._write_metadata()

    def add_topic(self, topic: str, msgtype: str, fields: Collection[str] = ()) -> bool:
        """Make a topic known; False when its type is not (the message cannot be described then).

        Args:
            fields: names in the type as it is installed, for a type that differs between distributions.
        """
        if topic in self._channels:
            return True
        store = TYPESTORE
        if msgtype == controller_state.NAME:
            store = controller_state.store_with(fields) or TYPESTORE
        try:
            definition, _ = store.generate_msgdef(msgtype, ros_version=2)
            type_hash = store.hash_rihs01(msgtype)
        except TypesysError:
            return False
        schema = self._writer.register_schema(msgtype, "ros2msg", definition.encode())
        self._channels[topic] = self._writer.register_channel(
            topic, "cdr", schema, {"offered_qos_profiles": ""}
        )
        self._topics[topic] = {"type": msgtype, "hash": type_hash, "count": 0}
        return True

    def write(self, topic: str, log_time: int, data: bytes) -> None:
        """Add a message of a known topic.

        Raises:
            OSError: the disk is full, for one; what was flushed stays readable.
        """
        self._writer.add_message(self._channels[topic], log_time, data, log_time)
        self._topics[topic]["count"] += 1
        self._first = self._first or log_time
        self._last = max(self._last, log_time)
        if time.monotonic() - self._flushed >= FLUSH_EVERY_S:
            self._writer.flush()
            self._file.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        """Write index and metadata."""
        self._writer.finish()
        self._file.close()
        self._write_metadata()

    def _write_metadata(self) -> None:
        count = sum(t["count"] for t in self._topics.values())
        start = {"nanoseconds_since_epoch": self._first}
        duration = {"nanoseconds": self._last - self._first}
        name = f"{self._folder.name}_0.mcap"
        info = {
            "version": 8,  # the newest that Humble and Iron read as well
            "storage_identifier": "mcap",
            "duration": duration,
            "starting_time": start,
            "message_count": count,
            "topics_with_message_count": [
                {
                    "topic_metadata": {
                        "name": topic,
                        "type": t["type"],
                        "serialization_format": "cdr",
                        "offered_qos_profiles": "",
                        "type_description_hash": t["hash"],
                    },
                    "message_count": t["count"],
                }
                for topic, t in self._topics.items()
            ],
            "compression_format": "",
            "compression_mode": "",
            "relative_file_paths": [name],
            "files": [
                {"path": name, "starting_time": start, "duration": duration, "message_count": count}
            ],
            "custom_data": None,
            "ros_distro": self._ros_distro,
        }
        partial = self._folder / "metadata.partial"
        partial.write_text(yaml.safe_dump({"rosbag2_bagfile_information": info}, sort_keys=False))
        os.replace(partial, self._folder / "metadata.yaml")

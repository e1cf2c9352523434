"""rosbag2 folders with MCAP storage, written so that a crash loses a second at most, and read even
when they were cut off.

No ROS needed: message definitions come from the `rosbags` library, files from the `mcap` library.
"""

import os
import struct
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import yaml
from mcap.exceptions import McapError
from mcap.reader import NonSeekingReader
from mcap.writer import MCAP0_MAGIC, CompressionType, Writer
from rosbags.typesys import Stores, TypesysError, get_typestore

from flow_policy_rl.errors import InputError

FLUSH_EVERY_S = 0.5
CHUNK_BYTES = 256 * 1024
TYPESTORE = get_typestore(Stores.ROS2_JAZZY)


class Message(NamedTuple):
    """One recorded message.

    Attributes:
        log_time: ns, wall time at which the recorder received it.
        data: CDR bytes; `deserialize` makes a message of them.
    """

    topic: str
    type: str
    log_time: int
    data: bytes


def deserialize(message: Message):
    """The message object (attributes as in ROS, arrays as numpy)."""
    return TYPESTORE.deserialize_cdr(message.data, message.type)


class BagWriter:
    """Writes `<folder>/<name>_0.mcap` and `metadata.yaml`. Chunks are small and flushed twice a second.

    Raises:
        InputError: the folder exists already.
    """

    def __init__(self, folder: Path, ros_distro: str = ""):
        if folder.exists():
            raise InputError(f"bag '{folder}' exists already")
        folder.mkdir(parents=True)
        self._folder, self._ros_distro = folder, ros_distro
        self._file = (folder / f"{folder.name}_0.mcap").open("wb")
        self._writer = Writer(self._file, chunk_size=CHUNK_BYTES, compression=CompressionType.ZSTD)
        self._writer.start(profile="ros2", library="flow_policy_rl")
        self._channels: dict[str, int] = {}
        self._topics: dict[str, dict] = {}
        self._first = self._last = 0
        self._flushed = time.monotonic()
        self._write_metadata()

    def add_topic(self, topic: str, msgtype: str) -> bool:
        """Make a topic known; False when its type is not (the message cannot be described then)."""
        if topic in self._channels:
            return True
        try:
            definition, _ = TYPESTORE.generate_msgdef(msgtype, ros_version=2)
            type_hash = TYPESTORE.hash_rihs01(msgtype)
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
            "version": 9,
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
                        "offered_qos_profiles": [],
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


def read_bag(folder: str | Path, topics: Iterable[str] | None = None) -> Iterator[Message]:
    """Messages of a bag in the order they were recorded. A file that was cut off is read up to the cut.

    Raises:
        InputError: no such bag, or no MCAP file in it.
    """
    folder = Path(folder)
    files = (
        [folder] if folder.suffix == ".mcap" and folder.is_file() else sorted(folder.glob("*.mcap"))
    )
    if not files:
        raise InputError(
            f"bag '{folder}' " + ("has no .mcap file" if folder.is_dir() else "does not exist")
        )
    wanted = None if topics is None else set(topics)
    for path in files:
        with path.open("rb") as file:
            reader = NonSeekingReader(file)
            try:
                for schema, channel, message in reader.iter_messages(
                    topics=wanted, log_time_order=False
                ):
                    yield Message(channel.topic, schema.name, message.log_time, message.data)
            except (McapError, EOFError, ValueError, OSError, struct.error) as error:
                if not _cut_off(path):
                    raise InputError(f"bag file '{path}' cannot be read: {error}") from None


def _cut_off(path: Path) -> bool:
    """Whether a file begins as MCAP and lacks its end, as that of a killed recorder does."""
    with path.open("rb") as file:
        begin = file.read(8)
        file.seek(max(0, path.stat().st_size - 8))
        return begin == MCAP0_MAGIC and (file.read() != begin or path.stat().st_size < 16)


def topic_types(folder: Path) -> dict[str, str]:
    """Topics of a bag and their types."""
    found: dict[str, str] = {}
    for message in read_bag(folder):
        found.setdefault(message.topic, message.type)
    return found

"""MCAP files record by record: whole, cut off anywhere, without index, chunked or not, compressed or not.

The `mcap` library stops at a chunk that is not complete. A killed recorder leaves one as its last, so
this reader takes the records of a chunk up to the cut, and goes on after a damaged one.
Format: https://mcap.dev/spec
"""

import struct
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import lz4.frame
import zstandard

from flow_policy_rl.data.problems import Problems

MAGIC = b"\x89MCAP0\r\n"
HEADER, FOOTER, SCHEMA, CHANNEL, MESSAGE, CHUNK, CHUNK_INDEX, DATA_END = 1, 2, 3, 4, 5, 6, 8, 15
MAX_CHUNK = 1 << 32  # bytes; a chunk that claims more is damaged
PIECE = 1 << 20

_RECORD = struct.Struct("<BQ")
_MESSAGE = struct.Struct("<HIQQ")  # channel, sequence, log time, publish time
_CHUNK = struct.Struct("<QQQI")  # first and last time, uncompressed size, checksum
_FOOTER_BYTES = 9 + 20 + 8


class Definition(NamedTuple):
    """How a type is defined: `encoding` is ros2msg or ros2idl."""

    type: str
    encoding: str
    text: str


class Raw(NamedTuple):
    """A message as stored."""

    topic: str
    definition: Definition
    log_time: int
    data: memoryview


class NotMcap(ValueError):
    """The file does not begin as MCAP does."""


def read_mcap(
    path: Path, file: BinaryIO, topics: Collection[str] | None, problems: Problems
) -> Iterator[Raw]:
    """Messages in the order of the file. What cannot be read is counted in `problems`.

    Args:
        path: for messages to people.
        file: seekable.
        topics: only these; None means all.

    Raises:
        NotMcap: another format.
    """
    size = file.seek(0, 2)
    file.seek(0)
    begin = file.read(len(MAGIC))
    if begin != MAGIC[: len(begin)]:
        raise NotMcap("it does not begin as MCAP does")
    tables = _Tables(path, topics, problems)
    end = _data_end(file, size)
    whole = end is not None
    if not whole:
        problems.add(path.name, "the file was cut off", f"byte {size}")
        end = size
    at = len(MAGIC)
    while at + _RECORD.size <= end:
        file.seek(at)
        opcode, length = _RECORD.unpack(file.read(_RECORD.size))
        here, at = at, at + _RECORD.size + length
        if opcode == DATA_END and (at == end or not whole):
            return
        if opcode in (0, FOOTER, DATA_END) or (at > end and whole):
            at = _next_chunk(file, size, here)
            problems.add(path.name, "damaged record skipped", f"byte {here}")
            if at is None:
                problems.add(path.name, f"{end - here} bytes unreadable", f"byte {here}")
                return
            continue
        if opcode == CHUNK:
            content = file.read(min(length, size - here))
            yield from tables.chunk(content, length, here)
        elif opcode in (SCHEMA, CHANNEL, MESSAGE) and at <= size:
            record = _RECORD.pack(opcode, length) + file.read(length)
            yield from tables.records(record, f"byte {here}")


class _Tables:
    """Schemas and channels met so far."""

    def __init__(self, path: Path, topics: Collection[str] | None, problems: Problems):
        self.path, self.topics, self.problems = path, topics, problems
        self.schemas: dict[int, Definition] = {}
        self.channels: dict[int, tuple[str, Definition] | None] = {}

    def chunk(self, content: bytes, length: int, at: int) -> Iterator[Raw]:
        """Messages of a chunk of which `content` is there (all of it, or what the cut left)."""
        where, cut = f"byte {at}", len(content) < length
        try:
            _, _, size, checksum = _CHUNK.unpack_from(content)
            compression, start = _string(content, _CHUNK.size)
            (stored,) = struct.unpack_from("<Q", content, start)
        except (struct.error, ValueError):
            if not cut:
                self.problems.add(self.path.name, "damaged chunk skipped", where)
            return
        data, complete = _decompress(
            memoryview(content)[start + 8 : start + 8 + stored], compression, size
        )
        whole = complete and not cut and len(data) == size
        if whole and checksum and zlib.crc32(data) != checksum:
            self.problems.add(self.path.name, "chunk with a wrong checksum, read anyway", where)
        elif not whole and not cut:
            self.problems.add(
                self.path.name,
                f"chunk of {size} bytes ({compression or 'not compressed'}) read up to byte {len(data)}",
                where,
            )
        yield from self.records(data, where)

    def records(self, data: bytes | memoryview, where: str) -> Iterator[Raw]:
        """Messages among the records of a chunk; an incomplete last one is left."""
        view, at, end = memoryview(data), 0, len(data)
        channels, header, message = self.channels, _RECORD.size, _MESSAGE.size
        while at + header <= end:
            opcode, length = _RECORD.unpack_from(view, at)
            begin = at + header
            at = begin + length
            if at > end:
                if opcode not in (SCHEMA, CHANNEL, MESSAGE):
                    self.problems.add(self.path.name, "damaged record in a chunk", where)
                return
            if opcode == MESSAGE:
                if length < message:
                    self.problems.add(self.path.name, "message record too short", where)
                    continue
                channel, _, log_time, _ = _MESSAGE.unpack_from(view, begin)
                if channel not in channels:
                    self.problems.add(
                        self.path.name, f"message of an unknown channel {channel}", where
                    )
                elif (known := channels[channel]) is not None:
                    yield Raw(known[0], known[1], log_time, view[begin + message : at])
            elif opcode == SCHEMA:
                self._schema(view[begin:at], where)
            elif opcode == CHANNEL:
                self._channel(view[begin:at], where)

    def _schema(self, record: memoryview, where: str) -> None:
        try:
            (number,) = struct.unpack_from("<H", record)
            name, at = _string(record, 2)
            encoding, at = _string(record, at)
            text, _ = _string(record, at)
        except (struct.error, ValueError):
            return self.problems.add(self.path.name, "damaged type definition", where)
        self.schemas[number] = Definition(name, encoding, text)

    def _channel(self, record: memoryview, where: str) -> None:
        try:
            number, schema = struct.unpack_from("<HH", record)
            topic, at = _string(record, 4)
            encoding, _ = _string(record, at)
        except (struct.error, ValueError):
            return self.problems.add(self.path.name, "damaged channel", where)
        if number in self.channels:
            return
        wanted = self.topics is None or topic in self.topics
        if wanted and encoding != "cdr":
            self.problems.add(topic, f"serialization '{encoding}' is not cdr: not read", where)
        if wanted and schema not in self.schemas:
            self.problems.add(topic, "its type is not in the file: not read", where)
        readable = wanted and encoding == "cdr" and schema in self.schemas
        self.channels[number] = (topic, self.schemas[schema]) if readable else None


def _string(data: bytes | memoryview, at: int) -> tuple[str, int]:
    """A length-prefixed UTF-8 string and where it ends."""
    (length,) = struct.unpack_from("<I", data, at)
    end = at + 4 + length
    if end > len(data):
        raise ValueError("string longer than its record")
    return str(data[at + 4 : end], "utf-8"), end


def _decompress(data: memoryview, compression: str, size: int) -> tuple[bytes | memoryview, bool]:
    """As much of a chunk as can be had, and whether nothing went wrong."""
    if compression == "":
        return data, True
    if compression == "zstd":
        unpack = zstandard.ZstdDecompressor().decompressobj()
    elif compression == "lz4":
        unpack = lz4.frame.LZ4FrameDecompressor()
    else:
        return b"", False
    pieces, got, limit = [], 0, min(size, MAX_CHUNK)
    try:
        for at in range(0, len(data), PIECE):
            if got >= limit:
                break
            pieces.append(unpack.decompress(data[at : at + PIECE]))
            got += len(pieces[-1])
    except (zstandard.ZstdError, RuntimeError, EOFError):
        return b"".join(pieces), False
    return pieces[0] if len(pieces) == 1 else b"".join(pieces), True


def _footer(file: BinaryIO, size: int) -> tuple[int, int] | None:
    """Where the summary begins (0: none), and where the footer record does; None without a sound end."""
    if size < _FOOTER_BYTES + len(MAGIC):
        return None
    file.seek(size - _FOOTER_BYTES)
    opcode, length, summary, _, _, magic = struct.unpack("<BQQQI8s", file.read(_FOOTER_BYTES))
    if magic != MAGIC or opcode != FOOTER or length != 20:
        return None
    return summary, size - _FOOTER_BYTES


def _data_end(file: BinaryIO, size: int) -> int | None:
    """Where the data ends; None when the file lacks its end."""
    footer = _footer(file, size)
    if footer is None:
        return None
    summary, end = footer
    return summary if 0 < summary < end else end


def _next_chunk(file: BinaryIO, size: int, after: int) -> int | None:
    """Where the next chunk begins, as the index at the end of the file tells."""
    footer = _footer(file, size)
    if footer is None or not 0 < footer[0] < footer[1]:
        return None
    file.seek(footer[0])
    index, at, starts = file.read(footer[1] - footer[0]), 0, []
    while at + _RECORD.size <= len(index):
        opcode, length = _RECORD.unpack_from(index, at)
        if opcode == CHUNK_INDEX and length >= 24:
            starts.append(struct.unpack_from("<QQQ", index, at + _RECORD.size)[2])
        at += _RECORD.size + length
    return min((s for s in starts if after < s < footer[0]), default=None)

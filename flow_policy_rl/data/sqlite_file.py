"""rosbag2's sqlite3 files, also such as a killed recorder or a full disk left."""

import os
import shutil
import sqlite3
import tempfile
from collections.abc import Collection, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from urllib.parse import quote

from flow_policy_rl.data.mcap_file import Definition, Raw
from flow_policy_rl.data.problems import Problems

MAX_STEP = 1 << 20  # rows to jump over when looking for the end of a damaged place


class NotSqlite(ValueError):
    """The file is no database with a rosbag2 in it."""


def read_sqlite(path: Path, topics: Collection[str] | None, problems: Problems) -> Iterator[Raw]:
    """Messages in the order of their time, or of recording where the index is gone.

    Raises:
        NotSqlite: another format.
    """
    if path.stat().st_size == 0:
        problems.add(path.name, "the file is empty", "byte 0")
        return
    with ExitStack() as stack:
        missing = _missing_bytes(path)
        if missing:
            problems.add(path.name, "the file was cut off", f"byte {path.stat().st_size}")
            path = _padded(path, missing, stack)
        connection = stack.enter_context(closing(_open(path, problems)))
        yield from _messages(connection, path, topics, problems, bool(missing))


def _messages(
    connection: sqlite3.Connection,
    path: Path,
    topics: Collection[str] | None,
    problems: Problems,
    cut: bool,
) -> Iterator[Raw]:
    connection.text_factory = lambda data: data.decode("utf-8", "replace")
    try:
        known = _topics(connection, topics, problems)
    except sqlite3.Error as error:
        if not cut:
            raise NotSqlite(str(error)) from None
        problems.add(path.name, "the cut is before its tables", "begin")
        return
    for topic, time, data in _rows(connection, path, list(known), problems, cut):
        if not isinstance(data, bytes) or not isinstance(time, int):
            problems.add(known[topic][0], "row without a message", "")
            continue
        yield Raw(*known[topic], time, memoryview(data))


def _open(path: Path, problems: Problems) -> sqlite3.Connection:
    name = quote(str(path.absolute()))
    # A journal beside the file means that the recorder did not end; sqlite may repair or refuse.
    for options in ("mode=ro", "mode=ro&immutable=1"):
        connection = sqlite3.connect(f"file:{name}?{options}", uri=True)
        try:
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
            return connection
        except sqlite3.OperationalError as error:
            connection.close()
            problems.add(path.name, f"opened without its journal: {error}", "begin")
        except sqlite3.Error as error:
            connection.close()
            raise NotSqlite(str(error)) from None
    raise NotSqlite("it cannot be opened")


def _topics(
    connection: sqlite3.Connection, wanted: Collection[str] | None, problems: Problems
) -> dict[int, tuple[str, Definition]]:
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
    definitions = {}
    if "message_definitions" in tables:
        query = "SELECT topic_type, encoding, encoded_message_definition FROM message_definitions"
        definitions = {row[0]: Definition(*row) for row in connection.execute(query)}
    known = {}
    for number, topic, kind, form in connection.execute(
        "SELECT id, name, type, serialization_format FROM topics"
    ):
        if wanted is not None and topic not in wanted:
            continue
        if form != "cdr":
            problems.add(topic, f"serialization '{form}' is not cdr: not read", "begin")
            continue
        known[number] = (topic, definitions.get(kind, Definition(kind, "", "")))
    return known


def _rows(
    connection: sqlite3.Connection, path: Path, topics: list[int], problems: Problems, cut: bool
) -> Iterator[tuple]:
    """(topic id, time, data): by time through the index, or, where that fails, by row around the damage."""
    marks = ",".join("?" * len(topics))
    last_time, seen = -(1 << 63), 0
    if not cut and _has_time_index(connection):
        query = f"SELECT topic_id, timestamp, data FROM messages WHERE topic_id IN ({marks}) ORDER BY timestamp"
        try:
            for row in connection.execute(query, topics):
                yield row
                last_time, seen = row[1], seen + 1
            return
        except sqlite3.Error as error:
            problems.add(path.name, f"database damaged: {error}", f"message {seen}")
    else:
        problems.add(path.name, "read in order of recording: cut off, or without an index", "begin")
    query = (
        f"SELECT id, topic_id, timestamp, data FROM messages WHERE id > ? AND timestamp > ? "
        f"AND topic_id IN ({marks}) ORDER BY id"
    )
    number, step = -(1 << 62), 1
    while step <= MAX_STEP:
        try:
            for row in connection.execute(query, (number, last_time, *topics)):
                number, step = row[0], 1
                yield row[1:]
            return
        except sqlite3.Error as error:
            problems.add(path.name, f"rows unreadable: {error}", f"after row {max(number, 0)}")
            number, step = max(number, 0) + step, step * 2


def _has_time_index(connection: sqlite3.Connection) -> bool:
    query = "SELECT sql FROM sqlite_master WHERE type = 'index' AND tbl_name = 'messages'"
    try:
        return any("timestamp" in (sql or "") for (sql,) in connection.execute(query))
    except sqlite3.Error:
        return False


def _missing_bytes(path: Path) -> int:
    """By how much the file is shorter than its header says."""
    with path.open("rb") as file:
        header = file.read(100)
    page = int.from_bytes(header[16:18], "big")
    page = 65536 if page == 1 else page
    size = int.from_bytes(header[28:32], "big") * page
    if not header.startswith(b"SQLite format 3\0"[: len(header)]):
        return 0
    return max(0, size - path.stat().st_size, 512 - path.stat().st_size)


def _padded(path: Path, missing: int, stack: ExitStack) -> Path:
    """A copy of full length: sqlite refuses a file that lacks its last pages altogether."""
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="bag-"))
    copy = Path(folder) / path.name
    shutil.copyfile(path, copy)
    os.truncate(copy, path.stat().st_size + missing)  # sparse
    return copy

"""Bags of every kind are read, damaged ones as far as they go, and what is lost is counted."""

import contextlib
import io
import random
import shutil
import sqlite3

import numpy as np
import pytest
import yaml
from mcap.writer import CompressionType
from mcap.writer import Writer as McapWriter
from rosbags.rosbag2 import CompressionFormat, CompressionMode, Reader, StoragePlugin, Writer
from rosbags.typesys import Stores, get_types_from_msg, get_typestore

from flow_policy_rl.data import controller_state
from flow_policy_rl.data.bags import BadMessage, Bag, BagWriter, Message, read_bag
from flow_policy_rl.data.mcap_file import read_mcap
from flow_policy_rl.data.problems import MAX_KINDS, Problems
from flow_policy_rl.errors import InputError
from flow_policy_rl.offline.truth import controller_reference

STORE = get_typestore(Stores.ROS2_HUMBLE)
STORE.register(get_types_from_msg("float64 force\nstring label", "odd_msgs/msg/Grip"))
NUMBER, JOINTS, GRIP = "std_msgs/msg/Float64", "sensor_msgs/msg/JointState", "odd_msgs/msg/Grip"


def number(value: float) -> bytes:
    return bytes(STORE.serialize_cdr(STORE.types[NUMBER](data=value), NUMBER))


def grip(value: float) -> bytes:
    return bytes(STORE.serialize_cdr(STORE.types[GRIP](force=value, label="x"), GRIP))


def write(folder, count=40, plugin=StoragePlugin.MCAP, mode=CompressionMode.NONE, start=0):
    """Numbers on /a, own type on /b, nothing on /silent."""
    writer = Writer(folder, version=9, storage_plugin=plugin)
    if mode is not CompressionMode.NONE:
        writer.set_compression(mode, CompressionFormat.ZSTD)
    with writer:
        a = writer.add_connection("/a", NUMBER, typestore=STORE)
        b = writer.add_connection("/b", GRIP, typestore=STORE)
        writer.add_connection("/silent", JOINTS, typestore=STORE)
        for i in range(start, start + count):
            writer.write(a, 1000 + 10 * i, number(i))
            writer.write(b, 1005 + 10 * i, grip(-i))


def values(path, problems=None) -> tuple[list[float], list[float]]:
    bag = Bag(path, problems)
    found = {"/a": [], "/b": []}
    for message in bag.messages():
        msg = bag.deserialize(message)
        found[message.topic].append(msg.data if message.topic == "/a" else msg.force)
    return found["/a"], found["/b"]


KINDS = [
    (StoragePlugin.MCAP, CompressionMode.NONE),
    (StoragePlugin.MCAP, CompressionMode.STORAGE),
    (StoragePlugin.MCAP, CompressionMode.MESSAGE),
    (StoragePlugin.MCAP, CompressionMode.FILE),
    (StoragePlugin.SQLITE3, CompressionMode.NONE),
    (StoragePlugin.SQLITE3, CompressionMode.MESSAGE),
    (StoragePlugin.SQLITE3, CompressionMode.FILE),
]


@pytest.mark.parametrize(("plugin", "mode"), KINDS, ids=lambda v: v.name.lower())
@pytest.mark.parametrize("metadata", [True, False], ids=["", "no-metadata"])
def test_every_storage_and_compression(tmp_path, plugin, mode, metadata):
    write(tmp_path / "bag", 40, plugin, mode)
    if not metadata:
        (tmp_path / "bag" / "metadata.yaml").unlink()
    problems = Problems()
    a, b = values(tmp_path / "bag", problems)
    assert a == list(range(40))
    assert b == [-i for i in range(40)]
    assert [p.topic for p in problems] == ([] if metadata else ["metadata.yaml"])
    if metadata:
        assert Bag(tmp_path / "bag").topics() == {"/a": NUMBER, "/b": GRIP, "/silent": JOINTS}
    only = [m.topic for m in read_bag(tmp_path / "bag", ["/a"])]
    assert only == ["/a"] * 40


def test_split_bag_missing_and_unlisted_files(tmp_path):
    for k in range(12):  # _10 comes after _9
        write(tmp_path / f"part{k}", 5, start=5 * k)
        (tmp_path / "bag").mkdir(exist_ok=True)
        shutil.copy(tmp_path / f"part{k}" / f"part{k}.mcap", tmp_path / "bag" / f"bag_{k}.mcap")
    names = [f"bag_{k}.mcap" for k in range(12)]
    info = yaml.safe_load((tmp_path / "part0" / "metadata.yaml").read_text())

    def metadata(files) -> None:
        info["rosbag2_bagfile_information"]["relative_file_paths"] = files
        (tmp_path / "bag" / "metadata.yaml").write_text(yaml.safe_dump(info))

    metadata(names)
    assert values(tmp_path / "bag")[0] == list(range(60))
    metadata([*names[:-1], "bag_99.mcap"])
    problems = Problems()
    assert values(tmp_path / "bag", problems)[0] == list(range(60))
    assert {(p.topic, p.reason) for p in problems} == {
        ("bag_99.mcap", "listed in metadata.yaml but not there"),
        ("bag_11.mcap", "not listed in metadata.yaml, read as well"),
    }
    for text in ("{", "- 1", "rosbag2_bagfile_information: 3", "\x00\xff"):
        (tmp_path / "bag" / "metadata.yaml").write_text(text)
        problems = Problems()
        assert values(tmp_path / "bag", problems)[0] == list(range(60))
        assert "cannot be read" in str(problems)


def test_the_definition_in_the_bag_wins_over_the_distribution(tmp_path):
    """A type of the same name but another layout, as between distributions."""
    store = get_typestore(Stores.EMPTY)
    store.register(get_types_from_msg("float32 extra\nfloat64 data", NUMBER))
    with Writer(tmp_path / "bag", version=9, storage_plugin=StoragePlugin.MCAP) as writer:
        a = writer.add_connection("/a", NUMBER, typestore=store)
        msg = store.types[NUMBER](extra=1.5, data=7.0)
        writer.write(a, 1, store.serialize_cdr(msg, NUMBER))
    bag = Bag(tmp_path / "bag")
    (message,) = bag.messages()
    assert (bag.deserialize(message).extra, bag.deserialize(message).data) == (1.5, 7.0)


def test_old_sqlite_bag_without_definitions(tmp_path):
    """Schema of Foxy to Humble: no definitions table; standard types still decode, own types are named."""
    write(tmp_path / "bag", 10, StoragePlugin.SQLITE3)
    database = sqlite3.connect(tmp_path / "bag" / "bag.db3")
    database.execute("DROP TABLE message_definitions")
    database.commit()
    database.close()
    bag = Bag(tmp_path / "bag")
    for message in bag.messages():
        if message.topic == "/a":
            bag.deserialize(message)
        else:
            with pytest.raises(BadMessage, match="odd_msgs/msg/Grip is neither defined"):
                bag.deserialize(message)


def state_of(store, values, empty=()):
    """A JointTrajectoryControllerState whose desired or reference position is `values`, but for parts left `empty`."""
    kinds, none = store.types, np.zeros(0)
    time = kinds["builtin_interfaces/msg/Time"](5, 0)
    header = kinds["std_msgs/msg/Header"](time, "")
    still = kinds["builtin_interfaces/msg/Duration"](0, 0)

    def point(name):
        own = name in ("reference", "desired") and name not in empty
        position = np.array(values if own else [9, 9], float)
        position = none if name in empty else position
        return kinds["trajectory_msgs/msg/JointTrajectoryPoint"](position, none, none, none, still)

    many = kinds["trajectory_msgs/msg/MultiDOFJointTrajectoryPoint"]([], [], [], still)
    known = {"header": header, "joint_names": ["x", "y"], "speed_scaling_factor": 1.0}
    fields = {}
    for name, _ in store.fielddefs[controller_state.NAME][1]:
        other = [] if name.endswith("names") else many if "multi" in name else None
        fields[name] = known.get(name, point(name) if other is None else other)
    return kinds[controller_state.NAME](**fields)


@pytest.mark.parametrize("k", range(5), ids=list(controller_state.STATES))
def test_controller_states_of_every_version_without_a_definition(tmp_path, k):
    """As in a sqlite3 bag of Humble: the layout is the one that the bytes fill."""
    store, name = controller_state.stores()[k], controller_state.NAME
    parts = {name for name, _ in store.fielddefs[name][1]}
    messages = [b"\x00\x01\x00\x00" + bytes(range(40))]
    messages += [bytes(store.serialize_cdr(state_of(store, [i, -i]), name)) for i in range(3)]
    if {"reference", "desired"} <= parts:  # the old topic of a later Humble
        only = state_of(store, [3.0, -3.0], {"reference", "feedback"})
        messages.append(bytes(store.serialize_cdr(only, name)))
    with Writer(tmp_path / "bag", version=8, storage_plugin=StoragePlugin.SQLITE3) as writer:
        topic = writer.add_connection("/state", name, typestore=store)
        for i, data in enumerate(messages):
            writer.write(topic, i, data)
    with contextlib.closing(sqlite3.connect(tmp_path / "bag" / "bag.db3")) as database:
        database.execute("DROP TABLE message_definitions")
        database.commit()
    bag, found = Bag(tmp_path / "bag"), []
    for message in bag.messages():
        with contextlib.suppress(BadMessage):
            found.append(controller_reference(bag.deserialize(message), ("y", "x")).tolist())
    assert found == [[-i, i] for i in range(len(messages) - 1)]


def test_what_is_recorded_of_a_controller_state_has_the_layout_that_is_installed(tmp_path):
    for k, store in enumerate(controller_state.stores()):
        fields = [name for name, _ in store.fielddefs[controller_state.NAME][1]]
        writer = BagWriter(tmp_path / f"bag{k}")
        assert writer.add_topic("/state", controller_state.NAME, fields)
        data = bytes(store.serialize_cdr(state_of(store, [1.0, 2.0]), controller_state.NAME))
        writer.write("/state", 5, data)
        writer.close()
        with Reader(tmp_path / f"bag{k}") as reader:
            (connection,) = reader.connections
            assert connection.digest == store.hash_rihs01(controller_state.NAME)
            own = get_typestore(Stores.EMPTY)
            own.register(get_types_from_msg(connection.msgdef.data, controller_state.NAME))
            msg = own.deserialize_cdr(data, controller_state.NAME)
        assert controller_reference(msg, ("x", "y")).tolist() == [1.0, 2.0]
    writer = BagWriter(tmp_path / "other")
    assert not writer.add_topic("/state", controller_state.NAME, ["header", "of_the_future"])


def test_every_distribution_reads_our_metadata(tmp_path):
    """rosbag2 of Humble and Iron take profiles as text whatever the version says; from 9 on, Jazzy wants a list."""
    writer = BagWriter(tmp_path / "bag", "humble")
    writer.add_topic("/a", NUMBER)
    writer.write("/a", 7, number(3.0))
    writer.close()
    raw = yaml.safe_load((tmp_path / "bag" / "metadata.yaml").read_text())
    info = raw["rosbag2_bagfile_information"]
    assert info["version"] in (6, 7, 8)
    (topic,) = info["topics_with_message_count"]
    assert topic["topic_metadata"]["offered_qos_profiles"] == ""
    assert topic["topic_metadata"]["type_description_hash"].startswith("RIHS01_")
    assert {type(info[k]) for k in ("ros_distro", "compression_mode", "compression_format")} == {
        str
    }
    with Reader(tmp_path / "bag") as reader:
        assert (reader.message_count, reader.ros_distro) == (1, "humble")
        ((connection, time, data),) = reader.messages()
        assert (connection.topic, time, bytes(data)) == ("/a", 7, number(3.0))
    assert [m.data for m in Bag(tmp_path / "bag").messages()] == [number(3.0)]


COMPRESSIONS = [CompressionType.NONE, CompressionType.ZSTD, CompressionType.LZ4, None]


def mcap_bytes(compression, count=60) -> bytes:
    """A file with several chunks; compression None means no chunks at all."""
    out = io.BytesIO()
    chunks = {"use_chunking": False} if compression is None else {"compression": compression}
    writer = McapWriter(out, chunk_size=400, **chunks)
    writer.start("ros2", "test")
    schema = writer.register_schema(NUMBER, "ros2msg", b"float64 data")
    channel = writer.register_channel("/a", "cdr", schema)
    for i in range(count):
        writer.add_message(channel, i, number(i + 0.3), i)
    writer.finish()
    return out.getvalue()


@pytest.mark.parametrize("compression", COMPRESSIONS, ids=lambda c: c.name if c else "no-chunks")
def test_a_file_cut_anywhere_gives_everything_before_the_cut(tmp_path, compression):
    """Also of the chunk that was being written: what an uncompressed prefix holds is read to the last message."""
    whole = mcap_bytes(compression)
    path = tmp_path / "cut.mcap"
    counts = []
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        problems = Problems()
        got = [np.frombuffer(m.data[4:], float)[0] for m in Bag(path, problems).messages()]
        assert got == [i + 0.3 for i in range(len(got))]
        counts.append(len(got))
        assert len(problems) == 1
        if compression in (CompressionType.NONE, None):  # every message whose last byte is there
            assert len(got) == sum(
                whole.find(number(i + 0.3), 0, length) >= 0 for i in range(60) if length > 8
            )
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (0, 60)
    path.write_bytes(whole)
    problems = Problems()
    assert len(list(Bag(path, problems).messages())) == 60
    assert len(problems) == 0


@pytest.mark.parametrize("compression", COMPRESSIONS, ids=lambda c: c.name if c else "no-chunks")
def test_fuzzed_mcap_never_crashes_and_never_loses_in_silence(tmp_path, compression):
    whole = mcap_bytes(compression)
    rng = random.Random(7)
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 1, 4, 30))):
            data[rng.randrange(8, len(data))] = rng.randrange(256)
        problems = Problems()
        got = [
            (m.log_time, bytes(m.data))
            for m in read_mcap(tmp_path / "x", io.BytesIO(data), None, problems)
        ]
        kept = sum(time == i and body == number(i + 0.3) for i, (time, body) in enumerate(got))
        if compression is CompressionType.NONE and kept < 60:  # chunks have a checksum there
            assert len(problems) > 0 or len(got) == 60
        assert len(problems) <= MAX_KINDS + 1


def test_damage_in_the_middle_is_skipped_over(tmp_path):
    whole = bytearray(mcap_bytes(CompressionType.ZSTD))
    middle = len(whole) // 2
    whole[middle - 60 : middle + 60] = bytes(120)
    problems = Problems()
    got = [m.log_time for m in read_mcap(tmp_path / "x", io.BytesIO(whole), None, problems)]
    assert got[0] == 0
    assert got[-1] == 59
    assert 30 < len(got) < 60
    assert all("byte" in p.first for p in problems)


@pytest.mark.parametrize("cut", [True, False], ids=["cut", "overwritten"])
def test_damaged_sqlite_gives_what_is_left(tmp_path, cut):
    write(tmp_path / "bag", 2000, StoragePlugin.SQLITE3)
    file = tmp_path / "bag" / "bag.db3"
    whole = file.read_bytes()
    rng = random.Random(3)
    best = 0
    for _ in range(40):
        data = bytearray(whole)
        at = rng.randrange(4096, len(data))
        if cut:
            data = data[:at]
        else:
            data[at : at + 200] = rng.randbytes(200)
        file.write_bytes(data)
        problems = Problems()
        try:
            got = [m.log_time for m in Bag(tmp_path / "bag", problems).messages(["/a", "/b"])]
        except InputError:  # the tables' own page is gone
            continue
        best = max(best, len(got))
        assert len(set(got)) == len(got) or not cut
        assert len(got) >= 3990 or len(problems) > 0
    assert best > 2000


def test_of_a_bag_without_any_message_the_damage_is_told(tmp_path):
    for name, content, says in (
        ("empty.mcap", b"", "it is empty|cut off"),
        ("packed.mcap.zstd", b"\x28\xb5\x2f\xfd" + b"junk" * 10, "decompression ended early"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=f"no message that can be read: .*({says})"):
            Bag(tmp_path / name).topics()


def test_what_is_no_bag_is_refused(tmp_path):
    for name in ("text.mcap", "text.db3"):
        (tmp_path / name).write_bytes(
            b"neither of the two formats, but long enough for a header" * 4
        )
        with pytest.raises(InputError, match="cannot be read"):
            list(read_bag(tmp_path / name))
    with pytest.raises(InputError, match="does not exist"):
        Bag(tmp_path / "none")


def test_random_payloads_are_bad_messages_not_crashes(tmp_path):
    bag, rng = bag_of(tmp_path), random.Random(5)
    for kind in (JOINTS, "sensor_msgs/msg/Image", "trajectory_msgs/msg/JointTrajectory", GRIP):
        for _ in range(150):
            data = b"\x00\x01\x00\x00" + rng.randbytes(rng.randrange(0, 120))
            with contextlib.suppress(BadMessage):
                bag.deserialize(Message("/x", kind, 0, data))


def bag_of(tmp_path) -> Bag:
    write(tmp_path / "bag", 1)
    bag = Bag(tmp_path / "bag")
    list(bag.messages())
    return bag

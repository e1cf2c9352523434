"""Demonstrations and bags on disk."""

import dataclasses
import weakref

import h5py
import numpy as np
import pytest
import torch
from rosbags.rosbag2 import Reader

from flow_policy_rl.data import bags, demonstrations
from flow_policy_rl.data.bags import TYPESTORE, BagWriter, deserialize, read_bag
from flow_policy_rl.data.demonstrations import ChunkDataset, DemoLayout, Demonstrations, Episode
from flow_policy_rl.errors import InputError
from flow_policy_rl.spec import ObservationField


def episode(length: int, start: float) -> Episode:
    """Action and observation k are start + k."""
    values = start + np.arange(length, dtype=float)[:, None]
    return Episode({"x": values}, values.copy(), np.zeros(length), np.zeros((length, 2)))


def make(episodes) -> Demonstrations:
    field = ObservationField("x", "joint_position", ("a",), "rad")
    return Demonstrations(DemoLayout("toy", "toy", ("a",), 0.05, (field,)), episodes, {"seed": 1})


def test_demonstrations_round_trip_in_robomimic_layout(tmp_path):
    demos = make([episode(5, 0), episode(3, 100), *[episode(2, 200 + i) for i in range(10)]])
    demonstrations.save(tmp_path / "d.hdf5", demos)
    again = demonstrations.load(tmp_path / "d.hdf5")
    assert again.layout == demos.layout
    assert again.provenance == demos.provenance
    for one, other in zip(
        demos.episodes, again.episodes, strict=True
    ):  # demo_10 comes after demo_9
        assert np.array_equal(one.actions, other.actions)
        assert np.array_equal(one.obs["x"], other.obs["x"])
    with h5py.File(tmp_path / "d.hdf5") as file:
        assert file["data"].attrs["total"] == demos.num_steps
        assert file["data/demo_1"].attrs["num_samples"] == 3
        assert file["data/demo_1/dones"][()].tolist() == [0, 0, 1]
        assert set(file["data/demo_0"]) == {"actions", "dones", "obs", "rewards", "states"}


def test_windows_follow_their_observation_and_repeat_the_last_action():
    data = ChunkDataset([episode(4, 0), episode(3, 100)], action_horizon=3)
    obs, chunks = data.batch(torch.arange(len(data)))
    assert obs["x"][:, 0].tolist() == [0, 1, 2, 3, 100, 101, 102]
    assert chunks[..., 0].tolist() == [
        [0, 1, 2],
        [1, 2, 3],
        [2, 3, 3],
        [3, 3, 3],
        [100, 101, 102],
        [101, 102, 102],
        [102, 102, 102],
    ]
    assert data.batch(torch.tensor([5]))[1][0, :, 0].tolist() == [101, 102, 102]


def test_split_keeps_episodes_whole():
    data = ChunkDataset([episode(4, 100 * i) for i in range(10)], action_horizon=2)
    training, held_out = data.split(0.2)
    assert (len(training), len(held_out)) == (32, 8)
    assert held_out.actions.min() == 800
    alone, nothing = data.split(0.0)
    assert (len(alone), len(nothing)) == (40, 0)
    assert (len(ChunkDataset([], 2).split(0.2)[0])) == 0


def test_a_part_is_what_its_episodes_alone_would_be_without_a_copy():
    def episodes():
        return [episode(length, 100 * length) for length in (4, 3, 5, 2, 6)]

    whole = ChunkDataset(episodes(), action_horizon=3)
    parts = whole.split(0.4)
    again = parts[0].split(0.34)
    for part, of in zip((*parts, *again), ((0, 3), (3, 5), (0, 2), (2, 3)), strict=True):
        alone = ChunkDataset(episodes()[slice(*of)], action_horizon=3)
        rows = torch.arange(len(alone))
        (obs, chunks), (own, theirs) = part.batch(rows), alone.batch(rows)
        assert len(part) == len(alone)
        assert torch.equal(obs["x"], own["x"])
        assert torch.equal(chunks, theirs)
        assert part.obs["x"].untyped_storage().data_ptr() == whole.obs["x"].data_ptr()


def test_observations_of_demonstrations_are_in_memory_once():
    """Each is gone before the next one is copied."""
    episodes, alive = [episode(50, 100 * i) for i in range(5)], []

    class Watched(dict):
        def pop(self, name):
            alive.append(sum(there() is not None for there in arrays))
            return super().pop(name)

    arrays = [weakref.ref(e.obs["x"]) for e in episodes]
    episodes = [dataclasses.replace(e, obs=Watched(e.obs)) for e in episodes]
    data = ChunkDataset(episodes, action_horizon=3)
    assert data.obs["x"].dtype == torch.float32
    assert data.obs["x"][:, 0].tolist() == [100 * i + k for i in range(5) for k in range(50)]
    # What is copied now is still bound while the next one is asked for.
    assert alive == [5, 5, 4, 3, 2]
    assert not any(there() is not None for there in arrays)


def test_bad_demonstrations_are_refused(tmp_path):
    (tmp_path / "text.hdf5").write_text("hello")
    with pytest.raises(InputError, match="cannot be read"):
        demonstrations.load(tmp_path / "text.hdf5")
    with pytest.raises(InputError, match="does not exist"):
        demonstrations.load(tmp_path / "none.hdf5")
    demonstrations.save(tmp_path / "empty.hdf5", make([]))
    with pytest.raises(InputError, match="no episode"):
        demonstrations.load(tmp_path / "empty.hdf5")
    broken = episode(4, 0)
    broken.obs["x"][2] = np.nan
    demonstrations.save(tmp_path / "nan.hdf5", make([episode(2, 0), broken]))
    with pytest.raises(InputError, match="demo_1/x has numbers that are not finite"):
        demonstrations.load(tmp_path / "nan.hdf5")


def test_arrays_that_do_not_fit_each_other_are_refused(tmp_path):
    """One observation too many would give every later episode the observations of its neighbour's steps."""
    path = tmp_path / "d.hdf5"

    def written(change) -> str:
        demonstrations.save(path, make([episode(6, 0.0), episode(5, 10.0)]))
        with h5py.File(path, "a") as file:
            change(file["data/demo_1"])
        with pytest.raises(InputError) as error:
            demonstrations.load(path)
        return str(error.value)

    def replaced(name, values):
        def change(group):
            del group[name]
            group[name] = values

        return change

    def emptied(group):
        for name in ("actions", "obs/x", "rewards"):
            replaced(name, group[name][:0])(group)

    assert "demo_1/x has shape (6, 1), not (5, 1)" in written(replaced("obs/x", np.zeros((6, 1))))
    assert "demo_1/actions has shape (5,)" in written(replaced("actions", np.zeros(5)))
    assert "demo_1/actions has shape (5, 3)" in written(replaced("actions", np.zeros((5, 3))))
    assert "demo_1/rewards has shape (0,)" in written(replaced("rewards", np.zeros(0)))
    assert "not real numbers" in written(replaced("actions", np.full((5, 1), b"a")))
    assert "not finite" in written(replaced("actions", np.full((5, 1), 1e39)))
    assert "demo_1 has no step" in written(emptied)
    assert "no JSON object" in written(lambda g: g.parent.attrs.update(provenance="[]"))


def joint_state(value: float):
    types = TYPESTORE.types
    stamp = types["builtin_interfaces/msg/Time"](sec=1, nanosec=2)
    header = types["std_msgs/msg/Header"](stamp=stamp, frame_id="")
    arrays = np.array([value, -value])
    return types["sensor_msgs/msg/JointState"](
        header=header, name=["a", "b"], position=arrays, velocity=arrays * 2, effort=np.zeros(0)
    )


def write_bag(folder, count: int) -> BagWriter:
    writer = BagWriter(folder)
    assert writer.add_topic("/joint_states", "sensor_msgs/msg/JointState")
    for i in range(count):
        data = bytes(TYPESTORE.serialize_cdr(joint_state(float(i)), "sensor_msgs/msg/JointState"))
        writer.write("/joint_states", 1000 + i, data)
    return writer


def test_our_bag_is_a_rosbag2_that_others_read(tmp_path):
    write_bag(tmp_path / "bag", 50).close()
    with Reader(tmp_path / "bag") as reader:
        assert reader.message_count == 50
        (connection,) = reader.connections
        assert connection.msgtype == "sensor_msgs/msg/JointState"
        values = [
            TYPESTORE.deserialize_cdr(data, connection.msgtype).position[0]
            for _, _, data in reader.messages()
        ]
    assert values == list(range(50))
    ours = list(read_bag(tmp_path / "bag"))
    assert [m.log_time for m in ours] == [1000 + i for i in range(50)]
    assert deserialize(ours[7]).velocity.tolist() == [14.0, -14.0]


def test_a_bag_cut_anywhere_is_read_up_to_the_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(bags, "FLUSH_EVERY_S", 0.0)  # a chunk per message
    write_bag(tmp_path / "bag", 20).close()
    whole = (tmp_path / "bag" / "bag_0.mcap").read_bytes()
    counts = []
    for length in range(8, len(whole), 97):
        (tmp_path / "cut.mcap").write_bytes(whole[:length])
        values = [deserialize(m).position[0] for m in read_bag(tmp_path / "cut.mcap")]
        assert values == list(range(len(values)))
        counts.append(len(values))
    assert counts == sorted(counts)
    assert counts[0] == 0
    assert counts[-1] == 20


def test_a_writer_that_never_closes_leaves_what_it_flushed(tmp_path, monkeypatch):
    monkeypatch.setattr(bags, "FLUSH_EVERY_S", 0.0)
    write_bag(tmp_path / "bag", 30)  # no close
    assert len(list(read_bag(tmp_path / "bag"))) >= 29
    assert (tmp_path / "bag" / "metadata.yaml").exists()


def test_bad_bags_are_refused(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        list(read_bag(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no .mcap and no .db3 file"):
        list(read_bag(tmp_path / "empty"))
    (tmp_path / "text.mcap").write_bytes(b"this is not MCAP at all, but long enough")
    with pytest.raises(InputError, match="cannot be read"):
        list(read_bag(tmp_path / "text.mcap"))
    write_bag(tmp_path / "bag", 1).close()
    with pytest.raises(InputError, match="exists already"):
        BagWriter(tmp_path / "bag")


def test_an_unknown_type_is_reported_not_written(tmp_path):
    writer = BagWriter(tmp_path / "bag")
    assert not writer.add_topic("/odd", "odd_msgs/msg/Odd")
    writer.close()

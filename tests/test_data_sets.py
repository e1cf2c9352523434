"""Data sets of other formats (LeRobot, robomimic, Minari, D4RL): what is read, what is written, what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flow_policy_rl import checkpoint, convert, train, train_config
from flow_policy_rl.algorithms.bc import BCConfig
from flow_policy_rl.convert import Config, Splitting
from flow_policy_rl.data import demonstrations, lerobot, sources
from flow_policy_rl.data.robomimic import DemoLayout, Demonstrations, Episode, RobomimicWriter
from flow_policy_rl.data.statistics import ImageStatistics, summarise
from flow_policy_rl.errors import InputError
from flow_policy_rl.policy import NetworkConfig
from flow_policy_rl.spec import ObservationField
from sim.errors import SimulationError


def toy_demos(camera=True) -> Demonstrations:
    fields = [
        ObservationField("joint_pos", "joint_position", ("a", "b"), "rad"),
        ObservationField("tool", "pose", ("x", "y", "z", "qx", "qy", "qz", "qw"), "m", "tool"),
    ]
    if camera:
        fields.append(
            ObservationField("front_image", "image", (), "", "front", resolution=(32, 48))
        )
    rng, episodes = np.random.default_rng(2), []
    for length in (7, 12, 5):
        obs = {f.name: rng.normal(size=(length, f.size)).astype(np.float32) for f in fields[:2]}
        if camera:
            level = rng.integers(20, 230, (length, 1, 1, 3))
            obs["front_image"] = np.broadcast_to(level, (length, 32, 48, 3)).astype(np.uint8)
        actions = rng.normal(size=(length, 2)).astype(np.float32)
        rewards = np.zeros(length)
        rewards[-1] = length != 12
        episodes.append(Episode(obs, actions, rewards, np.zeros((length, 0))))
    layout = DemoLayout("toy", "toy", ("a", "b"), 0.04, tuple(fields))
    return Demonstrations(layout, episodes, {"seed": 5})


@pytest.mark.parametrize("camera", [True, False])
def test_lerobot_round_trip(tmp_path, camera):
    demos = toy_demos(camera)
    demonstrations.save(tmp_path / "d.hdf5", demos)
    convert.main(Config(tmp_path / "d.hdf5", tmp_path / "lr"))
    assert sources.kind_of(tmp_path / "lr") == "lerobot"
    again = demonstrations.load(tmp_path / "lr")
    assert again.layout == demos.layout
    for one, other in zip(demos.episodes, again.episodes, strict=True):
        assert np.array_equal(one.actions, other.actions)
        assert np.array_equal(one.rewards, other.rewards)
        for name, values in one.obs.items():
            if values.dtype == np.uint8:  # the film is lossy and has half the colour resolution
                assert np.abs(values.astype(int) - other.obs[name]).max() <= 6
            else:
                assert np.array_equal(values, other.obs[name])


def test_lerobot_files_are_of_the_format(tmp_path):
    """What the lerobot library reads (0.4.4 loaded such folders; see docs/bags.md)."""
    demonstrations.save(tmp_path / "d.hdf5", toy_demos())
    convert.main(Config(tmp_path / "d.hdf5", tmp_path / "lr"))
    info = json.loads((tmp_path / "lr/meta/info.json").read_text())
    assert (info["codebase_version"], info["fps"], info["total_frames"]) == ("v3.0", 25, 24)
    table = pq.read_table(tmp_path / "lr" / info["data_path"].format(chunk_index=0, file_index=0))
    assert table["index"].to_pylist() == list(range(24))
    assert table["episode_index"].to_pylist() == [0] * 7 + [1] * 12 + [2] * 5
    assert table.schema.field("action").type.list_size == 2
    episodes = pq.read_table(tmp_path / "lr/meta/episodes/chunk-000/file-000.parquet").to_pylist()
    key = "videos/observation.images.front"
    assert [e[f"{key}/from_timestamp"] for e in episodes] == [0.0, 7 / 25, 19 / 25]
    stats = json.loads((tmp_path / "lr/meta/stats.json").read_text())
    actions = np.concatenate([e.actions for e in toy_demos().episodes])
    assert np.allclose(stats["action"]["mean"], actions.mean(axis=0), atol=1e-6)
    assert np.allclose(stats["action"]["q90"], np.quantile(actions, 0.9, axis=0), atol=1e-6)
    assert np.shape(stats["observation.images.front"]["mean"]) == (3, 1, 1)
    marks = json.loads(pq.read_schema(tmp_path / "lr/meta/tasks.parquet").metadata[b"pandas"])
    assert marks["index_columns"] == ["task"]


def test_a_foreign_lerobot_set_gets_names_from_its_features(tmp_path):
    demonstrations.save(tmp_path / "d.hdf5", toy_demos())
    convert.main(Config(tmp_path / "d.hdf5", tmp_path / "lr"))
    (tmp_path / "lr/meta/flow_policy_rl.json").unlink()
    demos = demonstrations.load(tmp_path / "lr")
    assert demos.layout.joint_names == ("a", "b")
    assert demos.layout.observations[0].name == "observation.state"
    assert demos.layout.observations[0].elements[2] == "tool.x"
    assert demos.layout.observations[1].resolution == (32, 48)
    assert demos.layout.control_dt == 0.04
    assert [len(e.actions) for e in demos.episodes] == [7, 12, 5]


def test_a_film_does_not_take_a_colon_for_a_protocol(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    demonstrations.save("d.hdf5", toy_demos())
    for name in ("2026-11-23T10:30", "out:1"):
        convert.main(Config(Path("d.hdf5"), Path(name)))
        assert demonstrations.load(name).num_steps == 24


def test_a_data_set_gets_the_name_of_the_task_and_no_setting_of_bags(tmp_path):
    demonstrations.save(tmp_path / "d.hdf5", toy_demos(camera=False))
    convert.main(Config(tmp_path / "d.hdf5", tmp_path / "o.hdf5", "fold"))
    assert demonstrations.load(tmp_path / "o.hdf5").layout.task == "fold"
    given = {
        "rate": 10.0,
        "resolution": (8, 8),
        "splitting": Splitting(only_success=True),
        "actions": "state",
        "max_age": 0.1,
        "topics": ("a=b",),
        "truth_topic": "/t",
        "cameras": True,
        "task_options": {"randomness": "med"},
    }
    assert set(given) == set(convert.FOR_BAGS)
    for name, value in given.items():
        config = Config(tmp_path / "d.hdf5", tmp_path / "x.hdf5", **{name: value})
        with pytest.raises(InputError, match=f"--{name.replace('_', '-')} is for bags"):
            convert.main(config)
    assert not list(tmp_path.glob("x*"))


def test_minari_and_d4rl(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "minari" / "data"
    folder.mkdir(parents=True)
    (folder / "metadata.json").write_text(json.dumps({"dataset_id": "D4RL/door/human-v2"}))
    with h5py.File(folder / "main_data.hdf5", "w") as file:
        for k, length in enumerate((6, 4)):
            group = file.create_group(f"episode_{k}")
            group["actions"] = rng.normal(size=(length, 3)).astype(np.float32)
            group["rewards"] = np.ones(length)
            group["observations/position"] = rng.normal(size=(length + 1, 2))
            group["observations/goal"] = rng.normal(size=length + 1)
    demos = demonstrations.load(tmp_path / "minari")
    assert demos.layout.task == "D4RL/door/human-v2"
    assert {f.name: f.size for f in demos.layout.observations} == {"goal": 1, "position": 2}
    assert [len(e.actions) for e in demos.episodes] == [6, 4]
    assert demos.episodes[0].obs["position"].shape == (6, 2)
    with h5py.File(tmp_path / "hopper.hdf5", "w") as file:
        file["observations"], file["actions"] = rng.normal(size=(20, 4)), rng.normal(size=(20, 2))
        file["rewards"], file["terminals"] = np.ones(20), np.arange(20) == 8
        file["timeouts"] = np.arange(20) == 14
    demos = demonstrations.load(tmp_path / "hopper.hdf5")
    assert [len(e.actions) for e in demos.episodes] == [9, 6, 5]
    convert.main(Config(tmp_path / "hopper.hdf5", tmp_path / "lr"))
    assert np.allclose(
        demonstrations.load(tmp_path / "lr").episodes[1].actions,
        demos.episodes[1].actions,
        atol=1e-6,
    )


@pytest.mark.parametrize("rows", [3, 60])
def test_minari_observations_of_another_length_are_refused(tmp_path, rows):
    with h5py.File(tmp_path / "main_data.hdf5", "w") as file:
        for k, length in ((2, 7), (10, rows)):
            group = file.create_group(f"episode_{k}")
            group["actions"], group["rewards"] = np.zeros((6, 2)), np.zeros(6)
            group["observations"] = np.zeros((length, 3))
    with pytest.raises(InputError, match=rf"episode_10/observations has shape \({rows}, 3\), not"):
        demonstrations.load(tmp_path)


def test_an_hdf5_file_without_the_header_of_robomimic_says_so(tmp_path):
    path = tmp_path / "theirs.hdf5"
    with h5py.File(path, "w") as file:
        file["data/demo_0/actions"] = np.zeros((3, 2))
    with pytest.raises(InputError, match="its group 'data' has no attribute 'env_args'"):
        demonstrations.load(path)


def test_a_file_of_robomimic_itself(tmp_path):
    with h5py.File(tmp_path / "low_dim.hdf5", "w") as file:
        data = file.create_group("data")
        kwargs = {"env_name": "Lift", "env_kwargs": {"control_freq": 25}, "type": 1}
        data.attrs["env_args"] = json.dumps(kwargs)
        for k in (0, 10, 2):
            group = data.create_group(f"demo_{k}")
            group["actions"], group["rewards"] = np.full((4, 7), float(k)), np.zeros(4)
            group["obs/eef"], group["obs/view_image"] = (
                np.zeros((4, 3)),
                np.zeros((4, 8, 8, 3), np.uint8),
            )
    demos = demonstrations.load(tmp_path / "low_dim.hdf5")
    assert demos.layout.control_dt == 0.04
    assert {f.name: f.kind for f in demos.layout.observations} == {
        "eef": "joint_position",
        "view_image": "image",
    }
    assert [e.actions[0, 0] for e in demos.episodes] == [0.0, 2.0, 10.0]


def test_broken_lerobot_folders_are_refused(tmp_path):
    demonstrations.save(tmp_path / "d.hdf5", toy_demos())
    convert.main(Config(tmp_path / "d.hdf5", tmp_path / "lr"))
    info = tmp_path / "lr/meta/info.json"
    whole = info.read_text()
    info.write_text(whole.replace("v3.0", "v2.1"))
    with pytest.raises(InputError, match="has version v2.1"):
        demonstrations.load(tmp_path / "lr")
    info.write_text(whole[:100])
    with pytest.raises(InputError, match="cannot be read"):
        demonstrations.load(tmp_path / "lr")
    info.write_text(whole)
    for name in (
        "data/chunk-000/file-000.parquet",
        "videos/observation.images.front/chunk-000/file-000.mp4",
    ):
        path = tmp_path / "lr" / name
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        with pytest.raises(InputError, match="cannot be read"):
            demonstrations.load(tmp_path / "lr")
        path.write_bytes(content)


def rewritten(folder, name, change):
    """A table of a LeRobot folder, changed; returns how to undo it."""
    path = folder / name
    content = path.read_bytes()
    pq.write_table(change(pq.read_table(path)), path)
    return lambda: path.write_bytes(content)


def test_a_lerobot_set_whose_parts_do_not_fit_is_refused(tmp_path):
    """Frames that lack their picture would get that of a later frame, or of the next episode."""
    demonstrations.save(tmp_path / "d.hdf5", toy_demos())
    convert.main(Config(tmp_path / "d.hdf5", tmp_path / "lr"))
    rows = "data/chunk-000/file-000.parquet"
    times = {
        "frame_index": np.zeros(24, int),
        "timestamp": np.arange(24.0),
    }
    for name, values in times.items():

        def change(table, name=name, values=values):
            return table.set_column(table.column_names.index(name), name, pa.array(values))

        undo = rewritten(tmp_path / "lr", rows, change)
        with pytest.raises(InputError, match="frame 1 of episode 0"):
            demonstrations.load(tmp_path / "lr")
        undo()
    undo = rewritten(
        tmp_path / "lr",
        "meta/episodes/chunk-000/file-000.parquet",
        lambda table: pa.Table.from_pylist(
            [*table.to_pylist(), {**table.to_pylist()[0], "episode_index": 3, "length": 0}]
        ),
    )
    with pytest.raises(InputError, match="episode 3 has no frame"):
        demonstrations.load(tmp_path / "lr")
    undo()
    film = tmp_path / "lr/videos/observation.images.front/chunk-000/file-000.mp4"
    for size, left_out, says in (
        ((32, 48), 9, "has no frame at 0.360 s"),
        ((16, 16), None, r"demo_0/front_image has shape \(7, 16, 16, 3\), not \(7, 32, 48, 3\)"),
    ):
        film.unlink()
        film.parent.rmdir()
        writer = lerobot._Film(film, *size, 25)
        for k in range(24):
            if k == left_out:
                writer.frames += 1
            else:
                writer.add(np.zeros((*size, 3), np.uint8))
        writer.close()
        with pytest.raises(InputError, match=says):
            demonstrations.load(tmp_path / "lr")


def test_what_is_no_number_and_no_picture_is_said_to_be_left_out(tmp_path, caplog):
    demonstrations.save(tmp_path / "d.hdf5", toy_demos())
    with h5py.File(tmp_path / "d.hdf5", "a") as file:
        file["data"].attrs["env_args"] = json.dumps({"env_name": "Lift"})
        for group in file["data"].values():
            steps = len(group["actions"])
            group["obs/depth"] = np.zeros((steps, 8, 8, 1), np.float32)
            group["obs/grip"] = np.arange(steps) / 10
    demos = demonstrations.load(tmp_path / "d.hdf5")
    assert "'depth' of shape (8, 8, 1) is left out" in caplog.text
    assert demos.episodes[1].obs["grip"].tolist() == [[k / 10] for k in range(12)]
    convert.main(Config(tmp_path / "d.hdf5", tmp_path / "lr"))
    caplog.clear()
    tasks = pa.table({"task_index": [0, 1], "task": ["fold", "wipe"]})
    pq.write_table(tasks, tmp_path / "lr/meta/tasks.parquet")
    (tmp_path / "lr/meta/flow_policy_rl.json").unlink()
    demonstrations.load(tmp_path / "lr")
    assert "2 tasks: their episodes are read as one task, 'fold'" in caplog.text


def test_films_of_odd_sizes_are_refused_before_the_work(tmp_path):
    demos = toy_demos()
    cut = [
        replace(e, obs={**e.obs, "front_image": e.obs["front_image"][:, :31]})
        for e in demos.episodes
    ]
    fields = tuple(
        replace(f, resolution=(31, 48)) if f.kind == "image" else f
        for f in demos.layout.observations
    )
    odd = Demonstrations(replace(demos.layout, observations=fields), cut, {})
    demonstrations.save(tmp_path / "d.hdf5", odd)
    with pytest.raises(InputError, match="'front_image' is 31 x 48, .* even"):
        convert.main(Config(tmp_path / "d.hdf5", tmp_path / "lr"))
    assert not list(tmp_path.glob("lr*"))


def test_success_is_what_was_said_or_what_sparse_rewards_say(tmp_path, caplog):
    """A cost per step is no failure, and a failure stays one in every format."""
    demos = toy_demos(camera=False)
    rewards = [np.full(7, -0.1), np.full(12, 0.3), np.zeros(5)]
    episodes = [replace(e, rewards=r) for e, r in zip(demos.episodes, rewards, strict=True)]
    episodes.append(replace(episodes[0], success=False))
    demonstrations.save(tmp_path / "d.hdf5", replace(demos, episodes=episodes))
    result = convert.main(Config(tmp_path / "d.hdf5", tmp_path / "lr"))
    found = [e.success for e in demonstrations.load(tmp_path / "lr").episodes]
    assert found == [None, None, None, False]
    assert any(f["detail"].startswith("1 episodes are marked") for f in result["findings"])
    (said,) = caplog.messages
    assert said.startswith("rewards are left out: a LeRobot folder")


@pytest.mark.parametrize("listed", [False, True])
def test_rewards_and_success_of_frames_in_a_lerobot_set_of_others(tmp_path, listed):
    """As its simulations write them: a number per frame, or a list of one."""
    demonstrations.save(tmp_path / "d.hdf5", toy_demos(camera=False))
    convert.main(Config(tmp_path / "d.hdf5", tmp_path / "lr"))
    rewards = np.linspace(-1, 1, 24)
    won = np.isin(
        np.arange(24), (6, 7)
    )  # at the last frame of one episode, at the first of the next
    cell = (lambda v: [v]) if listed else (lambda v: v)

    def change(table):
        for name, values in (("next.reward", rewards), ("next.success", won)):
            table = table.append_column(name, pa.array([cell(v) for v in values.tolist()]))
        return table

    rewritten(tmp_path / "lr", "data/chunk-000/file-000.parquet", change)
    rows = "meta/episodes/chunk-000/file-000.parquet"
    rewritten(tmp_path / "lr", rows, lambda table: table.drop_columns("success"))
    episodes = demonstrations.load(tmp_path / "lr").episodes
    assert np.concatenate([e.rewards for e in episodes]).tolist() == rewards.tolist()
    assert [e.success for e in episodes] == [True, True, False]


def test_an_interrupted_writer_leaves_no_data_set(tmp_path):
    writer = RobomimicWriter(tmp_path / "a.hdf5", toy_demos().layout)
    episode = toy_demos().episodes[0]
    writer.frame({n: v[0] for n, v in episode.obs.items()}, episode.actions[0])
    assert not (tmp_path / "a.hdf5").exists()


def test_image_statistics_are_those_of_the_pixels():
    rng, statistics = np.random.default_rng(0), ImageStatistics()
    pictures = rng.integers(0, 256, (20, 40, 48, 3), dtype=np.uint8)
    for p in pictures:
        statistics.add(p)
    exact = summarise(pictures[:, ::8, ::8].reshape(-1, 3) / 255)
    found = statistics.summary()
    for name in ("min", "max", "mean", "std"):
        assert np.allclose(np.ravel(found[name]), exact[name], atol=1e-6)
    assert np.allclose(np.ravel(found["q50"]), exact["q50"], atol=1 / 255)
    assert found["count"] == [20]


@pytest.mark.parametrize("output", ["lerobot", "d.hdf5"])
def test_training_takes_any_data_set(tmp_path, output):
    """A data set of a robot and task that have no simulation here."""
    rng = np.random.default_rng(0)
    layout = toy_demos(camera=False).layout
    episodes = [
        Episode(
            {f.name: rng.normal(size=(40, f.size)).astype(np.float32) for f in layout.observations},
            rng.uniform(-0.5, 0.5, (40, 2)).astype(np.float32),
            np.zeros(40),
            np.zeros((40, 0)),
        )
        for _ in range(4)
    ]
    demonstrations.save(tmp_path / "d.hdf5", Demonstrations(layout, episodes, {}))
    if output != "d.hdf5":
        convert.main(Config(tmp_path / "d.hdf5", tmp_path / output))
    config = train_config.TrainBC(
        task="recorded",
        demos=tmp_path / output,
        run_dir=tmp_path / "run",
        network=NetworkConfig(width=16, depth=1),
        bc=BCConfig(num_steps=5, batch_size=32),
    )
    policy = checkpoint.load(Path(train.main(config)["checkpoint"]))
    assert policy.spec.joint_names == ("a", "b")
    assert policy.spec.task == "toy"
    assert -0.7 < policy.spec.action_low[0] < -0.5 < 0.5 < policy.spec.action_high[0] < 0.7
    with pytest.raises(SimulationError, match="unknown task 'toy'"):
        train.main(replace(config, task="toy", run_dir=tmp_path / "other"))


def test_discarded_episodes_leave_no_trace(tmp_path):
    demos = toy_demos()
    for output in ("a.hdf5", "lr"):
        with sources.writer_for(tmp_path / output, demos.layout) as writer:
            for k, episode in enumerate(demos.episodes):
                for t in range(len(episode.actions)):
                    writer.frame({n: v[t] for n, v in episode.obs.items()}, episode.actions[t])
                writer.end(keep=k != 1)
            writer.close({})
        again = demonstrations.load(tmp_path / output)
        assert [len(e.actions) for e in again.episodes] == [7, 5]
        for one, other in zip((demos.episodes[0], demos.episodes[2]), again.episodes, strict=True):
            assert np.array_equal(one.actions, other.actions)
            difference = one.obs["front_image"].astype(int) - other.obs["front_image"]
            assert np.abs(difference).max() <= 6
    assert not list(tmp_path.glob("*.partial"))

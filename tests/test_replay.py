"""Replay: the same observations as the live node, truth by closed forms, and nothing bad goes unsaid."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from bag_toys import (
    ARRAY,
    JOINTS,
    MS,
    ROBOT,
    TOLD,
    TRAJECTORY,
    TYPES,
    TYPESTORE,
    apart,
    joint_state,
    late,
    motion,
    pose,
    recorded,
    told,
    trajectory,
    write,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_toys import holding_policy
from toys import documented, small_spec

from flow_policy_rl import cli, replay
from flow_policy_rl.data.bags import Bag
from flow_policy_rl.errors import InputError, RunFailed
from flow_policy_rl.offline import gates, metrics, predict
from flow_policy_rl.offline.durations import BLOCK, Durations, StreamFacts
from flow_policy_rl.offline.measure import measure
from flow_policy_rl.offline.predict import Predictor
from flow_policy_rl.offline.recording import read_recording
from flow_policy_rl.offline.truth import KEPT_S, CommandTruth, Pending, SampledTruth
from flow_policy_rl.serving.chunk_scheduler import ChunkScheduler
from flow_policy_rl.serving.onnx_policy import OnnxPolicy
from flow_policy_rl.serving.robot import load_robot
from flow_policy_rl.serving.streams import MEASURED, NotReady, Streams, with_measured
from flow_policy_rl.spec import ObservationField


@pytest.fixture(scope="module")
def policy_file(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    (folder / "robot.yaml").write_text(ROBOT)
    return holding_policy(folder / "policy.onnx", small_spec(robot="toy"))


@pytest.fixture(scope="module")
def robot(policy_file):
    return load_robot(str(policy_file.parent / "robot.yaml"))


def recording(folder, policy_file, robot, kind="command", sink=None):
    return read_recording(Bag(folder), OnnxPolicy(policy_file).spec, robot, kind, sink=sink)


def test_bag_frames_equal_live_frames(tmp_path, policy_file, robot):
    """The live node pushes and decodes every message; the replay leaves out what cannot matter. Both see the same."""
    spec = OnnxPolicy(policy_file).spec
    messages = recorded(4.0)
    write(tmp_path / "bag", messages)
    streams = Streams(with_measured(spec, robot.topics), 0.5)
    scheduler, live = ChunkScheduler(spec), []
    for topic, _, _, msg in messages:
        if topic == "/command":
            continue
        stamp = msg.header.stamp.sec * 1_000_000_000 + msg.header.stamp.nanosec
        streams.push(topic, stamp, msg)
        try:
            snapshot = streams.snapshot(stamp)
        except NotReady:
            continue
        if scheduler.due(snapshot.stamp):
            scheduler.started(snapshot.stamp)
            live.append((snapshot.stamp, snapshot.obs))
    replayed = []
    rec = recording(tmp_path / "bag", policy_file, robot, sink=replayed.append)
    assert [i.stamp for i in replayed] == [stamp for stamp, _ in live]
    assert len(live) > 15
    for inference, (_, obs) in zip(replayed, live, strict=True):
        for f in spec.observations:
            assert np.array_equal(inference.obs[f.name], obs[f.name])
    assert np.allclose(rec.measured, [o[MEASURED] for _, o in live], atol=0)


def test_drivers_apart_replay_as_one_does(tmp_path, policy_file, robot):
    """An arm and a hand that publish apart, and wheels: the same observations and truth as of whole joint states."""
    messages = recorded(4.0)
    found = []
    for name, said in (("whole", messages), ("apart", apart(messages))):
        seen: list = []
        write(tmp_path / name, said)
        found.append((recording(tmp_path / name, policy_file, robot, sink=seen.append), seen))
    (whole, expected), (parts, seen) = found
    assert len(expected) > 15
    assert [i.stamp for i in seen] == [i.stamp for i in expected]
    for mine, other in zip(seen, expected, strict=True):
        assert all(np.array_equal(mine.obs[key], other.obs[key]) for key in other.obs)
    assert np.array_equal(parts.truth, whole.truth, equal_nan=True)
    assert parts.segment.max() == whole.segment.max()
    # The first message, and the wheels after it, come before anything is known of b.
    assert parts.problems.total == whole.problems.total + 2
    silent = [
        m
        for m in apart(messages)
        if getattr(m[3], "name", "") != ["b"] or not 2.0 < m[2] / 1e9 < 3.5
    ]
    write(tmp_path / "silent", silent)
    rec = recording(tmp_path / "silent", policy_file, robot)
    assert "joint state lacks b; it has a, c" in str(rec.problems)
    assert 90 <= rec.streams["/js"].bad <= 110  # a second of states of the arm alone
    assert not ((rec.times > 2.5) & (rec.times < 3.5)).any()
    assert (rec.times > 3.5).any()


def test_truth_is_what_the_motion_says(tmp_path, policy_file, robot):
    """All three kinds, for a robot that is commanded what it does: equal to the closed form."""
    write(tmp_path / "bag", recorded(6.0))
    spec = OnnxPolicy(policy_file).spec
    for kind in ("command", "state"):
        rec = recording(tmp_path / "bag", policy_file, robot, kind)
        due = rec.times[:, None] - 1.0 + (np.arange(spec.action_horizon) + 1) * spec.control_dt
        expected = np.stack(motion(due), axis=-1)
        known = np.isfinite(rec.truth).all(axis=2)
        assert known[1:-3].all()
        assert np.abs(rec.truth - expected)[known].max() < (0.012 if kind == "command" else 1e-4)


@pytest.mark.parametrize("lag_ms", [0, 60, 150, 300])
@pytest.mark.parametrize("how", TOLD)
def test_a_stream_that_arrives_late_changes_no_truth(tmp_path, policy_file, robot, how, lag_ms):
    """Also where actions are due before their observation is complete."""
    write(tmp_path / "bag", late(told(how), "/cube", lag_ms * MS))
    spec = OnnxPolicy(policy_file).spec
    rec = read_recording(Bag(tmp_path / "bag"), spec, robot, *TOLD[how])
    due = rec.times[:, None] - 1.0 + (np.arange(spec.action_horizon) + 1) * spec.control_dt
    expected = np.stack(motion(due), axis=-1)
    known = np.isfinite(rec.truth).all(axis=2)
    assert len(known) > 15
    assert known[1:-3].all()
    assert np.abs(rec.truth - expected)[known].max() < 0.012
    assert np.isfinite(rec.before[2:]).all()
    assert np.abs(rec.before[2:] - np.stack(motion(rec.times[2:] - 1.0), axis=-1)).max() < 0.012


def test_controller_reference_and_per_tick_commands(tmp_path, policy_file, robot):
    messages = []
    for topic, kind, log, msg in recorded(3.0, command=False):
        messages.append((topic, kind, log, msg))
        if topic == "/js":
            reference = joint_state(log - MS, msg.position[1:] + 0.25, ("b", "a"))
            messages.append(("/reference", JOINTS, log, reference))
            dim = TYPES["std_msgs/msg/MultiArrayLayout"]([], 0)
            values = TYPES[ARRAY](dim, msg.position[[2, 1]] - 0.5)
            messages.append(("/command", ARRAY, log, values))
    write(tmp_path / "bag", messages)
    spec = OnnxPolicy(policy_file).spec
    state = recording(tmp_path / "bag", policy_file, robot, "state").truth
    reference = read_recording(Bag(tmp_path / "bag"), spec, robot, "controller", "/reference").truth
    ticks = recording(tmp_path / "bag", policy_file, robot, "command").truth
    known = np.isfinite(state) & np.isfinite(reference) & np.isfinite(ticks)
    assert known.mean() > 0.7
    assert np.allclose((reference - state)[known], 0.25, atol=1e-5)
    assert np.abs((ticks - state)[known] + 0.5).max() < 0.012  # held for one tick
    with pytest.raises(InputError, match="--truth-topic"):
        read_recording(Bag(tmp_path / "bag"), spec, robot, "controller")


def test_inference_does_not_depend_on_the_batch(tmp_path, policy_file, robot, monkeypatch):
    write(tmp_path / "bag", recorded(5.0))
    found = []
    for batch in (1, 7, 64):
        monkeypatch.setattr(predict, "BATCH", batch)
        predictor = Predictor(OnnxPolicy(policy_file), "random", seed=3, samples=2)
        recording(tmp_path / "bag", policy_file, robot, sink=predictor)
        found.append(predictor.finish())
    for chunks, samples in found[1:]:
        assert np.allclose(chunks, found[0][0], atol=1e-6)
        assert np.allclose(samples, found[0][1], atol=1e-6)
    assert not np.allclose(found[0][1][:, 0], found[0][1][:, 1])


def broken(messages):
    """Every kind of thing that goes wrong on a robot, and how often it must be counted."""
    out, counts = [], {}
    for k, (topic, kind, log, msg) in enumerate(messages):
        bad = None
        if topic == "/js" and 300 <= k < 310:
            bad = joint_state(log - MS, [9.0, 1.0], ("c", "b", "a"))
        elif topic == "/js" and 320 <= k < 324:
            bad = joint_state(log - MS, [9.0, np.nan, 0.0])
        elif topic == "/cube" and 400 <= k < 420:
            bad = pose(log - 5 * MS, float("nan"))
        elif topic == "/js" and 430 <= k < 434:
            bad = b"\x00\x01\x00\x00\x01"
        if bad is not None:
            counts[topic] = counts.get(topic, 0) + 1
        out.append((topic, kind, log, msg if bad is None else bad))
    return out, counts


def test_bad_messages_are_counted_located_and_do_not_end_the_replay(tmp_path, policy_file, robot):
    messages, counts = broken(recorded(6.0))
    write(tmp_path / "bag", messages)
    bag = Bag(tmp_path / "bag")
    rec = read_recording(bag, OnnxPolicy(policy_file).spec, robot)
    assert {t: s.bad for t, s in rec.streams.items()} == counts
    text = str(rec.problems)
    assert "3 names but 2 values of position" in text
    assert "not finite" in text
    assert len(rec.times) > 20
    assert np.isfinite(rec.measured).all()


def test_stamps_that_go_back_and_jumps_begin_new_segments(tmp_path, policy_file, robot):
    one = recorded(3.0)
    again = [(t, k, log + 4_000_000_000, m) for t, k, log, m in recorded(3.0)]
    write(tmp_path / "bag", one + again)
    rec = recording(tmp_path / "bag", policy_file, robot)
    assert rec.segment.max() == 1
    assert "stamp goes back" in str(rec.problems)
    for part in (0, 1):
        assert np.isfinite(rec.truth[rec.segment == part][1:-3]).all()


def test_missing_topics_and_wrong_types_are_named(tmp_path, policy_file, robot):
    write(tmp_path / "bag", [m for m in recorded(1.0) if m[0] != "/cube"])
    with pytest.raises(InputError, match="no topic /cube.*It has: /command"):
        recording(tmp_path / "bag", policy_file, robot)
    renamed = replay.mapped(robot, ("cube=/command",))
    with pytest.raises(InputError, match="/command is a trajectory_msgs"):
        read_recording(Bag(tmp_path / "bag"), OnnxPolicy(policy_file).spec, renamed, "state")
    with pytest.raises(InputError, match="unknown topic name 'cubes'.*did you mean 'cube'"):
        replay.mapped(robot, ("cubes=/x",))
    with pytest.raises(InputError, match="wants NAME=/TOPIC"):
        replay.mapped(robot, ("cube",))


def run(tmp_path, policy_file, **changes):
    values = {
        "bag": tmp_path / "bag",
        "policy": policy_file,
        "out": tmp_path / "out",
        "robot": str(policy_file.parent / "robot.yaml"),
    }
    return replay.main(replay.Config(**(values | changes)))


def test_the_whole_report(tmp_path, policy_file):
    write(tmp_path / "bag", recorded(8.0))
    (tmp_path / "gates.yaml").write_text(
        yaml.safe_dump(
            {"mae": {"max": 0.001}, "wiring_errors": {"max": 0}, "joints.a.rmse": {"max": 9}}
        )
    )
    result = run(
        tmp_path, policy_file, compare=policy_file, samples=3, gates=tmp_path / "gates.yaml"
    )
    assert set(result) == documented("replay", "--compare")
    assert not result["passed"]
    assert {n: g["passed"] for n, g in result["gates"].items()} == {
        "mae": False,
        "wiring_errors": True,
        "joints.a.rmse": True,
    }
    assert result["compare"]["paired"]["difference"] == 0  # the same policy on the same seeds
    assert result["compare"]["best_of_n"] == result["best_of_n"]
    assert result["best_of_n"]["best_mae"] <= result["best_of_n"]["mean_mae"]
    assert result["mae"] == pytest.approx(result["mae_hold"], abs=1e-6)  # the policy holds
    assert not result["beats_baselines"]
    tool = result["end_effector"]["position_mean_m"]  # at the end of a rod of 1 m
    assert tool == pytest.approx(result["joints"]["a"]["mae"], rel=0.01)
    assert "NOT better" in replay.text(result)
    out = tmp_path / "out"
    assert json.loads((out / "replay.json").read_text())["schema_version"] == replay.SCHEMA_VERSION
    page = (out / "report.html").read_text()
    assert "NOT better" in page
    assert "http://" not in page.partition("<body>")[2].replace("http://www.w3.org", "")
    rows = (out / "steps.csv").read_text().splitlines()
    assert len(rows) == 1 + result["chunks"] * 6
    assert rows[0].endswith("policy/a,policy/b,truth/a,truth/b")
    assert (out / "replay.png").stat().st_size > 10_000
    bag = Bag(out / "chunks")
    planned = [bag.deserialize(m) for m in bag.messages(["/replay/planned_chunk"])]
    assert len(planned) == result["chunks"]
    assert planned[3].joint_names == ["a", "b"]
    assert len(planned[3].points) == 6
    # mean error, recomputed from the table
    values = np.array([[float(v) if v else np.nan for v in row.split(",")[5:]] for row in rows[1:]])
    error = np.abs(values[:, 1:3] - values[:, 3:5])[values[:, 0] == 1]
    assert np.nanmean(error) == pytest.approx(result["mae"], abs=1e-5)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"samples": -3}, "--samples must be at least 0, not -3"),
        ({"latency_ms": -1.0}, "--latency-ms must be at least 0, not -1"),
        ({}, "does not exist"),
    ],
)
def test_a_replay_that_is_refused_leaves_no_folder(tmp_path, policy_file, wrong, says):
    with pytest.raises(InputError, match=says):
        run(tmp_path, policy_file, **wrong)
    assert not (tmp_path / "out").exists()


def test_a_replay_replaces_nothing_but_what_a_replay_left(tmp_path, policy_file):
    write(tmp_path / "bag", recorded(4.0))
    out = tmp_path / "out"
    write(out / "chunks", recorded(4.0))
    before = (out / "chunks" / "chunks_0.mcap").read_bytes()
    for bag in ("bag", "out/chunks", "out/chunks/chunks_0.mcap"):
        with pytest.raises(InputError, match="would replace '.*chunks', which is .*another --out"):
            run(tmp_path, policy_file, bag=tmp_path / bag)
    assert (out / "chunks" / "chunks_0.mcap").read_bytes() == before
    assert run(tmp_path, policy_file, out=tmp_path / "again")["passed"]
    assert run(tmp_path, policy_file, out=tmp_path / "again")["passed"]


@pytest.mark.parametrize("mode", ["grid", "timed"])
def test_a_policy_that_gives_no_numbers_is_not_judged_by_the_rest(
    tmp_path, policy_file, monkeypatch, mode
):
    write(tmp_path / "bag", recorded(4.0))
    infer = OnnxPolicy.infer

    def sometimes(self, obs, noise):
        chunk = infer(self, obs, noise)
        chunk[obs["joint_pos"][:, 0] > 0.4] = np.nan
        return chunk

    monkeypatch.setattr(OnnxPolicy, "infer", sometimes)
    with pytest.raises(RunFailed, match="not finite for 7 of 20 .*, first at 2.0"):
        run(tmp_path, policy_file, mode=mode)


def test_recorded_latencies_that_are_no_numbers_are_problems_and_the_report_is_json(
    tmp_path, policy_file
):
    number = "std_msgs/msg/Float64"
    values = (0.01, np.nan, np.inf, 0.02)
    told = [
        ("/sim_node/end_to_end_latency", number, 1_500_000_000 + k, TYPES[number](v))
        for k, v in enumerate(values)
    ]
    write(tmp_path / "bag", sorted(recorded(4.0) + told, key=lambda m: m[2]))
    result = run(tmp_path, policy_file)
    assert result["latency_ms"]["max"] == pytest.approx(20)
    (problem,) = (p for p in result["problems"] if "latency" in p["topic"])
    assert (problem["count"], problem["reason"]) == (2, "latency is not a finite number")
    json.loads((tmp_path / "out" / "replay.json").read_text(), parse_constant=pytest.fail)


def test_a_stamp_before_1970_is_a_problem(tmp_path, policy_file):
    messages = recorded(4.0)
    odd = [("/js", JOINTS, log, joint_state(-log, [9.0, 0.1, 0.1])) for _, _, log, _ in messages]
    write(tmp_path / "bag", messages[:300] + odd[300:301] + messages[301:])
    result = run(tmp_path, policy_file)
    (problem,) = (p for p in result["problems"] if p["topic"] == "/js")
    assert (problem["count"], problem["reason"]) == (1, "stamp is before 1970")
    assert result["segments"] == 1


def test_smoothness_is_compared_where_the_truth_is_known(tmp_path, policy_file, robot):
    """A policy that plans the truth is as smooth as it, whatever it plans where nothing was commanded."""
    half = [m for m in recorded(8.0) if m[0] != "/command" or m[2] > 5e9]
    bag = recording(write(tmp_path / "bag", half), policy_file, robot)
    unknown = ~np.isfinite(bag.truth)
    assert 0.3 < unknown.mean() < 0.7
    chunks = np.where(unknown, np.random.default_rng(0).normal(size=bag.truth.shape), bag.truth)
    smooth = measure(OnnxPolicy(policy_file).spec, robot, bag, chunks, np.zeros(0))["smoothness"]
    assert set(smooth["ratio"]) == set(smooth["truth"])
    assert list(smooth["ratio"].values()) == pytest.approx([1.0] * len(smooth["ratio"]))


def test_wiring_finds_degrees_and_rates(tmp_path, policy_file):
    messages = [
        (t, k, log, joint_state(log - MS, np.array(m.position) * 57.3) if t == "/js" else m)
        for t, k, log, m in recorded(4.0, rate=0.08)
    ]
    write(tmp_path / "bag", messages)
    result = run(tmp_path, policy_file, ground_truth="state")
    details = {c["name"]: (c["level"], c["detail"]) for c in result["wiring"]}
    assert details["units"][0] == "error"
    assert "degrees" in details["units"][1]
    assert details["rate of /js"][0] == "warning"  # 12.5 Hz for a policy of 20 Hz


@pytest.mark.parametrize(("lag_ms", "level"), [(0, "ok"), (150, "warning"), (300, "error")])
def test_wiring_says_that_input_is_too_old_for_the_live_node(tmp_path, policy_file, lag_ms, level):
    """Grid mode goes by stamps alone, where the node would hold."""
    write(tmp_path / "bag", late(told("state"), "/cube", lag_ms * MS))
    result = run(tmp_path, policy_file, ground_truth="state")
    (check,) = (c for c in result["wiring"] if c["name"] == "clock")
    assert check["level"] == level
    assert (level == "error") == ("/cube (0.3" in check["detail"])
    assert (result["wiring_errors"] > 0) == (level == "error")
    assert result["compared_chunks"] > 10


def test_gates_refuse_what_they_do_not_know(tmp_path):
    for text, says in {
        "mae: 3": "must be a mapping",
        "- mae": "must map names",
        "mae: {above: 3}": "unknown key",
        "mae: {max: x}": "must be a finite number",
        "mae: {equals: .nan}": "must be a finite number",
        "{": "not YAML",
    }.items():
        (tmp_path / "g.yaml").write_text(text)
        with pytest.raises(InputError, match=says):
            gates.load(tmp_path / "g.yaml")
    with pytest.raises(InputError, match="did you mean 'mae'"):
        gates.judge({"mae": 1.0}, {"mea": {"max": 1}})
    assert not gates.judge({"mae": None}, {"mae": {"max": 1}})["mae"]["passed"]


# --- numbers against closed forms ---


def test_baselines_seams_and_errors():
    truth = np.arange(4.0)[None, :, None] + 1  # (1, 4, 1): 1 2 3 4
    hold, copied = metrics.baselines(np.array([[0.0]]), np.array([[1.0]]), truth)
    assert np.abs(hold).mean() == 2.5
    assert np.abs(copied).mean() == 1.5
    _, unknown = metrics.baselines(np.array([[0.0]]), np.array([[np.nan]]), truth)
    assert np.array_equal(unknown, hold)
    chunks = np.array([[[0.0], [1.0], [2.0]], [[2.5], [3.5], [4.5]]])
    jumps = metrics.seams(chunks, np.array([0.0, 0.2]), np.zeros(2, int), 2, 0.1)
    assert jumps["position_max"] == pytest.approx(0.5)  # 2.5 instead of 2.0
    assert jumps["velocity_max"] == pytest.approx(5.0)  # 15 instead of 10 per second
    assert metrics.seams(chunks, np.array([0.0, 0.2]), np.arange(2), 2, 0.1)["position_max"] is None


def test_smoothness_of_a_known_motion():
    dt, t = 0.01, np.arange(0, 2 * np.pi, 0.01)
    result = metrics.smoothness([np.sin(t)[:, None]], dt)
    for order in ("velocity", "acceleration", "jerk"):
        assert result[f"{order}_peak"] == pytest.approx(1.0, abs=0.01)
        assert result[f"{order}_rms"] == pytest.approx(np.sqrt(0.5), abs=0.01)
    assert result["path_length"] == pytest.approx(4.0, abs=0.01)
    jerk = t**3 * (10 - 15 * t / 3 + 6 * t**2 / 9)
    rng = np.random.default_rng(0)
    smooth = metrics.spectral_arc_length(jerk[:300, None], dt)
    rough = metrics.spectral_arc_length(jerk[:300, None] + rng.normal(0, 0.3, (300, 1)), dt)
    assert rough < smooth < 0
    assert metrics.spectral_arc_length(np.zeros((50, 2)), dt) is None


def test_motions_are_the_executed_parts_of_inferences_that_follow_each_other():
    """A late inference and another segment begin a motion anew."""
    chunks = np.arange(15.0).reshape(5, 3, 1)
    times, segment = np.array([0.0, 0.2, 0.4, 0.9, 1.1]), np.array([0, 0, 0, 0, 1])
    motions = metrics.stitch(chunks, times, segment, 2, 0.1)
    assert [m.ravel().tolist() for m in motions] == [[0, 1, 3, 4, 6, 7], [9, 10], [12, 13]]


def test_smoothness_is_that_of_the_longest_piece_without_a_gap():
    """0.1 and 0.2 per step of 0.1 s, of which 13 points remain where one joint is unknown at the seventh of 20."""
    motion = np.arange(20.0)[:, None] * [0.1, 0.2]
    motion[6, 1] = np.nan
    result = metrics.smoothness([motion], 0.1)
    assert result["path_length"] == pytest.approx(12 * 0.3)
    assert result["velocity_peak"] == pytest.approx(2.0)
    assert metrics.smoothness([motion[:5]], 0.1)["path_length"] == pytest.approx(4 * 0.3)
    assert metrics.smoothness([motion[:4]], 0.1)["path_length"] is None


def test_spectral_arc_length_is_of_a_shape_alone_below_ten_hertz():
    """Balasubramanian et al., eq. 5, by a loop; neither size nor, beyond 10 Hz, shaking changes it."""
    dt = 0.01
    t = np.arange(0, 1 + dt / 2, dt)
    reach = (t**3 * (10 - 15 * t + 6 * t**2))[:, None]
    found = metrics.spectral_arc_length(reach, dt)
    speed = np.diff(reach[:, 0]) / dt
    spectrum = np.abs(np.fft.fft(speed, 2048)) / speed.sum()
    last = max(k for k in range(int(10 * 2048 * dt) + 1) if spectrum[k] >= 0.05)
    arc = sum(np.hypot(1 / last, spectrum[k + 1] - spectrum[k]) for k in range(last))
    assert found == pytest.approx(-arc, rel=1e-9)
    assert metrics.spectral_arc_length(7 * reach, dt) == pytest.approx(found)
    shaken = reach + 2e-3 * np.sin(2 * np.pi * 20 * t)[:, None]
    assert metrics.spectral_arc_length(shaken, dt) == pytest.approx(found, rel=0.05)


def test_a_seam_is_the_larger_of_the_two_steps_in_velocity_around_it():
    for new in (
        [2.5, 4.0],
        [2.0, 3.5],
    ):  # 10 per second before; the step is into the chunk, or in it
        chunks = np.array([[[0.0], [1.0], [2.0]], [[new[0]], [new[1]], [4.5]]])
        jumps = metrics.seams(chunks, np.array([0.0, 0.2]), np.zeros(2, int), 2, 0.1)
        assert jumps["velocity_max"] == pytest.approx(5.0)
        late = metrics.seams(chunks, np.array([0.0, 0.3]), np.zeros(2, int), 2, 0.1)
        assert late["velocity_max"] is None


def test_best_of_several_samples_counts_what_is_known():
    """Two inferences with three samples each, of which the last inference has no truth."""
    samples = np.array([[[1.0, 3.0], [2.0, 0.0], [0.0, 0.0]]] * 2)[..., None]
    truth = np.array([[[1.0], [1.0]], [[np.nan], [np.nan]]])
    result = metrics.best_of(samples, truth)
    assert (result["samples"], result["best_mae"], result["mean_mae"]) == (3, 1.0, 1.0)
    truth[0, 1] = np.nan  # of the first action alone: 0, 1 and 1
    result = metrics.best_of(samples, truth)
    assert result["best_mae"] == 0.0
    assert result["mean_mae"] == pytest.approx(2 / 3)
    spread = (np.std([1, 2, 0]) + np.std([3, 0, 0])) / 2
    assert result["spread"] == pytest.approx(spread)


def test_what_was_never_seen_in_training_is_counted_by_observation():
    """Five standard deviations away in one element of two, and within four."""
    field = ObservationField("q", "state", ("a", "b"), "m", mean=(1.0, -1.0), std=(0.1, 0.5))
    obs = {"q": np.array([[1.0, -1.0], [1.5, -1.0], [1.0, -2.9], [1.39, 0.9]])}
    assert metrics.out_of_distribution(obs, [field]) == {"q": 0.25}


def test_errors_and_percentiles_are_by_joint_and_of_what_is_known():
    error = np.array([[[1.0, -4.0], [-3.0, np.nan]]])
    result = metrics.errors_by_joint(["a", "b"], error)
    assert result["a"] == {"mae": 2.0, "rmse": pytest.approx(5**0.5), "max": 3.0}
    assert result["b"] == {"mae": 4.0, "rmse": 4.0, "max": 4.0}
    found = metrics.percentiles(np.array([*range(101), np.nan]))
    assert found == {"p50": 50, "p95": 95, "p99": 99, "max": 100}


def test_gripper_timing():
    t = np.arange(100)
    truth = np.where((t >= 30) & (t < 70), 0.04, 0.0)
    late = np.where((t >= 33) & (t < 75), 0.04, 0.0)
    result = metrics.gripper_agreement(late, truth, 0.0, 0.04, dt=0.1)
    assert result["timing_s"] == pytest.approx(0.4)
    assert result["accuracy"] == pytest.approx(0.92)
    assert (result["switches"], result["missed_switches"]) == (2, 0)
    assert result["f1"] == pytest.approx(2 * 37 / (40 + 42))
    raised = metrics.gripper_agreement(late + 1, truth + 1, 1.0, 1.04, dt=0.1)
    assert raised == result
    hidden = np.where(t < 50, np.nan, late)  # one switch of the truth can be judged
    half = metrics.gripper_agreement(hidden, truth, 0.0, 0.04, dt=0.1)
    assert (half["switches"], half["timing_s"]) == (1, pytest.approx(0.5))
    assert half["f1"] == pytest.approx(2 * 20 / (20 + 25))
    never = metrics.gripper_agreement(np.zeros(100), truth, 0.0, 0.04, 0.1)
    assert (never["missed_switches"], never["timing_s"]) == (2, None)


def test_violations_and_comparison():
    limits = {
        "position": np.array([[-1.0, 1.0]]),
        "velocity": np.array([1.0]),
        "acceleration": np.array([100.0]),
    }
    chunks = np.array([[[0.05], [0.1], [0.3], [1.2]]])
    share = metrics.violations(chunks, np.array([[0.0]]), limits, 0.1)
    assert share == {"position": 0.25, "velocity": 0.5, "acceleration": 0.0}
    soft = limits | {"acceleration": np.array([50.0])}  # 0, 15 and 70 per second squared
    share = metrics.violations(chunks, np.array([[0.0]]), soft, 0.1)
    assert share["acceleration"] == pytest.approx(1 / 3)
    # Nothing was commanded before; then the other way, beyond the other limit and in one of two joints.
    share = metrics.violations(chunks, np.array([[np.nan]]), limits, 0.1)
    assert share == {"position": 0.25, "velocity": 0.5, "acceleration": 0.0}
    twice = {name: limit.repeat(2, axis=0) for name, limit in limits.items()}
    back = np.concatenate([-chunks, 0 * chunks], axis=2)
    share = metrics.violations(back, np.zeros((1, 2)), twice, 0.1)
    assert share == {"position": 0.25, "velocity": 0.5, "acceleration": 0.0}
    # A motion counts by its length: 3 of 4 actions in one, none of 8 in the other; a short one does not.
    fast, slow = 0.2 * np.arange(5.0)[:, None], np.zeros((9, 1))
    fast[4:] = fast[3]
    share = metrics.motion_violations([fast, slow, 9 * fast[:3]], limits, 0.1)
    assert share == {"position": 0.0, "velocity": pytest.approx(3 / 12), "acceleration": 0.0}
    one = np.array([1.0, 2.0, 3.0, np.nan])
    result = metrics.compare(one, one - 0.5)
    assert result["share_second_better"] == 1.0
    assert result["difference"] == -0.5
    assert result["ci95"] == [-0.5, -0.5]
    assert result["inferences"] == 3


def test_the_interval_of_a_comparison_is_that_of_its_mean():
    """Differences of spread 2: the mean of 400 of them is known to 1.96 x 2 / 20 on both sides."""
    rng = np.random.default_rng(0)
    other = rng.normal(1.0, 2.0, 400)
    result = metrics.compare(np.zeros(400), other)
    low, high = result["ci95"]
    assert high - low == pytest.approx(2 * 1.96 * other.std() / 20, rel=0.06)
    assert (low + high) / 2 == pytest.approx(result["difference"], abs=0.03)
    assert result["share_second_better"] == (other < 0).mean()


def test_durations_over_many_blocks():
    """The longest of all with its time, counts before they are sorted in, and milliseconds."""
    durations = Durations()
    for i in range(2 * BLOCK + 10):
        durations.add(5.0 if i == 100 else 0.1 + 0.8 * i / (2 * BLOCK), at=float(i))
    assert durations.count == 2 * BLOCK + 10
    assert (durations.max, durations.max_at) == (5.0, 100.0)
    found = durations.summary_ms()
    assert found == {
        "p50": pytest.approx(500, rel=0.06),
        "p95": pytest.approx(860, rel=0.06),
        "p99": pytest.approx(892, rel=0.06),
        "max": 5000.0,
    }
    assert durations.count == 2 * BLOCK + 10
    facts = StreamFacts(periods=durations)
    assert facts.rate_hz() == pytest.approx(2.0, rel=0.06)
    one = Durations()
    one.add(0.98)  # the middle of its bin is at 1
    assert max(one.summary_ms().values()) == pytest.approx(980)


@given(st.lists(st.floats(1e-5, 100), min_size=5, max_size=300))
@settings(max_examples=30)
def test_streamed_percentiles_are_within_a_bin(values):
    durations = Durations()
    for v in values:
        durations.add(v)
    assert durations.max == max(values)
    for share in (0.5, 0.95):
        exact = np.sort(values)[max(0, int(np.ceil(share * len(values))) - 1)]
        assert durations.percentile(share) == pytest.approx(exact, rel=0.06)


def test_sampled_truth_and_pending_agree_with_interpolation():
    rng = np.random.default_rng(1)
    times = np.cumsum(rng.uniform(0.005, 0.02, 300))
    values = rng.normal(size=(300, 2))
    truth, found = SampledTruth(0.5), {}
    pending = Pending(lambda row, step, v: found.__setitem__((row, step), v))
    due = {}
    for i, (t, v) in enumerate(zip(times, values, strict=True)):
        truth.push(t, v)
        pending.resolve(t, truth.at)
        if i % 40 == 5:
            due[i] = t + np.arange(1, 60) * 0.01
            pending.add(i, due[i])
    for (row, step), v in found.items():
        exact = [np.interp(due[row][step], times, values[:, j]) for j in range(2)]
        assert np.allclose(v, exact)
    assert len(found) > 300
    assert truth.at(times[-1] + 1) is None


def test_the_past_is_kept_in_order_and_for_a_while_only(robot):
    sampled, command = SampledTruth(0.5), CommandTruth(("a", "b"))
    for k in range(5000):
        t = 100 + k * 0.002
        sampled.push(t, np.array([t, -t]))
        at = trajectory("ab", [0.01, 0.5], [(t, 0.0), (t + 1.0, 0.0)])
        command.push(at, t, np.zeros(2))
    for truth in (sampled, command):
        assert len(truth._past.entries) < 2.1 / 0.002
        assert truth.at(t - KEPT_S - 0.1) is None
        assert truth.at(90.0) is None
    assert np.allclose(sampled.at(t - 1.0003), [t - 1.0003, 1.0003 - t])
    assert command.at(t - 1.0)[0] == pytest.approx(t - 1.01, abs=0.002)
    sampled.push(t - 0.5, np.zeros(2))  # the clock went back: what was noted for later is gone
    assert sampled.known_until(t) == t - 0.5
    assert sampled.at(t - 0.2) is None
    for truth in (sampled, command):
        truth.reset()
        assert truth.at(t) is None


def test_the_command_in_force_is_the_last_before(robot):
    """A command that arrives with the time of a control step follows after it; times are seconds since 1970."""
    truth, start = CommandTruth(("a", "b")), 1_700_000_000.0
    for k in range(200):
        truth.push(joint_state(0, [k, 0.0], ("a", "b")), start + k * 0.05, np.zeros(2))
    for k in range(190, 200):
        due = start + k * 0.05
        for rounded in (np.nextafter(due, 0), due, np.nextafter(due, np.inf)):
            assert truth.at(rounded)[0] == k - 1
        assert truth.at(due + 0.001)[0] == k


def test_nothing_compared_is_no_verdict(tmp_path, policy_file, capsys):
    messages = [m for m in told("controller") if m[0] != "/reference" or m[2] < 1.05e9]
    write(tmp_path / "bag", messages)
    changes = {"ground_truth": "controller", "truth_topic": "/reference"}
    result = run(tmp_path, policy_file, **changes)
    assert (result["passed"], result["compared_chunks"], result["beats_baselines"]) == (
        False,
        0,
        None,
    )
    assert "NOTHING COULD BE COMPARED" in replay.text(result)
    assert "NOT better" not in replay.text(result)
    assert "NOTHING COULD BE COMPARED" in (tmp_path / "out" / "report.html").read_text()
    flags = ["--bag", "bag", "--policy", "p", "--out", "out", "--robot", "r", "--ground-truth"]
    places = {"bag": tmp_path / "bag", "p": policy_file, "out": tmp_path / "again"}
    places["r"] = policy_file.parent / "robot.yaml"
    arguments = [str(places.get(f, f)) for f in flags]
    assert cli.main(["replay", *arguments, "controller", "--truth-topic", "/reference"]) == 1
    assert "NOTHING COULD BE COMPARED" in capsys.readouterr().out


def test_refused_commands_are_no_truth(tmp_path, policy_file, robot):
    wrong = trajectory("ba", [0.2, 0.1], [(0.0, 0.0), (0.1, 0.1)])
    messages = [(t, k, log, wrong if t == "/command" else m) for t, k, log, m in recorded(3.0)]
    good = next(m for m in recorded(3.0) if m[0] == "/command")
    messages = sorted([*messages, good], key=lambda m: m[2])
    assert good[1] == TRAJECTORY
    write(tmp_path / "bag", messages)
    says = "15 of 16 commands on /command cannot be followed: times are not .*--ground-truth controller or state"
    with pytest.raises(InputError, match=says):
        recording(tmp_path / "bag", policy_file, robot)
    assert len(recording(tmp_path / "bag", policy_file, robot, "state").times) > 10


def test_a_pose_that_is_cut_short_is_a_problem_and_no_traceback(tmp_path, policy_file, robot):
    messages = recorded(3.0)
    at = next(k for k, m in enumerate(messages) if m[0] == "/cube" and k > 50)
    topic, kind, log, msg = messages[at]
    messages[at] = (topic, kind, log, bytes(TYPESTORE.serialize_cdr(msg, kind))[:40])
    write(tmp_path / "bag", messages)
    rec = recording(tmp_path / "bag", policy_file, robot)
    assert any("40 bytes" in problem.reason for problem in rec.problems)
    assert len(rec.times) > 10


# --- with latency ---


def test_without_latency_the_command_is_the_plan(tmp_path, policy_file, monkeypatch):
    """A policy that holds commands where the robot was at each observation, from the next control step on; and a plan
    that may change nearly at once."""
    monkeypatch.setattr(ChunkScheduler.__init__, "__defaults__", (0.01, "replace"))
    write(tmp_path / "bag", recorded(6.0))
    result = run(tmp_path, policy_file, mode="timed", latency_ms=0.0)
    timed = result["timed"]
    assert timed["refused"] == {}
    assert timed["skipped_observations"] == 0
    assert timed["chunks_sent"] == result["chunks"]
    assert timed["mae"] == pytest.approx(result["mae"], rel=0.35)
    assert timed["limit_violations"]["velocity"] == 0
    assert "With latency" in (tmp_path / "out" / "report.html").read_text()


def test_latency_delays_the_command_and_is_accounted_for(tmp_path, policy_file):
    write(tmp_path / "bag", recorded(6.0))
    errors = []
    for latency in (0.0, 100.0, 190.0):
        result = run(tmp_path, policy_file, mode="timed", latency_ms=latency)
        timed = result["timed"]
        assert result["latency_ms"]["p50"] == latency
        assert result["latency_source"].startswith("simulated")
        assert len(set(result["inference_ms"].values())) == 4  # as measured, not as simulated
        errors.append(timed["mae"])
        assert timed["latency_ms"]["p50"] == latency
        assert timed["delay_steps_p50"] == pytest.approx(latency / 50)
    assert errors[0] < errors[1] < errors[2]  # it holds ever older positions of a moving robot
    slow = run(tmp_path, policy_file, mode="timed", latency_ms=500.0)["timed"]
    assert slow["chunks_sent"] == 0  # six actions of 50 ms are over by then
    assert slow["refused"] == {
        "the chunk was late: all of its actions are past": pytest.approx(13, abs=4)
    }
    assert slow["skipped_observations"] > 10
    assert slow["mae"] is None

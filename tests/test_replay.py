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
from onnx_toys import holding_policy
from toys import documented, small_spec

from flow_policy_rl import cli, replay
from flow_policy_rl.data.bags import Bag
from flow_policy_rl.errors import InputError, RunFailed
from flow_policy_rl.offline import predict
from flow_policy_rl.offline.measure import measure
from flow_policy_rl.offline.predict import Predictor
from flow_policy_rl.offline.recording import read_recording
from flow_policy_rl.offline.truth import KEPT_S, CommandTruth, SampledTruth
from flow_policy_rl.serving.chunk_scheduler import ChunkScheduler
from flow_policy_rl.serving.onnx_policy import OnnxPolicy
from flow_policy_rl.serving.robot import load_robot
from flow_policy_rl.serving.streams import MEASURED, NotReady, Streams, with_measured


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
        ({"latency_ms": 0.0}, "--latency-ms is of --mode timed, and this is --mode grid"),
        ({"mode": "graph", "noise": "random"}, "--noise is of --mode grid or timed, and this is"),
        ({"mode": "timed", "samples": 4}, "--samples is of --mode grid, and this is --mode timed"),
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

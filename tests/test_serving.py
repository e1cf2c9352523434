"""Messages to arrays, streams, schedule, safety, controller: without ROS, on plain objects shaped like messages."""

from types import SimpleNamespace as Msg

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toys import small_spec

from flow_policy_rl.errors import InputError
from flow_policy_rl.serving import decode
from flow_policy_rl.serving.chunk_scheduler import METHODS, ChunkScheduler
from flow_policy_rl.serving.decode import DecodeError
from flow_policy_rl.serving.monitor import Arrivals, SaidTwice
from flow_policy_rl.serving.robot import Topics, load_robot, robot_names
from flow_policy_rl.serving.streams import NotReady, Streams, topics_of
from flow_policy_rl.serving.trajectory_controller import (
    ForwardController,
    TrajectoryController,
    TrajectoryRejected,
)

MS = 1_000_000


def header(ns: int) -> Msg:
    return Msg(stamp=Msg(sec=ns // 1_000_000_000, nanosec=ns % 1_000_000_000))


def joint_state(names, positions, velocities=(), ns=0) -> Msg:
    return Msg(
        header=header(ns), name=list(names), position=list(positions), velocity=list(velocities)
    )


def pose(values, ns=0) -> Msg:
    x, y, z, qx, qy, qz, qw = values
    inner = Msg(position=Msg(x=x, y=y, z=z), orientation=Msg(x=qx, y=qy, z=qz, w=qw))
    return Msg(header=header(ns), pose=inner)


# --- decode ---


@given(st.permutations(["a", "b", "c", "extra"]))
def test_joints_are_matched_by_name_in_any_order(order):
    values = {"a": 1.0, "b": 2.0, "c": 3.0, "extra": 9.0}
    msg = joint_state(order, [values[n] for n in order], [10 * values[n] for n in order])
    assert decode.joint_values(msg, ("c", "a"), "position").tolist() == [3.0, 1.0]
    assert decode.joint_values(msg, ("c", "a"), "velocity").tolist() == [30.0, 10.0]


@pytest.mark.parametrize(
    ("msg", "says"),
    [
        (joint_state(["a", "b"], [1, 2]), "lacks c; it has a, b"),
        (joint_state(["a", "b", "c"], [1, 2]), "3 names but 2 values"),
        (joint_state(["a", "b", "c"], [1, float("nan"), 3]), "not a finite number in b"),
        (joint_state([], []), "it has no joints"),
    ],
)
def test_bad_joint_states_say_what_is_wrong(msg, says):
    field = small_spec().observations[0]
    with pytest.raises(DecodeError) as error:
        decode.decode(field, msg)
    assert says in str(error.value)


def test_a_pose_has_one_form_whatever_the_sign_of_its_quaternion():
    q = np.array([0.1, -0.2, 0.3, 0.4])
    q /= np.linalg.norm(q)
    one, other = decode.pose(pose([1, 2, 3, *q])), decode.pose(pose([1, 2, 3, *-q]))
    assert np.array_equal(one, other)
    assert one[6] > 0
    with pytest.raises(DecodeError, match="length"):
        decode.pose(pose([0, 0, 0, 0, 0, 0, 0.5]))


@pytest.mark.parametrize("encoding", ["rgb8", "bgr8", "mono8"])
@pytest.mark.parametrize("padding", [0, 5])
def test_images_honour_encoding_and_row_step(encoding, padding):
    channels = 1 if encoding == "mono8" else 3
    pixels = np.random.default_rng(0).integers(0, 255, (4, 6, channels), dtype=np.uint8)
    rows = np.pad(pixels.reshape(4, -1), ((0, 0), (0, padding)))
    msg = Msg(height=4, width=6, encoding=encoding, step=rows.shape[1], data=rows.tobytes())
    expected = pixels[..., ::-1] if encoding == "bgr8" else pixels
    assert np.array_equal(decode.image(msg), expected)
    msg.data = msg.data[:-1]
    with pytest.raises(DecodeError, match="bytes"):
        decode.image(msg)
    msg.encoding = "16UC1"
    with pytest.raises(DecodeError, match="not one of"):
        decode.image(msg)


@pytest.mark.parametrize("kind", [".png", ".jpg"])
def test_a_compressed_image_is_rgb_with_every_opencv(kind, monkeypatch):
    cv2 = pytest.importorskip("cv2")
    monkeypatch.delattr(cv2, "IMREAD_COLOR_RGB", raising=False)  # came with 4.11
    pixels = np.full((8, 8, 3), [200, 30, 90], np.uint8)
    data = cv2.imencode(kind, pixels[..., ::-1])[1].tobytes()
    found = decode.rgb(Msg(format=kind[1:], data=data))
    assert np.abs(found.astype(int) - pixels).max() <= 3


# --- streams ---


@pytest.fixture
def streams() -> Streams:
    fields = topics_of(small_spec(), Topics("/joints", "/command", {"cube": "/cube"}))
    return Streams(fields, max_age_s=0.2)


ABC = ["a", "b", "c"]
UP = [0, 0, 0.1, 0, 0, 0, 1]


def test_observation_is_sampled_as_of_the_newest_common_time(streams):
    for ns, value in ((0, 0.0), (10 * MS, 1.0), (20 * MS, 2.0), (30 * MS, 3.0)):
        streams.push("/joints", ns, joint_state(ABC, [value] * 3))
    streams.push("/cube", 15 * MS, pose(UP))
    snapshot = streams.snapshot(35 * MS)
    assert snapshot.stamp == 15 * MS
    assert snapshot.obs["joint_pos"].tolist() == [1.0] * 3  # the last one not after 15 ms
    assert snapshot.obs["object_pose"][2] == 0.1


def test_missing_stale_and_broken_streams_are_named_and_never_filled(streams):
    with pytest.raises(NotReady, match="/joints: no message yet"):
        streams.snapshot(0)
    streams.push("/joints", 0, joint_state(ABC, [0] * 3))
    with pytest.raises(NotReady, match="/cube: no message yet"):
        streams.snapshot(0)
    streams.push("/cube", 0, pose(UP))
    streams.snapshot(200 * MS)
    with pytest.raises(NotReady, match="0.201 s old, limit 0.200 s"):
        streams.snapshot(201 * MS)
    streams.push("/joints", 10 * MS, joint_state(ABC, [0, np.nan, 0]))
    with pytest.raises(NotReady, match="/joints: .*not a finite number in b"):
        streams.snapshot(20 * MS)
    streams.push("/joints", 20 * MS, joint_state(ABC, [1] * 3))  # recovers by itself
    assert (
        streams.snapshot(20 * MS).obs["joint_pos"].tolist() == [0] * 3
    )  # as of the pose, which is older


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1000)), max_size=40))
def test_nothing_older_than_the_limit_goes_into_an_observation(arrivals):
    """Whichever streams pause, and for how long: also what is taken because it is in time for the others is young."""
    fields = topics_of(small_spec(), Topics("/joints", "/command", {"cube": "/cube"}))
    streams = Streams(fields, max_age_s=0.2)
    now = 0
    for which, ms in arrivals:
        now += ms * MS // 4
        if which:
            streams.push("/cube", now, pose(UP))
        else:
            streams.push("/joints", now, joint_state(ABC, [now / 1e9] * 3))
        try:
            snapshot = streams.snapshot(now)
        except NotReady:
            continue
        assert min(snapshot.stamps.values()) >= now - 200 * MS
        assert snapshot.obs["joint_pos"][0] == snapshot.stamps["/joints"] / 1e9


def test_a_gap_that_is_over_is_still_named_while_the_observation_would_reach_back_into_it(streams):
    streams.push("/joints", 300 * MS, joint_state(ABC, [0] * 3))
    streams.push("/cube", 1000 * MS, pose(UP))
    streams.push("/joints", 1050 * MS, joint_state(ABC, [1] * 3))
    with pytest.raises(NotReady, match="/joints: the message in time .* 0.760 s old, limit 0.200"):
        streams.snapshot(1060 * MS)
    streams.push("/cube", 1060 * MS, pose(UP))
    assert streams.snapshot(1060 * MS).obs["joint_pos"].tolist() == [1] * 3


def test_joint_states_of_something_else_on_the_same_topic_are_let_pass(streams):
    """A mobile base beside the arm. Before any joint was heard of they say why nothing is: a prefix, say."""
    wheels = joint_state(["wheel", "left_a"], [np.nan, 0])
    streams.push("/joints", 0, wheels)
    with pytest.raises(NotReady, match="/joints: joint state lacks a, b, c; it has wheel, left_a"):
        streams.snapshot(0)
    streams.push("/joints", 10 * MS, joint_state(ABC, [1, 2, 3]))
    streams.push("/cube", 10 * MS, pose(UP))
    before = streams.snapshot(20 * MS)
    for ns in (5 * MS, 15 * MS, 10_000_000 * MS, 0):  # of any clock
        streams.push("/joints", ns, wheels)
        streams.push("/joints", ns, joint_state([], []))
    after = streams.snapshot(20 * MS)
    assert after.stamps == before.stamps
    assert after.obs["joint_pos"].tolist() == [1, 2, 3]


@given(st.permutations(ABC), st.integers(1, 2), st.integers(-50, 50))
def test_drivers_that_publish_apart_are_put_together_by_joint(order, split, lag):
    """An arm and its gripper: each joint is what was said last about it, in whatever order and however far behind."""
    fields = topics_of(small_spec(), Topics("/joints", "/command", {"cube": "/cube"}))
    streams = Streams(fields, max_age_s=0.2)
    arm, hand = order[:split], order[split:]
    for k in range(5):
        now = 1000 * MS + k * 100 * MS
        streams.push("/cube", now - 50 * MS, pose(UP))
        streams.push("/joints", now, joint_state(arm, [k] * len(arm)))
        streams.push(
            "/joints", now + lag * MS, joint_state([*hand, "wheel"], [-k] * (len(hand) + 1))
        )
        streams.push("/cube", now + 50 * MS, pose(UP))
        snapshot = streams.snapshot(now + 50 * MS)
        expected = [k if name in arm else -k for name in ABC]
        assert snapshot.obs["joint_pos"].tolist() == expected
        assert snapshot.stamps["/joints"] == now + max(lag, 0) * MS
    streams.push("/joints", now + 60 * MS, joint_state(hand, [9] * len(hand)))
    streams.push("/joints", now + 55 * MS, joint_state(hand, [7] * len(hand)))  # out of order
    streams.push("/cube", now + 60 * MS, pose(UP))
    expected = [k if name in arm else 9 for name in ABC]
    assert streams.snapshot(now + 60 * MS).obs["joint_pos"].tolist() == expected


def test_each_joint_has_an_age_of_its_own(streams):
    for ns in range(0, 310, 10):
        streams.push("/joints", ns * MS, joint_state(["a", "b"], [ns, ns]))
        streams.push("/cube", ns * MS, pose(UP))
        if ns == 50:
            streams.push("/joints", ns * MS, joint_state(["c"], [5]))
        if 50 <= ns <= 250:
            assert streams.snapshot(ns * MS).obs["joint_pos"].tolist() == [ns, ns, 5]
    with pytest.raises(NotReady, match="/joints: joint state lacks c; it has a, b"):
        streams.snapshot(260 * MS)
    streams.push("/joints", 310 * MS, joint_state(["c"], [6]))
    streams.push("/cube", 310 * MS, pose(UP))
    assert streams.snapshot(310 * MS).obs["joint_pos"].tolist() == [300, 300, 6]


def test_what_a_driver_says_badly_stays_bad_whatever_the_other_says(streams):
    """A finger that is not a number is not mended by a good state of the arm; nor is a missing velocity made up."""
    streams.push("/cube", 0, pose(UP))
    for bad in ([np.nan], [], [1, 2]):
        streams.push("/joints", 0, joint_state(["c"], [3]))
        streams.push("/joints", 0, joint_state(["c"], bad))
        streams.push("/joints", 0, joint_state(["a", "b"], [1, 2]))
        with pytest.raises(NotReady, match="not a finite number in c"):
            streams.snapshot(0)
    streams.push("/joints", 0, joint_state(["c"], [3]))
    assert streams.snapshot(0).obs["joint_pos"].tolist() == [1, 2, 3]


def test_a_clock_that_jumps_back_empties_the_joints_as_well(streams):
    streams.push("/joints", 1000 * MS, joint_state(["a", "b"], [1, 1]))
    streams.push("/joints", 1000 * MS, joint_state(["c"], [1]))
    streams.push("/joints", 0, joint_state(["a", "b"], [2, 2]))
    streams.push("/cube", 0, pose(UP))
    with pytest.raises(NotReady, match="lacks c"):
        streams.snapshot(0)


def test_stamps_of_another_clock_are_told_from_late_ones(streams):
    """Real time in Unix seconds, simulated time from zero; a node on the one hears stamps of the other."""
    unix = 1_800_000_000 * 1000 * MS
    for stamp, now, says in (
        (0, 300 * MS, "0.300 s old, limit 0.200 s$"),
        (0, unix, "old.*another clock"),
        (300 * MS, 0, "0.300 s in the future: do the clocks agree"),
        (unix, 0, "in the future: another clock.*nobody publishes /clock"),
    ):
        streams.clear()
        streams.push("/joints", stamp, joint_state(ABC, [0] * 3))
        streams.push("/cube", stamp, pose(UP))
        with pytest.raises(NotReady, match=says):
            streams.snapshot(now)


def test_the_newest_message_is_used_whatever_came_before_and_counted_once(streams):
    """A burst after a pause: nothing of the backlog is used."""
    for ns in range(0, 100 * MS, 10 * MS):
        streams.push("/cube", ns, pose([0, 0, ns / 1e9, 0, 0, 0, 1]))
        streams.push("/joints", ns, joint_state(ABC, [ns / 1e9] * 3))
    streams.push("/cube", 80 * MS, pose(UP))  # out of order
    first = streams.take(100 * MS)
    assert first.stamps == {"/cube": 90 * MS, "/joints": 90 * MS}
    assert first.obs["object_pose"][2] == 0.09
    streams.push("/joints", 95 * MS, joint_state(ABC, [1] * 3))
    streams.take(100 * MS)  # nothing newer that both have reached
    assert streams.used == {"/cube": 1, "/joints": 1}
    streams.push("/cube", 96 * MS, pose(UP))
    assert streams.take(100 * MS).stamps == {"/cube": 90 * MS, "/joints": 95 * MS}
    assert streams.used == {"/cube": 1, "/joints": 2}


def test_lost_messages_are_counted_by_their_numbers():
    arrivals = Arrivals()
    for number in (7, 8, 11, 12):
        arrivals.count(number)
    assert (arrivals.received, arrivals.lost) == (4, 2)
    arrivals.begin_again()  # another publisher
    for number in (1, 2, None, 9, 10):  # without a number nothing is known
        arrivals.count(number)
    assert (arrivals.received, arrivals.lost) == (9, 2)
    arrivals.count(3)  # a publisher that started anew
    arrivals.count(4)
    assert (arrivals.received, arrivals.lost) == (11, 2)


def test_a_clock_that_jumps_back_empties_the_streams(streams):
    streams.push("/joints", 1000 * MS, joint_state(ABC, [0] * 3))
    streams.push("/cube", 1000 * MS, pose(UP))
    streams.push("/joints", 10 * MS, joint_state(ABC, [5] * 3))
    with pytest.raises(NotReady, match="/cube: no message yet"):
        streams.snapshot(10 * MS)


def test_a_pose_the_robot_does_not_know_is_refused():
    with pytest.raises(InputError, match="needs the pose of 'cube'; the robot file has ball"):
        topics_of(small_spec(), Topics("/joints", "/command", {"ball": "/ball"}))


# --- schedule ---


def test_late_actions_are_dropped_and_the_rest_keep_their_place_in_time():
    scheduler = ChunkScheduler(small_spec(), min_lead_s=0.01)
    chunk = np.arange(12.0).reshape(6, 2)
    scheduler.join(chunk, stamp=800 * MS, now=800 * MS)
    rest = scheduler.join(chunk, stamp=1000 * MS, now=1000 * MS + 95 * MS)
    # Due at 50, 100, 150, ... ms: the first is past, the second is closer than the lead.
    assert (rest.due - 1000 * MS).tolist() == [150 * MS, 200 * MS, 250 * MS, 300 * MS]
    assert np.array_equal(rest.positions, chunk[2:])
    assert scheduler.join(chunk, 0, 10_000 * MS) is None


@pytest.mark.parametrize("joining", METHODS)
def test_a_run_begins_with_the_first_action_however_long_its_inference_took(joining):
    """Nothing is in force: the robot stands where it was seen, and would have to jump to a later action."""
    spec = small_spec(prefix_horizon=2)
    chunk = np.arange(12.0).reshape(6, 2)
    first = ChunkScheduler(spec, joining=joining).join(chunk, 1000 * MS, 1200 * MS)
    assert first.due[0] == 1250 * MS
    assert np.allclose(first.positions[:4], chunk[:4])
    late = None if joining != "sync" else 1550 * MS
    over = ChunkScheduler(spec, joining=joining).join(chunk, 1000 * MS, 1500 * MS)
    assert (over.due[0] if over else None) == late


def ramp(start: float, slope: float) -> np.ndarray:
    """Chunk (6, 2) of two equal joints."""
    return np.repeat((start + slope * np.arange(1, 7))[:, None], 2, axis=1)


@pytest.mark.parametrize("joining", ["replace", "crossfade", "ensemble"])
def test_chunks_that_agree_join_without_a_seam(joining):
    scheduler = ChunkScheduler(small_spec(), joining=joining)
    scheduler.join(ramp(0.0, 0.1), 0, 0)
    joined = scheduler.join(ramp(0.2, 0.1), 100 * MS, 105 * MS)
    assert np.allclose(joined.positions, ramp(0.2, 0.1))
    assert np.allclose(joined.seam_jump, 0, atol=1e-9)


@pytest.mark.parametrize("joining", ["replace", "crossfade", "ensemble", "sync"])
@pytest.mark.parametrize("lead_s", [0.01, 0.05, 0.2])
def test_no_target_is_due_before_the_plan_may_change(joining, lead_s):
    """Also of the first chunk of a run, which may begin while the arm still comes to rest, at any rate of a policy."""
    scheduler = ChunkScheduler(small_spec(), lead_s, joining)
    for now in (0, 400 * MS):
        targets = scheduler.join(ramp(0.0, 0.1), now, now)
        assert targets.due[0] >= now + (lead_s + 0.2 * 0.05) * 1e9 - 1
        if now == 0:
            assert targets.due[0] <= now + (lead_s + 0.05) * 1e9
        assert (np.diff(targets.due) == 50 * MS).all()


def test_a_crossfade_begins_with_the_old_chunk_and_ends_with_the_new():
    scheduler = ChunkScheduler(small_spec(), joining="crossfade")
    scheduler.join(np.zeros((6, 2)), 0, 0)
    joined = scheduler.join(np.ones((6, 2)), 50 * MS, 50 * MS).positions[:, 0]
    # The old chunk ends at 300 ms, the new one begins at 100 ms with weight 1/5.
    assert np.allclose(joined, [0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


def test_an_ensemble_is_the_weighted_mean_of_all_predictions_for_a_moment():
    scheduler = ChunkScheduler(small_spec(), joining="ensemble")
    assert scheduler.period == 50 * MS
    scheduler.join(np.zeros((6, 2)), 0, 0)
    scheduler.join(np.ones((6, 2)), 50 * MS, 50 * MS)
    joined = scheduler.join(np.full((6, 2), 4.0), 100 * MS, 100 * MS).positions[:, 0]
    w = np.exp(-0.01 * np.arange(3))
    assert np.allclose(
        joined[:4], (w @ [0, 1, 4]) / w.sum()
    )  # due at 150 to 300 ms: three predictions
    assert np.isclose(joined[4], (w[:2] @ [1, 4]) / w[:2].sum())  # 350 ms: the first chunk is over
    assert joined[5] == 4.0


def test_states_that_jitter_do_not_cost_inferences():
    """100 Hz, stamps up to half a millisecond early or late: one inference per control step, not one per 60 ms."""
    rng = np.random.default_rng(0)
    scheduler = ChunkScheduler(small_spec(), joining="ensemble")
    started = []
    for stamp in 10 * MS * np.arange(1000) + rng.integers(-MS // 2, MS // 2, 1000):
        if scheduler.due(int(stamp)):
            scheduler.started(int(stamp))
            started.append(stamp)
    assert len(started) == 200
    assert np.allclose(np.diff(started), 50 * MS, atol=MS)


def test_sync_executes_then_looks_again():
    scheduler = ChunkScheduler(small_spec(), joining="sync")
    scheduler.started(0)
    assert not scheduler.due(10_000 * MS)  # while the inference runs
    targets = scheduler.join(ramp(0.0, 0.1), 0, 300 * MS)
    assert targets.due.tolist() == [350 * MS, 400 * MS, 450 * MS, 500 * MS]
    assert not scheduler.due(499 * MS)
    assert scheduler.due(500 * MS)


def test_rtc_hands_the_policy_what_will_be_executed_meanwhile():
    with pytest.raises(InputError, match="rtc needs a policy trained with a prefix"):
        ChunkScheduler(small_spec(), joining="rtc")
    scheduler = ChunkScheduler(small_spec(prefix_horizon=2), joining="rtc")
    assert scheduler.prefix(0).delay == 0  # nothing is in force
    scheduler.join(ramp(0.0, 0.1), 0, 0)
    scheduler.join(ramp(0.0, 0.1), 0, 60 * MS)  # a delay of more than one step
    prefix = scheduler.prefix(100 * MS)
    assert prefix.delay == 2
    assert np.allclose(prefix.actions[:, 0], [0.3, 0.4])  # due at 150 and 200 ms
    assert scheduler.prefix(260 * MS).delay == 1  # one action is left of the chunk


@pytest.mark.parametrize("now", [110, 190])
def test_rtc_takes_over_smoothly_from_the_end_of_its_prefix_however_early_it_comes(now):
    scheduler = ChunkScheduler(small_spec(prefix_horizon=2), joining="rtc")
    scheduler.join(ramp(0.0, 0.1), 0, 0)
    scheduler.join(ramp(0.0, 0.1), 0, 60 * MS)
    assert scheduler.prefix(100 * MS).delay == 2
    chunk = np.concatenate([ramp(0.2, 0.1)[:2], np.full((4, 2), 3.0)])  # as told, then elsewhere
    joined = scheduler.join(chunk, 100 * MS, now * MS)
    told = [0.3, 0.4] if now == 110 else []
    # In force is 0.5 at 250 and 0.6 at 300 ms, its end.
    blended = [0.8 * 0.5 + 0.2 * 3.0, 0.6 * 0.6 + 0.4 * 3.0]
    assert np.allclose(joined.positions[:, 0], [*told, *blended, 3.0, 3.0])
    assert np.allclose(joined.seam_jump, (blended[0] - 0.5) / 0.05)


def test_a_seam_is_what_the_new_chunk_adds_and_not_the_motion_itself():
    """Velocity of both chunks changes by 2 per step; one of them is 0.1 off."""
    scheduler = ChunkScheduler(small_spec())
    curve = lambda start: np.repeat((np.arange(start, start + 6) ** 2 * 0.05)[:, None], 2, axis=1)  # noqa: E731
    scheduler.join(curve(1), 0, 0)
    assert np.allclose(scheduler.join(curve(3), 100 * MS, 100 * MS).seam_jump, 0)
    off = scheduler.join(curve(4) + 0.1, 150 * MS, 150 * MS)
    assert np.allclose(off.seam_jump, 0.1 / 0.05)


def test_unknown_joining_names_the_methods():
    with pytest.raises(InputError, match="replace, crossfade, ensemble, rtc, sync"):
        ChunkScheduler(small_spec(), joining="blend")


def test_inference_is_due_once_per_executed_horizon_and_again_after_a_jump():
    scheduler = ChunkScheduler(small_spec())
    assert scheduler.due(0)
    scheduler.started(0)
    assert not scheduler.due(198 * MS)
    assert scheduler.due(200 * MS)
    scheduler.started(200 * MS)
    assert scheduler.due(0)


# --- robot files ---


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("arm:", "arms:"), "did you mean 'arm'"),
        (
            ("velocity: 2.175, acceleration: 15.0", "speed: 2.175, acceleration: 15.0"),
            "unknown key",
        ),
        (("position: [0.0, 0.04]", "position: [0.04, 0.0]"), "low < high"),
        (("position: [0.0, 0.04]", "position: 3"), "position a pair"),
        (("name: panda", "name: [panda"), "not YAML"),
        (
            ("  joint_states: /joint_states", "  jointstates: /joint_states"),
            "did you mean 'joint_states'",
        ),
    ],
)
def test_bad_robot_files_name_the_key(tmp_path, root, change, says):
    text = (root / "robots" / "panda.yaml").read_text()
    assert change[0] in text
    (tmp_path / "r.yaml").write_text(text.replace(*change, 1))
    with pytest.raises(InputError) as error:
        load_robot(str(tmp_path / "r.yaml"))
    assert says in str(error.value)
    assert "\n" not in str(error.value)


URDF = """<robot name="r"><link name="base"/>
<joint name="j1" type="revolute"><parent link="base"/><child link="l1"/><origin xyz="0 0 0.5"/><axis xyz="0 0 1"/>
  <limit lower="-1.5" upper="2.5" velocity="1.25" effort="9"/></joint>
<joint name="j2" type="prismatic"><parent link="l1"/><child link="l2"/><origin xyz="0.2 0 0" rpy="0
1.5707963267948966 0"/>
  <axis xyz="0 0 1"/><limit lower="0" upper="0.3" velocity="0.1" effort="9"/></joint>
<joint name="flange" type="fixed"><parent link="l2"/><child link="tool"/><origin xyz="0 0 0.1"/></joint></robot>"""
ROBOT = """name: mine
urdf: r.urdf
tool: tool
arm:
  j1: {acceleration: 2.0, jerk: 100.0}
  j2: {acceleration: 1.0, jerk: 50.0, velocity: 0.05}
gripper: {}
workspace: {low: [-1, -1, 0], high: [1, 1, 1]}
topics: {joint_states: /joint_states, command: /arm/joint_trajectory}
"""


def test_limits_and_kinematics_come_from_a_urdf(tmp_path):
    (tmp_path / "r.urdf").write_text(URDF)
    (tmp_path / "r.yaml").write_text(ROBOT)
    robot = load_robot(str(tmp_path / "r.yaml"))
    assert robot.arm["j1"].position == (-1.5, 2.5)
    assert robot.arm["j1"].velocity == 1.25
    assert robot.arm["j2"].velocity == 0.05  # the robot file has the last word
    tool = robot.chain.tool_position(("j1", "j2"), np.array([[0.0, 0.0], [np.pi / 2, 0.3]]))
    assert np.allclose(tool, [[0.3, 0, 0.5], [0, 0.6, 0.5]])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("r.urdf", "s.urdf"), "cannot be read"),
        (("tool: tool", "tool: tol"), "did you mean 'tool'"),
        (("j1: {acceleration: 2.0, ", "j1: {"), "key 'acceleration' is missing"),
        (("j1:", "j9:"), "key 'position' is missing"),
        (("low: [-1, -1, 0]", "low: [-1, -1]"), "list of 3 numbers"),
        (("low:", "lo:"), "did you mean 'low'"),
        (("tool: tool\n", ""), "workspace needs chain"),
        (("/joint_states", "joint states"), "not a topic name"),
    ],
)
def test_bad_robot_files_with_a_urdf_name_the_key(tmp_path, change, says):
    assert change[0] in ROBOT
    (tmp_path / "r.urdf").write_text(URDF)
    (tmp_path / "r.yaml").write_text(ROBOT.replace(*change, 1))
    with pytest.raises(InputError) as error:
        load_robot(str(tmp_path / "r.yaml"))
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", robot_names())
def test_robots_that_ship_can_be_loaded(name):
    assert load_robot(name).name == name


def test_two_publishers_of_the_same_are_told_by_their_numbers():
    """Not one that was started again, nor two that have joints of their own."""
    found = SaidTwice()
    for k in range(20):
        found.count(["a", "b"], 900 + k)
        found.count(["g"], k)
        found.count(["a"], None)
        found.count(["a"], 2**64 - 1)
    for k in range(20):
        found.count(["a", "b"], k)
    assert found.names == []
    for k in range(4):
        found.count(["b"], 100 + k)
        found.count(["b"], 100 + k)  # of another, started at the same moment
    assert found.names == ["b"]
    found.begin_again()
    assert found.names == []


def test_unknown_robot_names_the_nearest():
    with pytest.raises(InputError, match="did you mean 'panda'"):
        load_robot("pnada")


# --- the controller that follows ---


def test_controller_passes_its_points_with_their_velocities():
    controller = TrajectoryController(["a", "b"], np.zeros(2))
    times, points = np.array([0.1, 0.2, 0.3]), np.array([[1.0, 2], [2, 1], [3, 0]])
    velocities = np.array([[1.0, 0], [5, -5], [0, 0]])
    controller.accept(["a", "b"], times, points, velocities, now=10.0)
    for time, point, velocity in zip(times, points, velocities, strict=True):
        position, speed, _ = controller.sample(10 + time - 1e-9)
        assert np.allclose(position, point, atol=1e-6)
        assert np.allclose(speed, velocity, atol=1e-5)
    step = 1e-6
    for time in (10.05, 10.17, 10.28):  # the slope is the derivative of the position
        slope = (controller.sample(time + step)[0] - controller.sample(time - step)[0]) / (2 * step)
        assert np.allclose(slope, controller.sample(time)[1], atol=1e-4)
    position, speed, _ = controller.sample(99.0)
    assert np.array_equal(position, points[-1])
    assert np.array_equal(speed, [0, 0])


def test_controller_matches_names_and_replaces_at_once():
    controller = TrajectoryController(["a", "b"], np.array([0.0, 0.0]))
    controller.accept(["b", "a"], np.array([1.0]), np.array([[2.0, 1.0]]), None, now=0.0)
    assert np.allclose(controller.sample(0.5)[0], [0.5, 1.0])
    controller.accept(["a", "b"], np.array([1.0]), np.array([[0.5, 1.0]]), None, now=0.5)
    assert np.allclose(controller.sample(1.2)[0], [0.5, 1.0])  # the old goal is forgotten


@pytest.mark.parametrize(
    ("names", "times", "velocities"),
    [
        (["a"], [0.1, 0.2], None),
        (["a", "c"], [0.1, 0.2], None),
        (["a", "b"], [0.2, 0.2], None),
        (["a", "b"], [0.2, 0.1], None),
        (["a", "b"], [0.1, 0.2], [[0, 0], [0, 1]]),
    ],
)
def test_controller_drops_what_a_real_one_drops(names, times, velocities):
    controller = TrajectoryController(["a", "b"], np.zeros(2))
    points = np.ones((2, len(names)))
    with pytest.raises(TrajectoryRejected):
        controller.accept(
            names,
            np.array(times),
            points,
            None if velocities is None else np.array(velocities),
            0.0,
        )
    assert np.array_equal(controller.sample(1.0)[0], [0, 0])


def test_controller_of_partial_joints_holds_the_others():
    controller = TrajectoryController(["a", "b"], np.array([0.5, 0.7]), allow_partial=True)
    controller.accept(["b"], np.array([1.0]), np.array([[2.0]]), None, now=0.0)
    assert np.allclose(controller.sample(1.0)[0], [0.5, 2.0])


def test_controller_with_a_stamp_in_the_past_jumps_and_drops_what_is_over():
    controller = TrajectoryController(["a"], np.zeros(1))
    times, points = np.arange(1, 11) * 0.1, np.arange(1.0, 11)[:, None]
    controller.accept(["a"], times, points, None, now=10.0, start=9.6)
    assert np.allclose(controller.sample(10.0)[0], [4.0])  # the reference jumps: no blend
    with pytest.raises(TrajectoryRejected, match="ended 1.000 s before"):
        controller.accept(["a"], times, points, None, now=12.0, start=10.0)
    controller.accept(
        ["a"], times, points, None, now=10.0, start=10.8
    )  # future: from now on toward the first point
    assert 4.0 > controller.sample(10.4)[0][0] > 1.0


def test_controller_with_accelerations_follows_quintics():
    controller = TrajectoryController(["a"], np.zeros(1))
    t = np.linspace(0.1, 1.0, 10)
    f = np.polynomial.Polynomial([0, 0, 0, 1, -2, 1])  # t^3 (1 - t)^2: at rest at 1
    p, v, a = f(t)[:, None], f.deriv()(t)[:, None], f.deriv(2)(t)[:, None]
    v[-1] = 0
    controller.accept(["a"], t, p, v, 0.0, accelerations=a)
    moments = np.linspace(0, 0.99, 50)
    followed = np.array([controller.sample(m)[0][0] for m in moments])
    assert np.allclose(followed, f(moments), atol=1e-9)


def test_forward_controller_takes_the_last_command():
    controller = ForwardController(["a", "b"], np.zeros(2))
    controller.accept([1.0, 2.0])
    assert controller.sample(0.0)[0].tolist() == [1.0, 2.0]
    with pytest.raises(TrajectoryRejected, match="1 values for 2 joints"):
        controller.accept([1.0])

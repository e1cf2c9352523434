"""Messages to arrays, streams, schedule, safety, controller: without ROS, on plain objects shaped like messages."""

from types import SimpleNamespace as Msg

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from toys import small_spec

from flow_policy_rl.errors import InputError
from flow_policy_rl.serving import decode
from flow_policy_rl.serving.chunk_scheduler import ChunkScheduler
from flow_policy_rl.serving.decode import DecodeError
from flow_policy_rl.serving.robot import Topics, load_robot
from flow_policy_rl.serving.safety import Rejected, SafetyFilter
from flow_policy_rl.serving.streams import NotReady, Streams, topics_of
from flow_policy_rl.serving.trajectory_controller import TrajectoryController, TrajectoryRejected

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


def test_late_points_are_dropped_and_the_rest_keep_their_place_in_time():
    scheduler = ChunkScheduler(small_spec(), min_lead_s=0.01)
    chunk = np.arange(12.0).reshape(6, 2)
    rest = scheduler.trajectory(chunk, stamp=1000 * MS, now=1000 * MS + 95 * MS)
    # Due at 50, 100, 150, ... ms: the first is past, the second is closer than the lead.
    assert np.allclose(rest.times, [0.055, 0.105, 0.155, 0.205])
    assert np.array_equal(rest.positions, chunk[2:])
    assert np.allclose(rest.velocities[0], 2 / 0.05)
    assert np.array_equal(rest.velocities[-1], [0, 0])
    assert scheduler.trajectory(chunk, 0, 10_000 * MS) is None


def test_inference_is_due_once_per_executed_horizon_and_again_after_a_jump():
    scheduler = ChunkScheduler(small_spec())
    assert scheduler.due(0)
    scheduler.started(0)
    assert not scheduler.due(199 * MS)
    assert scheduler.due(200 * MS)
    scheduler.started(200 * MS)
    assert scheduler.due(0)


# --- safety ---

PANDA = load_robot("panda")
PANDA_JOINTS = tuple(PANDA.limits)


@given(
    chunk=arrays(np.float64, (12, 8), elements=st.floats(-50, 50)),
    start=arrays(np.float64, 8, elements=st.floats(0, 1)),
    control_dt=st.sampled_from([0.01, 0.05, 0.2]),
)
def test_nothing_outside_position_or_velocity_limits_passes(chunk, start, control_dt):
    low, high = PANDA.limit_array(PANDA_JOINTS, "position").T
    start = low + start * (high - low)
    safe = SafetyFilter(PANDA, PANDA_JOINTS, control_dt).check(chunk, start).chunk
    assert (safe >= low - 1e-12).all()
    assert (safe <= high + 1e-12).all()
    speed = np.abs(np.diff(np.vstack([start, safe]), axis=0)) / control_dt
    assert (speed <= PANDA.limit_array(PANDA_JOINTS, "velocity") * (1 + 1e-9)).all()


def test_a_chunk_within_limits_is_not_changed():
    start = np.array([0, -0.785, 0, -2.356, 0, 1.571, 0.785, 0.02])
    chunk = start + np.linspace(0, 0.01, 12)[:, None]
    checked = SafetyFilter(PANDA, PANDA_JOINTS, 0.05).check(chunk, start, first=True)
    assert np.array_equal(checked.chunk, chunk)
    assert checked.num_changed == 0


def test_nonsense_and_a_far_start_are_refused():
    safety = SafetyFilter(PANDA, PANDA_JOINTS, 0.05, max_start_distance=0.3)
    start = np.array([0, -0.785, 0, -2.356, 0, 1.571, 0.785, 0.02])
    chunk = np.tile(start, (12, 1))
    chunk[3, 2] = np.nan
    with pytest.raises(Rejected, match="not a finite target for panda_joint3"):
        safety.check(chunk, start)
    with pytest.raises(Rejected, match="first target of panda_joint1 is 0.400 away"):
        safety.check(np.tile(start + np.eye(8)[0] * 0.4, (12, 1)), start, first=True)


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
        position, speed = controller.sample(10 + time - 1e-9)
        assert np.allclose(position, point, atol=1e-6)
        assert np.allclose(speed, velocity, atol=1e-5)
    step = 1e-6
    for time in (10.05, 10.17, 10.28):  # the slope is the derivative of the position
        slope = (controller.sample(time + step)[0] - controller.sample(time - step)[0]) / (2 * step)
        assert np.allclose(slope, controller.sample(time)[1], atol=1e-4)
    position, speed = controller.sample(99.0)
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

"""From bags to data sets: closed forms, and what is refused."""

import json
from dataclasses import replace

import cv2
import numpy as np
import pytest
from bag_toys import (
    IMAGE,
    JOINTS,
    MS,
    POSE,
    ROBOT,
    TOLD,
    TRAJECTORY,
    TYPES,
    TYPESTORE,
    apart,
    header,
    joint_state,
    late,
    motion,
    picture,
    pose,
    recorded,
    told,
    trajectory,
    write,
)

from flow_policy_rl import checkpoint, convert, train, train_config
from flow_policy_rl.algorithms.bc import BCConfig
from flow_policy_rl.convert import Config, Splitting
from flow_policy_rl.data import demonstrations
from flow_policy_rl.data.bags import Bag
from flow_policy_rl.data.frames import End, Frame, FrameReader, layout_from_robot
from flow_policy_rl.data.health import Health
from flow_policy_rl.data.robomimic import DemoLayout, Demonstrations, Episode
from flow_policy_rl.errors import InputError
from flow_policy_rl.policy import NetworkConfig
from flow_policy_rl.serving.decode import DecodeError, compressed_image, decode, rgb
from flow_policy_rl.serving.robot import load_robot
from flow_policy_rl.spec import ObservationField
from sim.errors import SimulationError
from sim.tasks import make_task

BOOL, COMPRESSED = "std_msgs/msg/Bool", "sensor_msgs/msg/CompressedImage"
HEIGHT, WIDTH = 24, 32


def said(value: bool):
    return TYPES[BOOL](value)


def shade(t: float) -> int:
    """Brightness of the picture at a time: a film codec keeps it within a few levels."""
    return 40 + round(20 * t)


def with_camera(seconds=4.0, period=0.05, encoding="rgb8", compressed=False, size=(HEIGHT, WIDTH)):
    """The recorded robot with a camera that is 20 ms late to arrive."""
    messages = recorded(seconds)
    for k in range(int(seconds / period)):
        ns = 1_000_000_000 + round(k * period * 1e9)
        pixels = np.full((*size, 3), shade(k * period), np.uint8)
        if compressed:
            data = np.frombuffer(cv2.imencode(".png", pixels)[1], np.uint8)
            msg = TYPES[COMPRESSED](header(ns), "png", data)
        else:
            msg = picture(ns, *size, shade(k * period), encoding)
        messages.append(("/front", COMPRESSED if compressed else IMAGE, ns + 20 * MS, msg))
    messages.sort(key=lambda m: m[2])
    return messages


@pytest.fixture
def robot_file(tmp_path):
    (tmp_path / "robot.yaml").write_text(ROBOT)
    return str(tmp_path / "robot.yaml")


def run(tmp_path, robot_file, messages, output="demos.hdf5", **changes):
    write(tmp_path / "bag", messages)
    values = {"input": tmp_path / "bag", "output": tmp_path / output, "robot": robot_file}
    return convert.main(Config(**(values | changes)))


@pytest.mark.parametrize("output", ["demos.hdf5", "lerobot"])
@pytest.mark.parametrize("compressed", [False, True], ids=["raw", "compressed"])
def test_frames_are_as_of_one_time_and_actions_follow(tmp_path, robot_file, output, compressed):
    result = run(tmp_path, robot_file, with_camera(compressed=compressed), output, rate=20.0)
    demos = demonstrations.load(tmp_path / output)
    assert demos.layout.joint_names == ("a", "b")
    assert [f.name for f in demos.layout.observations] == [
        "joint_pos",
        "joint_vel",
        "gripper_pos",
        "cube_pose",
        "front_image",
    ]
    (episode,) = demos.episodes
    assert len(episode.actions) == result["steps"] > 70
    a = episode.obs["joint_pos"][:, 0]
    t = np.arcsin(a[:30] / 0.5)  # the time of each frame, from the joint itself
    assert np.allclose(np.diff(t), 0.05, atol=0.011)  # to one joint state
    first = t[0]
    t = first + 0.05 * np.arange(len(a))
    assert np.allclose(episode.obs["gripper_pos"][:, 0], motion(t)[1], atol=0.004)
    assert np.allclose(episode.actions, np.stack(motion(t + 0.05), axis=1), atol=0.012)
    assert (
        (t - episode.obs["cube_pose"][:, 0] >= -1e-6)
        & (t - episode.obs["cube_pose"][:, 0] < 0.0241)
    ).all()
    brightness = episode.obs["front_image"].mean(axis=(1, 2, 3))
    shown = (brightness - 40) / 20
    assert np.all((t - shown > -0.08) & (t - shown < 0.13))
    assert episode.obs["front_image"].shape[1:] == (HEIGHT, WIDTH, 3)
    assert result["format"] == ("robomimic" if output.endswith("hdf5") else "lerobot")


def frames_of(tmp_path, robot_file, messages, splitting=None, **settings):
    """Frames at 20 Hz, and how each episode ended."""
    bag, robot = Bag(write(tmp_path / "bag", messages)), load_robot(robot_file)
    layout = layout_from_robot(bag, robot, "toy", 0.05, None)
    events = list(FrameReader(bag, layout, robot, splitting or Splitting(), **settings).read())
    return [e for e in events if isinstance(e, Frame)], [e for e in events if isinstance(e, End)]


def test_a_frame_holds_the_newest_sample_of_each_stream_that_is_not_later(tmp_path, robot_file):
    """Stamps in closed form: joints every 10 ms, the pose 3 ms before every 20 ms, until it falls silent at 1 s."""
    messages = [m for m in recorded(2.0) if m[0] != "/cube" or m[2] < 2_000 * MS]
    frames, (end, *_) = frames_of(tmp_path, robot_file, messages, max_age=0.2)
    ms = np.round([1000 * (f.time - 1) for f in frames]).astype(int)
    assert ms.tolist() == list(range(0, 1151, 50))  # the last pose, of 977 ms, is good for 200 ms
    assert (end.reason, end.keep, end.steps) == ("stale /cube", True, len(frames))
    joints = np.array([f.obs["gripper_pos"][0] for f in frames]) / 0.3
    assert np.allclose(joints, ms / 1000, atol=1e-9)
    poses = np.array([f.obs["cube_pose"][0] for f in frames])
    assert np.allclose(poses, np.minimum((ms + 3) // 20 * 20, 980) / 1000, atol=1e-9)
    actions = np.array([f.action for f in frames])
    assert np.allclose(actions[:, 1] / 0.3, (ms + 50) / 1000, atol=0.011)


def test_frames_of_the_next_episode_are_later_than_the_mark_that_ended_the_one_before(
    tmp_path, robot_file
):
    """At 2.0 s, when the newest stamp is of 1.99 s; the action of the last frame was known by then."""
    messages = [*recorded(2.5), ("/done", BOOL, 2_000 * MS, said(True))]
    messages.sort(key=lambda m: m[2])
    frames, ends = frames_of(tmp_path, robot_file, messages, Splitting(end_topic="/done"))
    times = np.array([f.time for f in frames])
    first = ends[0].steps
    assert (ends[0].time, ends[0].success) == (1.99, True)
    assert np.allclose(times[:first], np.arange(1.0, 1.99 - 0.05 + 1e-9, 0.05))
    assert times[first] >= 1.99
    assert np.allclose(np.diff(times[first:]), 0.05)


def test_nothing_from_before_a_jump_of_time_is_in_a_frame_after_it(tmp_path, robot_file):
    """The clock goes back by half a second after 2 s, and the pose is heard of again only 100 ms later."""
    messages = []
    for topic, kind, log, msg in recorded(4.0):
        if topic == "/cube" and 3_000 * MS <= log < 3_100 * MS:
            continue
        if log >= 3_000 * MS and topic != "/command":
            stamp = msg.header.stamp
            back = stamp.sec * 10**9 + stamp.nanosec - 500 * MS
            msg = replace(msg, header=header(back))
        messages.append((topic, kind, log, msg))
    frames, ends = frames_of(tmp_path, robot_file, messages)
    assert ends[0].reason == "stamp goes back"
    after = frames[ends[0].steps :]
    assert len(after) > 20
    assert after[0].time == pytest.approx(2.597)  # of the first pose
    for frame in after:
        joint, cube = frame.obs["gripper_pos"][0] / 0.3, frame.obs["cube_pose"][0] - 0.003
        for seen in (joint, cube):
            assert -1e-9 <= frame.time + 0.5 - (1 + seen) < 0.02


def test_drivers_apart_convert_as_one_does(tmp_path, robot_file):
    """An arm and a hand that publish apart, and wheels on the same topic: the same demonstrations."""
    messages, found = recorded(4.0), []
    for name, said_apart in (("whole", messages), ("apart", apart(messages))):
        (tmp_path / name).mkdir()
        assert run(tmp_path / name, robot_file, said_apart, rate=20.0)["episodes"] == 1
        found.append(demonstrations.load(tmp_path / name / "demos.hdf5").episodes[0])
    whole, parts = found
    assert len(whole.actions) > 70
    assert np.array_equal(parts.actions, whole.actions)
    assert all(np.array_equal(parts.obs[key], whole.obs[key]) for key in whole.obs)


def test_episodes_by_topic_with_success(tmp_path, robot_file):
    messages = recorded(8.0)
    for k, good in enumerate((True, False, True)):
        messages.append(("/done", BOOL, 1_000_000_000 + (2 * k + 2) * 1_000_000_000, said(good)))
    messages.sort(key=lambda m: m[2])
    ends = Splitting(end_topic="/done")
    result = run(tmp_path, robot_file, messages, splitting=ends)
    assert (result["episodes"], result["successes"]) == (3, 2)
    assert result["discarded_episodes"] == {"no message on /done ended it (end of the bag)": 1}
    demos = demonstrations.load(tmp_path / "demos.hdf5")
    assert [e.rewards[-1] for e in demos.episodes] == [1.0, 0.0, 1.0]
    assert all(abs(len(e.actions) - 40) <= 5 for e in demos.episodes)
    config = Config(
        tmp_path / "bag",
        tmp_path / "good.hdf5",
        robot=robot_file,
        splitting=Splitting(end_topic="/done", only_success=True),
    )
    assert convert.main(config)["episodes"] == 2


def test_episodes_by_service_calls(tmp_path, robot_file):
    """Both request events of a call (client and server) begin one episode; types of the events are not needed."""
    messages = recorded(6.0)
    event = "std_msgs/msg/Empty"  # any type: the first byte of a service event is its kind
    for second in (2, 4):
        for kind, later in ((0, 0), (1, 3), (2, 5), (3, 8)):
            data = b"\x00\x01\x00\x00" + bytes([kind]) + bytes(40)
            messages.append(
                ("/reset/_service_event", event, (1 + second) * 10**9 + later * MS, data)
            )
    messages.sort(key=lambda m: m[2])
    result = run(tmp_path, robot_file, messages, splitting=Splitting(start_service="/reset"))
    demos = demonstrations.load(tmp_path / "demos.hdf5")
    assert result["episodes"] == 2
    for episode, begin in zip(demos.episodes, (2.0, 4.0), strict=True):
        assert episode.obs["gripper_pos"][0, 0] == pytest.approx(motion(begin)[1], abs=0.02)


def test_gaps_jumps_and_stale_streams_end_episodes(tmp_path, robot_file):
    messages = [
        m for m in with_camera(9.0) if not (m[0] == "/front" and 3.0 < m[2] / 1e9 - 1 < 4.0)
    ]
    messages = [m for m in messages if not 6.0 < m[2] / 1e9 - 1 < 7.0]
    result = run(tmp_path, robot_file, messages, rate=20.0)
    assert result["episodes"] == 3
    assert result["ended_by"] == {"stale /front": 1, "gap": 1, "end of the bag": 1}
    assert result["stale"] == {"/front": 1}
    assert "stale" in json.dumps(result["problems"])
    for episode in demonstrations.load(tmp_path / "demos.hdf5").episodes:
        steps = np.diff(episode.obs["gripper_pos"][:, 0]) / 0.3
        assert np.allclose(steps, 0.05, atol=0.011)  # no hole within an episode


@pytest.mark.parametrize("lag_ms", [60, 150])
@pytest.mark.parametrize("how", TOLD)
def test_a_stream_that_arrives_late_changes_no_label(tmp_path, robot_file, how, lag_ms):
    """Later than a control step of 50 ms: frames are those of streams in time, but for the end."""
    found, (kind, topic) = [], TOLD[how]
    for name, lag in (("in_time", 0), ("late", lag_ms * MS)):
        (tmp_path / name).mkdir()
        messages = late(told(how), "/cube", lag)
        run(tmp_path / name, robot_file, messages, actions=kind, truth_topic=topic)
        (episode,) = demonstrations.load(tmp_path / name / "demos.hdf5").episodes
        found.append(episode)
    in_time, behind = found
    n = len(behind.actions)
    assert 70 < len(in_time.actions) - 4 <= n <= len(in_time.actions)
    assert np.array_equal(behind.actions, in_time.actions[:n])
    for name, values in behind.obs.items():
        assert np.array_equal(values, in_time.obs[name][:n])
    ahead = (behind.actions[:, 1] - behind.obs["gripper_pos"][:, 0]) / 0.3
    assert np.allclose(ahead, 0.05, atol=0.0141)  # s: to a joint state, and a command


def with_a_hand_apart(messages):
    """The same commands, for arm and hand on a topic each, the hand's 100 ms later."""
    out = []
    for topic, kind, log, msg in messages:
        if topic != "/command":
            out.append((topic, kind, log, msg))
            continue
        for name, column, to, wait in (
            ("a", 1, "/command", 0),
            ("b", 0, "/hand/command", 100 * MS),
        ):
            times = np.array([p.time_from_start.nanosec / 1e9 for p in msg.points])
            if wait:
                t = (log - 4 * MS + wait) / 1e9 - 1
                positions = [[motion(t + d)[1]] for d in times]
            else:
                positions = [[p.positions[column]] for p in msg.points]
            out.append((to, TRAJECTORY, log + wait, trajectory(name, times, positions)))
    return sorted(out, key=lambda m: m[2])


def test_a_hand_with_a_topic_of_its_own_does_not_cut_off_the_arm(tmp_path):
    """Nor the arm the hand: each has a controller, and goes on with what that was told."""
    path = tmp_path / "robot.yaml"
    path.write_text(ROBOT.replace("/command\n", "/command\n  gripper_command: /hand/command\n"))
    result = run(tmp_path, str(path), with_a_hand_apart(recorded(4.0)), rate=20.0)
    (episode,) = demonstrations.load(tmp_path / "demos.hdf5").episodes
    b = episode.obs["gripper_pos"][:, 0]
    due = b / 0.3 + 0.05
    assert len(due) > 60
    later = slice(5, None)  # when the hand was told something as well
    assert np.allclose(episode.actions[later], np.stack(motion(due), axis=1)[later], atol=0.012)
    assert result["problems"] == []


@pytest.mark.parametrize("how", ["trajectory", "array", "joint state", "controller"])
def test_a_command_that_is_no_number_is_refused(tmp_path, robot_file, how):
    """The data set would be one that nobody can read."""
    messages = told(how)
    kind, topic = TOLD[how]
    where = topic or "/command"
    for k, msg in enumerate(m[3] for m in messages if m[0] == where):
        if k % 7 == 3:
            values = msg.points[2].positions if how == "trajectory" else getattr(msg, "data", None)
            values = msg.position if values is None else values
            values[0] = np.inf
    result = run(tmp_path, robot_file, messages, rate=20.0, actions=kind, truth_topic=topic)
    episodes = demonstrations.load(tmp_path / "demos.hdf5").episodes
    assert all(np.isfinite(e.actions).all() for e in episodes)
    assert any("not finite" in str(p) for p in result["problems"])


def test_a_controller_that_falls_silent_ends_the_episode(tmp_path, robot_file):
    """What is never known is waited for no longer than the past is remembered, however long the bag goes on."""
    messages = [m for m in told("controller", 8.0) if m[0] != "/reference" or m[2] < 3e9]
    bag = Bag(write(tmp_path / "bag", messages))
    robot = load_robot(robot_file)
    layout = layout_from_robot(bag, robot, "t", 0.05, None)
    reader, most = FrameReader(bag, layout, robot, Splitting(), "controller", "/reference"), 0
    frames = 0
    for item in reader.read():
        frames += not isinstance(item, End)
        most = max(most, len(reader.waiting))
    assert 35 < frames < 45
    assert most < 45  # 2 s and the tolerated age
    assert reader.facts.without_action > 20
    assert reader.facts.ends == {"no action": 1}


@pytest.mark.parametrize(
    ("until", "reason"), [(3.0, "no action"), (4.0, "no action"), (9.0, "end of the bag")]
)
def test_an_episode_that_lacks_commands_at_its_end_is_not_said_to_end_with_the_bag(
    tmp_path, robot_file, until, reason
):
    """However soon after them the bag ends: less than the time that the past is remembered, too."""
    messages = [
        m for m in told("controller", 4.5) if m[0] != "/reference" or m[2] / 1e9 - 1 < until
    ]
    result = run(
        tmp_path, robot_file, messages, actions="controller", truth_topic="/reference", rate=20.0
    )
    assert result["ended_by"] == {reason: 1}
    missed = max(0.0, 4.5 - until - 0.2) * 20
    assert result["frames_without_action"] == pytest.approx(missed, abs=2)


def queues(tmp_path, robot_file, messages, **splitting) -> tuple[int, list]:
    """The most samples that a stream had waiting, and what was read."""
    bag, robot = Bag(write(tmp_path / "bag", messages)), load_robot(robot_file)
    layout = layout_from_robot(bag, robot, "t", 0.05, None)
    reader, most, items = FrameReader(bag, layout, robot, Splitting(**splitting)), 0, []
    advance = reader._advance

    def watched():
        nonlocal most
        advance()
        most = max(most, *map(len, reader.samples.values()))

    reader._advance = watched
    items = list(reader.read())
    return most, items


@pytest.mark.parametrize("what", ["dies", "late", "idle"])
def test_memory_does_not_grow_while_no_frame_can_be_made(tmp_path, robot_file, what):
    """A stream that died, or is not there yet, or a robot between episodes: the others' pictures would pile up."""
    messages, splitting = with_camera(10.0), {}
    if what == "idle":
        splitting["start_topic"] = "/go"
        messages.append(("/go", BOOL, int(10e9), said(True)))
        messages.sort(key=lambda m: m[2])
    else:
        kept = (lambda ns: ns < 2e9) if what == "dies" else (lambda ns: ns > 10e9)
        messages = [m for m in messages if m[0] != "/cube" or kept(m[2])]
    most, items = queues(tmp_path, robot_file, messages, **splitting)
    # 2.2 s of joint states at 100 Hz, of the ten.
    assert most < 240
    frames = [i for i in items if not isinstance(i, End)]
    assert 15 < len(frames) < 26
    assert frames[0].time == pytest.approx(1.0 if what == "dies" else 10.0, abs=0.03)


def servo(messages, period=0.01, ahead=0.034):
    """Commands as MoveIt Servo sends them: one point, with a velocity, again and again."""
    out = []
    for topic, kind, log, msg in messages:
        out.append((topic, kind, log, msg))
        if topic == "/js":
            t = (log - MS) / 1e9 - 1 + ahead
            velocity = (0.3, 0.5 * np.cos(t))
            point = trajectory("ba", [ahead], [motion(t)[::-1]], [velocity])
            out.append(("/command", TRAJECTORY, log, point))
    return out


def test_commands_that_end_with_a_velocity_are_followed(tmp_path, robot_file):
    result = run(tmp_path, robot_file, servo(recorded(3.0, command=False)))
    (episode,) = demonstrations.load(tmp_path / "demos.hdf5").episodes
    ahead = (episode.actions[:, 1] - episode.obs["gripper_pos"][:, 0]) / 0.3
    assert np.allclose(ahead[5:], 0.05, atol=0.02)
    assert result["problems"] == []


@pytest.mark.parametrize("output", ["demos.hdf5", "lerobot"])
def test_commands_that_the_controller_refused_are_no_labels(tmp_path, robot_file, output):
    messages, k = [], 0
    for topic, kind, log, msg in recorded(3.0):
        if topic == "/command":
            k += 1
            if k > 5:  # of 15
                msg.points[1].time_from_start = msg.points[0].time_from_start
        messages.append((topic, kind, log, msg))
    says = "10 of 15 commands on /command cannot be followed: times are not strictly increasing.*--actions controller"
    with pytest.raises(InputError, match=says):
        run(tmp_path, robot_file, messages, output)
    assert not (tmp_path / output).exists()


def test_pictures_that_change_size_or_break_are_counted(tmp_path, robot_file):
    messages = []
    for topic, kind, log, msg in with_camera(4.0):
        if topic == "/front" and 2.0 < log / 1e9 - 1 < 2.4:
            msg = picture(log - 20 * MS, 48, 64, 99)
        if topic == "/front" and 3.0 < log / 1e9 - 1 < 3.08:
            msg = picture(log - 20 * MS, HEIGHT, WIDTH, 99, "16UC1")
        messages.append((topic, kind, log, msg))
    result = run(tmp_path, robot_file, messages)
    demos = demonstrations.load(tmp_path / "demos.hdf5")
    assert all(e.obs["front_image"].shape[1:] == (HEIGHT, WIDTH, 3) for e in demos.episodes)
    assert "'16UC1' is not one of" in json.dumps(result["problems"])


def test_frozen_cameras_dead_joints_and_jumps_are_found(tmp_path, robot_file):
    layout = DemoLayout(
        "t",
        "toy",
        ("a", "b"),
        0.05,
        (
            ObservationField("x", "joint_position", ("a", "b"), "rad"),
            ObservationField("front_image", "image", (), "", "front", resolution=(8, 8)),
        ),
    )
    rng, episodes = np.random.default_rng(0), []
    for k in range(12):
        actions = np.stack([np.linspace(0, 0.5, 40), np.zeros(40)], axis=1)
        if k == 3:
            actions[20:, 0] += 0.4
        pictures = rng.integers(0, 255, (40, 8, 8, 3), dtype=np.uint8)
        if k == 5:
            pictures[10:30] = 7
        obs = {"x": actions + 0.01, "front_image": pictures}
        episodes.append(Episode(obs, actions, np.zeros(40), np.zeros((40, 0))))
    demonstrations.save(tmp_path / "d.hdf5", Demonstrations(layout, episodes, {}))
    config = Config(tmp_path / "d.hdf5", tmp_path / "out.hdf5", robot=robot_file)
    found = {f["name"]: f["detail"] for f in convert.main(config)["findings"]}
    assert "b is never commanded" in found["dead joint"]
    assert "front_image: 1 stretches" in found["frozen camera"]
    assert "episode 3, step 20" in found["jumps of the action"]
    assert "x: b" in found["constant input"]
    page = (tmp_path / "out.hdf5.health.html").read_text()
    assert "frozen camera" in page


def test_an_episode_that_is_not_kept_leaves_no_trace_in_the_health_page():
    image = ObservationField("front_image", "image", (), "", "front", resolution=(8, 8))
    x = ObservationField("x", "joint_position", ("a",), "rad")
    rng = np.random.default_rng(0)

    def seen(health: Health, moving: bool, keep: bool) -> None:
        for k in range(40):
            pixels = rng.integers(0, 100, (8, 8, 3)) if moving else np.full((8, 8, 3), 255)
            health.frame({"x": np.zeros(1), "front_image": pixels.astype(np.uint8)}, np.ones(1) * k)
        health.end(keep)

    kept, mixed = (Health(DemoLayout("t", "toy", ("a",), 0.05, (x, image))) for _ in range(2))
    seen(kept, True, True)
    rng = np.random.default_rng(0)
    seen(mixed, False, False)
    seen(mixed, True, True)
    seen(mixed, False, False)
    assert mixed.summary() == kept.summary()
    assert mixed.frozen == {"front_image": 0}


@pytest.mark.parametrize("output", ["d.hdf5", "lr"])
def test_what_is_interrupted_leaves_nothing_behind(tmp_path, robot_file, monkeypatch, output):
    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(convert.Health, "end", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, robot_file, with_camera(3.0), output)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bag", "robot.yaml"]


def test_two_cameras_may_share_a_topic(tmp_path):
    (tmp_path / "robot.yaml").write_text(
        ROBOT.replace("front: /front", "front: /front, hand: /front")
    )
    run(tmp_path, str(tmp_path / "robot.yaml"), with_camera(3.0), rate=20.0)
    (episode,) = demonstrations.load(tmp_path / "demos.hdf5").episodes
    assert np.array_equal(episode.obs["front_image"], episode.obs["hand_image"])


def test_bad_input_is_refused_in_one_line(tmp_path, robot_file):
    write(tmp_path / "bag", recorded(3.0, command=False))
    (tmp_path / "text.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    bag, out = tmp_path / "bag", tmp_path / "o.hdf5"
    cases = {
        "does not exist": Config(tmp_path / "none", out),
        "exists already": Config(bag, tmp_path / "text.txt"),
        "is no data set": Config(tmp_path / "empty", out),
        "cannot be read": Config(tmp_path / "text.txt", out),
        "no topic /command": Config(bag, out, robot=robot_file),
        "--robot is needed": Config(bag, out),
        "--rate must be": Config(bag, out, robot=robot_file, rate=-1.0),
        "--resolution must be from 1": Config(bag, out, robot=robot_file, resolution=(8, 0)),
        "to 4096 pixels each way, not 5000 8": Config(
            bag, out, robot=robot_file, resolution=(5000, 8)
        ),
        "--max-age must be": Config(bag, out, robot=robot_file, max_age=np.nan),
        "--min-steps must be": Config(
            bag, out, robot=robot_file, splitting=Splitting(min_steps=-1)
        ),
        "whole number of frames": Config(
            bag, tmp_path / "lr", robot=robot_file, rate=7.3, actions="state"
        ),
    }
    for says, config in cases.items():
        with pytest.raises(InputError, match=says) as error:
            convert.main(config)
        assert "\n" not in str(error.value)
        assert not out.exists()
    with pytest.raises(InputError, match="make demonstrations of it with flow-policy convert"):
        demonstrations.load(bag)
    write(
        tmp_path / "silent", [m for m in recorded(3.0) if m[0] != "/command"] + recorded(3.0)[-2:]
    )


def test_a_task_that_may_be_misspelt_is_asked_about(tmp_path, robot_file, capsys):
    write(tmp_path / "bag", recorded(3.0))
    for name, asked in (("lfit", "did you mean 'lift'?"), ("peel_banana", None)):
        convert.main(Config(tmp_path / "bag", tmp_path / f"{name}.hdf5", name, robot=robot_file))
        said = capsys.readouterr().err
        assert asked in said if asked else "note" not in said
    with pytest.raises(InputError, match=r"for task 'lfit' \(did you mean 'lift'\?\); valid"):
        convert.main(Config(tmp_path / "bag", tmp_path / "o.hdf5", "lfit"))


def test_a_bag_of_a_task_with_options_makes_a_policy_of_that_task(tmp_path):
    """Actions are the next measured state, so that a stream of joints and one of poses is all there is."""
    task, messages = make_task("reach"), []
    names, home = task.world.joint_names, task.observe(task.initial_state(np.random.default_rng(0)))
    values = [*home["joint_pos"], *home["gripper_pos"]]
    for k in range(100):
        ns = 1_000_000_000 + k * 20 * MS
        messages.append(("/goal/pose", POSE, ns, pose(ns, 0.5)))
        messages.append(("/joint_states", JOINTS, ns + MS, joint_state(ns, values, names)))
    bag = write(tmp_path / "bag", messages)
    dense = {"reward": "dense"}
    config = Config(bag, tmp_path / "d.hdf5", "reach", task_options=dense, actions="state")
    convert.main(config)
    assert demonstrations.load(config.output).provenance["task_options"] == dense
    small = NetworkConfig(width=8, depth=1)
    run = train_config.TrainBC(
        "reach", config.output, tmp_path / "run", network=small, bc=BCConfig(1, 8)
    )
    assert checkpoint.load(train.main(run)["checkpoint"]).spec.task_options == dense
    with pytest.raises(SimulationError, match="unknown option of task 'reach' 'rewards'"):
        convert.main(replace(config, output=tmp_path / "o.hdf5", task_options={"rewards": "d"}))
    with pytest.raises(InputError, match="--task-options: 'grasp' is no task here"):
        convert.main(replace(config, output=tmp_path / "o.hdf5", task="grasp"))


# --- pieces ---


@pytest.mark.parametrize("encoding", ["rgb8", "bgr8", "rgba8", "bgra8", "mono8", "8UC3"])
def test_every_eight_bit_encoding_becomes_rgb(encoding):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (6, 10, 3), dtype=np.uint8)
    if encoding == "mono8":
        data, expected = pixels[..., :1], np.repeat(pixels[..., :1], 3, axis=2)
    else:
        data, expected = pixels[..., ::-1] if "bgr" in encoding else pixels, pixels
        if "a" in encoding:
            data = np.concatenate([data, np.full((6, 10, 1), 255, np.uint8)], axis=2)
    step = data.shape[1] * data.shape[2]
    msg = TYPES[IMAGE](header(0), 6, 10, encoding, 0, step, np.ascontiguousarray(data).ravel())
    assert np.array_equal(rgb(msg), expected)


def test_pictures_are_brought_to_the_size_of_the_policy_by_area():
    field = ObservationField("i", "image", (), "", "front", resolution=(4, 6))
    pixels = np.zeros((8, 12, 3), np.uint8)
    pixels[:, 6:] = 200
    msg = TYPES[IMAGE](header(0), 8, 12, "rgb8", 0, 36, pixels.ravel())
    small = decode(field, msg)
    assert small.shape == (4, 6, 3)
    assert (small[:, :3] == 0).all()
    assert (small[:, 3:] == 200).all()


@pytest.mark.parametrize("data", [b"", b"\xff\xd8\xff", b"hello" * 20])
def test_unreadable_pictures_say_so(data):
    msg = TYPES[COMPRESSED](header(0), "jpeg", np.frombuffer(data, np.uint8))
    with pytest.raises(DecodeError, match="compressed image"):
        compressed_image(msg)


def test_poses_have_their_stamp_where_the_reader_looks(tmp_path):
    """`header_stamp` reads bytes; the decoder agrees."""
    from flow_policy_rl.data.bags import Message
    from flow_policy_rl.offline.raw_messages import header_stamp

    for msg, kind in (
        (pose(1_234_567_891, 1.0), "geometry_msgs/msg/PoseStamped"),
        (picture(7, 2, 2), IMAGE),
    ):
        data = bytes(TYPESTORE.serialize_cdr(msg, kind))
        expected = msg.header.stamp.sec * 10**9 + msg.header.stamp.nanosec
        assert header_stamp(Message("/x", kind, 5, data)) == expected

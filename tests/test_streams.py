"""When an observation is there, and of what: streams of plain objects shaped like messages."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from message_toys import MS, joint_state, pose
from toys import small_spec

from flow_policy_rl.errors import InputError
from flow_policy_rl.serving.monitor import SETTLED, TELLING_FALLS, Arrivals, SaidTwice
from flow_policy_rl.serving.robot import Topics
from flow_policy_rl.serving.streams import NotReady, Streams, topics_of


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
    # As of the pose, which is older.
    assert streams.snapshot(20 * MS).obs["joint_pos"].tolist() == [0] * 3


@pytest.mark.parametrize("names", [["a", "b", "c", "a"], ["a", "a"]])
def test_a_joint_that_a_message_has_twice_is_not_guessed(streams, names):
    """Of others it does not matter."""
    streams.push("/cube", 0, pose(UP))
    streams.push("/joints", 0, joint_state([*ABC, "wheel", "wheel"], [0] * 5))
    assert streams.snapshot(0).obs["joint_pos"].tolist() == [0] * 3
    streams.push("/joints", 0, joint_state(names, range(len(names))))
    with pytest.raises(NotReady, match="/joints: joint state has a more than once"):
        streams.snapshot(0)


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


def test_a_publisher_that_is_started_again_now_and_then_stays_one():
    found = SaidTwice()
    for _ in range(2 * TELLING_FALLS):
        for k in range(SETTLED + 1):
            found.count(["a"], k)
    assert found.names == []

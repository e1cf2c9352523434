"""A soft start goes the same way more slowly: nothing is cut off, and what the policy is told is what is commanded."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toys import small_spec

from flow_policy_rl.serving.chunk_scheduler import ChunkScheduler
from flow_policy_rl.serving.commander import Commander
from flow_policy_rl.serving.pace import REAL_TIME, SLOWEST, Pace
from flow_policy_rl.serving.robot import JointLimits, Robot, Topics
from flow_policy_rl.serving.safety import SafetyFilter

MS = 1_000_000
BEGAN = 1_700_000_000_000 * MS
STEP = 50 * MS


def progress(pace: Pace, times: np.ndarray) -> np.ndarray:
    return np.array([pace.progress(int(t)) for t in times])


@given(soft=st.sampled_from([0.05, 0.5, 3.0]), ms=st.lists(st.integers(-500, 6000), min_size=1))
def test_the_policys_time_is_the_integral_of_its_share_and_back_again(soft, ms):
    pace, times = Pace(BEGAN, soft), BEGAN + np.array(ms) * MS
    there = progress(pace, times)
    assert np.abs(pace.when(there) - times).max() <= 20  # ns
    assert (there <= times).all()
    within = times[times >= BEGAN]
    speed = (progress(pace, within + 1000) - progress(pace, within)) / 1000
    assert speed == pytest.approx(pace.share(within), abs=2e-3)
    late = times[times >= BEGAN + soft * 1e9]
    assert np.allclose(late - progress(pace, late), soft * (1 - SLOWEST) / 2 * 1e9, atol=2)
    before = times[times <= BEGAN]
    assert (progress(pace, before) == before).all()
    assert (pace.when(before) == before).all()


def test_without_a_soft_start_time_is_real_time():
    times = BEGAN + np.arange(5) * STEP
    for pace in (REAL_TIME, Pace(BEGAN, 0.0)):
        assert (progress(pace, times) == times).all()
        assert (pace.when(times) == times).all()
        assert (pace.share(times) == 1).all()
        assert pace.full(BEGAN)
        assert (pace.due(BEGAN, np.array([STEP])) == BEGAN + STEP).all()


def commander(soft_start_s: float, joining: str, **spec) -> Commander:
    """Two quick joints."""
    spec = small_spec(joint_names=("a", "b"), control_dt=0.05, **spec)
    limits = JointLimits((-9, 9), 3.0, 60.0, 10_000.0)
    robot = Robot("toy", {"a": limits, "b": limits}, {}, Topics("/j", "/c"))
    safety = SafetyFilter(robot, spec.joint_names, 0.05, max_start_distance=99)
    return Commander(ChunkScheduler(spec, joining=joining), safety, soft_start_s=soft_start_s)


def path(t: np.ndarray) -> np.ndarray:
    """Where the policy wants to be at times (n,) s of its own, (n, 2)."""
    return np.stack([1 - np.cos(2 * t), 0.5 * np.sin(2 * t) - t], axis=1)


@pytest.mark.parametrize("joining", ["replace", "crossfade", "ensemble", "sync"])
def test_a_soft_start_goes_the_same_way_more_slowly(joining):
    """A policy that knows how far the robot has come: its chunks, joined, are passed through point by point."""
    horizon = 8
    one = commander(0.5, joining, action_horizon=horizon, execute_horizon=4)
    fast = commander(0.0, joining, action_horizon=horizon, execute_horizon=4)
    ahead = 0.05 * np.arange(1, horizon + 1)
    chunk = path(ahead)
    slow, quick = (c.accept(chunk, BEGAN, BEGAN, np.zeros(2)) for c in (one, fast))
    assert slow.checked.largest_change < 1e-9
    assert np.allclose(slow.targets.positions, quick.targets.positions)
    pace = Pace(BEGAN, 0.5)
    assert np.abs(progress(pace, slow.targets.due) - quick.targets.due).max() <= 20
    speed = np.abs(slow.plan.spline.velocities[1 : len(slow.targets.due) + 1])
    assert (speed <= 3.0 * pace.share(slow.targets.due)[:, None] + 1e-9).all()
    # The next chunk, begun from where the robot is by then, continues where it should.
    now = BEGAN + 400 * MS
    done = (pace.progress(now) - BEGAN) / 1e9
    following = one.accept(path(done + ahead), now, now, np.zeros(2))
    if joining == "sync":
        return
    assert following.checked.largest_change < 2e-2
    passed = (progress(pace, following.targets.due) - BEGAN) / 1e9
    tolerance = 1e-3 if joining == "replace" else 0.01  # the others interpolate
    assert np.allclose(following.targets.positions, path(passed), atol=tolerance)


@pytest.mark.parametrize(("joining", "apart"), [("replace", 4), ("crossfade", 4), ("ensemble", 1)])
def test_in_a_soft_start_the_policy_looks_where_it_looks_without(joining, apart):
    """After as many actions of a chunk: other places on the way are places where it never began a chunk in training."""
    looks = {}
    for soft in (0.0, 0.5):
        one = commander(soft, joining, action_horizon=8, execute_horizon=4)
        looks[soft] = []
        for now in range(BEGAN, BEGAN + 1500 * MS, MS):
            if not one.due(now):
                continue
            one.scheduler.started(now)
            done = (Pace(BEGAN, soft).progress(now) - BEGAN) / 1e9
            one.accept(path(done + 0.05 * np.arange(1, 9)), now, now, np.zeros(2))
            looks[soft].append(one.plan.at(now).position)
    num = len(looks[0.5])
    assert num >= 1200 // (50 * apart)
    assert np.allclose(looks[0.5], looks[0.0][:num], atol=0.01)


def test_the_prefix_of_a_soft_start_is_what_is_commanded():
    one = commander(0.5, "rtc", action_horizon=12, execute_horizon=6, prefix_horizon=4)
    ahead = 0.05 * np.arange(1, 13)
    plan = one.accept(path(ahead), BEGAN, BEGAN, np.zeros(2)).plan
    for _ in range(3):  # slow inferences: a long prefix
        one.scheduler._delays.append(4 * STEP)
    now = BEGAN + 300 * MS
    inputs = one.prefix_inputs(now)
    assert inputs["inference_delay"] == [4]
    pace = Pace(BEGAN, 0.5)
    due = pace.due(now, STEP * np.arange(1, 5))
    assert (np.diff(due) > STEP).any()
    commanded = np.array([plan.at(int(t)).position for t in due])
    assert np.allclose(inputs["prefix"][0], commanded, atol=5e-3)
    done = (pace.progress(now) - BEGAN) / 1e9
    assert np.allclose(inputs["prefix"][0], path(done + ahead[:4]), atol=2e-3)


def test_a_mad_chunk_is_kept_to_the_share_of_the_velocity_limits():
    one = commander(0.5, "replace", action_horizon=12, execute_horizon=6)
    plan = one.accept(np.full((12, 2), 8.0), BEGAN, BEGAN, np.zeros(2)).plan
    times = np.arange(1, 100) * 5 * MS
    for t in times:
        share = Pace(BEGAN, 0.5).share(np.array([BEGAN + t]))[0]
        assert (np.abs(plan.at(BEGAN + int(t)).velocity) <= 3.0 * share + 1e-6).all()

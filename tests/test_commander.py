"""What is in force from chunk to chunk: when a plan changes, what a run begins with, what is left of one that is over;
and of the scheduler what only a sequence of calls shows."""

import numpy as np
import pytest
from commander_toys import HERE, MS, START, STEP, chunk, make_commander
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import small_spec

from flow_policy_rl.serving.chunk_scheduler import METHODS, ChunkScheduler
from flow_policy_rl.serving.pace import Pace
from flow_policy_rl.serving.safety import EmergencyStop, Rejected
from flow_policy_rl.serving.trajectory_controller import TrajectoryController


def same(one, other) -> bool:
    """Whether two outcomes are the same plan from the same targets."""
    curves = zip(
        (one.plan.start, *vars(one.plan.spline).values(), one.targets.due, one.targets.positions),
        (
            other.plan.start,
            *vars(other.plan.spline).values(),
            other.targets.due,
            other.targets.positions,
        ),
        strict=True,
    )
    return all(np.array_equal(a, b) for a, b in curves if a is not None)


@settings(max_examples=40)
@given(
    waits=st.lists(st.integers(1, 400), min_size=1, max_size=5),
    joining=st.sampled_from(METHODS),
    seed=st.integers(0, 2**31),
)
def test_a_new_plan_is_the_old_one_until_lead_from_now_and_has_no_short_segment(
    waits, joining, seed
):
    """Position, velocity and acceleration; where a knot of the old plan is nearer than a millisecond, until there.

    Where the old plan is at rest the new one begins at once, and a stop changes nothing. At a knot, where acceleration
    jumps, it may be either side's: times are rounded to ns.
    """
    rng, one, now = np.random.default_rng(seed), make_commander(joining), START
    lead = one.scheduler.min_lead
    old = one.accept(chunk(rng.uniform(-1, 1)), now, now, HERE).plan
    for wait in waits:
        now += wait * MS
        if (
            rng.random() < 0.5
        ):  # so that the change falls on a knot of the old plan, or just beside it
            ahead = old.start + np.rint(old.spline.times * 1e9).astype(int) - lead
            ahead = ahead[ahead > now]
            now = int(rng.choice([*ahead, now])) + int(rng.choice([0, 1, rng.integers(-MS, MS)]))
        stops = rng.random() < 0.2
        one.prefix_inputs(now)
        rests = old.settled(now)
        if stops and rests:
            assert one.stop(now) is None
            assert one.plan is old
            continue
        new = one.stop(now) if stops else one.accept(chunk(rng.uniform(-1, 1)), now, now, HERE).plan
        if rests:  # at the nanosecond of its end: but for rounding
            here = new.at(now)
            assert np.allclose(here.position, old.spline.positions[-1], rtol=0, atol=1e-12)
            assert np.abs(here.velocity).max() < 1e-12
            old = new
            continue
        knots = old.start + old.spline.times * 1e9
        for t in np.linspace(now + 1, now + lead - MS, 20).astype(int).tolist():
            before, after = old.at(t), new.at(t)
            assert np.allclose(after.position, before.position, atol=1e-9)
            assert np.allclose(after.velocity, before.velocity, atol=1e-7)
            at_a_knot = np.abs(knots - t).min() < 3
            assert at_a_knot or np.allclose(after.acceleration, before.acceleration, atol=1e-4)
        times = new.start + new.spline.times * 1e9
        times = times[(times > now + lead - MS - 1) & (times < now + lead + 2 * STEP)]
        assert (np.diff(times) > 0.99 * MS).all()
        assert np.array_equal(new.spline.velocities[-1], np.zeros(3))
        old = new


@pytest.mark.parametrize("control_dt", [0.001, 0.002, 0.004, 0.005])
@pytest.mark.parametrize("joining", ["replace", "sync"])
def test_times_of_a_plan_rise_however_short_a_control_step_is(control_dt, joining):
    """Even where a knot of the old plan, which a new one may continue from, comes after the first target."""
    for after_us in range(0, 6000, 130):
        one = make_commander(joining, lead_s=0.001, control_dt=control_dt)
        one.accept(chunk(0.1), START, START, HERE)
        now = START + after_us * 1000
        times = one.accept(chunk(0.1), now, now, HERE).plan.points(now)[0]
        assert (np.diff(times) > 0.09 * control_dt).all()


@pytest.mark.parametrize(("after_ms", "moves"), [(150, True), (700, False), (-1, False)])
def test_a_run_that_begins_anew_continues_only_what_the_robot_may_still_follow(after_ms, moves):
    """It lags behind: from where it is seen, the plan would begin with a jump. Before the plan there is none."""
    one = make_commander()
    old = one.accept(chunk(0.5), START, START, HERE).plan
    if after_ms == 150:
        one.stop(START + 60 * MS)
        old = one.plan
    now = START + after_ms * MS
    one.begin_anew(now)
    behind = HERE - 0.02
    new = one.accept(chunk(0.5), now, now, behind).plan
    assert np.array_equal(new.at(now).position, old.at(now).position if moves else behind)
    one.begin_anew(now)
    assert (one.plan is not None) or not moves


@pytest.mark.parametrize("max_tracking_error", [0.0, 0.1])
def test_a_run_that_begins_anew_begins_where_the_arm_is_if_it_was_moved(max_tracking_error):
    """As by a reset of the simulation while it still stops: then it does not lag, and does not fail to follow."""
    one = make_commander(max_tracking_error=max_tracking_error)
    one.accept(chunk(0.5), START, START, HERE)
    one.stop(START + 60 * MS)
    now = START + 90 * MS
    assert not one.plan.settled(now)
    one.begin_anew(now)
    elsewhere = HERE - 0.3
    one.check_following(now, elsewhere)
    new = one.accept(chunk(-0.3), now, now, elsewhere).plan
    assert np.array_equal(new.at(now).position, elsewhere)


@pytest.mark.parametrize("after", [0, 1000, 400_000, 999_000])
def test_without_lead_a_plan_changes_at_once_and_never_in_the_past(after):
    one = make_commander(lead_s=0.0)
    old = one.accept(chunk(0.5), START, START, HERE).plan
    now = START + 2 * STEP + after  # ns after a knot
    here = old.at(now)
    new = one.accept(chunk(-0.5), now, now, HERE).plan
    assert np.allclose(new.at(now).position, here.position, atol=1e-9)
    assert new.start == now


def test_a_plan_is_settled_at_its_end_and_not_before():
    plan = make_commander().accept(chunk(0.5), START, START, HERE).plan
    end = START + round(plan.spline.end * 1e9)
    assert not plan.settled(end - 1000)
    assert plan.settled(end + 1)
    assert plan.settled(end + STEP)


@pytest.mark.parametrize("late", [0, 1, 10_000])
def test_the_message_of_a_plan_that_is_over_holds_its_end(late):
    plan = make_commander().accept(chunk(0.5), START, START, HERE).plan
    now = START + round(plan.spline.end * 1e9) + late * MS
    times, positions, velocities = plan.points(now)
    controller = TrajectoryController(("a", "b", "g"), np.zeros(3))
    controller.accept(("a", "b", "g"), times, positions, velocities, now / 1e9)  # it is legal
    assert np.array_equal(positions, plan.spline.positions[-1:])
    assert not velocities.any()
    assert 0 < times[0] < 0.01


@pytest.mark.parametrize("joining", METHODS)
@pytest.mark.parametrize("end", ["forget", "stop", "stay"])
def test_after_the_end_of_a_run_the_next_begins_like_the_first(end, joining):
    """Soft start, the distance of its first target, targets that know nothing of the chunks before; even where the
    clock went back."""
    one = make_commander(joining, soft_start_s=0.5)
    for k in range(3):
        now = START + k * 200 * MS
        one.prefix_inputs(now)
        last = one.accept(chunk(0.3), now, now, HERE).plan
    now += 130 * MS if end == "stop" else -20_000 * MS
    getattr(one, end)(*[] if end == "forget" else [now])
    if end == "forget":
        assert one.plan is None
        assert one.stop(now) is None
    if end == "stay":
        assert np.array_equal(one.plan.at(now + STEP).position, last.spline.positions[-1])
    other = make_commander(joining, soft_start_s=0.5)
    other.plan = one.plan
    there = one.plan.at(now).position if one.plan else HERE
    assert one.scheduler.due(now)
    one.scheduler._delays.clear()  # known delays stay
    for k in range(3):
        now += 60 * MS
        told, expected = one.prefix_inputs(now), other.prefix_inputs(now)
        assert all(np.array_equal(told[name], expected[name]) for name in expected)
        targets = there + chunk(0.2 + 0.1 * k)
        late = now + 7 * MS
        assert same(one.accept(targets, now, late, there), other.accept(targets, now, late, there))
    getattr(one, end)(*[] if end == "forget" else [late])
    with pytest.raises(Rejected, match="away from where it is"):
        one.accept(there + chunk(9.0), late, late, there)


def test_a_chunk_that_is_refused_changes_nothing():
    one = make_commander(soft_start_s=0.5)
    with pytest.raises(Rejected, match="away from where it is"):
        one.accept(np.full((6, 3), 2.0), START, START, HERE)
    assert one.plan is None
    now = START + 1000 * MS  # the soft start begins with the first plan, not with the first try
    one.scheduler.reset()
    fresh = make_commander(soft_start_s=0.5).accept(chunk(0.3), now, now, HERE)
    outcome = one.accept(chunk(0.3), now, now, HERE)
    assert same(outcome, fresh)
    bad = np.where(np.arange(3) == 1, np.nan, chunk(0.3))
    for refused, says in (
        (lambda t: one.accept(chunk(0.3), t - 1000 * MS, t, HERE), "late"),
        (lambda t: one.accept(bad, t, t, HERE), "not a finite target for b$"),
    ):
        with pytest.raises(Rejected, match=says):
            refused(now + 100 * MS)
        assert one.plan is outcome.plan
    # What was in force goes on: a number that is none has not spoilt what the next chunk is joined with.
    after = one.accept(chunk(0.3), now + 100 * MS, now + 100 * MS, HERE)
    assert np.isfinite(after.targets.seam_jump).all()


def test_only_the_first_target_of_a_run_must_be_near_where_the_robot_is():
    one = make_commander()
    one.accept(chunk(0.3), START, START, HERE)
    now = START + 100 * MS
    one.accept(np.full((6, 3), 2.0), now, now, HERE)


def test_plans_that_are_limited_too_often_stop_the_run_until_a_reset():
    one = make_commander(emergency=EmergencyStop(3))
    one.accept(chunk(0.1), START, START, HERE)
    for k in range(1, 4):
        assert not one.emergency.tripped
        now = START + k * 100 * MS
        one.accept(np.full((6, 3), 2.9), now, now, HERE)
    assert one.emergency.tripped
    with pytest.raises(Rejected, match="emergency stop: 3 plans in a row"):
        one.accept(chunk(0.1), now + 100 * MS, now + 100 * MS, HERE)
    one.emergency.reset()
    one.accept(chunk(0.1), now + 200 * MS, now + 200 * MS, HERE)


OFF_S = 0.15  # how long ago an arm may have been sent where it is


@pytest.mark.parametrize("side", [1.0, -1.0])
def test_an_arm_that_does_not_follow_is_noticed_on_either_side_and_a_gripper_is_not(side):
    one = make_commander(max_tracking_error=0.1)
    one.check_following(START, HERE + 9.0)  # nothing is commanded yet
    plan = one.accept(chunk(side * 0.5), START, START, HERE).plan
    now = START + 250 * MS
    there, before = plan.at(now).position, plan.at(now - round(OFF_S * 1e9)).position
    assert abs(there[0] - before[0]) > 0.1
    off = lambda joint, by: side * by * (np.arange(3) == joint)  # noqa: E731
    one.check_following(now, there + off(1, 0.099))
    one.check_following(now, before - off(1, 0.099))  # it lags
    one.check_following(now, there + off(2, 2.0))
    for where, by in ((there, 0.101), (before, -0.101)):
        with pytest.raises(
            Rejected, match=r"^b is 0\.101 from where it was commanded to be, limit 0\.100"
        ):
            one.check_following(now, where + off(1, by))
    with pytest.raises(Rejected, match="^a is"):
        one.check_following(now, there + off(0, 0.3) + off(1, 0.2))
    one.max_tracking_error = 0.0  # not asked for
    one.check_following(now, there + off(0, 2.0))


def test_where_the_arm_was_when_a_slow_inference_began_is_remembered():
    """Plans come and go while it runs."""
    one = make_commander("ensemble", max_tracking_error=0.01)
    first = one.accept(chunk(1.0), START, START, HERE).plan
    seen = [(t, first.at(t).position) for t in range(START, START + 50 * MS, 10 * MS)]
    for k in range(1, 12):
        now = START + k * STEP
        plan = one.accept(one.plan.at(now).position + chunk(1.0), now, now, HERE).plan
        seen += [(t, plan.at(t).position) for t in range(now, now + STEP, 10 * MS)]
        for t, position in seen:
            assert np.allclose(one.plan.at(t).position, position, atol=1e-9)
            one.check_following(t, position)


@pytest.mark.parametrize("end", ["leave", "stop"])
def test_a_run_begins_where_the_arm_is_if_it_was_moved_since_the_last_one(end):
    """By hand, or by a controller that was started again. The gripper stays as it was sent: it may hold something."""
    one = make_commander(max_tracking_error=0.1)
    one.accept(chunk(0.5), START, START, HERE)
    now = START + 130 * MS
    getattr(one, end)(*[now] if end == "stop" else [])
    sent = one.plan.spline.positions[-1]
    now = one.plan.start + round(one.plan.spline.end * 1e9) + 2000 * MS
    moved = sent + [0.3, -0.2, 0.1]
    one.check_following(now, moved)
    with pytest.raises(Rejected, match="away from where it is"):  # what is refused changes nothing
        one.accept(np.full((6, 3), 2.9), now, now, moved)
    assert np.array_equal(one.plan.at(now).position, sent)
    one.leave()
    late = now + 20 * MS
    plan = one.accept(moved + chunk(0.3), now, late, moved).plan
    assert np.allclose(plan.at(late).position, [*moved[:2], sent[2]])
    assert not plan.at(late).velocity.any()
    times, _, _ = plan.points(late)
    assert times[0] > 0.04  # nothing is asked of the controller before the first target


def test_an_arm_that_is_nearly_where_it_was_sent_goes_on_from_there():
    """An arm sags under its weight; run after run must not take it further down."""
    one = make_commander(max_tracking_error=0.1)
    one.accept(chunk(0.5), START, START, HERE)
    sent = one.stop(START + 130 * MS).spline.positions[-1]
    now = START + 2000 * MS
    plan = one.accept(sent + chunk(0.3), now, now, sent - 0.09).plan
    assert np.array_equal(plan.at(now).position, sent)


def test_an_arm_that_went_astray_is_told_nothing_until_it_is_where_it_was_sent():
    one = make_commander(max_tracking_error=0.1)
    plan = one.accept(chunk(0.5), START, START, HERE).plan
    now = START + 130 * MS
    away = plan.at(now).position + 0.5
    with pytest.raises(Rejected, match="from where it was commanded to be"):
        one.check_following(now, away)
    assert one.stop(now) is None
    assert one.plan is plan  # what the controller has comes to rest by itself
    with pytest.raises(Rejected):
        one.check_following(now, plan.at(now).position)  # on its way it may pass where it should be
    later = START + 2000 * MS
    with pytest.raises(Rejected, match="Deactivate and activate"):
        one.check_following(later, away)
    one.check_following(later, plan.spline.positions[-1])
    one.check_following(later, away)  # moved by hand since
    with pytest.raises(Rejected):
        one.accept(chunk(0.3), later, later, away + 9.0)
    one.accept(away + chunk(0.3), later, later, away)
    with pytest.raises(Rejected):
        one.check_following(later + 300 * MS, away - 0.5)
    one.forget()
    one.check_following(later + 300 * MS, away - 0.5)


# --- the scheduler, where only a sequence of calls shows it ---


def test_the_delay_that_a_prefix_covers_is_the_longest_of_late_with_the_lead():
    one = make_commander("rtc")
    scheduler = one.scheduler
    now = START
    for ms, steps in ((10, 1), (39, 1), (41, 2), (20, 2), (500, 2)):  # a lead of 10 ms comes on top
        scheduler.join(chunk(0.1), now, now + ms * MS)
        assert scheduler.delay_steps == steps
        now += 100 * MS
    for _ in range(20):
        scheduler.join(chunk(0.1), now, now + 5 * MS)
        now += 100 * MS
    assert scheduler.delay_steps == 1


def test_a_prefix_is_what_was_in_force_at_its_time_and_no_more_than_there_is():
    scheduler = make_commander("rtc").scheduler
    scheduler.join(np.repeat(np.arange(1.0, 7)[:, None], 3, axis=1), START, START + 60 * MS)
    # The run began at 60 ms: its last action is due at 360 ms.
    scheduler._delays.append(100 * MS)
    for ms, delay, first in (
        (60, 2, 1.0),
        (110, 2, 2.0),
        (260, 2, 5.0),
        (285, 2, 5.5),
        (286, 1, 5.52),
        (336, 0, 6.0),
    ):
        prefix = scheduler.prefix(START + ms * MS)
        assert prefix.delay == delay, ms
        assert prefix.actions[0, 0] == pytest.approx(first)
    # What is over is remembered: the policy may look from an older observation.
    scheduler.join(np.full((6, 3), 9.0), START + 250 * MS, START + 260 * MS)
    assert scheduler.prefix(START + 60 * MS).actions[:, 0] == pytest.approx([1.0, 2.0])


@pytest.mark.parametrize("joining", [m for m in METHODS if m != "rtc"])
def test_without_rtc_a_policy_is_told_no_prefix(joining):
    spec = small_spec(prefix_horizon=2)
    scheduler = ChunkScheduler(spec, joining=joining)
    scheduler.join(np.ones((6, 2)), START, START)
    prefix = scheduler.prefix(START + 100 * MS)
    assert prefix.delay == 0
    assert not prefix.actions.any()


@given(waits=st.lists(st.integers(0, 280), min_size=1, max_size=6), seed=st.integers(0, 2**31))
def test_in_force_are_the_newest_targets_and_the_older_ones_up_to_half_a_step_before(waits, seed):
    rng, now = np.random.default_rng(seed), START
    scheduler = make_commander("rtc").scheduler
    due, positions = np.zeros(0), np.zeros((0, 3))
    for wait in (0, *waits):
        now += wait * MS
        targets = scheduler.join(rng.normal(size=(6, 3)), now, now)
        kept = due < targets.due[0] - STEP / 2
        due = np.concatenate([due[kept], targets.due])
        positions = np.concatenate([positions[kept], targets.positions])
        for stamp in range(now - 3 * STEP, now + 6 * STEP, 10 * MS):
            moments = stamp + STEP * np.arange(1, 3)
            expected = [np.interp(moments - START, due - START, p) for p in positions.T]
            assert np.allclose(scheduler.prefix(stamp).actions.T, expected, atol=1e-9)


def test_sync_looks_again_only_after_what_it_was_told_last():
    scheduler = make_commander("sync").scheduler
    for begin in (START, START + 1000 * MS):
        assert scheduler.due(begin)
        scheduler.started(begin)
        assert not scheduler.due(begin + 10_000 * MS)  # while the inference runs
        scheduler.join(chunk(0.1), begin, begin + 100 * MS)
        assert not scheduler.due(begin + 299 * MS)
        assert scheduler.due(begin + 300 * MS)


def test_a_chunk_after_a_pause_meets_nothing():
    """A seam is where chunks meet: not after the robot has stood for longer than a step and a half."""
    for pause, meets in ((70, True), (80, False)):
        scheduler = make_commander().scheduler
        scheduler.join(chunk(0.3), START, START)
        later = START + 300 * MS + (pause - 50) * MS
        assert (scheduler.join(chunk(0.2), later, later).seam_jump is not None) == meets


@given(offset=st.floats(0.0, 1.0), seed=st.integers(0, 2**31))
def test_an_ensemble_weighs_every_prediction_of_a_moment_by_its_age(offset, seed):
    """Chunks at any time, not at whole steps: linear between actions, the last of a chunk holds for half a step."""
    rng = np.random.default_rng(seed)
    scheduler = make_commander("ensemble").scheduler
    now, known = START, []
    for _ in range(9):
        values = rng.normal(size=(6, 3))
        known.append((now, values))
        # A run begins when its first chunk is there, however long that took.
        joined = scheduler.join(values, now if known[1:] else now - 100 * MS, now)
        for due, found in zip(joined.due, joined.positions, strict=True):
            total, weights = np.zeros(3), 0.0
            for m, (stamp, predicted) in enumerate(known):
                row = (due - stamp) / STEP - 1
                if row > 5.5:
                    continue
                weight = np.exp(-0.01 * m)
                total += weight * np.array([np.interp(row, np.arange(6), p) for p in predicted.T])
                weights += weight
            assert np.allclose(found, total / weights, atol=1e-9)
        now += int((0.3 + offset) * STEP)
    assert len(scheduler._chunks) < 9 or offset < 0.6  # what is over is forgotten


def test_an_ensemble_in_a_soft_start_counts_steps_of_the_policys_time():
    scheduler, pace = make_commander("ensemble").scheduler, Pace(START, 0.5)
    scheduler.join(np.zeros((6, 3)), START, START, pace)
    now = START + 200 * MS  # little more than one step of the policy's
    assert 1 < (pace.progress(now) - START) / STEP < 1.5
    joined = scheduler.join(np.ones((6, 3)), now, now, pace)
    assert (joined.positions[:5] < 0.5).all()
    assert (joined.positions[5] == 1).all()

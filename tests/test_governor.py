"""The governor in closed form: how a stop goes, when a step is one too far, how soon a far target is reached."""

import numpy as np
import pytest

from flow_policy_rl.serving.governor import Bounds, JointGroup, Motion, _ramp_share, course
from flow_policy_rl.serving.spline import derivatives

DT = 0.05


def make_group(acceleration, jerk=1e6, speed=10.0, dt=DT) -> JointGroup:
    """Joints with these limits; by default jerk does not bind."""
    acceleration = np.atleast_1d(np.asarray(acceleration, float))
    full = lambda value: np.broadcast_to(np.asarray(value, float), acceleration.shape)  # noqa: E731
    limits = {"velocity": full(speed), "acceleration": acceleration, "jerk": full(jerk)}
    return JointGroup(np.arange(len(acceleration)), limits, dt)


def make_bounds(size: int = 1, reach: float = 100.0, speed: float = 10.0) -> Bounds:
    return Bounds(np.full(size, -reach), np.full(size, reach), np.full(size, speed))


def knots(way) -> tuple[np.ndarray, np.ndarray]:
    """Positions and velocities (n, A)."""
    return np.array(way[0]), np.array(way[1])


def test_a_ramp_of_m_steps_covers_m_times_m_plus_1_over_2():
    for m in range(1, 40):
        here, there = m * (m + 1) / 2, (m + 1) * (m + 2) / 2
        assert _ramp_share(here) * here == pytest.approx(m, rel=1e-12)
        for part in (0.1, 0.5, 0.9):  # linear between
            between = here + part * (there - here)
            assert _ramp_share(between) * between == pytest.approx(m + part, rel=1e-12)
    assert [_ramp_share(d) for d in (0.0, 1e-12, 0.3, 1.0)] == [1.0] * 4


@pytest.mark.parametrize("seed", range(20))
def test_a_stop_without_jerk_is_a_straight_ramp_of_the_slowest_joint(seed):
    rng = np.random.default_rng(seed)
    strength, v, q = rng.uniform(0.5, 20, 3), rng.uniform(-2, 2, 3), rng.uniform(-1, 1, 3)
    positions, velocities = knots(make_group(strength).stop(Motion(q, v, np.zeros(3))))
    seconds = (np.abs(v) / strength).max()
    k = np.arange(1, len(positions) + 1)
    assert len(positions) == max(1, np.ceil(seconds / DT - 1e-9))
    left = np.maximum(0, 1 - k * DT / max(seconds, DT))[:, None]
    assert np.allclose(velocities, left * v, atol=1e-9)
    means = (np.vstack([v, velocities[:-1]]) + velocities) / 2
    assert np.allclose(positions, q + np.cumsum(means * DT, axis=0), atol=1e-9)


def test_what_stands_still_needs_no_stop():
    still = make_group([1.0, 2.0]).stop(Motion.at_rest(np.array([0.3, -0.2])))
    assert [len(part) for part in still] == [0, 0]
    crawls = Motion(np.zeros(2), np.array([0.0, -1e-8]), np.zeros(2))
    assert len(make_group([1.0, 2.0]).stop(crawls)[0]) == 1


@pytest.mark.parametrize("seed", range(30))
def test_a_stop_with_jerk_keeps_its_limits_and_is_nearly_the_quickest(seed):
    rng = np.random.default_rng(seed)
    strength, speed = rng.uniform(2, 20), rng.uniform(0.5, 3)
    jerk, v = rng.uniform(0.05, 1.9) * strength / DT, rng.choice([-1, 1]) * rng.uniform(0.1, speed)
    group = make_group(strength, jerk, speed)
    assert group.jerk_binds
    assert not make_group(strength, 2.01 * strength / DT).jerk_binds
    _, velocities = knots(group.stop(Motion(np.zeros(1), np.array([v]), np.zeros(1))))
    way = np.concatenate([[v], velocities[:, 0]])
    a = np.concatenate([[0.0], np.diff(way) / DT, [0.0]])
    assert way[-1] == 0
    assert (way * np.sign(v) >= 0).all()
    assert (np.abs(a) <= strength * (1 + 1e-9)).all()
    assert (np.abs(np.diff(a)) <= jerk * DT * (1 + 1e-9) + 1e-7).all()
    full = strength**2 / jerk  # speed lost by ramping up to full braking and down again
    quickest = abs(v) / strength + strength / jerk if abs(v) > full else 2 * np.sqrt(abs(v) / jerk)
    assert len(velocities) * DT < quickest + 4 * DT


def test_every_stop_from_full_speed_comes_to_rest_in_time():
    rng = np.random.default_rng(0)
    for _ in range(60):
        strength, speed = rng.uniform(0.5, 20, 2), rng.uniform(0.1, 3, 2)
        group = make_group(strength, rng.choice([5.0, 30.0, 200.0, 1e4], 2), speed, 0.02)
        start = Motion(np.zeros(2), speed * [1, -1], strength * rng.choice([-1, 0, 1], 2))
        assert np.abs(group.stop(start)[1][-1]).max() == 0


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("v", [0.07, 0.31, 1.9])
@pytest.mark.parametrize("jerk", [1e6, 60.0])
def test_a_step_is_allowed_as_long_as_a_stop_after_it_stays_inside(sign, v, jerk):
    """A limit just beyond where the stop ends, and just before it; ahead of the joint, and behind it."""
    group, h = make_group(4.0, jerk), 0.03
    there = v * h
    positions, _ = knots(group.stop(Motion(np.array([there]), np.array([v]), np.zeros(1))))
    furthest = positions.max()
    for limit, allowed in ((furthest + 1e-8, True), (furthest - 1e-8, False)):
        low, high = (-0.5, limit) if sign > 0 else (-limit, 0.5)
        reach = [(low, high, 10.0)]
        state = group.after([0.0], [sign * v], [0.0], h, reach)
        assert (state is not None) == allowed
        if allowed:
            assert state[0] == pytest.approx([sign * there], abs=1e-15)
            assert state[1] == [sign * v]
    # A speed that the step itself reaches; with jerk the stop begins by being faster still.
    away = [(-100.0, 100.0, v + 4.0 * h)]
    assert (group.after([0.0], [sign * v], [sign * 3.99], h, away) is None) == group.jerk_binds
    assert group.after([0.0], [sign * v], [sign * 4.01], h, away) is None


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("jerk", [1e6, 250.0])
def test_a_joint_that_turns_within_a_step_is_judged_where_it_turns(sign, jerk):
    group, v, a = make_group(20.0, jerk), 0.4, -10.0
    turn = v * v / (2 * -a)  # beyond the end of the step: v h + a h^2 / 2 = 0.0075
    for limit, allowed in ((turn + 1e-6, True), (turn - 1e-6, False), (0.0076, False)):
        low, high = (-10.0, limit) if sign > 0 else (-limit, 10.0)
        state = group.after([0.0], [sign * v], [sign * a], DT, [(low, high, 10.0)])
        assert (state is not None) == allowed
    # One that starts on the limit and leaves it does not turn.
    reach = [(0.0, 10.0, 10.0) if sign > 0 else (-10.0, 0.0, 10.0)]
    assert group.after([0.0], [0.0], [sign], DT, reach) is not None


def test_with_jerk_also_what_turns_during_the_stop_is_judged_where_it_turns():
    """The brake is on already and cannot be let go at once: the joint overshoots zero velocity and comes back."""
    group = make_group(20.0, 100.0)
    q, v, a = [0.0], [0.3], [-12.0]
    there, ahead = group.after(q, v, a, 0.01, [(-9, 9, 9)])
    positions, velocities = group.stop(Motion(np.array(there), np.array(ahead), np.array(a)))
    way = np.array([ahead, *velocities])[:, 0]
    assert way.min() < -0.01  # it turns on the way
    passed = np.array([there, *positions])[:, 0]
    k = int((way[:-1] * way[1:] < 0).argmax())
    turn = passed[k] - way[k] ** 2 * DT / (2 * (way[k + 1] - way[k]))
    assert turn > passed.max() + 1e-6
    assert group.after(q, v, a, 0.01, [(-9.0, turn + 1e-7, 9.0)]) is not None
    assert group.after(q, v, a, 0.01, [(-9.0, turn - 1e-7, 9.0)]) is None
    fastest = np.abs(way).max()
    assert group.after(q, v, a, 0.01, [(-9.0, 9.0, fastest + 1e-9)]) is not None
    back = -passed.min()
    assert group.after(q, v, a, 0.01, [(-back - 1e-9, 9.0, 9.0)]) is not None


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_far_target_is_reached_in_a_trapezoid(sign):
    strength, speed, distance = 4.0, 1.0, 1.5
    n = 45
    group, bounds = make_group(strength, speed=speed), make_bounds(speed=speed)
    due, targets = DT * np.arange(1, n + 1), np.full((n, 1), sign * distance)
    start = Motion.at_rest(np.zeros(1))
    positions, velocities = knots(group.govern(start, due, targets, bounds))
    v, k = sign * velocities[:n, 0], np.arange(1, n + 1)
    rising = int(speed / (strength * DT))
    assert np.allclose(v[:rising], k[:rising] * strength * DT, atol=1e-9)
    assert np.allclose(v[rising:25], speed, atol=1e-9)
    assert (np.diff(v) >= -strength * DT * (1 + 1e-9)).all()
    assert sign * positions[-1, 0] == pytest.approx(distance, abs=1e-6)
    assert (
        sign * positions.max() <= distance + 1e-9
        if sign > 0
        else positions.min() >= -distance - 1e-9
    )
    quickest = distance / speed + speed / strength
    arrived = (np.abs(positions[:n, 0]) > distance - 1e-3).argmax() + 1
    assert quickest - 2 * DT < arrived * DT < quickest + 3 * DT


def test_a_moving_target_is_caught_and_kept():
    """At the slope of the targets, without lag."""
    n, slope = 40, 0.6
    group, due = make_group(4.0), DT * np.arange(1, n + 1)
    targets = (0.4 + slope * DT * np.arange(n))[:, None]
    start = Motion.at_rest(np.zeros(1))
    positions, velocities = knots(group.govern(start, due, targets, make_bounds()))
    caught = slice(25, n - 1)  # the last target stands still
    assert np.allclose(positions[caught], targets[caught], atol=1e-6)
    assert np.allclose(velocities[caught], slope, atol=1e-5)


def test_the_governor_stops_at_a_limit_and_no_sooner():
    group = make_group(4.0)
    due, targets = DT * np.arange(1, 41), np.full((40, 1), 5.0)
    bounds = Bounds(np.array([-1.0]), np.array([0.7]), np.array([2.0]))
    start = Motion.at_rest(np.zeros(1))
    positions, velocities = knots(group.govern(start, due, targets, bounds))
    assert positions.max() <= 0.7 + 1e-9
    assert positions[-1, 0] > 0.7 - 2e-3
    assert velocities[-1, 0] == 0


def test_the_first_step_may_be_short_and_changes_acceleration_by_no_more():
    group = make_group(20.0, 100.0)
    steps, targets = np.array([0.01, 0.05, 0.05]), np.full((3, 1), 1.0)
    start = Motion.at_rest(np.zeros(1))
    _, v = knots(group.govern(start, np.cumsum(steps), targets, make_bounds()))
    a = np.diff(np.concatenate([[0.0], v[:3, 0]])) / steps
    assert a[0] == pytest.approx(100.0 * 0.01)
    assert a[1] - a[0] == pytest.approx(100.0 * DT)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_stop_after_a_course_lets_its_acceleration_go_slowly(sign):
    """Targets on a parabola that end in full acceleration: the stop takes it back by a step of jerk at a time."""
    strength, k = 4.0, np.arange(1, 9)
    due, targets = DT * k, sign * strength / 2 * (k[:, None] * DT) ** 2
    start = Motion(np.zeros(1), np.zeros(1), np.array([sign * strength]))
    way = course(start, due, targets)
    _, acceleration = derivatives(way, start.acceleration)
    assert np.allclose(acceleration[:-3], sign * strength, atol=1e-9)
    assert np.allclose(way.velocities[:-1, 0], sign * strength * DT * np.arange(8), atol=1e-9)
    assert np.array_equal(way.positions[1:], targets)
    arrival = np.array([sign * 3.0])
    positions, velocities = knots(make_group(8.0, 40.0).follow(way, arrival))
    assert np.allclose(positions[:8], targets, atol=1e-12)
    tail = np.diff(velocities[7:, 0]) / DT
    assert tail[0] == pytest.approx(sign * (3.0 - 40.0 * DT))
    assert velocities[-1] == 0


def test_bounds_leave_room_for_rounding_alone():
    bounds = Bounds(np.array([-1.0, 0.0]), np.array([1.0, 2.0]), np.array([0.5, 3.0]))
    low, high, speed = np.array(bounds.reach()).T
    assert ((bounds.low - 1e-8 < low) & (low < bounds.low)).all()
    assert ((bounds.high < high) & (high < bounds.high + 1e-8)).all()
    assert ((bounds.speed < speed) & (speed < bounds.speed * (1 + 1e-6))).all()
    part = bounds.part(np.array([1]))
    assert [float(x[0]) for x in (part.low, part.high, part.speed)] == [0.0, 2.0, 3.0]

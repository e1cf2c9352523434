"""Whatever a policy says and whenever it says it, nothing outside the limits goes out. Judged by an independent
sampler of what a joint_trajectory_controller makes of the messages."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_safety import plain_check
from toys import small_spec

from flow_policy_rl.serving.chunk_scheduler import ChunkScheduler
from flow_policy_rl.serving.commander import Commander
from flow_policy_rl.serving.robot import JointLimits, Robot, Topics, load_robot
from flow_policy_rl.serving.safety import EmergencyStop, Motion, Rejected, SafetyFilter
from flow_policy_rl.serving.spline import Spline, extremes, hull
from flow_policy_rl.serving.trajectory_controller import TrajectoryController

PANDA = load_robot("panda")
JOINTS = tuple(PANDA.limits)
HOME = np.array([PANDA.home[name] for name in JOINTS])
MS = 1_000_000
SAMPLE_S = 0.001


def robots() -> st.SearchStrategy[Robot]:
    """Two arm joints and a gripper of random abilities: from slow and jerk-limited to quick."""
    limits = st.builds(
        JointLimits,
        st.tuples(st.floats(-3, -0.2), st.floats(0.2, 3)),
        st.floats(0.1, 3),
        st.floats(0.5, 20),
        st.sampled_from([5.0, 30.0, 200.0, 10_000.0]),
    )
    return st.builds(
        lambda a, b, g: Robot("toy", {"a": a, "b": b}, {"g": g}, Topics("/j", "/c")),
        limits,
        limits,
        limits,
    )


def adversarial_chunks(rng: np.random.Generator, num: int, horizon: int) -> np.ndarray:
    """Everything between smooth and mad: walks, jumps between extremes, far beyond the limits, constant."""
    kinds = rng.integers(0, 5, num)
    walk = np.cumsum(rng.normal(0, 0.05, (num, horizon, 3)), axis=1)
    jumps = rng.choice([-4.0, 4.0, 0.0], (num, horizon, 3))
    far = rng.normal(0, 1e4, (num, horizon, 3))
    still = np.tile(rng.uniform(-1, 1, (num, 1, 3)), (1, horizon, 1))
    sine = np.sin(np.arange(horizon) * rng.uniform(0.1, 3, (num, 1)))[..., None].repeat(3, axis=2)
    return np.choose(kinds[:, None, None], [walk, jumps, far, still, sine])


def run(robot: Robot, seed: int, joining: str, margin: float = 0.0, **options):
    """Feed random chunks at random times with random delays; sample what the controller follows.

    Returns positions, velocities, accelerations (n, A) at 1 kHz, and the start position.
    """
    rng = np.random.default_rng(seed)
    spec = small_spec(
        joint_names=("a", "b", "g"),
        action_low=(-9.0,) * 3,
        action_high=(9.0,) * 3,
        control_dt=float(rng.choice([0.02, 0.05, 0.1])),
    )
    safety = SafetyFilter(
        robot, spec.joint_names, spec.control_dt, max_start_distance=1e9, position_margin=margin
    )
    commander = Commander(ChunkScheduler(spec, joining=joining), safety, **options)
    start = rng.uniform(safety.low, safety.high)
    controller = TrajectoryController(spec.joint_names, start)
    now, samples = 10_000 * MS, []
    for chunk in adversarial_chunks(rng, 12, spec.action_horizon):
        late = rng.choice(
            [0.0, rng.uniform(0, 1.5)]
        )  # without delay, knots of one plan fall on those of the next
        stamp = now - int(late * spec.control_dt * 1e9)
        event = rng.random()
        try:
            plan = (
                commander.stop(now)
                if event < 0.15
                else commander.accept(chunk, stamp, now, controller.sample(now / 1e9)[0]).plan
            )
        except Rejected:
            plan = None
        if plan is not None:
            times, positions, velocities = plan.points(now)
            controller.accept(spec.joint_names, times, positions, velocities, now / 1e9)
        wait = int(rng.choice([0.011, 0.05, 0.2, 1.0, 3 * spec.control_dt]) * 1e9)
        moments = np.arange(now / 1e9, (now + wait) / 1e9, SAMPLE_S)
        samples += [controller.sample(t) for t in moments]
        now += wait
    position, velocity, acceleration = (np.array(part) for part in zip(*samples, strict=True))
    return safety, start, position, velocity, acceleration


@settings(max_examples=25, deadline=None)
@given(
    robot=robots(),
    seed=st.integers(0, 2**31),
    joining=st.sampled_from(["replace", "crossfade", "ensemble", "sync"]),
    soft_start_s=st.sampled_from([0.0, 0.5]),
)
def test_no_command_ever_leaves_the_limits(robot, seed, joining, soft_start_s):
    safety, _, position, velocity, acceleration = run(
        robot, seed, joining, soft_start_s=soft_start_s
    )
    limits = safety.limits
    assert (position >= safety.low - 1e-5).all()
    assert (position <= safety.high + 1e-5).all()
    assert (np.abs(velocity) <= limits["velocity"] * (1 + 1e-4) + 1e-6).all()
    # A first knot less than 0.1 ms ahead is left out of a message; that costs less than a hundredth.
    assert (np.abs(acceleration) <= limits["acceleration"] * 1.01 + 1e-3).all()
    step = np.abs(np.diff(acceleration, axis=0))
    assert (step <= limits["jerk"] * safety.control_dt * 1.01 + 2e-3).all()
    # The reference itself is continuous: no jump at any seam.
    assert (np.abs(np.diff(position, axis=0)) <= limits["velocity"] * SAMPLE_S * 1.001 + 1e-6).all()


def modest_chunk(
    rng: np.random.Generator, start: Motion, horizon: int, control_dt: float
) -> np.ndarray:
    """From what needs no limit to what goes too far, (H, 3), beginning near the start."""
    ahead = np.arange(1, horizon + 1)[:, None]
    kinds = [
        start.position + start.velocity * control_dt * ahead,
        start.position + np.cumsum(rng.normal(0, rng.choice([0.001, 0.05]), (horizon, 3)), axis=0),
        start.position + (ahead / horizon) ** 2 * rng.normal(0, 0.05, 3),
        np.tile(rng.uniform(-1, 1, 3), (horizon, 1)),
        rng.choice([-4.0, 4.0, 0.0], (horizon, 3)),
    ]
    return kinds[rng.integers(len(kinds))]


@settings(max_examples=25, deadline=None)
@given(robot=robots(), seed=st.integers(0, 2**31))
def test_plans_are_those_of_the_plain_rules(robot, seed):
    """Chunk after chunk, each from where the plan before it is under way, with and without jerk that binds."""
    rng = np.random.default_rng(seed)
    dt = float(rng.choice([0.02, 0.05, 0.1]))
    safety = SafetyFilter(robot, ("a", "b", "g"), dt, max_start_distance=1e9)
    start = Motion.at_rest(rng.uniform(safety.low, safety.high))
    for _ in range(8):
        targets = modest_chunk(rng, start, 8, dt)
        due = rng.uniform(0.2, 1.0) * dt + dt * np.arange(8)
        share = np.minimum(1.0, rng.choice([1.0, 1.0, 0.2]) + due * rng.choice([0.0, 2.0]))
        try:
            expected = plain_check(safety, start, due, targets, share)
        except Rejected:
            with pytest.raises(Rejected):
                safety.check(start, due, targets, speed_share=share)
            return
        spline = safety.check(start, due, targets, speed_share=share).spline
        found = spline.times, spline.positions, spline.velocities
        for ours, theirs in zip(found, expected, strict=True):
            assert np.abs(ours - theirs).max() < 1e-9
        t = float(rng.choice([rng.choice(spline.times[1:]), rng.uniform(0, spline.end)]))
        position, velocity, _ = spline.sample(t)
        start = Motion(position, velocity, spline.sample(t - 1e-6)[2])


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), still=st.booleans())
def test_a_spline_stays_between_its_extremes_and_these_within_its_hull(seed, still):
    rng = np.random.default_rng(seed)
    times = np.concatenate([[0.0], np.cumsum(rng.uniform(0.01, 0.2, 6))])
    velocities = rng.normal(0, 2, (7, 3)) * (not still)
    spline = Spline(times, rng.normal(0, 0.1, (7, 3)), velocities)
    wide = hull(spline, np.zeros(3))
    exact = extremes(spline, wide)
    shares = np.linspace(0, 1 - 1e-9, 100)
    moments = (times[:-1, None] + np.diff(times)[:, None] * shares).ravel()
    samples = [spline.sample(t) for t in moments]
    position, velocity, acceleration = (np.array(part) for part in zip(*samples, strict=True))
    assert np.allclose(exact.low, position.min(axis=0), atol=0.01)
    assert np.allclose(exact.high, position.max(axis=0), atol=0.01)
    assert np.allclose(exact.speed, np.abs(velocity).max(axis=0), rtol=0.01)
    assert np.allclose(exact.acceleration, np.abs(acceleration).max(axis=0), rtol=1e-4)
    for found in (exact, wide):
        assert (found.low <= position.min(axis=0) + 1e-12).all()
        assert (found.high >= position.max(axis=0) - 1e-12).all()
        assert (found.speed >= np.abs(velocity).max(axis=0) * (1 - 1e-9)).all()
        assert (found.acceleration >= np.abs(acceleration).max(axis=0) * (1 - 1e-9)).all()
    assert (wide.low <= exact.low + 1e-12).all()
    assert (wide.high >= exact.high - 1e-12).all()
    assert (wide.speed >= exact.speed - 1e-9).all()


@given(
    velocity=st.lists(st.floats(-2, 2), min_size=7, max_size=7), dt=st.sampled_from([0.01, 0.05])
)
def test_stopping_distance_in_closed_form_is_that_of_the_stop(velocity, dt):
    group = SafetyFilter(PANDA, JOINTS[:7], dt)._groups[0]
    v = np.array(velocity)
    _, positions, velocities = group.stop(Motion(np.zeros(7), v, np.zeros(7)))
    went = positions[-1] if len(positions) else np.zeros(7)
    assert np.allclose(v * group.stop_seconds(velocity), went, atol=1e-8)
    # The direction stays: every velocity on the way is a multiple of the first.
    for ahead in velocities:
        assert np.allclose(np.outer(ahead, v), np.outer(v, ahead), atol=1e-7)


def test_a_plan_within_the_limits_passes_through_its_targets():
    due = (1 + np.arange(12)) * 0.05
    targets = HOME + np.linspace(0, 0.1, 12)[:, None] ** 2
    targets[:, 7] = HOME[7]
    checked = SafetyFilter(PANDA, JOINTS, 0.05).check(Motion.at_rest(HOME), due, targets)
    assert np.allclose(checked.spline.position(due), targets, atol=1e-12)
    assert checked.num_changed == 0
    assert not checked.spline.velocities[-1].any()


def test_all_joints_slow_down_together_so_that_the_path_stays_straight():
    direction = np.array([1.0, -0.3, 0.5, 0.2, 0.8, 0.1, -0.9, 0.0])
    targets = np.tile(HOME + 1.5 * direction, (30, 1))
    due = (1 + np.arange(30)) * 0.05
    checked = SafetyFilter(PANDA, JOINTS, 0.05).check(Motion.at_rest(HOME), due, targets)
    way = (checked.spline.positions - HOME)[:, :7]
    along = way @ direction[:7] / (direction[:7] @ direction[:7])
    assert np.allclose(way, along[:, None] * direction[:7], atol=1e-9)
    assert along[-1] == pytest.approx(1.5, abs=0.02)


def test_a_closing_hand_does_not_slow_the_arm():
    due = (1 + np.arange(12)) * 0.05
    targets = HOME + np.linspace(0, 0.1, 12)[:, None] ** 2
    targets[:, 7] = 0.0
    checked = SafetyFilter(PANDA, JOINTS, 0.05).check(Motion.at_rest(HOME), due, targets)
    assert np.allclose(checked.spline.position(due)[:, :7], targets[:, :7], atol=1e-12)
    assert checked.spline.positions[-1, 7] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    ("limit", "value", "kind"),
    [
        (None, None, ()),
        ("position", (-9, 0.29), ("position",)),  # the last target is out
        (
            "position",
            (-9, 0.301),
            ("position",),
        ),  # the last target is in, but there is no stopping there
        ("velocity", 0.49, ("velocity",)),
        ("acceleration", 2.0, ("acceleration",)),
        ("jerk", 40.0, ("jerk",)),
    ],
)
def test_it_is_said_which_limit_the_targets_go_beyond(limit, value, kind):
    """A line at 0.5 rad/s with a small step in it. The gripper does not count."""
    due = (1 + np.arange(12)) * 0.05
    line = 0.5 * due + np.where(due > 0.3, 0.002, 0.0) * (limit in ("acceleration", "jerk"))
    start = Motion(np.zeros(2), np.full(2, 0.45 if limit == "velocity" else 0.5), np.zeros(2))
    easy = {"position": (-9, 9), "velocity": 9.0, "acceleration": 100.0, "jerk": 1e6}
    tight, free = JointLimits(**(easy | ({limit: value} if limit else {}))), JointLimits(**easy)
    for arm, hand, expected in ((tight, free, kind), (free, tight, ())):
        robot = Robot("toy", {"a": arm}, {"g": hand}, Topics("/j", "/c"))
        safety = SafetyFilter(robot, ("a", "g"), 0.05)
        assert safety.check(start, due, np.stack([line, line], axis=1)).beyond == expected


def test_nonsense_and_a_far_start_are_refused():
    safety = SafetyFilter(PANDA, JOINTS, 0.05, max_start_distance=0.3)
    due, here = (1 + np.arange(12)) * 0.05, Motion.at_rest(HOME)
    targets = np.tile(HOME, (12, 1))
    targets[3, 2] = np.nan
    with pytest.raises(Rejected, match="not a finite target for panda_joint3"):
        safety.check(here, due, targets)
    with pytest.raises(Rejected, match="first target of panda_joint1 is 0.400 away"):
        safety.check(here, due, np.tile(HOME + np.eye(8)[0] * 0.4, (12, 1)), measured=HOME)
    with pytest.raises(Rejected, match="shape"):
        safety.check(here, due, targets[:, :5])


def test_the_tool_stays_in_its_box():
    tool = PANDA.chain.tool_position(JOINTS, HOME[None])[0]
    box = (tool - [0.3, 0.1, 0.2], tool + [0.3, 0.1, 0.2])
    robot = dataclasses.replace(PANDA, workspace=box)
    safety = SafetyFilter(robot, JOINTS, 0.05)
    due = (1 + np.arange(40)) * 0.05
    targets = np.tile(HOME + np.eye(8)[0] * 1.2, (40, 1))  # a sideways swing far out of the box
    checked = safety.check(Motion.at_rest(HOME), due, targets)
    assert "box" in checked.beyond
    spline = checked.spline
    times = np.linspace(0, spline.end, 400)
    reached = PANDA.chain.tool_position(JOINTS, spline.position(times))
    assert (reached >= box[0] - 1e-4).all()
    assert (reached <= box[1] + 1e-4).all()
    assert np.ptp(reached[:, 1]) > 0.05  # it went some way
    free = SafetyFilter(robot, JOINTS, 0.05, workspace=False)
    wide = free.check(Motion.at_rest(HOME), due, targets)
    out = wide.spline
    assert "box" not in wide.beyond
    assert PANDA.chain.tool_position(JOINTS, out.positions)[:, 1].max() > box[1][1] + 0.1


def test_forward_kinematics_agree_with_the_simulated_arm():
    mujoco = pytest.importorskip("mujoco")
    from sim.tasks import make_task

    world = make_task("lift").world
    rng = np.random.default_rng(0)
    low, high = PANDA.limit_array(JOINTS, "position").T
    for positions in rng.uniform(low, high, (20, 8)):
        data = mujoco.MjData(world.model)
        data.qpos[world.joint_qpos] = positions
        mujoco.mj_forward(world.model, data)
        expected = data.site("panda_tcp").xpos - data.body("panda_link0").xpos
        assert np.allclose(
            PANDA.chain.tool_position(JOINTS, positions[None])[0], expected, atol=1e-6
        )


def test_the_emergency_stop_is_latched_and_trips_after_plans_in_a_row_that_were_limited():
    stop = EmergencyStop(max_consecutive_limited=3)
    spec = small_spec(joint_names=("a", "b"), control_dt=0.05)
    limits = JointLimits((-1, 1), 1.0, 5.0, 500.0)
    robot = Robot("toy", {"a": limits, "b": limits}, {}, Topics("/j", "/c"))
    safety = SafetyFilter(robot, spec.joint_names, 0.05, max_start_distance=99)
    commander = Commander(ChunkScheduler(spec), safety, stop)
    mad, calm = np.full((6, 2), 50.0), np.zeros((6, 2))
    now = 0
    for chunk, tripped in ((mad, False), (mad, False), (calm + 0.4, True)):
        now += 50 * MS
        commander.accept(chunk, now, now, np.zeros(2))
        assert stop.tripped == tripped
    with pytest.raises(Rejected, match="emergency stop: 3 plans in a row had to be limited"):
        commander.accept(calm, now, now, np.zeros(2))
    plan = commander.stop(now)
    assert not plan.spline.velocities[-1].any()
    stop.trip("button")  # outweighs its own reason
    stop.trip("another")  # the first one stays
    assert stop.reason == "button"
    assert stop.trips == 1
    stop.reset()
    commander.accept(
        calm + plan.spline.positions[-1],
        now + 3000 * MS,
        now + 3000 * MS,
        plan.spline.positions[-1],
    )
    assert not stop.tripped

"""Whatever a policy says and whenever it says it, nothing outside the limits goes out. Judged by an independent
sampler of what a joint_trajectory_controller makes of the messages."""

import dataclasses

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from plain_safety import plain_check
from toys import small_spec

from flow_policy_rl.errors import InputError
from flow_policy_rl.serving import shipped
from flow_policy_rl.serving.chunk_scheduler import ChunkScheduler
from flow_policy_rl.serving.commander import Commander, Plan
from flow_policy_rl.serving.onnx_policy import OnnxPolicy
from flow_policy_rl.serving.robot import LIMITS, JointLimits, Robot, Topics, load_robot
from flow_policy_rl.serving.safety import (
    USABLE,
    Checked,
    EmergencyStop,
    Motion,
    Rejected,
    SafetyFilter,
)
from flow_policy_rl.serving.spline import Spline, extremes, hull
from flow_policy_rl.serving.trajectory_controller import TrajectoryController

PANDA = load_robot("panda")
JOINTS = tuple(PANDA.limits)
HOME = np.array([PANDA.home[name] for name in JOINTS])
MS = 1_000_000
SAMPLE_S = 0.001
SLOW = JointLimits((-1.0, 1.0), 1.0, 1.0, 5.0)
SLOW_ROBOT = Robot("toy", {"a": SLOW, "b": SLOW}, {"g": SLOW}, Topics("/j", "/c"))


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


@settings(max_examples=25)
@given(
    robot=robots(),
    seed=st.integers(0, 2**31),
    joining=st.sampled_from(["replace", "crossfade", "ensemble", "sync"]),
    soft_start_s=st.sampled_from([0.0, 0.5]),
)
@example(SLOW_ROBOT, 69423, "sync", 0.0)  # a chunk comes at the nanosecond at which a stop ends
def test_no_command_ever_leaves_the_limits(robot, seed, joining, soft_start_s):
    safety, _, position, velocity, acceleration = run(
        robot, seed, joining, soft_start_s=soft_start_s
    )
    limits = {what: robot.limit_array(safety.joint_names, what) for what in LIMITS}
    assert (position >= safety.low - 1e-5).all()
    assert (position <= safety.high + 1e-5).all()
    assert (np.abs(velocity) <= limits["velocity"] * (1 + 1e-4) + 1e-6).all()
    assert (np.abs(acceleration) <= limits["acceleration"]).all()
    step = np.abs(np.diff(acceleration, axis=0))
    assert (step <= limits["jerk"] * safety.control_dt + 1e-3).all()
    # The reference itself is continuous: no jump at any seam.
    assert (np.abs(np.diff(position, axis=0)) <= limits["velocity"] * SAMPLE_S * 1.001 + 1e-6).all()


@pytest.mark.parametrize("lead_us", [0.001, 1, 20, 49, 51, 99, 500, 999])
def test_a_message_is_the_plan_however_near_its_next_knot_is(lead_us):
    """At full acceleration, forth and back, in segments of 10 ms: a first knot that is left out costs the share of the
    segment that it is ahead, four times; a knot that is kept leaves rounding to ns without consequence."""
    most, step = 15.0, 0.01
    speed = np.cumsum([0.0, *most * step * np.array([1, 1, -1, -1, -1, -1, 1, 1])])[:, None]
    place = np.cumsum(np.vstack([[0.0], (speed[1:] + speed[:-1]) / 2 * step]))[:, None]
    plan = Plan(0, Spline(step * np.arange(len(speed)), place, speed))
    controller = TrajectoryController(("a",), np.zeros(1))
    controller.accept(("a",), *plan.points(0), 0.0)
    now = 20 * MS - round(1000 * lead_us)  # before the acceleration turns round
    times, positions, velocities = plan.points(now)
    rounding = 6 * np.abs(speed).max() * 0.5e-9 / times[0] ** 2
    assert rounding < 0.03 * most
    controller.accept(("a",), times, positions, velocities, now / 1e9)
    follows = [controller.sample(now / 1e9 + t)[2][0] for t in np.arange(0.0, 0.1, 1e-4)]
    assert np.abs(follows).max() * USABLE < most


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


@settings(max_examples=25)
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


@settings(max_examples=40)
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


@pytest.mark.parametrize("late_ms", [0, 20, 50])
def test_a_run_begins_beside_a_joint_limit_too(late_ms):
    """The shipped policy's targets for joint 7 lie on the limit, 0.0002 rad from where it is. Refused, the arm would
    stand there for good. A soft start makes the first steps longer than a control step."""
    policy = OnnxPolicy(shipped.find("lift"))
    spec = policy.spec
    here = np.array([0.03613, -0.64018, 0.04362, -2.50375, 0.0424, 1.96492, 2.8971016, 0.03655])
    obs = {
        "joint_pos": here[None, :7],
        "joint_vel": np.zeros((1, 7)),
        "gripper_pos": here[None, 7:],
        "object_pose": np.array([[0.5, 0.0, 0.0225, 0.0, 0.0, 0.0, 1.0]]),
    }
    obs = {name: value.astype(np.float32) for name, value in obs.items()}
    noise = np.zeros((1, spec.action_horizon, len(JOINTS)), np.float32)
    chunk = policy.infer(obs, noise).reshape(spec.action_horizon, -1)
    safety = SafetyFilter(PANDA, JOINTS, spec.control_dt, max_start_distance=0.5)
    assert chunk[0, 6] > safety.high[6] - 1e-4
    commander = Commander(ChunkScheduler(spec, joining="replace"), safety, soft_start_s=0.5)
    plan = commander.accept(chunk, -late_ms * MS, 0, here).plan
    assert plan.spline.positions[:, 6].max() > here[6] + 1e-4


@given(
    velocity=st.lists(st.floats(-2, 2), min_size=7, max_size=7), dt=st.sampled_from([0.01, 0.05])
)
def test_stopping_distance_in_closed_form_is_that_of_the_stop(velocity, dt):
    group = SafetyFilter(PANDA, JOINTS[:7], dt)._groups[0]
    v = np.array(velocity)
    positions, velocities = group.stop(Motion(np.zeros(7), v, np.zeros(7)))
    went = positions[-1] if len(positions) else np.zeros(7)
    assert np.allclose(v * group.stop_seconds(velocity, dt), went, atol=1e-8)
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


def boxed(*half: float) -> tuple[SafetyFilter, tuple]:
    """A filter for the arm, and the tool's box: so far to each side of where the tool is at home."""
    tool = PANDA.chain.tool_position(JOINTS, HOME[None])[0]
    box = (tool - half, tool + half)
    return SafetyFilter(dataclasses.replace(PANDA, workspace=box), JOINTS, 0.05), box


@pytest.mark.parametrize("side", [1, -1])
def test_the_tool_stays_in_its_box(side):
    safety, box = boxed(0.3, 0.1, 0.2)
    due = (1 + np.arange(40)) * 0.05
    targets = np.tile(HOME + np.eye(8)[0] * 1.2 * side, (40, 1))  # a sideways swing far out
    checked = safety.check(Motion.at_rest(HOME), due, targets)
    assert "box" in checked.beyond
    spline = checked.spline
    times = np.linspace(0, spline.end, 400)
    reached = PANDA.chain.tool_position(JOINTS, spline.position(times))
    assert (reached >= box[0] - 1e-4).all()
    assert (reached <= box[1] + 1e-4).all()
    assert np.ptp(reached[:, 1]) > 0.05  # it went some way
    robot = dataclasses.replace(PANDA, workspace=box)
    free = SafetyFilter(robot, JOINTS, 0.05, workspace=False)
    wide = free.check(Motion.at_rest(HOME), due, targets)
    out = wide.spline
    assert "box" not in wide.beyond
    swing = PANDA.chain.tool_position(JOINTS, out.positions)[:, 1] * side
    assert swing.max() > box[1][1] + 0.1


def test_a_tool_that_hurries_to_the_edge_stops_at_once_or_nothing_goes_out():
    """Whatever the targets: where only an immediate stop stays inside, that is the plan; past that, there is none."""
    outcomes = set()
    for half in np.arange(0.02, 0.1, 0.002):
        safety, box = boxed(0.3, half, 0.2)
        start = Motion(HOME, np.eye(8)[0] * 1.5, np.zeros(8))
        due = (1 + np.arange(12)) * 0.05
        targets = HOME + 1.5 * due[:, None] * np.eye(8)[0]
        stop = safety.stop(start)
        inside = safety._stays_inside(stop, 0.0)
        try:
            spline = safety.check(start, due, targets).spline
        except Rejected:
            assert not inside
            outcomes.add("none")
            continue
        assert inside
        reached = PANDA.chain.tool_position(JOINTS, spline.position(np.linspace(0, spline.end, 99)))
        assert (reached[:, 1] <= box[1][1] + 1e-4).all()
        at_once = len(spline.times) == len(stop.times)
        outcomes.add("at once" if at_once else "later")
        if at_once:
            assert np.array_equal(spline.positions, stop.positions)
    assert outcomes == {"none", "at once", "later"}


def test_the_box_is_judged_between_the_knots_too():
    swing = HOME + np.outer([-0.4, 0.4], np.eye(8)[0])
    middle, end = PANDA.chain.tool_position(JOINTS, np.stack([HOME, swing[1]]))[:, 0]
    assert middle > end + 0.02  # furthest out halfway
    low, high = np.full(3, -9.0), np.array([(middle + end) / 2, 9.0, 9.0])
    robot = dataclasses.replace(PANDA, workspace=(low, high))
    safety = SafetyFilter(robot, JOINTS, 0.05)
    plan = Spline(np.array([0.0, 1.0]), swing, np.zeros((2, 8)))
    assert (safety._outside(swing) == 0).all()
    assert not safety._stays_inside(plan, 0.0)
    assert safety._stays_inside(plan, 1.0)  # one that comes from further out


@pytest.mark.parametrize("side", [1, -1])
def test_a_margin_keeps_the_arm_away_from_its_limits_and_leaves_the_gripper_alone(side):
    margin = 0.2
    safety = SafetyFilter(PANDA, JOINTS, 0.05, position_margin=margin)
    low, high = PANDA.limit_array(JOINTS, "position").T
    due = (1 + np.arange(200)) * 0.05
    targets = np.tile(HOME + np.eye(8)[0] * 9.0 * side, (200, 1))
    targets[:, 7] = 0.0  # the gripper's own limit
    spline = safety.check(Motion.at_rest(HOME), due, targets).spline
    furthest = high[0] - margin if side > 0 else low[0] + margin
    assert spline.positions[-1, 0] == pytest.approx(furthest, abs=1e-6)
    assert spline.positions[-1, 7] == pytest.approx(0.0, abs=1e-6)
    with pytest.raises(InputError, match="position_margin 3.0 leaves panda_joint1 no range"):
        SafetyFilter(PANDA, JOINTS, 0.05, position_margin=3.0)


def two_joints(**limits) -> SafetyFilter:
    """An arm joint and a gripper joint with the same limits."""
    easy = {"position": (-1, 1), "velocity": 2.0, "acceleration": 10.0, "jerk": 400.0}
    one = JointLimits(**(easy | limits))
    return SafetyFilter(Robot("toy", {"a": one}, {"g": one}, Topics("/j", "/c")), ("a", "g"), 0.05)


@pytest.mark.parametrize("side", [1, -1])
def test_an_arm_that_stands_outside_of_its_limits_may_come_back(side):
    safety, due = two_joints(), (1 + np.arange(20)) * 0.05
    start = Motion.at_rest(np.array([1.2 * side, 0.0]))
    spline = safety.check(start, due, np.zeros((20, 2))).spline
    assert np.abs(spline.positions[-1, 0]) < 0.2
    assert (side * spline.position(np.linspace(0, spline.end, 300))[:, 0] <= 1.2 + 1e-6).all()
    assert safety.stop(start) is not None
    further = safety.check(start, due, np.full((20, 2), 3.0 * side)).spline
    assert (side * further.positions[:, 0] <= 1.2 + 1e-6).all()


def test_the_last_check_knows_every_limit():
    """Whoever made a plan, and however it went wrong: each limit alone, just kept and just broken, and not at rest."""
    h, a = 0.1, 3.0
    v = a * h  # up to speed, along, and to rest, with constant acceleration
    times = np.array([0.0, h, 2 * h, 3 * h])
    way = np.array([0.0, v * h / 2, v * h * 1.5, v * h * 2])
    joint = lambda values: np.stack([values, np.zeros(4)], axis=1)  # noqa: E731
    speeds = np.array([0.0, v, v, 0.0])
    plan, start = Spline(times, joint(way), joint(speeds)), Motion.at_rest(np.zeros(2))
    exact = {"position": way[-1], "velocity": v}
    exact |= {"acceleration": a / USABLE, "jerk": a / 0.05 / USABLE}
    for what, value in exact.items():
        for share, expected in ((1.001, []), (0.999, [(what, 0)])):
            limit = (-1, value * share) if what == "position" else value * share
            safety = two_joints(**{what: limit})
            assert safety._excess(start, plan, safety._bounds(start)) == expected, what
    low = two_joints(position=(-way[-1] * 0.999, 1))
    mirrored = Spline(times, -plan.positions, -plan.velocities)
    assert low._excess(start, mirrored, low._bounds(start)) == [("position", 0)]
    safety = two_joints()
    rolling = Spline(times[:3], plan.positions[:3], plan.velocities[:3])
    assert safety._excess(start, rolling, safety._bounds(start)) == [("rest", 0)]
    shaken = Motion(np.zeros(2), np.zeros(2), np.array([-40.0, 0.0]))
    assert safety._excess(shaken, plan, safety._bounds(start)) == [("jerk", 0)]
    unknown = Spline(times, plan.positions * np.nan, plan.velocities)
    assert ("position", 0) in safety._excess(start, unknown, safety._bounds(start))


def test_a_stop_that_cannot_stay_within_the_limits_is_none_and_the_plan_in_force_goes_on():
    safety = two_joints()
    hurried = Motion(np.array([0.95, 0.0]), np.array([2.0, 0.0]), np.zeros(2))
    assert safety.stop(hurried) is None
    spec = small_spec(joint_names=("a", "g"), control_dt=0.05)
    commander = Commander(ChunkScheduler(spec), safety)
    times, still = np.array([0.0, 0.475, 0.6]), np.zeros(3)
    positions = np.stack([[0.0, 0.95, 0.99], still], axis=1)
    commander.plan = plan = Plan(
        0, Spline(times, positions, np.stack([[2.0, 2, 0], still], axis=1))
    )
    now = 475 * MS - commander.scheduler.min_lead
    assert plan.at(475 * MS).velocity[0] == pytest.approx(2.0)
    assert commander.stop(now) is plan
    assert commander.stop(200 * MS) is not plan  # earlier it could


@pytest.mark.parametrize("side", [1, -1])
def test_a_hand_near_its_limit_does_not_keep_the_arm_from_stopping(side):
    """It closes at full speed and is already braking; in whole control steps it would stop too late."""
    safety = SafetyFilter(PANDA, JOINTS, 0.05)
    start = Motion(HOME.copy(), np.zeros(8), np.zeros(8))
    # From 0.2 m/s, 4.1 mm is the shortest way to rest.
    start.position[7] = 0.02 + side * (0.02 - 0.0044)
    start.velocity[:] = [1.0] * 7 + [0.2 * side]
    stop = safety.stop(start)
    assert stop is not None
    assert stop.end < 0.3
    assert safety._excess(start, stop, safety._bounds(start)) == []


def test_a_missed_gripper_target_is_not_a_missed_arm_target():
    safety, due = two_joints(velocity=0.1), (1 + np.arange(5)) * 0.05
    targets = np.zeros((5, 2))
    targets[:, 1] = 0.9
    assert safety.check(Motion.at_rest(np.zeros(2)), due, targets).num_changed == 0
    assert safety.check(Motion.at_rest(np.zeros(2)), due, targets[:, ::-1]).num_changed == 5


def test_a_smooth_course_keeps_to_a_share_of_the_velocity_limits():
    """One that would be followed as it is, if all of the speed could be used."""
    safety, due = two_joints(), (1 + np.arange(20)) * 0.05
    targets = 0.4 * due[:, None] ** 2 * [1, 1]
    start, share = Motion.at_rest(np.zeros(2)), np.full(20, 0.2)
    assert safety.check(start, due, targets).beyond == ()
    checked = safety.check(start, due, targets, speed_share=share)
    assert checked.beyond == ("velocity",)
    assert (np.abs(checked.spline.velocities) <= 0.2 * 2.0 + 1e-5).all()


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


def test_only_limited_plans_in_a_row_trip_and_a_reset_begins_to_count_anew():
    limited, fine = (Checked(Spline(np.zeros(1), np.zeros((1, 1))), n, 0.0, ()) for n in (1, 0))
    stop = EmergencyStop(max_consecutive_limited=2)
    assert [stop.count(c) for c in (limited, fine, limited)] == [False] * 3
    assert stop.count(limited)
    stop.reset()
    assert [stop.count(c) for c in (limited, fine, limited, limited)] == [False] * 3 + [True]
    never = EmergencyStop()
    assert not any(never.count(limited) for _ in range(50))


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

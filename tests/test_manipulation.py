"""The manipulation tasks: what their experts, predicates, rewards and start states promise."""

import mujoco
import numpy as np
import pytest

from flow_policy_rl.serving.robot import load_robot
from sim import poses
from sim.arm import ARMS
from sim.errors import SimulationError
from sim.expert import Hand, make_expert
from sim.kinematics import SitePose
from sim.tasks import TASKS, make_task
from sim.tasks.assembly import Assembly
from sim.tasks.insert import PEG
from sim.tasks.pick_place import BIN
from sim.tasks.tabletop import Tabletop
from sim.vec_env import VecEnv

NAMES = sorted(name for name, task in TASKS.items() if issubclass(task, Tabletop))


def run_expert(task, seeds) -> np.ndarray:
    """Success per seed, (len(seeds),) bool."""
    env = VecEnv(task, len(seeds), num_threads=1)
    env.reset(list(seeds))
    experts = [make_expert(task, s, np.random.default_rng(0)) for s in env.state]
    won, running = np.zeros(len(seeds), bool), np.ones(len(seeds), bool)
    while running.any():
        actions = [
            e.act(state) if on else rest
            for e, state, rest, on in zip(experts, env.state, env.command, running, strict=True)
        ]
        step = env.step(np.stack(actions)[:, None])
        won |= running & step.success
        running &= ~step.ended
    env.close()
    return won


def put(task, **bodies) -> np.ndarray:
    """A state with bodies at given poses: (x, y, z), or (x, y, z, qw, qx, qy, qz)."""
    state = task.initial_state(np.random.default_rng(0))
    for name, place in bodies.items():
        place = np.asarray(place, dtype=float)
        task.pose(state, name)[:] = place if len(place) == 7 else poses.pose(place)
    return state


@pytest.mark.parametrize(
    ("name", "robot"),
    [
        (name, robot)
        for name in NAMES
        for robot in TASKS[name].robots
        if not issubclass(TASKS[name], Assembly)  # see test_assembly.py
    ],
)
def test_the_expert_succeeds(name, robot):
    assert run_expert(make_task(name, robot=robot), range(3)).all()


@pytest.mark.parametrize("name", NAMES)
def test_batched_kinematics_is_that_of_mujoco(name):
    task = make_task(name)
    model = task.world.model
    data = mujoco.MjData(model)
    rng = np.random.default_rng(1)
    qpos = np.stack([task.world.qpos(task.initial_state(rng)) for _ in range(4)])
    qpos[:, task.world.joint_qpos] = rng.uniform(
        task.world.target_low, task.world.target_high, (4, len(task.world.joint_names))
    )
    for site in (arm.tool for arm in task.arms):
        for row, pose in zip(qpos, SitePose(model, site)(qpos), strict=True):
            data.qpos[:] = row
            mujoco.mj_kinematics(model, data)
            turn = np.empty(9)
            mujoco.mju_quat2Mat(turn, pose[3:])
            assert np.allclose(pose[:3], data.site(site).xpos, atol=1e-9)
            assert np.allclose(turn, data.site(site).xmat, atol=1e-9)


def test_kinematics_of_the_ur5e_is_the_published_one():
    """Universal Robots' Denavit-Hartenberg parameters; ROS turns the base by half a turn."""
    a = [0, -0.425, -0.3922, 0, 0, 0]
    d = [0.1625, 0, 0, 0.1333, 0.0997, 0.0996]
    alpha = np.array([1, 0, 0, 1, -1, 0]) * np.pi / 2
    task = make_task("reach", robot="ur5e")
    qpos = task.world.home_qpos
    for seed in range(5):
        q = np.random.default_rng(seed).uniform(-np.pi, np.pi, 6)
        qpos[task.world.joint_qpos[:6]] = q
        pose = np.diag([-1.0, -1.0, 1.0, 1.0])
        for i in range(6):
            ct, st, ca, sa = np.cos(q[i]), np.sin(q[i]), np.cos(alpha[i]), np.sin(alpha[i])
            pose = pose @ np.array(
                [
                    [ct, -st * ca, st * sa, a[i] * ct],
                    [st, ct * ca, -ct * sa, a[i] * st],
                    [0, sa, ca, d[i]],
                    [0, 0, 0, 1],
                ]
            )
        tool = SitePose(task.world.model, "ur5e_tcp")(qpos)
        assert np.allclose(tool[:3], (pose @ [0, 0, 0.145, 1])[:3], atol=1e-6)
        assert np.allclose(poses.rotate(tool[3:], np.array([0, 0, 1.0])), pose[:3, 2], atol=1e-6)


@pytest.mark.parametrize("robot", [*ARMS, "dual_panda"])
def test_limits_in_the_mjcf_are_those_of_the_robot_file(robot):
    task = make_task("reach", robot=robot) if robot in ARMS else make_task("transport")
    assert task.robot == robot
    world, limits = task.world, load_robot(robot)
    position = limits.limit_array(world.joint_names, "position")
    assert np.allclose(position, np.stack([world.target_low, world.target_high], axis=1))
    assert np.allclose(limits.limit_array(world.joint_names, "velocity"), world.velocity_limit)
    for joint, span in zip(world.joint_names, position, strict=True):
        assert np.allclose(world.model.joint(joint).range, span)


@pytest.mark.parametrize("robot", ARMS)
def test_chain_and_home_of_the_robot_file_are_those_of_the_mjcf(robot):
    world, file = make_task("reach", robot=robot).world, load_robot(robot)
    rng = np.random.default_rng(0)
    targets = rng.uniform(world.target_low, world.target_high, (5, len(world.joint_names)))
    qpos = np.tile(world.home_qpos, (5, 1))
    qpos[:, world.joint_qpos] = targets
    tool = SitePose(world.model, f"{robot}_tcp")(qpos)[:, :3]
    assert np.allclose(file.chain.tool_position(world.joint_names, targets), tool, atol=1e-6)
    home = dict(zip(world.joint_names, world.home_qpos[world.joint_qpos], strict=True))
    assert file.home == pytest.approx(home)


def test_every_robot_file_knows_the_bodies_of_its_tasks():
    for name in NAMES:
        for robot in TASKS[name].robots:
            task = make_task(name, robot=robot)
            assert set(task.observed.values()) <= set(load_robot(task.robot).topics.poses)


def test_a_ur5e_keeps_its_velocity_and_torque_limits():
    """Bang-bang over a quarter turn about home."""
    task = make_task("reach", robot="ur5e")
    world, model = task.world, task.world.model
    data = mujoco.MjData(model)
    data.qpos[:] = world.home_qpos
    home = world.home_qpos[world.joint_qpos]
    swing = np.where(np.arange(60)[:, None] // 15 % 2, 0.4, -0.4)
    controls, _ = world.ramp(home[None], (home + swing)[None])
    for ctrl in controls[0]:
        data.ctrl[:] = ctrl
        mujoco.mj_step(model, data)
        speed = np.abs(data.qvel[world.joint_qvel])
        assert (speed[:6] <= 1.15 * world.velocity_limit[:6]).all()
        assert (np.abs(data.actuator_force) <= model.actuator_forcerange[:, 1] + 1e-9).all()


def test_kinematics_follows_bodies_that_hang_on_free_ones():
    model = mujoco.MjModel.from_xml_string(
        '<mujoco><worldbody><body pos="1 2 3"><freejoint/><geom size="0.1"/>'
        '<body pos="0.1 0 0" euler="10 20 30"><joint type="hinge" axis="1 1 0" pos="0.2 0.1 0"/>'
        '<joint type="slide" axis="0 1 1" ref="0.3"/><geom size="0.1"/>'
        '<site name="s" pos="0 0 1" euler="0 0 40"/></body></body></worldbody></mujoco>'
    )
    data = mujoco.MjData(model)
    rng = np.random.default_rng(0)
    for _ in range(5):
        data.qpos[:] = rng.standard_normal(model.nq)
        data.qpos[3:7] /= np.linalg.norm(data.qpos[3:7])
        mujoco.mj_kinematics(model, data)
        assert np.allclose(SitePose(model, "s")(data.qpos)[:3], data.site("s").xpos)


def test_pose_arithmetic():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 5, 7))
    for p in (a, b):
        p[:, 3:] /= np.linalg.norm(p[:, 3:], axis=1, keepdims=True)
    assert np.allclose(poses.compose(a, poses.relative(a, b)), b)
    for p in a:
        mat = np.empty(9)
        mujoco.mju_quat2Mat(mat, p[3:])
        assert np.allclose(poses.rotate(p[3:], b[0, :3]), mat.reshape(3, 3) @ b[0, :3])
    angles = np.linspace(-3, 3, 7)
    assert np.allclose(poses.yaw(poses.about_z(angles)), angles)
    assert np.allclose(poses.tilt(poses.about_z(angles)), 0)
    assert poses.wrap(0.8 * np.pi, np.pi / 2) == pytest.approx(-0.2 * np.pi)


@pytest.mark.parametrize("name", NAMES)
def test_starts_fill_their_ranges_and_touch_nothing(name):
    task = make_task(name)
    states = np.stack([task.initial_state(np.random.default_rng(s)) for s in range(200)])
    assert not task.is_success(states).any()
    for body, start in task.starts.items():
        drawn = task.pose(states, body)
        offset = np.abs(drawn[:, :3] - start.center)
        assert (offset <= np.array(start.spread) + 1e-12).all()
        assert (offset.max(axis=0) >= 0.8 * np.array(start.spread)).all()
        turned = np.abs(poses.wrap(poses.yaw(drawn[:, 3:]) - start.yaw))
        assert turned.max() <= start.yaw_spread + 1e-12
        assert turned.max() >= 0.8 * start.yaw_spread
    for i, a in enumerate(task.starts):
        for b in list(task.starts)[:i]:
            gap = task.pose(states, a)[:, :2] - task.pose(states, b)[:, :2]
            assert (np.linalg.norm(gap, axis=1) >= task.apart).all()


@pytest.mark.parametrize("name", NAMES)
def test_bodies_stay_where_they_start(name):
    """The first half second under a resting arm moves nothing by more than a millimetre."""
    task = make_task(name)
    env = VecEnv(task, 8, num_threads=1)
    env.reset(list(range(8)))
    before = env.state.copy()
    after = env.step(np.tile(env.command[:, None], (1, 10, 1))).states[:, -1]
    env.close()
    for body in task.starts:
        moved = task.pose(after, body)[:, :3] - task.pose(before, body)[:, :3]
        assert np.abs(moved).max() < 1e-3


def test_success_of_reach():
    task = make_task("reach")
    tool = task.tool(put(task))[:3]
    assert task.is_success(put(task, goal=tool + [0.019, 0, 0]))
    assert not task.is_success(put(task, goal=tool + [0.021, 0, 0]))


def test_success_of_push_is_in_the_plane():
    task = make_task("push")
    assert task.is_success(put(task, puck=(0.5, 0.024, 0.02), goal=(0.5, 0, 0.001)))
    assert not task.is_success(put(task, puck=(0.5, 0.026, 0.02), goal=(0.5, 0, 0.001)))


def test_success_of_stack():
    task = make_task("stack")
    green = (0.5, 0, 0.025)
    assert task.is_success(put(task, green=green, red=(0.51, 0.01, 0.07)))
    assert not task.is_success(put(task, green=green, red=(0.53, 0, 0.07)))  # beside it
    assert not task.is_success(put(task, green=green, red=(0.5, 0, 0.08)))  # above it
    tool = task.tool(put(task))[:3]
    held = put(task, green=tool - [0, 0, 0.045], red=tool)
    assert not task.is_success(held)


def test_success_of_pick_place():
    task = make_task("pick_place")
    assert task.is_success(put(task, can=(*BIN[:2], 0.05)))
    lying = poses.pose((*BIN[:2], 0.028), (np.sqrt(0.5), np.sqrt(0.5), 0, 0))
    assert task.is_success(put(task, can=lying))
    assert not task.is_success(put(task, can=(*BIN[:2], 0.10)))
    assert not task.is_success(put(task, can=(BIN[0], BIN[1] - 0.11, 0.05)))


def test_success_of_insert():
    task = make_task("insert")
    x, y, _ = PEG
    assert task.is_success(put(task, nut=(x + 0.003, y, 0.012)))
    assert not task.is_success(put(task, nut=(x, y, 0.09)))  # above the peg
    assert not task.is_success(put(task, nut=(x - 0.1, y, 0.012)))  # beside it
    tool = task.tool(put(task))[:3]
    handle = poses.compose(poses.pose(tool), poses.pose([-0.075, 0, 0]))
    assert not task.is_success(put(task, nut=handle))


def test_success_of_transport():
    task = make_task("transport")
    goal = (0.9, 0.1, 0.001)
    assert task.is_success(put(task, goal=goal, bar=(0.93, 0.1, 0.014)))
    assert not task.is_success(put(task, goal=goal, bar=(0.85, 0.1, 0.014)))
    assert not task.is_success(put(task, goal=goal, bar=(0.9, 0.1, 0.05)))


@pytest.mark.parametrize("along", [-0.1, -0.07, 0.0, 0.07, 0.1])
def test_a_hand_that_holds_the_bar_anywhere_has_not_transported_it(along):
    task = make_task("transport")
    state = put(task, goal=(0.9, 0.1, 0.001), bar=(0.9, 0.1, 0.014))
    arm = task.arms[1]
    hand = Hand(arm, task.world.qpos(state)[task.world.joint_qpos], task.control_dt)
    for height in (0.02, 0.1):
        for _ in hand.move([0.9 + along, 0.1, height], np.pi):
            joints = hand.solve()
        task.world.qpos(state)[task.world.joint_qpos[arm.columns]] = joints
        assert np.allclose(task.tool(state, 1)[:3], [0.9 + along, 0.1, height], atol=5e-3)
        assert task.is_success(state) == (height == 0.1)


def test_the_left_arm_of_transport_cannot_reach_the_marks():
    """Its tool is a hand's length beyond the flange, which is at most 0.855 m from the shoulder (Panda data sheet)."""
    task = make_task("transport")
    states = np.stack([task.initial_state(np.random.default_rng(s)) for s in range(100)])
    marks = task.pose(states, "goal")[:, :3]
    flange = marks + [0, 0, 0.107 + 0.1034]
    assert np.linalg.norm(flange - [0, 0, 0.333], axis=1).min() > 0.855


@pytest.mark.parametrize("name", [n for n in NAMES if "dense" in TASKS[n].rewards])
def test_dense_costs_shrink_as_a_body_nears_its_goal(name):
    """On the way from start to done (as the expert leaves it) the sum of costs rises to nearly zero."""
    task = make_task(name, reward="dense")
    env = VecEnv(task, 1, num_threads=1)
    env.reset([3])
    expert = make_expert(task, env.state[0], np.random.default_rng(0))
    first = sum(task.costs(env.state[0]).values())
    rewards, ended = [], False
    while not ended:
        step = env.step(expert.act(env.state[0])[None, None])
        rewards.append(step.reward_terms)
        ended = bool(step.ended[0])
    env.close()
    costs = {n: np.array([r[n][0, 0] for r in rewards]) for n in rewards[0] if n != "success"}
    for cost in costs.values():
        assert (cost <= 0).all()
        assert (cost >= -0.02).all()
    total = sum(costs.values())
    assert total[-1] > 0.02 * first * 0.6
    assert rewards[-1]["success"][0, 0] == 1
    goal = max(costs, key=lambda n: costs[n][-1])  # the term that says how far the task is
    assert costs[goal][-1] > -0.007


def test_a_dense_reward_is_monotone_in_the_distance():
    task = make_task("push", reward="dense")
    states = np.stack(
        [put(task, puck=(0.5, y, 0.02), goal=(0.5, 0.3, 0.001)) for y in (-0.2, 0, 0.2)]
    )
    goal = task.costs(states)["goal"]
    assert (np.diff(goal) > 0).all()
    sparse = make_task("push")
    none = np.zeros(3, bool)
    assert list(sparse.reward_terms(states, None, states, none)) == ["success"]
    dense = task.reward_terms(states, None, states, none)
    assert np.allclose(dense["goal"], 0.02 * goal)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"robot": "pandas"}, "robot for task 'push' 'pandas'.*did you mean 'panda'"),
        ({"reward": "shaped"}, "unknown reward of task 'push' 'shaped'.*dense, sparse"),
        ({"rewrd": "dense"}, "unknown option of task 'push' 'rewrd'.*did you mean 'reward'"),
    ],
)
def test_wrong_options_name_the_valid_ones(options, message):
    with pytest.raises(SimulationError, match=message):
        make_task("push", **options)


@pytest.mark.parametrize("name", ["push", "hopper", "kitchen"])
def test_a_switch_is_true_or_false_for_every_task(name):
    for word, wanted in (("true", True), ("false", False), (True, True)):
        fields = make_task(name, cameras=word).obs_fields
        assert any(f.kind == "image" for f in fields) == wanted
    with pytest.raises(SimulationError, match=f"cameras of task '{name}' is true or false, not"):
        make_task(name, cameras="no")

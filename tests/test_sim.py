"""The batched simulation: exact, independent of batch and threads, within the robot's limits."""

import mujoco
import numpy as np
import pytest

from flow_policy_rl.serving.robot import load_robot
from sim.backends.rollout import RolloutBackend
from sim.errors import SimulationError
from sim.expert import make_expert
from sim.tasks import TASKS, make_task
from sim.vec_env import VecEnv
from sim.world import STATE, World


@pytest.fixture(scope="module")
def task():
    return make_task("lift")


def wild_targets(task, shape: tuple, seed: int = 0) -> np.ndarray:
    """Targets anywhere in reach, a new one every control step."""
    low, high = task.world.target_low, task.world.target_high
    return np.random.default_rng(seed).uniform(low, high, (*shape, len(low)))


def gentle_targets(task, shape: tuple, seed: int = 0) -> np.ndarray:
    """Targets near the home pose."""
    home = task.world.home_qpos[task.world.joint_qpos]
    return home + 0.15 * np.random.default_rng(seed).standard_normal((*shape, len(home)))


def test_a_chunk_is_mj_step_bit_for_bit(task):
    world = task.world
    rng = np.random.default_rng(3)
    state = np.stack([task.initial_state(rng) for _ in range(3)])
    command = world.qpos(state)[:, world.joint_qpos]
    controls, _ = world.ramp(command, wild_targets(task, (3, 8)))
    chunk = np.empty((3, 8, world.state_size))
    RolloutBackend(world, 2).step(state, controls, chunk)
    for env in range(3):
        data = mujoco.MjData(world.model)
        mujoco.mj_setState(world.model, data, state[env], STATE)
        data.qacc_warmstart[:] = 0  # the same warm start as a rollout's: none
        for step, ctrl in enumerate(controls[env]):
            data.ctrl[:] = ctrl
            mujoco.mj_step(world.model, data)
            if (step + 1) % world.decimation == 0:
                expected = np.empty(world.state_size)
                mujoco.mj_getState(world.model, data, expected, STATE)
                assert np.array_equal(chunk[env, step // world.decimation], expected)


def test_result_depends_on_neither_threads_nor_batch(task):
    actions = gentle_targets(task, (5, 24))
    runs = []
    for num_envs, threads in ((5, 1), (5, 2), (1, 1)):
        env = VecEnv(task, num_envs, num_threads=threads)
        env.reset(list(range(100, 100 + num_envs)))
        steps = [env.step(actions[:num_envs, k : k + 8]) for k in (0, 8, 16)]
        runs.append(np.concatenate([s.states for s in steps], axis=1))
        env.close()
    assert np.array_equal(runs[0], runs[1])
    assert np.array_equal(runs[0][:1], runs[2])


def test_same_seed_same_episode(task):
    env = VecEnv(task, 2)
    first = env.reset([7, 8])
    again = env.reset([8, 7])
    for name in first:
        assert np.array_equal(first[name], again[name][::-1])
    assert not np.array_equal(first["object_pose"][0], first["object_pose"][1])


def test_as_many_seeds_as_environments(task):
    env = VecEnv(task, 3)
    with pytest.raises(SimulationError, match="3 environments need as many seeds, not 2"):
        env.reset([1, 2])
    env.close()


def test_episodes_are_numbered_across_environments_and_processes(task):
    """Episode k of environment i is that of (seed, i, k), wherever the numbering begins; `restart` begins again."""
    env, later = VecEnv(task, 3, seed=5), VecEnv(task, 2, seed=5, first_env=1)
    for k in range(2):
        env.reset(), later.reset()
        for i, row in enumerate(env.state):
            expected = task.initial_state(np.random.default_rng((5, i, k)))
            assert np.array_equal(row, expected)
        assert np.array_equal(env.state[1:], later.state)
    env.restart(6)
    env.reset()
    assert np.array_equal(env.state[1], task.initial_state(np.random.default_rng((6, 1, 0))))
    env.close(), later.close()


def test_a_snapshot_holds_how_long_the_goal_has_been_met(task):
    """From two states in which nine steps in a row have met it, and none: the tenth decides."""
    env = VecEnv(task, 2)
    env.reset([0, 1])
    env._held[:] = 9, 0
    env.state[:, 1 + 2] = 0.2
    kept, hold = env.snapshot(), env.command[:, None].copy()
    assert env.step(hold).success.tolist() == [True, False]
    assert env._held.tolist() == [0, 1]  # a new episode begins with none
    env.restore(kept)
    assert env.step(hold).success.tolist() == [True, False]
    env.restore(kept)
    env.state[0, 1 + 2] = 0.05  # one step that does not meet it, and the count begins anew
    assert not env.step(hold).success.any()
    assert env._held.tolist() == [0, 1]
    env.close()


def test_a_snapshot_holds_which_episode_comes_next(task):
    env = VecEnv(task, 2, seed=3, num_threads=1)
    env.reset()
    snapshot = env.snapshot()
    second = env.reset()
    env.restore(snapshot)
    for name, values in env.reset().items():
        assert np.array_equal(values, second[name])
    env.close()


def test_targets_ramp_no_faster_than_the_velocity_limit(task):
    world = task.world
    command = world.home_qpos[world.joint_qpos][None]
    controls, commands = world.ramp(command, wild_targets(task, (1, 20)))
    steps = np.diff(np.concatenate([command[:, None], controls], axis=1), axis=1)
    assert (np.abs(steps) <= world.velocity_limit * world.physics_dt * (1 + 1e-9)).all()
    assert (controls >= world.target_low).all()
    assert (controls <= world.target_high).all()
    assert np.allclose(controls[:, world.decimation - 1 :: world.decimation], commands)


def test_arm_respects_published_velocity_and_torque_limits(task):
    """Bang-bang commands over the whole range: measured speed stays at the limit, torque never passes it."""
    world, model = task.world, task.world.model
    data = mujoco.MjData(model)
    mujoco.mj_setState(model, data, task.initial_state(np.random.default_rng(0)), STATE)
    command = world.qpos(task.initial_state(np.random.default_rng(0)))[world.joint_qpos][None]
    targets = np.where(np.arange(60)[None, :, None] // 15 % 2, world.target_low, world.target_high)
    controls, _ = world.ramp(command, targets)
    for ctrl in controls[0]:
        data.ctrl[:] = ctrl
        mujoco.mj_step(model, data)
        in_contact = any(
            c.geom1 >= 0 for c in data.contact if "cube" not in model.geom(c.geom1).name
        )
        if not in_contact:
            assert (
                np.abs(data.qvel[world.joint_qvel][:7]) <= 1.15 * world.velocity_limit[:7]
            ).all()
        assert (
            np.abs(data.actuator_force) <= np.abs(model.actuator_forcerange).max(axis=1) + 1e-9
        ).all()


def test_limits_in_the_mjcf_are_those_of_the_robot_file(task):
    world, robot = task.world, load_robot("panda")
    position = robot.limit_array(world.joint_names, "position")
    assert np.allclose(position[:, 0], world.target_low)
    assert np.allclose(position[:, 1], world.target_high)
    assert np.allclose(robot.limit_array(world.joint_names, "velocity"), world.velocity_limit)
    for joint, (low, high) in zip(world.joint_names, position, strict=True):
        assert np.allclose(world.model.joint(joint).range, [low, high])


def test_forward_kinematics_is_the_published_one(task):
    """Modified DH parameters of the Franka documentation, written out here again."""
    a = [0, 0, 0, 0.0825, -0.0825, 0, 0.088]
    d = [0.333, 0, 0.316, 0, 0.384, 0, 0]
    alpha = np.array([0, -np.pi / 2, np.pi / 2, np.pi / 2, -np.pi / 2, np.pi / 2, np.pi / 2])
    data = mujoco.MjData(task.world.model)
    for seed in range(5):
        q = np.random.default_rng(seed).uniform(task.world.target_low, task.world.target_high)[:7]
        data.qpos[:] = task.world.home_qpos
        data.qpos[task.world.joint_qpos[:7]] = q
        mujoco.mj_kinematics(task.world.model, data)
        pose = np.eye(4)
        for i in range(7):
            ct, st, ca, sa = np.cos(q[i]), np.sin(q[i]), np.cos(alpha[i]), np.sin(alpha[i])
            pose = pose @ np.array(
                [
                    [ct, -st, 0, a[i]],
                    [st * ca, ct * ca, -sa, -d[i] * sa],
                    [st * sa, ct * sa, ca, d[i] * ca],
                    [0, 0, 0, 1],
                ]
            )
        flange_to_tool = 0.107 + 0.1034
        assert np.allclose(
            data.site("panda_tcp").xpos, (pose @ [0, 0, flange_to_tool, 1])[:3], atol=1e-6
        )


def test_things_collide(task):
    """Fingers pressed into the table stop at it; a cube dropped on the table rests on it."""
    env = VecEnv(task, 1)
    env.reset([0])
    state = env.state.copy()
    state[0, 1 + 2] = 0.2  # lift the cube
    env.state = state
    home = env.command.copy()
    for _ in range(4):
        obs = env.step(np.tile(home[:, None], (1, 8, 1))).obs
    assert obs["object_pose"][0, 2] == pytest.approx(0.0225, abs=1e-3)
    # Straight down from a reaching pose.
    down = np.array([[0.0, 0.6, 0.0, -2.1, 0.0, 2.7, 0.785, 0.0]])
    for _ in range(6):
        final = env.step(np.tile(down[:, None], (1, 8, 1))).states[0, -1]
    data = mujoco.MjData(task.world.model)
    mujoco.mj_setState(task.world.model, data, final, STATE)
    mujoco.mj_forward(task.world.model, data)
    assert data.site("panda_tcp").xpos[2] > -0.01


def test_cube_starts_anywhere_in_the_square_at_any_yaw(task):
    poses = task.observe(
        np.stack([task.initial_state(np.random.default_rng(s)) for s in range(400)])
    )["object_pose"]
    spread = poses[:, :2].max(0) - poses[:, :2].min(0)
    assert (spread > 0.2).all()
    yaw = 2 * np.arctan2(poses[:, 5], poses[:, 6])
    assert yaw.max() - yaw.min() > 2 * np.pi * 0.95
    assert (poses[:, 6] >= 0).all()


def test_success_needs_ten_steps_in_a_row_and_ends_the_episode(task):
    env = VecEnv(task, 2)
    env.reset([0, 1])
    high = env.world.qpos(env.state)
    lifted = env.state.copy()
    lifted[:, 1 + 2] = 0.2
    gravity = task.world.model.opt.gravity.copy()
    try:
        task.world.model.opt.gravity[:] = 0
        env.state = lifted.copy()
        env.state[1, 1 + 2] = 0.05  # the other cube is not high enough
        hold = np.tile(env.command[:, None], (1, 8, 1))
        first, second = env.step(hold), env.step(hold)
    finally:
        task.world.model.opt.gravity[:] = gravity
    assert not first.ended.any()
    assert list(second.success) == [True, False]
    assert list(second.valid[0]) == [True, True, *[False] * 6]
    assert second.reward[0].tolist() == [0, 1, 0, 0, 0, 0, 0, 0]
    assert second.reward[1].sum() == 0
    assert second.final_obs["object_pose"][0, 2] > 0.15
    assert second.obs["object_pose"][0, 2] == pytest.approx(high[0, 2])  # a new episode
    env.close()


@pytest.mark.parametrize("limit", [None, 110])
def test_time_limit_truncates_and_masks(task, limit):
    env, due = VecEnv(task, 1, time_limit=limit), limit or task.episode_steps
    env.reset([0])
    hold = np.tile(env.command[:, None], (1, 50, 1))
    first, second, third = (env.step(hold) for _ in range(3))
    assert not first.ended.any()
    assert not second.ended.any()
    assert third.truncated.all()
    assert not third.terminated.any()
    assert third.valid.sum() == due - 100
    env.close()


@pytest.mark.parametrize("limit", [0, 121])
def test_a_time_limit_beyond_the_tasks_is_refused(task, limit):
    with pytest.raises(
        SimulationError, match=f"1 to 120 control steps, as 'lift' has them, not {limit}"
    ):
        VecEnv(task, 1, time_limit=limit)


@pytest.mark.parametrize("limit", [None, 60])
def test_staggered_episodes_run_out_of_time_evenly(task, limit):
    """In any eighth of an episode an eighth of the episodes ends, in any process; then each has its full time."""
    env = VecEnv(task, 64, time_limit=limit)
    later = VecEnv(task, 24, first_env=40, time_limit=limit)
    env.reset(range(64)), later.reset(range(40, 64))
    env.stagger(), later.stagger()
    assert np.array_equal(env._steps[40:], later._steps)
    due_after = limit or task.episode_steps
    assert np.abs(np.histogram(env._steps, 8, (0, due_after))[0] - 8).max() <= 1
    started, length = env._steps.copy(), due_after // 3
    chunk = np.tile(env.command[:, None], (1, length, 1))
    for k in range(1, 4):
        step = env.step(chunk)
        gone = started + k * length
        due = (gone >= due_after) & (gone - length < due_after)
        assert np.array_equal(step.truncated, due)
        chunk = np.tile(env.command[:, None], (1, length, 1))
    env.close(), later.close()


def test_a_divergence_that_cannot_be_written_down_ends_nothing(task, tmp_path, caplog):
    (tmp_path / "full").write_text("")
    env = VecEnv(task, 2, dump_dir=tmp_path / "full")
    env.reset([0, 1])
    task.world.qvel(env.state[1])[0] = np.nan
    assert env.step(gentle_targets(task, (2, 8))).diverged.tolist() == [False, True]
    assert "could not be kept" in caplog.text
    env.close()


def test_a_diverged_environment_is_reset_and_the_others_are_untouched(task, tmp_path, caplog):
    env, alone = VecEnv(task, 3, dump_dir=tmp_path), VecEnv(task, 3)
    env.reset([0, 1, 2])
    alone.reset([0, 1, 2])
    cube = task.world.qvel_address(["panda_joint1"])[0]
    for count, bad in enumerate((np.nan, 1e8), start=1):  # not a number, and far too much energy
        task.world.qvel(env.state[1])[cube] = bad
        command, actions = env.command[1].copy(), gentle_targets(task, (3, 8))
        broken, whole = env.step(actions), alone.step(actions)
        assert list(broken.diverged) == [False, True, False]
        assert list(broken.truncated) == [False, True, False]
        assert not whole.diverged.any()
        for name, values in broken.obs.items():
            assert np.isfinite(values).all()
            assert np.array_equal(values[[0, 2]], whole.obs[name][[0, 2]])
        assert env.num_diverged == count
        assert "environment 1 broke down at control step 1" in caplog.text
        dump = np.load(tmp_path / f"lift-0-1-{count - 1}.npz")
        assert np.array_equal(dump["actions"], actions[1])
        assert np.array_equal(dump["command"], command)
        assert not np.abs(task.world.qvel(dump["state"])).max() < 1e6
    env.close()
    alone.close()


def test_numbers_beyond_belief_are_a_breakdown_though_they_are_finite(task, monkeypatch):
    """Which is not where MuJoCo itself gives up; the state before is what remains of it."""
    monkeypatch.setattr("sim.vec_env.ABSURD", 1e3)
    env = VecEnv(task, 2, num_threads=1, dump_dir=None)
    env.reset([0, 1])
    task.world.qvel(env.state[1])[2] = 2e3  # m/s, the cube's, upwards
    before = env.state.copy()
    step = env.step(np.tile(env.command[:, None], (1, 4, 1)))
    assert step.diverged.tolist() == [False, True]
    assert step.valid.sum(axis=1).tolist() == [4, 1]
    assert np.array_equal(step.states[1], np.tile(before[1], (4, 1)))
    env.close()


@pytest.mark.parametrize("name", ["hopper", "halfcheetah", "lift"])
def test_a_step_that_breaks_down_pays_nothing(name):
    """So that the return of its episode is a number."""
    env = VecEnv(make_task(name), 2, num_threads=1, dump_dir=None)
    env.reset([1, 2])
    actions = np.tile(env.command[:, None], (1, 4, 1))
    actions[0, 1, 0] = np.nan
    step = env.step(actions)
    assert step.diverged.tolist() == [True, False]
    assert step.valid.sum(axis=1).tolist() == [2, 4]
    assert np.isfinite(step.reward).all()
    assert (step.reward[0, 1:] == 0).all()
    assert all(np.isfinite(term).all() for term in step.reward_terms.values())
    env.close()


def test_only_the_first_breakdowns_are_written_but_all_are_counted(task, tmp_path, monkeypatch):
    monkeypatch.setattr("sim.vec_env.MOST_DUMPS", 2)
    env = VecEnv(task, 3, dump_dir=tmp_path)
    env.reset([0, 1, 2])
    task.world.qvel(env.state)[:] = np.nan
    assert env.step(env.command[:, None]).diverged.all()
    assert env.num_diverged == 3
    assert len(list(tmp_path.iterdir())) == 2
    env.close()


def test_expert_lifts_the_cube_every_time(task):
    env = VecEnv(task, 20)
    env.reset(list(range(20)))
    rng = np.random.default_rng(0)
    experts = [make_expert(task, state, rng) for state in env.state]
    won = np.zeros(20, bool)
    for _ in range(60):
        actions = [e.act(row) for e, row in zip(experts, env.state, strict=True)]
        won |= env.step(np.stack(actions)[:, None]).success
    assert won.all()


def test_unknown_task_names_the_nearest_and_all():
    with pytest.raises(SimulationError, match="did you mean 'lift'") as error:
        make_task("lfit")
    assert all(name in str(error.value) for name in TASKS)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ('user="2" ctrlrange="-1 1"', None),
        ('ctrlrange="-1 1"', "^actuator b has no velocity limit above 0"),
        ('user="2"', "^actuator b has no control range"),
    ],
)
def test_an_actuator_without_a_limit_is_named(wrong, says):
    """One of two: what the other says does not count for it, and no limit is not a limit of 0."""
    joint = '<body><joint name="{0}"/><geom size="0.1"/></body>'
    model = mujoco.MjModel.from_xml_string(
        f"<mujoco><worldbody>{joint.format('a')}{joint.format('b')}</worldbody><actuator>"
        f'<position name="a" joint="a" user="2" ctrlrange="-1 1"/><position name="b" joint="b" {wrong}/>'
        "</actuator></mujoco>"
    )
    if says is None:
        assert World(model, 0.02).velocity_limit.tolist() == [2, 2]
        return
    with pytest.raises(SimulationError, match=says):
        World(model, 0.02)

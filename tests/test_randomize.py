"""Domain randomisation: nominal changes nothing, each range does what it says, an episode's draw can be looked up."""

import dataclasses
import json

import mujoco
import numpy as np
import pytest
from toys import untrained_policy

from flow_policy_rl import cli
from sim.errors import SimulationError
from sim.randomize import (
    PRESETS,
    Randomization,
    RandomizedVecEnv,
    Randomizer,
    make_env,
    preset,
)
from sim.tasks import TASKS, make_task
from sim.vec_env import VecEnv

SEEDS = [3, 4, 5]


@pytest.fixture(scope="module")
def task():
    return make_task("lift")


def hold(env: VecEnv, steps: int = 8) -> np.ndarray:
    return np.tile(env.command[:, None], (1, steps, 1))


def swing(env: VecEnv, steps: int = 8) -> np.ndarray:
    """Away from home, slowly enough for the velocity limits."""
    way = np.linspace(0, 0.3, steps + 1)[1:, None] * ([1.0] * 7 + [0.0])
    return hold(env, steps) + way


def randomized(task, **ranges) -> RandomizedVecEnv:
    env = RandomizedVecEnv(task, len(SEEDS), randomization=Randomization(**ranges))
    env.first = env.reset(SEEDS)
    return env


@pytest.mark.parametrize("name", ["lift", "hopper"])
def test_nominal_is_the_plain_environment_bit_for_bit(name):
    task = make_task(name)
    plain, nominal = VecEnv(task, 3), RandomizedVecEnv(task, 3, randomization=Randomization())
    plain.reset(SEEDS), nominal.reset(SEEDS)
    low, high = task.world.target_low, task.world.target_high
    for k in range(4):
        actions = np.random.default_rng(k).uniform(low, high, (3, 6, len(low)))
        one, other = plain.step(actions), nominal.step(actions)
        assert np.array_equal(one.states, other.states)
        assert np.array_equal(one.reward, other.reward)
        assert all(np.array_equal(one.obs[f], other.obs[f]) for f in one.obs)
    plain.close(), nominal.close()


@pytest.mark.parametrize("name", ["mild", "hard"])
def test_a_draw_depends_on_the_seed_alone_and_leaves_the_start_state_alone(task, name):
    config = preset(name, task)
    many = RandomizedVecEnv(task, 3, randomization=config)
    one = RandomizedVecEnv(task, 1, randomization=config, num_threads=1)
    plain = VecEnv(task, 3)
    many.reset(SEEDS), one.reset([SEEDS[1]]), plain.reset(SEEDS)
    assert np.array_equal(many.state, plain.state)
    looked_up = Randomizer(task, config).for_seed(SEEDS[1])
    assert set(looked_up) == {f.name for f in dataclasses.fields(Randomization)}
    for key, value in looked_up.items():
        assert np.array_equal(many.draws[1][key], value)
        low, high = getattr(config, key)
        assert low == high or not np.array_equal(many.draws[0][key], value)
        assert (np.asarray(value) >= low).all()
        assert (np.asarray(value) <= high).all()
    steps = many.step(swing(many)), one.step(swing(one))
    assert np.array_equal(steps[0].states[1], steps[1].states[0])
    assert all(np.array_equal(steps[0].obs[f][1], steps[1].obs[f][0]) for f in steps[0].obs)


def test_models_get_what_was_drawn_and_nothing_remains_of_it(task):
    randomizer = Randomizer(task, preset("hard", task))
    model = make_task("lift").world.model
    nominal = randomizer.nominal
    draw = randomizer.draw(np.random.default_rng(0))
    randomizer.apply(model, draw)
    cube = nominal.body("cube").id
    size = draw["object_size"][0]
    geom = nominal.body("cube").geomadr[0]
    assert np.allclose(model.geom_size[geom], nominal.geom_size[geom] * size)
    expected = nominal.body_mass[cube] * draw["mass"][cube] * size**3
    assert model.body_mass[cube] == pytest.approx(expected)
    expected = nominal.body_inertia * draw["mass"][:, None]
    expected[cube] *= size**5
    assert np.allclose(model.body_inertia, expected, rtol=1e-12)
    gain = draw["gain"][:, None]  # of a servo: its force stays zero where its target is met
    assert np.ptp(gain) > 0
    assert np.allclose(model.actuator_gainprm, nominal.actuator_gainprm * gain)
    assert np.allclose(model.actuator_biasprm, nominal.actuator_biasprm * gain)
    assert np.allclose(model.geom_friction, nominal.geom_friction * draw["friction"])
    assert np.allclose(model.dof_damping, nominal.dof_damping * draw["damping"])
    assert model.body_subtreemass[0] == pytest.approx(model.body_mass.sum())  # constants follow
    turn = np.zeros(3)
    mujoco.mju_subQuat(turn, model.cam_quat[0], nominal.cam_quat[0])
    assert np.allclose(turn, draw["camera_turn"][0], atol=1e-9)
    randomizer.apply(model, Randomizer(task, Randomization()).draw(np.random.default_rng(0)))
    for name in ("body_mass", "body_inertia", "geom_size", "geom_rbound", "cam_quat", "geom_rgba",
                 "actuator_gainprm", "actuator_biasprm", "dof_invweight0", "light_diffuse"):  # fmt: skip
        assert np.allclose(getattr(model, name), getattr(nominal, name), rtol=1e-9), name


def test_an_object_that_grows_keeps_its_balance():
    """The handle of the nut puts its middle of mass beside its origin."""
    task, size = make_task("insert"), 1.03
    randomizer = Randomizer(task, Randomization(object_size=(size, size)))
    model, nut = task.world.model, task.world.model.body("nut").id
    randomizer.apply(model, randomizer.draw(np.random.default_rng(0)))
    assert abs(randomizer.nominal.body_ipos[nut, 0]) > 0.01
    assert np.allclose(model.body_ipos[nut], size * randomizer.nominal.body_ipos[nut])
    randomizer.apply(model, Randomizer(task, Randomization()).draw(np.random.default_rng(0)))
    assert np.allclose(model.body_ipos, randomizer.nominal.body_ipos)


def test_latency_and_jitter_shift_what_the_arm_does(task):
    physics = task.world.physics_dt
    plain, late = VecEnv(task, 3), randomized(task, action_latency=(4 * physics, 4 * physics))
    plain.reset(SEEDS)
    joint = task.world.joint_qpos[0]
    one, other = plain.step(swing(plain)), late.step(swing(late))
    # The arm lags by 4 physics steps of a ramp of 0.3 rad in 8 control steps.
    lag = task.world.qpos(one.states - other.states)[:, -1, joint]
    assert np.allclose(lag, 0.3 / 8 / task.control_dt * 4 * physics, rtol=0.1)
    # What was still under way arrives in the next chunk.
    one, other = plain.step(hold(plain)), late.step(hold(late))
    assert np.allclose(
        task.world.qpos(one.states)[:, -1], task.world.qpos(other.states)[:, -1], atol=2e-3
    )


@pytest.mark.parametrize("name", ["hopper", "ant"])
def test_a_held_control_that_comes_late_changes_within_the_control_step(name):
    """Latency of three physics steps, across two chunks, against `mj_step` with a queue."""
    task = make_task(name)
    world, late = task.world, 3
    env = randomized(task, action_latency=(late * world.physics_dt, late * world.physics_dt))
    rng = np.random.default_rng(0)
    actions = rng.uniform(-0.1, 0.1, (2, len(SEEDS), 2, world.model.nu))
    start = env.state.copy()
    states = np.concatenate([env.step(chunk).states for chunk in actions], axis=1)
    for i, row in enumerate(start):
        data = mujoco.MjData(world.model)
        world.write(row, data)
        sent = np.repeat(actions[:, i].reshape(-1, world.model.nu), world.decimation, axis=0)
        sent = np.concatenate([np.zeros((late, world.model.nu)), sent])
        for step in range(4 * world.decimation):
            data.ctrl[:] = sent[step]
            mujoco.mj_step(world.model, data)
        assert np.allclose(world.qpos(states[i, -1]), data.qpos, rtol=0, atol=1e-9)


def test_jitter_makes_each_action_late_by_its_own_share(task):
    """Of a steady ramp every control comes as it was sent up to half a control step ago, which the action alone
    decides."""
    steps, decimation = 200, task.world.decimation
    env = randomized(task, rate_jitter=(0.5, 0.5))
    executed, _ = env._controls(env.command, swing(env, steps))
    prompt, _ = task.world.controls(env.command, swing(env, steps))
    slope = 0.3 / steps / decimation
    late = ((prompt - executed)[..., 0] / slope).reshape(len(SEEDS), steps, decimation)
    assert late.min() > -1e-6
    late = late[:, 1:]  # before the first action the arm stands still
    assert np.allclose(late, np.round(late), atol=1e-6)
    assert np.allclose(late, late[..., :1], atol=1e-6)
    counts = np.bincount(np.round(late[..., 0]).astype(int).ravel(), minlength=decimation // 2 + 1)
    # Uniform from 0 to 5 physics steps, rounded: the ends get half.
    assert counts.tolist() == pytest.approx(
        [counts.sum() / 10 * share for share in (1, 2, 2, 2, 2, 1)], abs=35
    )


def test_lost_actions_leave_the_last_one_in_force(task):
    env = randomized(task, packet_loss=(1.0, 1.0))
    start = env.command.copy()
    step = env.step(swing(env))
    assert np.array_equal(step.commands, np.repeat(start[:, None], 8, axis=1))


class FirstArrives:
    """A generator by which all actions but the first are lost."""

    def __init__(self):
        self.first = True

    def random(self, count: int) -> np.ndarray:
        drawn = np.zeros(count)
        drawn[0], self.first = self.first, False
        return drawn

    def standard_normal(self, shape) -> np.ndarray:
        return np.zeros(shape)


def test_after_a_lost_action_the_arm_goes_on_to_the_last_target_whatever_the_chunks(task):
    """A target too far for one control step."""
    ends = []
    for chunk in (4, 2, 1):
        env = randomized(task, packet_loss=(0.5, 0.5))
        env._rngs = [FirstArrives() for _ in SEEDS]
        start, far = env.command[:, 0].copy(), hold(env, 4) + [1.0, *[0.0] * 7]
        steps = [env.step(far[:, h : h + chunk]) for h in range(0, 4, chunk)]
        ends.append(steps[-1].commands[:, -1, 0] - start)
        env.close()
    assert np.allclose(ends, 4 * task.world.velocity_limit[0] * task.control_dt)


def test_observations_come_late_across_chunks(task):
    """Delayed by two control steps, with chunks of one."""
    env = randomized(task, observation_delay=(2 * task.control_dt, 2 * task.control_dt))
    moves, shown, true = swing(env, 6), [env.first], [task.observe(env.state)]
    for h in range(6):
        step = env.step(moves[:, h : h + 1])
        shown.append(step.obs)
        true.append(task.observe(step.states[:, 0]))
    for h, obs in enumerate(shown):
        assert np.array_equal(obs["joint_pos"], true[max(h - 2, 0)]["joint_pos"])


@pytest.mark.parametrize("late", [0, 1, 3, 10, 24])
@pytest.mark.parametrize("chunk", [1, 4])
def test_a_cube_that_drifts_is_seen_where_it_was(task, late, chunk):
    """Closed form: without gravity, at 0.1 m/s, it is seen where it was `late` physics steps ago, or began."""
    world, speed = task.world, 0.1
    delay = late * world.physics_dt
    env = randomized(task, observation_delay=(delay, delay + 0.4 * world.physics_dt))
    env.state[:, 1:4] = 0.0, 0.7, 0.1  # in the air beside the table
    qvel = world.qvel(env.state)
    qvel[:] = 0
    qvel[:, world.model.joint("cube").dofadr[0]] = speed
    for model in env.models:
        model.opt.gravity[:] = 0
    env._past[:] = env.state[:, None]
    start = env.state[:, 1].copy()
    for k in range(1, 12 // chunk + 1):
        obs = env.step(hold(env, chunk)).obs
        gone = speed * max(0.0, k * chunk * task.control_dt - delay)
        assert np.allclose(obs["object_pose"][:, 0], start + gone, rtol=0, atol=1e-9)
    env.close()


@pytest.mark.parametrize("late", [1.5, 2])
@pytest.mark.parametrize("name", ["hopper", "ant", "kitchen", "reach"])
def test_late_observations_leave_the_physics_alone(name, late):
    """Rows, rewards and ends bit for bit, with every kind of backend; an episode is first seen as it starts."""
    task = make_task(name)
    delay, field = late * task.control_dt, task.obs_fields[0].name
    plain, late = VecEnv(task, 3), randomized(task, observation_delay=(delay, delay))
    plain.reset(SEEDS)
    moving = slice(1 + task.world.model.nq + task.world.model.nv)
    rng, shape = np.random.default_rng(0), (3, 4, len(task.world.joint_names))
    for _ in range(8):
        actions = rng.uniform(task.world.target_low, task.world.target_high, shape)
        one, other = plain.step(actions), late.step(actions)
        assert np.array_equal(one.valid, other.valid)
        assert np.array_equal(one.states[one.valid][:, moving], other.states[one.valid][:, moving])
        assert np.array_equal(one.reward, other.reward)
        assert np.array_equal(one.ended, other.ended)
        same = (other.obs[field] == task.observe(late.state)[field]).all(axis=1)
        assert np.array_equal(same, one.ended)
        if one.ended.any():
            break  # `reset(seeds)` gives the two the same first episodes only
        near = task.observe(one.states[:, 1:3])[field]  # two control steps ago, and one
        if (
            delay == 2 * task.control_dt or task.feedback
        ):  # the kitchen's sensors read once in a control step
            assert np.array_equal(other.obs[field], near[:, 0])
        else:
            most = np.abs(np.ptp(near, axis=1)).max()
            assert np.abs(other.obs[field] - near.mean(axis=1)).max() < most
    plain.close(), late.close()


def test_an_environment_that_breaks_down_is_seen_as_it_was(task):
    env = randomized(task, observation_delay=(0.01, 0.01))
    env.dump_dir = None
    before = task.observe(env.state.copy())["object_pose"]
    task.world.qvel(env.state[1])[:] = np.nan
    step = env.step(hold(env, 4))
    assert step.diverged.tolist() == [False, True, False]
    assert np.isfinite(step.final_obs["joint_pos"]).all()
    assert np.allclose(step.final_obs["object_pose"][1], before[1])


def test_noise_has_the_spread_that_was_asked_for(task):
    randomizer = Randomizer(task, Randomization(observation_noise=(0.01, 0.01)))
    state = task.initial_state(np.random.default_rng(0))
    obs, rng = task.observe(state), np.random.default_rng(1)
    draw = randomizer.draw(rng)
    seen = [randomizer.sense(obs, draw, rng) for _ in range(2000)]
    for field, spread in (("joint_pos", 0.01), ("joint_vel", 0.1)):
        error = np.stack([s[field] for s in seen]) - obs[field]
        assert error.std() == pytest.approx(spread, rel=0.05)
    poses = np.stack([s["object_pose"] for s in seen])
    assert (poses[:, :3] - obs["object_pose"][:3]).std() == pytest.approx(0.01, rel=0.05)
    assert np.allclose(np.linalg.norm(poses[:, 3:], axis=1), 1)
    assert (poses[:, 6] >= 0).all()
    turns = np.empty((len(seen), 3))
    wxyz = [3, 0, 1, 2]
    for turn, quat in zip(turns, poses[:, 3:], strict=True):
        mujoco.mju_subQuat(turn, quat[wxyz], obs["object_pose"][3:][wxyz])
    assert turns.std(axis=0) == pytest.approx([0.01] * 3, rel=0.05)
    assert turns.mean(axis=0) == pytest.approx([0.0] * 3, abs=0.001)


def test_joint_offsets_are_seen_and_followed(task):
    """Where the encoders err, the arm reports its target and stands elsewhere."""
    env = randomized(task, joint_offset=(0.01, 0.01))
    target = hold(env, 40)
    for _ in range(2):
        step = env.step(target)
    truth = task.observe(step.states[:, -1])["joint_pos"]
    assert np.allclose(step.obs["joint_pos"] - truth, 0.01)
    assert np.allclose(step.obs["joint_pos"], target[:, -1, :7], atol=3e-3)


def test_cameras_show_the_world_of_their_environment():
    task = make_task("lift", cameras=True)
    env = RandomizedVecEnv(
        task, 2, randomization=Randomization(light=(0.3, 1.5), color=(-0.2, 0.2))
    )
    obs = env.reset([0, 0])
    assert np.array_equal(*obs["front_image"])
    obs = env.reset([0, 1])
    assert np.abs(obs["front_image"][0].astype(int) - obs["front_image"][1]).mean() > 5
    env.close()


def pictures(name: str, **ranges) -> np.ndarray:
    """What the policy sees first, nominally and randomised, (2, height, width, 3)."""
    task = make_task(name, cameras=True)
    field = next(f.name for f in task.obs_fields if f.kind == "image")
    seen = []
    for config in (Randomization(), Randomization(**ranges)):
        env = RandomizedVecEnv(task, 1, randomization=config, num_threads=1)
        seen.append(env.reset([7])[field][0].astype(int))
        env.close()
    return np.stack(seen)


@pytest.mark.parametrize("name", ["hopper", "ant", "kitchen", "lift"])
@pytest.mark.parametrize("what", ["camera_shift", "camera_turn"])
def test_cameras_are_moved_those_too_that_follow_a_walker(name, what):
    nominal, moved = pictures(name, **{what: (0.2, 0.2)})
    assert np.abs(moved - nominal).mean() > 3


@pytest.mark.parametrize("name", ["hopper", "kitchen", "lift"])
@pytest.mark.parametrize("shift", [-0.03, 0.03])
def test_a_small_shift_of_colors_is_small_where_materials_have_them_too(name, shift):
    """Lamps may double it; what is white stays white."""
    nominal, shifted = pictures(name, color=(shift, shift))
    change = np.sign(shift) * (shifted - nominal)
    assert 1 < change.mean() < 2 * 255 * 0.03
    assert change.min() >= -1


def test_no_lamp_is_left_out():
    nominal, dark = pictures("lift", light=(1e-6, 1e-6))
    assert nominal.mean() > 50
    assert dark.max() <= 1


@pytest.mark.parametrize("name", ["ant", "kitchen", "lift", "one_leg"])
def test_pictures_are_those_of_the_model_alone(name):
    """Nothing is left of the environment that was drawn before, nothing of a model is overlooked."""
    task = make_task(name, cameras=True)
    field = next(f for f in task.obs_fields if f.kind == "image")
    env = RandomizedVecEnv(task, 2, randomization=preset("hard", task), num_threads=1)
    env.randomizer.config = dataclasses.replace(preset("hard", task), observation_noise=(0, 0))
    seen = env.reset([0, 1])[field.name]
    for picture, model, state in zip(seen, env.models, env.state, strict=True):
        data = mujoco.MjData(model)
        task.world.write(state, data)
        mujoco.mj_forward(model, data)
        with mujoco.Renderer(model, *field.resolution) as alone:
            alone.update_scene(data, field.source)
            assert np.array_equal(picture, alone.render())
    env.close()


@pytest.mark.parametrize("name", ["mild", "hard"])
def test_a_snapshot_goes_on_bit_for_bit(task, name):
    """In the middle of episodes, into environments that have seen others, over ends of episodes."""
    first, other = (make_env(task, 3, name, seed=seed) for seed in (0, 1))
    first.reset(), other.reset()
    first.step(swing(first)), other.step(swing(other))
    first._steps[1] = task.episode_steps - 5
    other.restore({k: v.copy() for k, v in first.snapshot().items()})
    other.seed = first.seed
    for _ in range(3):
        one, two = first.step(hold(first)), other.step(hold(other))
        assert np.array_equal(one.states, two.states)
        assert np.array_equal(one.commands, two.commands)
        assert all(np.array_equal(one.obs[f], two.obs[f]) for f in one.obs)
    assert all(np.array_equal(first.draws[1][k], other.draws[1][k]) for k in first.draws[1])


def test_each_episode_draws_anew(task):
    env = make_env(task, 2, "mild")
    env.reset()
    before = [draw["mass"] for draw in env.draws]
    env._steps[0] = task.episode_steps - 1
    env.step(hold(env, 1))
    assert not np.array_equal(env.draws[0]["mass"], before[0])
    assert np.array_equal(env.draws[1]["mass"], before[1])


def test_nominal_environments_share_one_model(task):
    env = make_env(task, 2, "nominal")
    assert env.models is None
    assert env.draws == [{}, {}]
    with pytest.raises(
        SimulationError, match=r"unknown randomisation 'milt' \(did you mean 'mild'"
    ):
        make_env(task, 2, "milt")


def test_bad_ranges_are_refused(task):
    with pytest.raises(SimulationError, match="mass"):
        Randomization(mass=(1.2, 0.8))
    with pytest.raises(SimulationError, match="friction"):
        Randomization(friction=(0.0, 1.0))
    with pytest.raises(SimulationError, match="packet_loss"):
        Randomization(packet_loss=(0.0, 1.5))
    with pytest.raises(SimulationError, match="did you mean 'mild'") as error:
        preset("mildd", task)
    assert all(name in str(error.value) for name in PRESETS)


def test_eval_randomize_prints_a_table_and_a_heat_map(small_checkpoint, tmp_path, capsys):
    flags = ["--policy", str(small_checkpoint), "--episodes", "3", "--randomize"]
    flags += ["--randomize-episodes", "2", "--out", str(tmp_path)]
    assert cli.main(["eval", *flags, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["randomization"] for row in result["robustness"]] == list(PRESETS)
    assert result["robustness"][0]["return_mean"] == pytest.approx(result["return_mean"], rel=1e-9)
    assert len(result["heat_map"]) == 16
    records = [json.loads(line) for line in (tmp_path / "robustness.jsonl").open()]
    assert len(records) == 9
    assert all(
        set(r["draw"]) == {f.name for f in dataclasses.fields(Randomization)} for r in records
    )
    assert "action latency" in (tmp_path / "robustness.html").read_text()


@pytest.fixture
def small_checkpoint(tmp_path):
    """A fresh policy for hopper, whose episodes are short."""
    from flow_policy_rl import checkpoint

    task = make_task("hopper")
    path = tmp_path / "policy.safetensors"
    checkpoint.save(path, untrained_policy(task))
    return path


@pytest.mark.parametrize("name", TASKS)
def test_every_task_can_be_randomized(name):
    task = make_task(name)
    env = RandomizedVecEnv(task, 2, randomization=preset("hard", task), dump_dir=None)
    env.reset(SEEDS[:2])
    for _ in range(2):
        step = env.step(np.tile(env.command[:, None], (1, 3, 1)))
        assert not step.diverged.any()
        assert all(np.isfinite(values).all() for values in step.obs.values())
    env.close()

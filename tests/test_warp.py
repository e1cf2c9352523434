"""MuJoCo Warp on its CPU device against the CPU backend: what would run on a GPU, in 32 bits."""

import copy
import dataclasses
import re
import sys

import mujoco
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from flow_policy_rl import cli, collect, doctor, evaluate, train, train_config
from flow_policy_rl.bench import sim as bench
from flow_policy_rl.data import demonstrations
from sim.backends import make_backend
from sim.errors import SimulationError
from sim.randomize import Randomization, RandomizedVecEnv, Randomizer, hard, make_env
from sim.tasks import TASKS, make_task
from sim.vec_env import VecEnv
from sim.world import World

# Largest difference in qpos (m, rad) and qvel after two control steps under random actions, from states at rest.
EXACT = (1e-5, 1e-3)  # rounding
BOXES = (1e-4, 2e-2)  # rounding decides whether a resting corner touches
ROCKS = (2e-2, 2.0)  # fewer contact points than MuJoCo has, so that what stands there rocks
PYRAMIDS = (5e-2, 3.0)  # other axes of the friction pyramid under capsules
TOLERANCES = {
    **dict.fromkeys(("hopper", "walker2d", "halfcheetah", "humanoid"), EXACT),
    **dict.fromkeys(
        ("reach", "lift", "stack", "insert", "transport", "lamp", "round_table"), BOXES
    ),
    **dict.fromkeys(("one_leg", "push", "pick_place", "kitchen"), ROCKS),
    "ant": PYRAMIDS,
}
SLOW = sorted(set(TOLERANCES) - {"lift"})  # each compiles kernels of its own
ENVS = 4


@pytest.fixture(scope="module")
def warp():
    pytest.importorskip("mujoco_warp", reason="MuJoCo Warp is not installed: pip install '.[warp]'")
    from sim.backends import warp as module

    return module


@pytest.fixture(scope="module")
def lift():
    return make_task("lift")


def at_rest(task, num_envs: int = ENVS) -> VecEnv:
    """Some way into episodes, when what was set down has settled."""
    env = VecEnv(task, num_envs, num_threads=1, dump_dir=None)
    env.reset(range(num_envs))
    for _ in range(3):
        env.step(np.repeat(env.command[:, None], 4, axis=1))
    return env


def small_actions(env: VecEnv, horizon: int = 2) -> np.ndarray:
    world, rng = env.world, np.random.default_rng(0)
    shape = (env.num_envs, horizon, len(world.joint_names))
    if world.interface == "control":
        return rng.uniform(world.target_low, world.target_high, shape)
    return env.command[:, None] + rng.uniform(-0.05, 0.05, shape)


def same_start(env: VecEnv, other: VecEnv) -> None:
    other.reset(range(other.num_envs))
    other.restore(env.snapshot())


@pytest.mark.parametrize("name", ["lift", *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)])
def test_short_rollouts_agree_with_the_cpu_backend(warp, name):
    task = make_task(name)
    plain = at_rest(task)
    other = VecEnv(task, ENVS, backend="warp-cpu")
    same_start(plain, other)
    plain.models = [warp.adapted(task.world.model)] * ENVS  # the same solver on both sides
    actions = small_actions(plain)
    one, two = plain.step(actions), other.step(actions)
    position, velocity = TOLERANCES[name]
    qpos, qvel = task.world.qpos, task.world.qvel
    off = [np.abs(part(one.states) - part(two.states)).max() for part in (qpos, qvel)]
    print("{}: measured {:.0e} m or rad, {:.0e} per second".format(name, *off))  # pytest -rP
    assert np.allclose(qpos(one.states), qpos(two.states), rtol=0, atol=position)
    assert np.allclose(qvel(one.states), qvel(two.states), rtol=0, atol=velocity)
    assert np.allclose(one.states[..., 0], two.states[..., 0], rtol=0, atol=1e-9)
    for name in one.obs:
        if name in ("joint_pos", "gripper_pos", "qpos", "robot_pos"):
            assert np.allclose(one.obs[name], two.obs[name], rtol=0, atol=position)
    for part in ("valid", "terminated", "truncated", "success"):
        assert np.array_equal(getattr(one, part), getattr(two, part))
    for output, (where, _) in task.world.outputs.items():
        if TOLERANCES[task.name] is EXACT:
            expected = one.states[..., where]
            scale = 1e-4 * np.abs(expected).max()
            assert np.allclose(two.states[..., where], expected, rtol=0, atol=scale), output
    plain.close(), other.close()


def test_every_task_has_a_tolerance():
    assert set(TOLERANCES) == set(TASKS)


def test_full_buffers_grow_and_the_chunk_is_computed_again(warp, lift, caplog, capfd):
    env = at_rest(lift)
    world = lift.world
    controls, _ = world.controls(env.command, small_actions(env))
    backend = make_backend(world, name="warp-cpu")
    wide, narrow = np.empty((2, ENVS, 2, world.state_size))
    backend.step(env.state, controls, wide)
    backend._allocate(ENVS, contacts=1, constraints=4)
    backend.step(env.state, controls, narrow)
    assert np.array_equal(wide, narrow)
    assert "do not fit into 1 and 4; computing the chunk again" in caplog.text
    assert backend._data.njmax > 4
    caplog.clear()
    backend.step(env.state, controls, narrow)
    assert caplog.text == ""
    printed = capfd.readouterr()
    assert "overflow" in printed.err  # MuJoCo Warp's own words
    assert printed.out == ""  # which belongs to --json


def test_tensors_of_the_device_are_taken_and_filled_in_place(warp, lift):
    env = at_rest(lift)
    controls, _ = lift.world.controls(env.command, small_actions(env))
    backend = make_backend(lift.world, name="warp-cpu")
    rows = np.empty((ENVS, 2, lift.world.state_size))
    backend.step(env.state, controls, rows)
    tensors = [torch.as_tensor(a, dtype=torch.float32) for a in (env.state, controls)]
    backend.step(*tensors, filled := torch.empty(rows.shape))
    assert np.allclose(filled.numpy(), rows, rtol=0, atol=1e-6)
    assert np.array_equal(filled.numpy()[..., 1:], rows[..., 1:])


@pytest.mark.parametrize(
    "name",
    [
        "lift",
        *(
            pytest.param(n, marks=pytest.mark.slow)
            for n in ("hopper", "walker2d", "halfcheetah", "ant")
        ),
    ],
)
def test_a_step_of_the_task_can_stay_on_the_device(warp, name):
    """Controls, physics, observation and reward of tensors, against the environment, which goes through NumPy."""
    task = make_task(name)
    world, env = task.world, at_rest(task)
    other = VecEnv(task, ENVS, backend="warp-cpu")
    same_start(env, other)
    actions = small_actions(env)
    step = other.step(actions)
    state, command, given = map(torch.as_tensor, (env.state, env.command, actions))
    controls, _ = world.controls(command, given)
    states = torch.empty((ENVS, 2, world.state_size), dtype=torch.float64)
    other.backend.step(state, controls, states)
    for field, values in task.observe(states[:, -1]).items():
        assert np.array_equal(values.numpy(), step.final_obs[field])
    before = torch.cat([state[:, None], states[:, :-1]], dim=1)
    won = torch.zeros(states.shape[:2], dtype=torch.bool)
    for term, values in task.reward_terms(before, given, states, won).items():
        assert np.allclose(values.numpy(), step.reward_terms[term], rtol=1e-12)


def test_its_pictures_show_what_mujocos_show(warp):
    """Same scene and camera, another light: edges and colours agree, brightness does not."""
    task = make_task("lift", cameras=True)
    envs = [VecEnv(task, 3, backend=name) for name in ("cpu", "warp-cpu-pixels")]
    one, other = (env.reset(range(3))["front_image"].astype(int) for env in envs)
    assert one.shape == other.shape
    off = np.abs(one - other).max(axis=-1)
    print(f"{(off > 30).mean():.3f} of the pixels differ by more than 30")  # pytest -rP
    assert (off > 30).mean() < 0.15

    def cubes(pictures: np.ndarray) -> np.ndarray:
        """Middle of what is red, (3, 2) pixels."""
        red = (pictures[..., 0] > 60) & (pictures[..., 0] > 3 * pictures[..., 1])
        return np.stack([np.argwhere(seen).mean(axis=0) for seen in red])

    assert np.abs(cubes(one) - cubes(other)).max() < 1.0
    assert np.abs(cubes(one)[0] - cubes(one)[1]).max() > 5
    alone = VecEnv(task, 1, backend="warp-cpu-pixels")
    assert np.array_equal(alone.reset([2])["front_image"][0], other[2])
    with pytest.raises(SimulationError, match="no randomised worlds"):
        make_env(task, 2, "mild", backend="warp-cpu-pixels").reset()
    for env in (*envs, alone):
        env.close()


def test_a_camera_that_is_not_there_is_named(warp, lift):
    renderer = warp.WarpRenderer(lift.world, 8, 8, "cpu")
    with pytest.raises(SimulationError, match="unknown camera 'side'; valid: front, overview"):
        renderer.batch(lift.initial_state(np.random.default_rng(0))[None], "side")


def test_more_than_any_buffer_holds_is_an_error(warp, lift, monkeypatch):
    env = at_rest(lift)
    controls, _ = lift.world.controls(env.command, small_actions(env))
    backend = make_backend(lift.world, name="warp-cpu")
    monkeypatch.setattr(warp, "MOST_ROWS", 8)
    backend.step(env.state, controls, out := np.empty((ENVS, 2, lift.world.state_size)))
    backend._allocate(ENVS, contacts=1, constraints=4)
    with pytest.raises(SimulationError, match=r"contacts and \d+ constraints in one environment"):
        backend.step(env.state, controls, out)


def test_an_environment_that_breaks_down_leaves_the_others_alone(warp, lift):
    envs = [VecEnv(lift, 3, backend="warp-cpu", dump_dir=None) for _ in range(2)]
    for env in envs:
        env.reset(range(3))
    lift.world.qpos(envs[0].state)[1, lift.world.joint_qpos[0]] = np.nan
    actions = small_actions(envs[1], 1)
    broken, whole = (env.step(actions) for env in envs)
    assert broken.diverged.tolist() == [False, True, False]
    assert np.array_equal(broken.states[[0, 2]], whole.states[[0, 2]])


def test_randomised_models_differ_as_on_the_cpu(warp, lift):
    ranges = Randomization(
        mass=(0.5, 2.0), gain=(0.7, 1.3), damping=(0.5, 2.0), object_size=(0.9, 1.1)
    )
    envs = [
        RandomizedVecEnv(lift, 3, randomization=ranges, backend=backend)
        for backend in ("cpu", "warp-cpu")
    ]
    nominal = VecEnv(lift, 3)
    joints = lift.world.joint_qpos[:7]
    after = []
    for _ in range(2):  # an episode's values replace those of the one before
        for env in (*envs, nominal):
            env.reset()
            moved = env.step(env.command[:, None] + 0.1 * np.ones((1, 2, 1)))
            after.append(lift.world.qpos(moved.states)[:, -1, joints])
        one, two, plain = after[-3:]
        assert np.allclose(one, two, rtol=0, atol=1e-5)
        assert np.abs(two - plain).max() > 1e-3
    assert np.abs(after[1] - after[4]).max() > 1e-3
    controls, _ = lift.world.controls(nominal.command, small_actions(nominal))
    fresh, used = make_backend(lift.world, name="warp-cpu"), envs[1].backend
    rows = np.empty((2, 3, 2, lift.world.state_size))
    for backend, out in zip((fresh, used), rows, strict=True):
        backend.step(nominal.state, controls, out)
    assert np.array_equal(*rows)  # nothing is left of them


@pytest.mark.parametrize("name", ["insert", "humanoid"])
def test_all_that_randomisation_changes_of_the_physics_varies(warp, name):
    """Also what follows: where the mass of a larger nut is, what a heavier humanoid's tendons weigh."""
    from mujoco_warp import Model

    task = make_task(name)
    randomizer = Randomizer(task, hard(task))
    drawn = copy.copy(task.world.model)
    randomizer.apply(drawn, randomizer.draw(np.random.default_rng(0)))
    looks = re.compile("cam_|light_|mat_|geom_rgba")
    changed = {
        field
        for field in Model.__dataclass_fields__
        if isinstance(getattr(drawn, field, None), np.ndarray) and not looks.match(field)
        if not np.array_equal(getattr(drawn, field), getattr(randomizer.nominal, field))
    }
    assert changed >= {"body_mass", "body_ipos"}
    assert changed <= set(warp.VARIED)


def test_what_warp_lacks_is_named(warp):
    spec = mujoco.MjSpec.from_string(
        "<mujoco model='slippery'><option noslip_iterations='3'/><worldbody><body><joint name='j'/>"
        "<geom size='.1'/></body></worldbody><actuator><motor joint='j' ctrlrange='-1 1'/></actuator></mujoco>"
    )
    with pytest.raises(SimulationError, match="cannot run model 'slippery': noslip solver not"):
        make_backend(World(spec, 0.01, interface="control"), name="warp-cpu")
    with pytest.raises(SimulationError, match=r"did you mean 'warp'\?"):
        make_backend(World(spec, 0.01, interface="control"), name="wrap")


def test_a_solver_that_warp_lacks_is_replaced_and_said_to_be(warp, caplog):
    model = mujoco.MjModel.from_xml_string("<mujoco><option solver='PGS'/></mujoco>")
    assert warp.adapted(model).opt.solver == mujoco.mjtSolver.mjSOL_NEWTON
    assert model.opt.solver == mujoco.mjtSolver.mjSOL_PGS
    assert "no PGS solver" in caplog.text


def test_without_a_gpu_one_line_says_so(warp, monkeypatch, capsys):
    monkeypatch.setattr(warp.wp, "is_cuda_available", lambda: False)
    assert cli.main(["eval", "--policy", "lift", "--episodes", "1", "--backend", "warp"]) == 2
    assert "backend 'warp' needs an NVIDIA GPU" in capsys.readouterr().err


def test_without_the_extra_one_line_says_so(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "sim.backends.warp", raising=False)
    monkeypatch.setitem(sys.modules, "warp", None)
    arguments = ["eval", "--policy", "lift", "--episodes", "1", "--backend", "warp-cpu"]
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "needs warp, which is not installed: pip install 'flow_policy_rl[warp]'" in error


def test_the_doctor_names_it_and_its_device(warp, monkeypatch):
    check = doctor.warp()
    assert check.ok or check.mend
    assert check.detail.startswith("MuJoCo Warp 3.9")
    assert "no GPU" in check.detail or "cuda:0" in check.detail
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    assert doctor.warp().ok  # it is optional
    assert "flow_policy_rl[warp]" in doctor.warp().detail


@pytest.mark.slow
def test_commands_run_on_it(warp, tmp_path, capsys):
    same, result = (
        evaluate.main(evaluate.Config("lift", episodes=4, num_envs=n, backend="warp-cpu"))
        for n in (3, 4)
    )
    assert same == result
    assert result["success_rate"] == 1.0
    out = tmp_path / "d.hdf5"
    collect.main(collect.Config("reach", out, episodes=2, num_envs=2, backend="warp-cpu"))
    assert demonstrations.load(out).provenance["backend"] == "warp-cpu"
    rates = bench.main(
        bench.Config("lift", num_envs=4, repeats=1, gymnasium=False, backend="warp-cpu")
    )
    assert rates["env_steps_per_s"] > 0
    flags = ["--task", "reach", "--run-dir", str(tmp_path / "run"), "--backend", "warp-cpu"]
    small = [
        "--ppo.num-iterations",
        "1",
        "--ppo.num-envs",
        "4",
        "--ppo.num-steps",
        "2",
        "--eval-every",
        "0",
    ]
    assert cli.main(["train", "gaussian_ppo", *flags, *small]) == 0
    assert (tmp_path / "run" / train.POLICY_FILE).is_file()


@pytest.mark.slow
def test_a_resumed_run_goes_on_bit_for_bit(warp, tmp_path):
    def run(folder: str, iterations: int, resume: bool = False) -> dict:
        settings = train_config.default_config("gaussian_ppo", "hopper", from_scratch=True)
        ppo = dataclasses.replace(
            settings.ppo, num_iterations=iterations, num_envs=4, num_steps=4, num_minibatches=2
        )
        folder = tmp_path / folder
        train.main(
            dataclasses.replace(
                settings,
                ppo=ppo,
                run_dir=folder,
                eval_every=0,
                backend="warp-cpu",
                randomize="mild",
                resume=resume,
            )
        )
        return load_file(folder / "state.safetensors")

    whole = run("whole", 2)
    run("parts", 1)
    parts = run("parts", 2, resume=True)
    assert whole.keys() == parts.keys()
    assert [name for name in whole if not torch.equal(whole[name], parts[name])] == []

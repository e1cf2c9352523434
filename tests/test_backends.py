"""The two backends: exact, and independent of threads and batch bit for bit."""

import copy

import mujoco
import numpy as np
import pytest

from sim.backends import make_backend
from sim.backends.rollout import RolloutBackend
from sim.backends.threads import ThreadsBackend
from sim.errors import SimulationError
from sim.tasks import make_task
from sim.world import EQUALITIES, WARM_START, World

BALLS = """
<mujoco model="balls">
  <option timestep="0.002" integrator="RK4"/>
  <worldbody>
    <geom type="plane" size="5 5 .1"/>
    <body name="a" pos="0 0 .3"><joint name="slide" type="slide" axis="1 0 0" damping=".1"/>
      <joint name="drop" type="slide" axis="0 0 1"/><geom size=".1" condim="6" friction="1 .01 .01"/>
      <body name="b" pos="0 0 .2"><joint name="swing" type="hinge" axis="0 1 0"/>
        <geom type="capsule" size=".05" fromto="0 0 0 .3 0 0"/></body></body>
  </worldbody>
  <equality><joint joint1="swing" active="false"/></equality>
  <actuator><motor joint="slide" ctrlrange="-5 5"/><motor joint="swing" ctrlrange="-1 1"/></actuator>
</mujoco>
"""


def world(**options) -> World:
    return World(mujoco.MjSpec.from_string(BALLS), 0.01, interface="control", **options)


def step(backend, state: np.ndarray, controls: np.ndarray) -> np.ndarray:
    """States (N, H, state_size) at the ends of the control steps."""
    w = backend.world
    horizon = controls.shape[1] * w.steps_per_control // w.decimation
    out = np.empty((len(state), horizon, w.state_size))
    backend.step(state, controls, out)
    return out


def start(w: World, num_envs: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.stack([w.make_state(0.05 * rng.standard_normal(3)) for _ in range(num_envs)])


def actions(num_envs: int, steps: int) -> np.ndarray:
    return np.random.default_rng(1).uniform(-1, 1, (num_envs, steps, 2)) * [5, 1]


def test_threads_chunk_after_chunk_are_one_long_mj_step_loop():
    w = world(extra_state=WARM_START, outputs=("cfrc_ext", "xpos"))
    backend = make_backend(w, 2)
    assert isinstance(backend, ThreadsBackend)
    state, wanted = start(w, 3), actions(3, 60)
    chunks = []
    for k in range(0, 60, 4):
        chunks.append(step(backend, state, wanted[:, k : k + 4]))
        state = chunks[-1][:, -1]
    states = np.concatenate(chunks, axis=1)
    assert np.abs(w.output(states, "cfrc_ext")).max() > 1  # it does touch the floor
    first = start(w, 3)
    for env in range(3):
        data = mujoco.MjData(w.model)
        data.qpos[:] = w.qpos(first)[env]
        mujoco.mj_forward(w.model, data)
        for h in range(60):
            data.ctrl[:] = wanted[env, h]
            mujoco.mj_step(w.model, data, 5)
            mujoco.mj_rnePostConstraint(w.model, data)
            assert np.array_equal(w.qpos(states)[env, h], data.qpos)
            assert np.array_equal(w.qvel(states)[env, h], data.qvel)
            assert np.array_equal(w.output(states, "cfrc_ext")[env, h], data.cfrc_ext)
            assert np.array_equal(w.output(states, "xpos")[env, h], data.xpos)
    backend.close()


@pytest.mark.parametrize("options", [{}, {"extra_state": WARM_START}], ids=["rollout", "threads"])
def test_result_depends_on_neither_threads_nor_batch(options):
    w = world(**options)
    state, wanted = start(w, 21), actions(21, 12)
    results = []
    for num_envs, threads in ((21, 1), (21, 3), (1, 1)):
        backend = make_backend(w, threads)
        results.append(step(backend, state[:num_envs], wanted[:num_envs]))
        backend.close()
    assert np.array_equal(results[0], results[1])
    assert np.array_equal(results[0][:1], results[2])


def test_backends_agree_within_a_chunk():
    """From a cold start a rollout and the threads do the same physics, position targets or held controls."""
    task = make_task("lift")
    cold = world()
    for w, state, controls in (
        (cold, start(cold, 4), actions(4, 8)),
        (
            task.world,
            np.stack([task.initial_state(np.random.default_rng(s)) for s in range(4)]),
            np.random.default_rng(0).uniform(-1, 1, (4, 20, 8)),
        ),
    ):
        one, other = RolloutBackend(w, 1), ThreadsBackend(w, 1)
        assert np.array_equal(step(one, state, controls), step(other, state, controls))


def test_an_equality_is_part_of_the_state():
    w = world(extra_state=WARM_START | EQUALITIES)
    state = start(w, 2)
    w.part(state, EQUALITIES)[1] = 1
    backend = make_backend(w, 2)
    push = np.zeros((2, 30, 2)) + [0, 1]
    after = step(backend, state, push)[:, -1]
    assert w.part(after, EQUALITIES).tolist() == [[0], [1]]
    swing = w.qpos_address(["swing"])[0]
    assert abs(w.qpos(after)[0, swing]) > 0.3
    assert abs(w.qpos(after)[1, swing]) < 0.1
    backend.close()


def test_malformed_model_is_one_line(tmp_path):
    from sim.world import compile_model, load_spec

    broken = tmp_path / "broken.xml"
    broken.write_text("<mujoco><worldbody><geom type='cubus'/></worldbody></mujoco>")
    with pytest.raises(SimulationError, match="broken.xml.*cubus") as error:
        load_spec(broken)
    assert "\n" not in str(error.value)
    with pytest.raises(SimulationError, match="does not exist"):
        load_spec(tmp_path / "nothing.xml")
    spec = mujoco.MjSpec()
    spec.modelname = "hollow"
    spec.worldbody.add_body(name="b").add_joint(name="j")
    with pytest.raises(SimulationError, match="model 'hollow'.*mass") as error:
        compile_model(spec)
    assert "\n" not in str(error.value)
    with pytest.raises(SimulationError, match="no array 'cfrc_exd'"):
        world(outputs=("cfrc_exd",))


def test_whole_chunks_in_c_equal_the_loop_in_python():
    """A world with a warm start, with and without an output that makes the loop necessary."""
    whole, loop = world(extra_state=WARM_START), world(extra_state=WARM_START, outputs=("xpos",))
    state, wanted = start(whole, 5), actions(5, 24)
    wide = start(loop, 5)
    backends = make_backend(whole, 2), make_backend(loop, 2)
    for k in range(0, 24, 6):
        one = step(backends[0], state, wanted[:, k : k + 6])
        other = step(backends[1], wide, wanted[:, k : k + 6])
        size = whole.parts[int(WARM_START)].start
        assert np.array_equal(one[..., :size], other[..., :size])
        state, wide = one[:, -1], other[:, -1]
        assert np.array_equal(state, wide[:, : whole.state_size])  # the warm start too
    for backend in backends:
        backend.close()


@pytest.mark.parametrize("outputs", [(), ("xpos",)], ids=["whole", "loop"])
@pytest.mark.parametrize("horizon", [1, 4, 7])
def test_what_has_stopped_stays_and_the_others_go_on(outputs, horizon):
    """Without a look at who may stop every row is the same, until the look that finds an environment stopped."""
    w = world(extra_state=WARM_START, outputs=outputs)
    backend = make_backend(w, 2)
    state, wanted = start(w, 60), actions(60, horizon)
    plain, hinted = (np.empty((60, horizon, w.state_size)) for _ in range(2))
    models = [copy.copy(w.model) for _ in range(60)]  # each environment its own
    for i, model in enumerate(models):
        model.dof_damping[:] *= i
    backend.step(state, wanted, plain, models=models)  # several environments in each thread's block

    def stop(rows: np.ndarray) -> np.ndarray:
        return w.qpos(rows)[:, 0] > limit

    numbers = slice(0, w.parts[int(WARM_START)].start)
    asked = w.qpos(plain)[..., 0]
    for limit in (np.inf, np.quantile(asked, 0.5), -np.inf):
        backend.step(state, wanted, hinted, stop, models)
        for env in range(60):
            first = np.argmax(asked[env] > limit) if (asked[env] > limit).any() else horizon - 1
            upto = slice(first + 1), numbers
            assert np.array_equal(hinted[env][upto], plain[env][upto])
            repeats = (np.diff(hinted[env], axis=0) == 0).all(axis=1)  # of the row before
            met = (asked[env] > limit)[:-1]
            assert not (repeats & ~np.logical_or.accumulate(met)).any()
            if limit == -np.inf:
                assert repeats[first + 1 :].all()
                assert horizon < 3 or repeats.any()
        if limit == np.inf:
            assert np.array_equal(hinted[:, -1], plain[:, -1])  # the warm start too
    backend.close()

"""Evaluations: each seed is one whole episode, the same beside whatever others, and nothing is simulated in vain."""

import dataclasses

import numpy as np
import pytest

from flow_policy_rl.data.demonstrations import DemoLayout
from flow_policy_rl.errors import InputError, RunFailed
from flow_policy_rl.evaluate import Evaluation, check_fits, evaluate, text, wilson_interval
from flow_policy_rl.train_config import default_config
from flow_policy_rl.train_run import policy_spec
from sim.randomize import make_env
from sim.tasks import make_task
from sim.vec_env import VecEnv

SEEDS = range(10_000, 10_011)
H, EXECUTED = 4, 3


def stagger_about(obs, noise: np.ndarray) -> np.ndarray:
    """Chunks for Hopper, row by row: it falls, sooner or later. What is under way counts, where it is told."""
    seen = sum(np.sin(values.reshape(len(noise), -1)).sum(axis=1) for values in obs.values())
    return np.float32(np.clip(0.3 * noise + 0.1 * np.sin(9 * seen)[:, None, None], -1, 1))


def counted(env: VecEnv) -> list[int]:
    """What the physics is asked for from now on: control steps, call by call."""
    calls, step = [], env.backend.step

    def count(state, controls, out, *rest):
        calls.append(out.shape[0] * out.shape[1])
        step(state, controls, out, *rest)

    env.backend.step = count
    return calls


def played(num_envs: int, noise: str, preset: str, delays: tuple[int, int]):
    env = make_env(make_task("hopper"), num_envs, preset, num_threads=1, dump_dir=None)
    calls, seen = counted(env), []
    watch = lambda states, valid: seen.append(valid.sum())  # noqa: E731
    outcome = evaluate(env, stagger_about, SEEDS, (H, 3), EXECUTED, noise, watch, *delays)
    env.close()
    assert sum(seen) == outcome.steps.sum()
    return outcome, sum(calls)


@pytest.mark.parametrize("delays", [(0, 0), (1, 0), (1, 1)])
@pytest.mark.parametrize("preset", ["nominal", "mild"])
@pytest.mark.parametrize("noise", ["zero", "random"])
def test_results_do_not_depend_on_the_number_of_environments(noise, preset, delays):
    one, _ = played(1, noise, preset, delays)
    assert len(set(one.steps)) > 3
    for num_envs in (2, 4, 16):
        several, _ = played(num_envs, noise, preset, delays)
        assert np.array_equal(several.steps, one.steps)
        assert np.array_equal(several.returns, one.returns)


@pytest.mark.parametrize("num_envs", [1, 4, 16])
def test_an_episode_is_simulated_to_the_end_of_its_last_chunk_and_no_further(num_envs):
    outcome, simulated = played(num_envs, "random", "nominal", (0, 0))
    assert simulated == (-(-outcome.steps // EXECUTED) * EXECUTED).sum()


def test_a_policy_that_gives_no_numbers_is_not_judged_as_one_that_fails():
    def fails_later(obs, noise: np.ndarray) -> np.ndarray:
        chunk = stagger_about(obs, noise)
        chunk[-1, 0, 0] = np.nan if calls else 0.0
        calls.append(1)
        return chunk

    calls, env = [], VecEnv(make_task("hopper"), 2, num_threads=1)
    with pytest.raises(RunFailed, match="not finite in the episode of seed 10001"):
        evaluate(env, fails_later, SEEDS[:2], (H, 3), EXECUTED)
    env.close()


def test_an_environment_at_rest_stays_as_it_is_and_is_not_drawn():
    task = make_task("reach", cameras=True)
    env = VecEnv(task, 3, num_threads=1, time_limit=4)
    drawn = []
    for renderer in env._renderers.values():
        draw = renderer.batch
        renderer.batch = lambda states, *rest, draw=draw: (
            drawn.append(len(states)) or draw(states, *rest)
        )
    hold = np.broadcast_to(task.world.home_qpos[task.world.joint_qpos], (3, 4, 8))
    env.play([5, 6])
    assert env.playing.tolist() == [0, 1, -1]
    before = env.state[2].copy()
    step = env.step(hold)
    assert step.valid.all(axis=1).tolist() == step.ended.tolist() == [True, True, False]
    assert not step.valid[2].any()
    assert step.reward[2].sum() == 0
    assert np.array_equal(env.state[2], before)
    assert not step.obs["front_image"][2].any()
    assert drawn == [2, 2]  # at the beginning and at the end
    assert (env.playing < 0).all()
    env.reset()
    assert env.step(hold).valid.all()
    env.close()


@pytest.mark.parametrize(
    ("field", "other"),
    [
        (0, {"elements": ("panda_joint2", "panda_joint1")}),
        (0, {"unit": "deg"}),
        (3, {"source": "ball"}),
        (3, {"resolution": (64, 64)}),
    ],
)
def test_a_policy_that_sees_other_numbers_under_the_same_name_is_refused(field, other):
    task = make_task("lift", cameras=True)
    fields = list(DemoLayout.of_task(task).observations)
    config = default_config("bc", "lift")
    check_fits(policy_spec(task, tuple(fields), config), task, "mine")
    fields[field] = dataclasses.replace(fields[field], **other)
    (what,) = other
    says = rf"'mine' \(task 'lift', {what} of {fields[field].name} .*\) does not fit task 'lift' \({what} of"
    with pytest.raises(InputError, match=says):
        check_fits(policy_spec(task, tuple(fields), config), task, "mine")


def test_the_time_of_a_success_leaves_out_episodes_that_failed():
    steps = np.array([100, 800, 120, 300, 110, 800])
    won = steps < 800
    result = Evaluation(tuple(range(6)), won, won.astype(float), steps).summary()
    assert result["success_steps"] == pytest.approx([115, 246])  # of 100, 110, 120, 300
    assert "within 115 control steps by median, 246 for nine tenths" in text(
        result | {"policy": "p", "task": "t", "task_options": {}}
    )
    failed = Evaluation(tuple(range(6)), ~won & won, np.zeros(6), steps).summary()
    walked = Evaluation(tuple(range(6)), None, np.zeros(6), steps).summary()
    for result in (failed, walked):
        assert result["success_steps"] is None
        assert "within" not in text(result | {"policy": "p", "task": "t", "task_options": {}})


def test_wilson_interval_against_known_values():
    # Newcombe (1998), table I, method 3: 81 of 263 and 0 of 20.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)

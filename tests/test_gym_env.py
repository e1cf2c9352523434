"""Every task is a Gymnasium environment, and the vectorised one gives what the single one gives."""

import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from sim import gym_env
from sim.errors import SimulationError
from sim.tasks import TASKS


@pytest.mark.parametrize("task", TASKS)
def test_check_env(task):
    env = gymnasium.make(gym_env.env_id(task))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(spec|render|infinity|normal).*")
        check_env(env.unwrapped, skip_render_check=True)
    env.close()


def test_render():
    env = gymnasium.make("flow_policy/Lift-v0", render_mode="rgb_array")
    env.reset(seed=0)
    picture = env.render()
    assert picture.shape == (240, 320, 3)
    assert picture.std() > 10
    env.close()


@pytest.mark.parametrize("name", ["Hopper", "Lift"])
def test_vector_is_single_side_by_side(name):
    """Same seeds and actions, the same numbers bit for bit, until the first episode ends."""
    envs = gymnasium.make_vec(f"flow_policy/{name}-v0", num_envs=3)
    ones = [gymnasium.make(f"flow_policy/{name}-v0") for _ in range(3)]
    many, _ = envs.reset(seed=5)
    single = [env.reset(seed=5 + i)[0] for i, env in enumerate(ones)]
    running = np.ones(3, bool)
    envs.action_space.seed(0)
    for _ in range(60):
        for i in np.flatnonzero(running):
            for field, values in many.items():
                assert np.array_equal(values[i], single[i][field])
        actions = envs.action_space.sample()
        many, reward, terminated, truncated, info = envs.step(actions)
        for i in np.flatnonzero(running):
            single[i], r, te, tr, _ = ones[i].step(actions[i])
            assert (reward[i], terminated[i], truncated[i]) == (r, te, tr)
            if te or tr:
                for field, values in info["final_obs"].items():
                    assert np.array_equal(values[i], single[i][field])
        running &= ~(terminated | truncated)
    assert name != "Hopper" or not running.all()
    assert envs.observation_space.contains(many)
    envs.close()
    for env in ones:
        env.close()


@pytest.mark.parametrize("seed", [3, [3, 8]])
def test_a_seed_restarts_the_whole_sequence(seed):
    envs = gymnasium.make_vec("flow_policy/Hopper-v0", num_envs=2, flat=True)
    runs = []
    for _ in range(2):
        obs, _ = envs.reset(seed=seed)
        envs.action_space.seed(3)
        for _ in range(80):
            obs, *_ = envs.step(envs.action_space.sample())
        runs.append(obs)
    assert np.array_equal(*runs)
    assert runs[0].shape == (2, 11)
    envs.close()


def test_without_a_seed_no_two_are_alike():
    for make in (gymnasium.make, gymnasium.make_vec):
        one, other = (make("flow_policy/Hopper-v0", flat=True).reset()[0] for _ in range(2))
        assert not np.array_equal(one, other)


def test_a_seed_may_be_an_integer_of_numpy():
    envs = gymnasium.make_vec("flow_policy/Reach-v0", num_envs=2, flat=True)
    assert np.array_equal(envs.reset(seed=np.int64(3))[0], envs.reset(seed=3)[0])
    envs.close()


def test_options_and_bad_input():
    env = gymnasium.make("flow_policy/Reach-v0", reward="dense", flat=True)
    env.reset(seed=0)
    _, reward, *_ = env.step(env.action_space.sample())
    assert reward < 0
    env.close()
    with pytest.raises(SimulationError, match="flat=True"):
        gymnasium.make("flow_policy/Lift-v0", cameras=True, flat=True)
    with pytest.raises(SimulationError, match="reward"):
        gymnasium.make("flow_policy/Lift-v0", reward="denze")

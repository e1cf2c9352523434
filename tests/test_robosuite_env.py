"""Stock robosuite environments behave as Gymnasium environments. Slow, and only where robosuite is installed."""

from importlib.util import find_spec

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from sim import robosuite_env
from sim.errors import SimulationError


@pytest.mark.slow
@pytest.mark.skipif(find_spec("robosuite") is None, reason="robosuite is not installed")
@pytest.mark.parametrize("name", robosuite_env.STOCK)
def test_check_env_and_seeds(name):
    env = gymnasium.make(f"flow_policy/Robosuite{name}-v0").unwrapped
    check_env(env, skip_render_check=True)
    first, _ = env.reset(seed=1)
    again, _ = env.reset(seed=1)
    other, _ = env.reset(seed=2)
    assert all(np.array_equal(first[k], again[k]) for k in first)
    assert not np.array_equal(first["object"], other["object"])
    *_, info = env.step(env.action_space.sample())
    assert info == {"success": False}
    env.close()


def test_bad_input(monkeypatch):
    with pytest.raises(SimulationError, match="did you mean 'Square'"):
        robosuite_env.RobosuiteEnv("Sqare")
    monkeypatch.setattr(robosuite_env, "find_spec", lambda name: None)
    with pytest.raises(SimulationError, match="pip install --no-deps robosuite"):
        robosuite_env.RobosuiteEnv("Lift")

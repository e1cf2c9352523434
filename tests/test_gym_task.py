"""`flow-policy eval` on Gymnasium environments that are not ours: the same loop, the same episodes, honest refusals."""

from importlib.util import find_spec

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from toys import small_policy

from flow_policy_rl import checkpoint, cli, evaluate, train_config, train_run
from flow_policy_rl.errors import InputError
from flow_policy_rl.policy import FlowPolicy, NetworkConfig
from flow_policy_rl.spec import ObservationField, PolicySpec
from sim import robosuite_env
from sim.errors import SimulationError
from sim.gym_task import GymnasiumTask, GymnasiumVecEnv, is_gymnasium
from sim.tasks import TASKS, make_task


@pytest.fixture(scope="module")
def hopper(tmp_path_factory) -> str:
    """A fresh policy: it moves, and falls soon."""
    torch.manual_seed(0)
    task = make_task("hopper")
    fields = tuple(
        ObservationField(f.name, f.kind, f.elements, f.unit, f.source) for f in task.obs_fields
    )
    horizons = train_config.ScratchConfig(action_horizon=4, execute_horizon=3)
    path = tmp_path_factory.mktemp("hopper") / "policy.safetensors"
    checkpoint.save(
        path, FlowPolicy(train_run.policy_spec(task, fields, horizons), NetworkConfig())
    )
    return str(path)


def played(policy: str, task: str | None = None, **settings) -> dict:
    return evaluate.main(evaluate.Config(policy, task=task, **({"episodes": 5} | settings)))


@pytest.mark.parametrize("noise", ["zero", "random"])
def test_stock_gymnasium_gives_what_our_own_task_gives(hopper, noise):
    ours, stock = (played(hopper, name, noise=noise) for name in (None, "Hopper-v5"))
    assert stock["task"] == "Hopper-v5"
    assert stock["success_rate"] is ours["success_rate"] is None
    assert stock["steps_mean"] == ours["steps_mean"]
    assert stock["return_mean"] == pytest.approx(ours["return_mean"], rel=1e-6)
    assert stock["return_std"] == pytest.approx(ours["return_std"], rel=1e-5)


def test_fields_are_found_by_name_and_success_in_the_info():
    ours, stock = (played("lift", name) for name in ("lift", "flow_policy/Lift-v0"))
    same = ("success_rate", "success_ci95", "return_mean", "steps_mean", "episodes")
    assert {key: stock[key] for key in same} == {key: ours[key] for key in same}
    assert stock["success_rate"] > 0


def test_an_episode_is_the_same_in_any_batch(hopper):
    whole, single = (played(hopper, "Hopper-v5", num_envs=n) for n in (5, 1))
    assert whole["return_mean"] == pytest.approx(single["return_mean"], rel=1e-6)
    assert whole["steps_mean"] == single["steps_mean"]


class Count(gymnasium.Env):
    """Ends after as many steps as its seed says; success is told at every step, or never."""

    observation_space = spaces.Dict({"x": spaces.Box(-9, 9, (1,)), "y": spaces.Box(-9, 9, (2,))})
    action_space = spaces.Box(-1, 1, (2,))

    def __init__(self, tells: str = "is_success"):
        self.tells = tells

    def _obs(self):
        return {"x": np.full(1, self.steps, np.float32), "y": np.zeros(2, np.float32)}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps, self.last = 0, seed
        return self._obs(), {}

    def step(self, action):
        assert self.steps < self.last, "stepped after its end"
        self.steps += 1
        good = self.steps % 2 == 0
        info = {self.tells: good} if self.tells else {}
        return self._obs(), 1.0, False, self.steps == self.last, info


gymnasium.register("Count-v0", entry_point=Count)
WANTED = (ObservationField("x", "state", ("x",), ""),)


@pytest.mark.parametrize("tells", ["success", "is_success", ""])
def test_an_episode_succeeds_by_its_last_step_and_nothing_counts_after_it(tells):
    task = GymnasiumTask("Count-v0", 0.1, {"tells": tells})
    env = GymnasiumVecEnv(task, 2, WANTED)
    act = lambda obs, noise: noise  # noqa: E731
    outcome = evaluate.evaluate(env, act, [1, 2, 5, 6], (4, 2), 4)
    assert outcome.steps.tolist() == [1, 2, 5, 6]
    assert outcome.returns.tolist() == [1, 2, 5, 6]
    if tells:
        assert outcome.success.tolist() == [False, True, False, True]
    else:
        assert outcome.success is None
    step = env.play([3, 9]) and env.step(np.zeros((2, 4, 2)))
    assert step.valid.tolist() == [[True, True, True, False], [True] * 4]
    assert step.obs["x"][:, 0].tolist() == [3, 4]
    assert step.truncated.tolist() == [True, False]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("Hopper-v9", "version `v9` for environment `Hopper` doesn't exist"),
        ("nowhere:Hopper-v5", "No module named 'nowhere'"),
        ("CartPole-v1", r"actions Discrete\(2\); a policy needs"),
    ],
)
def test_what_cannot_be_played_is_said_in_one_line(name, says):
    with pytest.raises(SimulationError, match=says) as error:
        GymnasiumTask(name, 0.1)
    assert "\n" not in str(error.value)


def spec(**changes) -> PolicySpec:
    policy = small_policy(**changes)
    return policy.spec


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"observations": (*WANTED, ObservationField("z", "state", ("z",), ""))}, r"'z': \(1,\)"),
        ({"observations": (ObservationField("y", "state", ("y",), ""),)}, r"'y': \(1,\)"),
        ({"joint_names": ("a",), "action_low": (-1,), "action_high": (1,)}, "actions 1"),
    ],
)
def test_a_policy_of_other_dimensions_is_refused(changes, says):
    task = GymnasiumTask("Count-v0", 0.05)
    evaluate.check_fits_gymnasium(spec(observations=WANTED), task, "fits")
    with pytest.raises(InputError, match=says):
        evaluate.check_fits_gymnasium(spec(**{"observations": WANTED} | changes), task, "p")


def test_one_line_for_whatever_else_is_wrong(hopper, capsys, monkeypatch):
    monkeypatch.setattr(robosuite_env, "find_spec", lambda name: None)
    for flags, says in (
        (["--task", "robosuite_lift"], "pip install --no-deps robosuite"),
        (["--task", "Walker2d-v5"], "actions 3, observations (11,)) does not fit environment"),
        (["--task", "Hopper-v5", "--randomize"], "--randomize needs a task of this package"),
        (["--task", "Hopper-v5", "--backend", "warp"], "--backend needs a task of this package"),
        (["--task", "Hopper-v5", "--task-options", "colour", "red"], "colour"),
    ):
        assert cli.main(["eval", "--policy", hopper, "--episodes", "1", *flags]) == 2
        printed = capsys.readouterr()
        assert says in printed.err
        assert printed.err.count("\n") == 1


def test_no_task_of_ours_is_taken_for_gymnasiums():
    assert not any(map(is_gymnasium, TASKS))
    assert all(map(is_gymnasium, ("Hopper-v5", "robosuite_square", "a:B", "flow_policy/Lift-v0")))


@pytest.mark.slow
@pytest.mark.skipif(find_spec("robosuite") is None, reason="robosuite is not installed")
@pytest.mark.parametrize("name", robosuite_env.STOCK)
def test_robosuite_is_played(name, tmp_path):
    task = GymnasiumTask(f"robosuite_{name.lower()}", 1.0)
    assert task.control_dt == 0.05
    fields = tuple(
        ObservationField(n, "state", tuple(f"{n}_{k}" for k in range(task.fields[n][0])), "")
        for n in ("object", "robot0_eef_pos", "robot0_gripper_qpos")
    )
    names = tuple(f"action_{k}" for k in range(task.num_actions))
    low, high = (-1.0,) * len(names), (1.0,) * len(names)
    policy = small_policy(
        observations=fields, joint_names=names, action_low=low, action_high=high, task=task.name
    )
    path = tmp_path / "p.safetensors"
    checkpoint.save(path, policy)
    result = played(str(path), episodes=2)
    assert result["success_rate"] == 0.0
    assert result["steps_mean"] == robosuite_env.STOCK[name][2]

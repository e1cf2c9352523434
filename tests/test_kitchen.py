"""Franka Kitchen is gymnasium-robotics': readings, targets, rewards, ends, step by step."""

import gymnasium
import mujoco
import numpy as np
import pytest

from flow_policy_rl import cli
from flow_policy_rl.data import demonstrations
from sim.errors import SimulationError
from sim.expert import make_expert
from sim.tasks import make_task
from sim.tasks.kitchen import GOALS, START
from sim.vec_env import VecEnv

gymnasium_robotics = pytest.importorskip("gymnasium_robotics")


class Noise:
    """Stands for the generator of their environment: gives it our noise of this step, piece by piece."""

    def __init__(self, values: np.ndarray):
        self.values = values

    def uniform(self, low: float, high: float, size: tuple[int, ...]) -> np.ndarray:
        piece, self.values = np.split(self.values, [size[0]])
        return piece


def test_goals_are_theirs():
    from gymnasium_robotics.envs.franka_kitchen import kitchen_env

    for name, (where, goal) in GOALS.items():
        assert np.array_equal(np.arange(30)[where], kitchen_env.OBS_ELEMENT_INDICES[name])
        assert np.array_equal(goal, kitchen_env.OBS_ELEMENT_GOALS[name])


@pytest.mark.skipif(
    mujoco.__version__.startswith("4."), reason="gymnasium-robotics 1.4 cannot read MuJoCo 4"
)
@pytest.mark.parametrize("chunk", [1, 5])
def test_equals_gymnasium_robotics(chunk):
    """60 control steps of 40 physics steps, across chunks; in the middle the light switch is set by hand."""
    gymnasium.register_envs(gymnasium_robotics)
    task = make_task("kitchen", goals=("light switch", "microwave"))
    theirs = gymnasium.make("FrankaKitchen-v1", tasks_to_complete=list(task.goals)).unwrapped
    env = VecEnv(task, 1)
    obs = env.reset([7])
    key = int(env.world.memory(env.state)[0, -2])
    theirs.reset(seed=0)
    robot = theirs.robot_env
    rng = np.random.default_rng(1)

    def read(step: int) -> np.ndarray:
        robot.np_random = Noise(task.noise(key, step))
        return theirs._get_obs(robot._get_obs())["observation"]

    assert np.allclose(together(obs), read(0), rtol=0, atol=1e-9)
    rewards = []
    for k in range(0, 60, chunk):
        actions = rng.uniform(-1.2, 1.2, (1, chunk, 9))
        if k == 30:  # the same hand on both sides
            task.world.qpos(env.state)[0, 17:19] = robot.data.qpos[17:19] = GOALS["light switch"][1]
        step = env.step(actions)
        for h in range(chunk):
            robot.np_random = Noise(task.noise(key, k + h + 1))
            seen, reward, terminated, _, info = theirs.step(actions[0, h])
            assert np.allclose(robot.data.qpos, task.world.qpos(step.states)[0, h], atol=1e-9)
            assert step.reward[0, h] == reward
            assert terminated == step.terminated[0]
            rewards.append(reward)
        assert np.allclose(together(step.final_obs), seen["observation"], rtol=0, atol=1e-9)
        done = [
            name for name, met in zip(task.goals, task.completed(env.state)[0], strict=True) if met
        ]
        assert done == info["episode_task_completions"]
    assert sum(rewards) == 1
    assert np.flatnonzero(rewards)[0] == 30
    env.close()


def together(obs: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate(
        [obs[n][0] for n in ("robot_pos", "robot_vel", "object_pos", "object_vel")]
    )


def test_all_goals_end_the_episode():
    task = make_task("kitchen")
    env = VecEnv(task, 2)
    env.reset([0, 1])
    for name in task.goals:
        where, goal = GOALS[name]
        task.world.qpos(env.state)[0, where] = goal
    step = env.step(np.zeros((2, 2, 9)))
    assert step.success.tolist() == [True, False]
    assert step.reward[0].tolist() == [4.0, 0.0]
    assert not task.completed(env.state)[0].any()  # a new episode
    assert np.allclose(task.world.qpos(env.state)[0], START)
    env.close()


def test_unknown_goal():
    with pytest.raises(SimulationError, match="did you mean 'kettle'"):
        make_task("kitchen", goals=("ketle",))


def play(goals, seeds: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Whether the expert won, and after how many control steps, (n,) each."""
    task = make_task("kitchen", goals=goals)
    env = VecEnv(task, len(seeds))
    env.reset(seeds)
    rngs = [np.random.default_rng(seed) for seed in seeds]
    experts = [make_expert(task, *given) for given in zip(env.state, rngs, strict=True)]
    length, won = np.zeros(len(seeds), int), np.zeros(len(seeds), bool)
    for _ in range(task.episode_steps):
        running = ~won
        actions = [e.act(state) for e, state in zip(experts, env.state, strict=True)]
        assert np.abs(actions).max() <= 1.0
        step = env.step(np.stack(actions)[:, None])
        length += running
        won |= running & step.success
        if won.all():
            break
    env.close()
    return won, length


def test_the_expert_meets_all_goals_of_the_complete_kitchen():
    won, length = play(("microwave", "kettle", "light switch", "slide cabinet"), [0, 1])
    assert won.all()
    assert (length < 240).all()


def test_the_expert_takes_goals_in_any_order_and_as_one_text():
    won, _ = play("slide cabinet, light switch", [2])
    assert won.all()


def test_a_goal_without_a_script_names_those_with_one():
    task = make_task("kitchen", goals="kettle,top burner")
    rng = np.random.default_rng(0)
    with pytest.raises(SimulationError, match="'top burner'.*valid: kettle, light switch, micro"):
        make_expert(task, task.initial_state(rng), rng)


def test_demonstrations_are_collected(tmp_path):
    out = tmp_path / "kitchen.hdf5"
    flags = ["--task", "kitchen", "--task-options", "goals", "kettle", "--episodes", "2"]
    assert cli.main(["collect", *flags, "--noise", "0.1", "--out", str(out)]) == 0
    found = demonstrations.load(out)
    assert len(found.episodes) == 2
    assert found.provenance["task_options"] == {"goals": "kettle"}

"""The locomotion tasks are Gymnasium's: states, observations, rewards, terms, ends, across chunks and resets."""

import json

import gymnasium
import mujoco
import numpy as np
import pytest
from toys import untrained_policy

from flow_policy_rl import checkpoint, cli
from sim.render import Renderer
from sim.tasks import make_task
from sim.tasks.locomotion import LOCOMOTION
from sim.vec_env import VecEnv

TERMS = {  # ours -> Gymnasium's
    "forward": "reward_forward",
    "control": "reward_ctrl",
    "healthy": "reward_survive",
    "contact": "reward_contact",
}


def together(obs: dict[str, np.ndarray], env: int) -> np.ndarray:
    """Our fields as Gymnasium's vector."""
    return np.concatenate([values[env] for values in obs.values()])


def compare(name: str, steps: int, chunk: int, episode_steps: int | None = None) -> int:
    """Two environments with the same starts and actions; returns the number of episodes that ended."""
    task = make_task(name)
    if episode_steps:
        task.episode_steps = episode_steps
    env = VecEnv(task, 2, num_threads=2)
    reference = [
        gymnasium.make(task.gymnasium_id, max_episode_steps=episode_steps) for _ in range(2)
    ]
    episode = [0, 0]
    obs = env.reset()

    def restart(i: int) -> np.ndarray:
        """Gymnasium's reset, from the generator that our episode k of environment i draws from."""
        reference[i].reset()
        reference[i].unwrapped.np_random = np.random.default_rng((env.seed, i, episode[i]))
        episode[i] += 1
        return reference[i].reset()[0]

    for i in range(2):
        assert np.allclose(together(obs, i), restart(i), rtol=0, atol=1e-9)
    low, high = task.world.target_low, task.world.target_high
    rng = np.random.default_rng(5)
    ended = 0
    for _ in range(steps // chunk):
        # Sometimes more than the range: neither side may clamp what the reward is computed from.
        actions = rng.uniform(1.1 * low, 1.1 * high, (2, chunk, len(low)))
        step = env.step(actions)
        for i in range(2):
            for h in range(int(step.valid[i].sum())):
                theirs, reward, terminated, truncated, info = reference[i].step(actions[i, h])
                last = h == step.valid[i].sum() - 1
                assert step.reward[i, h] == pytest.approx(reward, abs=1e-9, rel=1e-9)
                for term, values in step.reward_terms.items():
                    assert values[i, h] == pytest.approx(info[TERMS[term]], abs=1e-9, rel=1e-9)
                assert (terminated or truncated) == (last and step.ended[i])
                if last:
                    assert np.allclose(together(step.final_obs, i), theirs, rtol=1e-9, atol=1e-9)
                    assert terminated == step.terminated[i]
                    assert (truncated and not terminated) == step.truncated[i]
            if step.ended[i]:
                ended += 1
                assert np.allclose(together(step.obs, i), restart(i), rtol=0, atol=1e-9)
    env.close()
    return ended


@pytest.mark.parametrize("name", LOCOMOTION)
def test_equals_gymnasium_across_chunks_and_resets(name):
    ended = compare(name, steps=240, chunk=4, episode_steps=90)
    assert ended >= 4


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [1, 8])
@pytest.mark.parametrize("name", LOCOMOTION)
def test_equals_gymnasium_over_a_thousand_steps(name, chunk):
    assert compare(name, steps=2000, chunk=chunk) >= 2


@pytest.mark.parametrize("name", LOCOMOTION)
def test_start_is_what_gymnasium_gives_for_the_seed(name):
    task = make_task(name)
    env = VecEnv(task, 2)
    obs = env.reset([3, 4])
    for i, seed in enumerate((3, 4)):
        theirs, _ = gymnasium.make(task.gymnasium_id).reset(seed=seed)
        assert np.array_equal(together(obs, i), theirs)
    assert sum(len(f.elements) for f in task.obs_fields) == len(theirs)
    env.close()


@pytest.mark.parametrize("name", LOCOMOTION)
def test_the_camera_follows_the_walker(name):
    """As MuJoCo's own renderer shows it after a whole forward pass."""
    task = make_task(name)
    state = task.initial_state(np.random.default_rng(0))
    task.world.qpos(state)[0] = 5.0
    data = mujoco.MjData(task.world.model)
    task.world.write(state, data)
    mujoco.mj_forward(task.world.model, data)
    with Renderer(task.world, 48, 64) as ours:
        seen = ours.render(state, "track")
    with mujoco.Renderer(task.world.model, 48, 64) as plain:
        plain.update_scene(data, "track")
        assert np.array_equal(seen, plain.render())


def test_a_policy_for_a_task_without_success_is_judged_by_its_return(tmp_path, capsys):
    task = make_task("hopper")
    path = tmp_path / "policy.safetensors"
    checkpoint.save(path, untrained_policy(task))
    assert cli.main(["eval", "--policy", str(path), "--episodes", "3", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["success_rate"] is None
    assert result["return_mean"] > 0
    assert cli.main(["eval", "--policy", str(path), "--episodes", "3"]) == 0
    assert "success" not in capsys.readouterr().out


EDGES = np.add.outer((0.2, 0.7, 0.8, 1.0, 2.0, 10.0, 100.0), (-1e-3, 1e-3)).ravel()


@pytest.mark.parametrize("name", [n for n in LOCOMOTION if n != "halfcheetah"])
def test_healthy_is_what_gymnasium_calls_healthy_on_both_sides_of_every_edge(name):
    task = make_task(name)
    theirs = gymnasium.make(task.gymnasium_id).unwrapped
    theirs.reset(seed=0)
    start = task.initial_state(np.random.default_rng(0))
    found = set()
    for i in (1, 2, 3, -1):
        for part in (task.world.qpos, task.world.qvel):
            for value in (*EDGES, *-EDGES):
                state = start.copy()
                part(state)[i] = value
                theirs.data.qpos[:], theirs.data.qvel[:] = task.world.qpos(state), task.world.qvel(state)  # fmt: skip
                assert task.is_healthy(state) == bool(theirs.is_healthy), (i, value)
                assert task.is_failure(state) != task.is_healthy(state)
                found.add(bool(task.is_healthy(state)))
    assert found == {True, False}


@pytest.mark.parametrize("name", LOCOMOTION)
def test_what_is_clipped_is_clipped_as_gymnasium_does(name):
    """Velocities beyond 10 and forces far beyond any that occur, on both sides of zero."""
    task = make_task(name)
    theirs = gymnasium.make(task.gymnasium_id).unwrapped
    theirs.reset(seed=0)
    state, rng = task.initial_state(np.random.default_rng(0)), np.random.default_rng(1)
    qvel = task.world.qvel(state)
    qvel[:] = theirs.data.qvel[:] = rng.uniform(-30, 30, qvel.shape)
    theirs.data.qpos[:] = task.world.qpos(state)
    for output, (where, shape) in task.world.outputs.items():
        values = rng.uniform(-3e3, 3e3, shape) if output == "cfrc_ext" else rng.uniform(-1, 1, shape)  # fmt: skip
        getattr(theirs.data, output)[:] = values
        state[where] = values.ravel()
    obs = task.observe(state[None])
    assert np.allclose(together(obs, 0), theirs._get_obs(), rtol=1e-12, atol=0)
    if task.contact_weight:
        assert task.contact_cost(state) == pytest.approx(theirs.contact_cost, rel=1e-12)

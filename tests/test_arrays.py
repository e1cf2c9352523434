"""A task's pure functions give the same on tensors as on arrays, and stay where the tensors are."""

import numpy as np
import pytest
import torch

from sim import poses
from sim.arrays import constant, namespace
from sim.tasks import TASKS, make_task
from sim.tasks.tabletop import Tabletop
from sim.vec_env import VecEnv

ENVS, STEPS = 6, 3


def states_and_actions(task) -> tuple[np.ndarray, np.ndarray]:
    """Some way into episodes: (N, 1 + h, state_size) and (N, h, A)."""
    env = VecEnv(task, ENVS, num_threads=1, dump_dir=None)
    env.reset(range(ENVS))
    start = env.state[:, None].copy()
    rng, world = np.random.default_rng(0), task.world
    actions = rng.uniform(world.target_low, world.target_high, (ENVS, STEPS, world.model.nu))
    states = np.concatenate([start, env.step(actions).states], axis=1)
    env.close()
    return states, actions


def tilted(task, states: np.ndarray) -> np.ndarray:
    """Free bodies turned any way and strewn about, so that successes, failures and both signs of qw are among them."""
    rng, states = np.random.default_rng(1), states.copy()
    for body in task.starts:
        pose = task.pose(states, body)
        pose[..., 3:] = rng.standard_normal(pose[..., 3:].shape)
        pose[..., 3:] /= np.linalg.norm(pose[..., 3:], axis=-1, keepdims=True)
        pose[..., :3] += 0.02 * rng.standard_normal(pose[..., :3].shape)
    return states


def same(mine, other) -> None:
    assert isinstance(other, torch.Tensor)
    assert other.shape == mine.shape
    assert np.allclose(other.numpy(), mine, rtol=1e-12, atol=1e-12)
    assert (other.dtype == torch.bool) == (mine.dtype == bool)


@pytest.mark.parametrize("name", TASKS)
def test_tasks_are_functions_of_tensors_too(name):
    options = {"reward": TASKS[name].rewards[-1]} if issubclass(TASKS[name], Tabletop) else {}
    task = make_task(name, **options)
    states, actions = states_and_actions(task)
    for rows in [states] + ([tilted(task, states)] if isinstance(task, Tabletop) else []):
        tensors = torch.as_tensor(rows)
        for field, values in task.observe(rows).items():
            same(values, task.observe(tensors)[field])
        if task.success_hold_steps is not None:
            same(task.is_success(rows), task.is_success(tensors))
        same(task.is_failure(rows), task.is_failure(tensors))
        won = np.arange(ENVS * STEPS).reshape(ENVS, STEPS) % 2 == 0
        given = (rows[:, :-1], actions, rows[:, 1:], won)
        terms, others = task.reward_terms(*given), task.reward_terms(*map(torch.as_tensor, given))
        assert terms.keys() == others.keys()
        for term, values in terms.items():
            same(np.asarray(values), others[term])


def test_commands_become_controls_as_tensors_too():
    task = make_task("lift")
    _, actions = states_and_actions(task)
    command = task.world.initial_command(task.initial_state(np.random.default_rng(0)))
    command = np.tile(command, (ENVS, 1))
    given = command, 3 * actions  # beyond limits of position and of speed
    for mine, other in zip(
        task.world.controls(*given),
        task.world.controls(*map(torch.as_tensor, given)),
        strict=True,
    ):
        same(mine, other)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", TASKS)
def test_they_stay_on_the_gpu(name):
    task = make_task(name)
    rows, actions = (torch.as_tensor(a, device="cuda") for a in states_and_actions(task))
    won = torch.zeros(actions.shape[:2], dtype=torch.bool, device="cuda")
    terms = task.reward_terms(rows[:, :-1], actions, rows[:, 1:], won)
    assert all(v.is_cuda for v in (*task.observe(rows).values(), *terms.values()))


def test_poses_agree():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 5, 3, 7))
    for pose in (a, b):
        pose[..., 3:] /= np.linalg.norm(pose[..., 3:], axis=-1, keepdims=True)
    for function in (poses.compose, poses.relative):
        same(function(a, b), function(torch.as_tensor(a), torch.as_tensor(b)))
    for function in (poses.yaw, poses.tilt, poses.conjugate):
        same(function(a[..., 3:]), function(torch.as_tensor(a[..., 3:])))
    one, other = a[..., :3], b[..., :3]
    same(np.cross(one, other), poses.cross(torch.as_tensor(one), torch.as_tensor(other)))
    assert np.array_equal(np.cross(one, other), poses.cross(one, other))


def test_kinds():
    assert namespace(np.zeros(1)) is namespace(np.float64(0)) is np
    assert namespace(torch.zeros(1)) is torch
    assert constant(torch.zeros(1), [1, 2]).dtype == torch.float32
    assert constant(np.zeros(1, np.float32), [1, 2]).dtype == np.float64

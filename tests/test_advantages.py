"""GAE by hand, and against brute-force returns."""

import torch

from flow_policy_rl.advantages import generalized_advantages


def test_hand_worked_numbers_with_a_termination_and_a_truncation():
    reward = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 1.0]])
    value = torch.tensor([[0.5, 1.0], [1.0, 0.5], [2.0, 1.0]])
    next_value = torch.tensor([[1.0, 7.0], [2.0, 4.0], [0.0, 3.0]])
    discount = torch.full((3, 2), 0.5)
    terminated = torch.tensor([[False, True], [False, False], [False, False]])
    truncated = torch.tensor([[False, False], [False, True], [False, False]])
    advantage, returns = generalized_advantages(
        reward, value, next_value, discount, terminated, truncated, gae_lambda=0.5
    )
    # Environment 0: deltas 1 + .5*1 - .5 = 1; 0 + .5*2 - 1 = 0; 3 + 0 - 2 = 1; carry .25.
    # Environment 1: terminated: 0 - 1 = -1, cut; truncated: 2 + .5*4 - .5 = 3.5, cut; 1 + .5*3 - 1 = 1.5.
    expected = torch.tensor([[1.0 + 0.25 * 0.25, -1.0], [0.25, 3.5], [1.0, 1.5]])
    assert torch.allclose(advantage, expected)
    assert torch.allclose(returns, expected + value)


def test_lambda_one_gives_discounted_returns_within_an_episode():
    generator = torch.Generator().manual_seed(1)
    steps, gamma = 12, 0.9
    reward = torch.randn(steps, 1, generator=generator)
    value, bootstrap = torch.randn(steps, 1, generator=generator), torch.tensor([[0.7]])
    next_value = torch.cat([value[1:], bootstrap])
    no = torch.zeros(steps, 1, dtype=torch.bool)
    _, returns = generalized_advantages(
        reward, value, next_value, torch.full((steps, 1), gamma), no, no, gae_lambda=1.0
    )
    expected, following = torch.empty(steps, 1), bootstrap[0]
    for step in reversed(range(steps)):
        following = reward[step] + gamma * following
        expected[step] = following
    assert torch.allclose(returns, expected, atol=1e-5)


def test_nothing_leaks_across_an_episode_end():
    reward = torch.tensor([[0.0], [0.0], [100.0]])
    zero, discount = torch.zeros(3, 1), torch.full((3, 1), 0.99)
    end = torch.tensor([[False], [True], [False]])
    no = torch.zeros_like(end)
    for terminated, truncated in ((end, no), (no, end)):
        advantage, _ = generalized_advantages(
            reward, zero, zero, discount, terminated, truncated, 0.95
        )
        assert torch.equal(advantage[:2], torch.zeros(2, 1))

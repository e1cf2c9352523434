"""What the on-policy loop does with a rollout, whatever the ratio estimator."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from point_world import PointEnv, point_policy, weak_point_policy

from flow_policy_rl import distributed
from flow_policy_rl.advantages import generalized_advantages
from flow_policy_rl.algorithms.gaussian import Gaussian, GaussianConfig
from flow_policy_rl.algorithms.ppo import PPO, PPOConfig, parts
from flow_policy_rl.errors import InputError

SMALL = PPOConfig(
    num_envs=16, num_steps=5, num_epochs=2, critic_warmup=0, value_width=16, value_depth=2
)


def loop_of(generator, env=None, **changes) -> PPO:
    torch.manual_seed(0)
    policy = point_policy(width=16, depth=2)
    config = dataclasses.replace(SMALL, **changes)
    estimator = Gaussian(policy, GaussianConfig())
    return PPO(policy, estimator, env or PointEnv(16), config, generator)


def test_it_leaves_a_saddle(generator):
    """A policy that reaches one of two goals in less than six of ten tries, and a critic from nothing."""
    config = PPOConfig(
        num_envs=64,
        num_steps=16,
        gamma=0.97,
        clip_range=0.1,
        actor_learning_rate=1e-3,
        value_width=64,
    )
    estimator = Gaussian(weak_point_policy(generator), GaussianConfig(0.05, 0.3))
    loop = PPO(estimator.policy, estimator, PointEnv(64), config, generator)
    history = [loop.iterate() for _ in range(20)]
    rates = [row["rollout/success_rate"] for row in history]
    assert rates[1] < 0.6
    assert np.mean(rates[-3:]) > 0.85
    assert history[-1]["train/explained_variance"] > 0.3


def test_an_update_fits_these_advantages_and_returns(generator):
    loop = loop_of(generator, num_epochs=1, num_minibatches=1)
    rollout = loop.collect()
    with torch.no_grad():
        value, next_value = (
            loop.critic(torch.stack([loop.policy.features({"features": f}) for f in seen]))
            for seen in (rollout.obs["features"], rollout.final_obs["features"])
        )
    ends = rollout.discount, rollout.terminated, rollout.truncated
    advantage, returns = generalized_advantages(rollout.reward, value, next_value, *ends, 0.95)
    given = {}
    loop._critic_step = lambda obs, returns, rows, count: given.update(returns=returns) or {}
    step = loop._actor_step
    loop._actor_step = lambda obs, trace, advantage, rows, count: (
        given.update(advantage=advantage) or step(obs, trace, advantage, rows, count)
    )
    metrics = loop.update(rollout)
    torch.testing.assert_close(given["returns"], returns.flatten())
    expected = (advantage - advantage.mean()) / advantage.std()
    torch.testing.assert_close(given["advantage"], expected.flatten())
    explained = 1 - (returns - value).var() / returns.var()
    assert metrics["train/explained_variance"] == pytest.approx(explained.item(), abs=1e-4)


def test_the_critic_is_fitted_to_the_returns(generator):
    loop = loop_of(generator)
    obs = {"features": torch.randn(64, loop.policy.num_features, generator=generator)}
    returns = 3 * obs["features"][:, 0] + 1
    for _ in range(300):
        loss = loop._critic_step(obs, returns, torch.arange(64), 64)["train/value_loss"]
    value = loop.critic(obs["features"])
    assert loss == pytest.approx(0.5 * (value - returns).square().mean().item(), rel=0.2)
    assert (value - returns).square().mean() < 0.05 * returns.var()


def test_only_the_critic_learns_in_its_warm_up(generator):
    loop = loop_of(generator, critic_warmup=1)
    before, critic = copy.deepcopy(loop.policy), copy.deepcopy(loop.critic)

    def same(a, b):
        return all(map(torch.equal, a.parameters(), b.parameters()))

    assert loop.iterate()["train/actor_steps"] == 0
    assert same(loop.policy, before)
    assert not same(loop.critic, critic)
    loop.iterate()
    assert not same(loop.policy, before)


def test_an_update_stops_where_the_policy_has_moved_too_far(generator):
    """The first step sees a ratio of 1 and the second what the first one did, which is too far for any step."""
    loop = loop_of(generator, target_kl=1e-9)
    assert loop.iterate()["train/actor_steps"] == 2
    free = loop_of(generator, target_kl=1e9)
    assert free.iterate()["train/actor_steps"] == SMALL.num_epochs * SMALL.num_minibatches


def test_pictures_that_move_are_for_one_process(generator, monkeypatch):
    """Episodes end at other times in each: their generators, and with them the minibatches, would part."""
    loop_of(generator, random_shift=2)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    loop_of(generator)
    with pytest.raises(InputError, match=r"ppo.random_shift needs one process"):
        loop_of(generator, random_shift=2)


def test_the_entropy_bonus_widens(generator):
    loop = loop_of(generator, entropy_coef=1.0)
    rollout = loop.collect()
    obs = {"features": rollout.obs["features"].flatten(0, 1)}
    trace = {k: v.flatten(0, 1) for k, v in rollout.trace.items()}
    trace["executed"] = rollout.executed.flatten(0, 1)
    rows, nothing = torch.arange(80), torch.zeros(80)
    entropies = [
        loop._actor_step(obs, trace, nothing, rows, 80)["train/entropy"] for _ in range(20)
    ]
    assert np.all(np.diff(entropies) > 0)


class Paying(PointEnv):
    """One reward per control step, in episodes of three chunks."""

    def step(self, action_chunk):
        step = super().step(0 * action_chunk)
        return dataclasses.replace(step, reward=step.valid.astype(float))


def test_rewards_are_divided_by_the_spread_of_the_discounted_return(generator):
    """Of all rollouts so far, and it begins anew with each episode."""
    loop = loop_of(
        generator, Paying(16, episode_steps=6), scale_rewards=True, gamma=0.5, num_steps=4
    )
    seen, running = [], np.zeros(16)
    for _ in range(2):
        rollout = loop.collect()
        scaled = loop._scaled(rollout).numpy()
        for t in range(4):
            running = rollout.discount[t].numpy() * running + rollout.reward[t].numpy()
            seen.append(running)
            running = np.where((rollout.terminated | rollout.truncated)[t], 0.0, running)
        spread = np.std(np.concatenate(seen))
        np.testing.assert_allclose(scaled, rollout.reward.numpy() / spread, rtol=1e-4)


def test_a_process_without_a_row_of_a_minibatch_takes_no_part_in_it():
    assert parts(torch.arange(0), 4) == ()
    assert [part.tolist() for part in parts(torch.arange(5), 4)] == [[0, 1, 2, 3], [4]]

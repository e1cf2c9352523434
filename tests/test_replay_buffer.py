"""Replay of chunk transitions: order, balance, ages; and what a chunk is worth, from environment to target."""

import dataclasses

import numpy as np
import pytest
import torch
from point_world import PointEnv, point_policy

from flow_policy_rl import presets
from flow_policy_rl.advantages import lambda_returns
from flow_policy_rl.algorithms import rldt
from flow_policy_rl.algorithms.rldt import RLDT, RLDTConfig
from flow_policy_rl.algorithms.rldt_critic import Critic, CriticConfig
from flow_policy_rl.buffers import ChunkReplay, rollout_segments
from flow_policy_rl.errors import RunFailed
from flow_policy_rl.nesting import flat
from flow_policy_rl.policy import FlowPolicy, NetworkConfig
from flow_policy_rl.rollout import Collector


def segments(values: list[float], steps: int = 3) -> dict:
    """One segment per value: its reward comes in the first chunk, its number is written everywhere."""
    number = torch.tensor(values).expand(steps, -1).clone()
    after = torch.zeros_like(number)
    after[0] = number[0]
    return {
        "obs": {"a": number[..., None].clone()},
        "number": number,
        "return_before": torch.zeros_like(number),
        "return_after": after,
    }


def test_ring_keeps_the_newest_and_knows_their_age(generator):
    replay = ChunkReplay(5)
    for start in (0, 2, 4, 6):
        replay.add(segments([start + 0.0, start + 1.0]))
    assert replay.size == 5
    fresh, old = replay.ages()
    assert sorted(replay.get(fresh)["number"][0].tolist()) == [6, 7]
    assert sorted(replay.get(old)["number"][0].tolist()) == [3, 4, 5]
    with pytest.raises(ValueError, match="do not fit"):
        replay.add(segments([0.0] * 6))


def test_what_goes_in_comes_out_and_is_not_shared(generator):
    replay, data = ChunkReplay(4), segments([1.0, 2.0])
    replay.add(data)
    data["obs"]["a"].fill_(-1)
    out = replay.get(torch.tensor([1, 0]))
    assert out["obs"]["a"].shape == (3, 2, 1)
    assert out["number"].tolist() == [[2.0, 1.0]] * 3
    assert torch.equal(out["obs"]["a"][..., 0], out["number"])


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0.1), (0.33, 0.33), (1.0, 1.0)])
def test_a_draw_holds_its_share_of_the_latest_rollout(share, expected, generator):
    replay = ChunkReplay(100)
    for start in range(10):
        replay.add(segments([float(start)] * 10))
    numbers = replay.sample(100, generator, fresh_share=share)["number"][0]
    assert (numbers == 9).float().mean() == pytest.approx(expected, abs=0.01)


def test_first_draw_is_all_fresh_and_repeats_only_when_it_must(generator):
    replay = ChunkReplay(100)
    replay.add(segments([float(i) for i in range(10)]))
    assert sorted(replay.sample(10, generator)["number"][0].tolist()) == list(range(10))
    assert len(replay.sample(25, generator)["number"][0]) == 25


def test_balanced_draws_show_each_level_of_reward_equally_often(generator):
    """31 of 41 are older: a third of them for each level, the odd one for any."""
    replay = ChunkReplay(1000)
    replay.add(segments([0.0] * 90 + [0.8, 1.2] * 4 + [2.0] * 2))
    replay.add(segments([5.0] * 10))
    drawn = [replay.sample(41, generator, 0.25, balanced=True) for _ in range(200)]
    numbers = torch.cat([d["number"][0] for d in drawn]).round()
    assert (numbers == 5).float().mean() == pytest.approx(10 / 41)
    for level in (0, 1, 2):
        assert (numbers == level).float().mean() == pytest.approx(31 / 41 / 3, abs=0.005)


def test_state_of_a_replay_survives(generator):
    replay = ChunkReplay(5)
    for start in (0, 2, 4):
        replay.add(segments([start + 0.0, start + 1.0]))
    other = ChunkReplay(5)
    other.load_state_dict(replay.state_dict())
    for one in (replay, other):
        one.add(segments([9.0]))
    state = generator.get_state()
    first = replay.sample(7, generator, 0.3, balanced=True)
    generator.set_state(state)
    second = other.sample(7, generator, 0.3, balanced=True)
    assert all(torch.equal(v, flat(second)[k]) for k, v in flat(first).items())


# --- what a chunk is worth ---


def test_lambda_returns_by_hand_and_at_both_ends_of_lambda():
    reward = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 1.0]])
    value = torch.tensor([[1.0, 7.0], [2.0, 4.0], [0.0, 3.0]])
    discount = torch.full((3, 2), 0.5)
    terminated = torch.tensor([[False, True], [False, False], [False, False]])
    truncated = torch.tensor([[False, False], [True, False], [False, False]])
    args = (reward, value, discount, terminated, truncated)
    # Environment 0: 3 + .5*0 = 3; truncated: 0 + .5*2 = 1; 1 + .5*(.5*1 + .5*1) = 1.5.
    # Environment 1: 1 + .5*3 = 2.5; 2 + .5*(.5*4 + .5*2.5) = 3.625; terminated: 0.
    expected = torch.tensor([[1.5, 0.0], [1.0, 3.625], [3.0, 2.5]])
    assert torch.allclose(lambda_returns(*args, 0.5), expected)
    one_step = reward + discount * value * ~terminated
    assert torch.allclose(lambda_returns(*args, 0.0), one_step)
    # lambda = 1: discounted rewards up to the end of the episode or of the data, and the value there.
    assert torch.allclose(
        lambda_returns(*args, 1.0), torch.tensor([[1.5, 0.0], [1.0, 2 + 0.5 * 2.5], [3.0, 2.5]])
    )


def constant_value_learner(value: float, generator, **critic) -> RLDT:
    """A learner whose critics say `value` everywhere."""
    config = RLDTConfig(
        num_envs=16, num_steps=6, gamma=0.9, critic=CriticConfig(width=8, td_lambda=0.0, **critic)
    )
    torch.manual_seed(0)
    learner = RLDT(point_policy(width=16, depth=2), PointEnv(16), config, generator)
    for critic_net in (learner.critic.ensemble, learner.critic.target):
        with torch.no_grad():
            critic_net.head.zero_()
            critic_net.head_bias.fill_(value)
    return learner


class ThreeSteps(PointEnv):
    """Episodes that end by time in the middle of a chunk."""

    episode_steps = 3


def targets_of(learner: RLDT, env: PointEnv, generator):
    collector = Collector(env, 2, 0.9)
    rollout = collector.collect(lambda obs: learner.explore(obs), 6)
    return rollout, learner.critic.targets(
        learner.critic_batch(rollout_segments(rollout), learner.generator)
    )


def test_a_truncated_chunk_is_worth_the_steps_it_ran_and_what_lies_beyond(generator):
    """With a value of 10 everywhere: 0.9^2 * 10 after two steps, 0.9 * 10 after the one that a time limit left."""
    learner = constant_value_learner(10.0, generator)
    env = ThreeSteps(16, episode_steps=3)
    rollout, targets = targets_of(learner, env, generator)
    quiet = (rollout.reward == 0) & ~rollout.terminated
    assert torch.allclose(targets[quiet & ~rollout.truncated], torch.tensor(8.1))
    assert torch.allclose(targets[quiet & rollout.truncated], torch.tensor(9.0))
    assert (quiet & rollout.truncated).any()
    terminal = constant_value_learner(10.0, generator, time_limit_is_terminal=True)
    rollout, targets = targets_of(terminal, ThreeSteps(16, episode_steps=3), generator)
    assert (targets[rollout.truncated & (rollout.reward == 0)] == 0).all()


class Winning(PointEnv):
    """Every second control step reaches a goal: episodes end by success within and at the end of chunks."""

    def step(self, action_chunk):
        self.position[:] = [0.6, 0.0]
        return super().step(np.tile([0.25, 0.0], (self.num_envs, action_chunk.shape[1], 1)))


def test_a_terminated_chunk_is_worth_its_discounted_reward_alone(generator):
    learner = constant_value_learner(10.0, generator)
    rollout, targets = targets_of(learner, Winning(16), generator)
    assert rollout.terminated.all()
    assert torch.allclose(targets, rollout.reward)
    assert set(rollout.reward.unique().tolist()) <= {1.0, float(np.float32(0.9))}
    assert torch.equal(rollout.return_before, torch.zeros(6, 16))
    assert torch.equal(rollout.return_after, torch.ones(6, 16))


def test_targets_are_held_to_the_known_range(generator):
    learner = constant_value_learner(10.0, generator, value_low=0.0, value_high=1.0)
    rollout, targets = targets_of(learner, PointEnv(16), generator)
    running = ~(rollout.terminated | rollout.truncated) & (rollout.reward == 0)
    assert torch.allclose(targets[running], torch.tensor(0.81))


@pytest.mark.parametrize(
    ("preset", "task", "held"),
    [
        ("clean", "lift", -1.0),
        ("clean", "one_leg", -1.0),
        ("clean", "insert", 0.0),
        ("paper", "one_leg", 0.0),
    ],
)
def test_targets_are_open_but_in_the_released_settings(preset, task, held, generator):
    """A value below the least that can be earned reaches the targets as it is."""
    said = presets.rldt(task, preset)["rldt"].critic
    known = {"value_low": said.value_low, "value_high": said.value_high}
    learner = constant_value_learner(-1.0, generator, **known)
    rollout, targets = targets_of(learner, PointEnv(16), generator)
    running = ~(rollout.terminated | rollout.truncated) & (rollout.reward == 0)
    assert torch.allclose(targets[running], torch.tensor(0.81 * held))


def test_the_critic_takes_the_least_of_its_members(generator):
    learner = constant_value_learner(1.0, generator)
    with torch.no_grad():
        learner.critic.target.head_bias[1].fill_(3.0)
    rollout, targets = targets_of(learner, PointEnv(16), generator)
    running = ~(rollout.terminated | rollout.truncated) & (rollout.reward == 0)
    assert torch.allclose(targets[running], torch.tensor(0.81))


@pytest.mark.parametrize("target", ["min", "mean"])
def test_targets_equal_an_independent_numpy_version(target, generator):
    """The least (or mean) of the target network's members per action, then the mean over the two actions."""
    torch.manual_seed(0)
    steps, segments, high = 3, 4, 0.1
    critic = Critic(
        5, 4, CriticConfig(width=8, target=target, value_high=high), torch.device("cpu")
    )
    with torch.no_grad():
        for parameter in critic.target.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    shape = (steps, segments)
    batch = {
        "reward": torch.randn(shape, generator=generator),
        "discount": torch.rand(shape, generator=generator),
        "terminated": torch.arange(12).view(shape) == 4,
        "truncated": torch.arange(12).view(shape) == 5,
        "next_features": torch.randn(*shape, 5, generator=generator),
        "next_action": torch.randn(*shape, 2, 4, generator=generator),
    }
    expected, held = np.zeros(shape), 0
    for s in range(segments):
        for t in reversed(range(steps)):
            context = critic.target.embed(batch["next_features"][t, s][None])
            q = [critic.target(context, a[None])[:, 0] for a in batch["next_action"][t, s]]
            value = np.mean([getattr(np, target)(of.detach().numpy()) for of in q])
            held += value > high
            value = min(value, high)
            last = t == steps - 1 or batch["truncated"][t, s]
            beyond = value if last else 0.5 * value + 0.5 * expected[t + 1, s]
            if batch["terminated"][t, s]:
                beyond = 0.0
            expected[t, s] = batch["reward"][t, s] + batch["discount"][t, s] * beyond
    assert 0 < held < 12
    assert np.allclose(critic.targets(batch), expected, atol=1e-5)


def test_health_compares_what_the_critic_says_with_what_was_achieved(generator):
    """Members say 10 and 14, hence 12: 1 + 12 / 2 = 7 is achieved by the last chunk, then 4.5 and 3.25."""
    critic = constant_value_learner(10.0, generator).critic
    with torch.no_grad():
        critic.ensemble.head_bias[1].fill_(14.0)
    shape, no = (3, 4), torch.zeros(3, 4, dtype=torch.bool)
    batch = {"reward": torch.ones(shape), "discount": torch.full(shape, 0.5)}
    batch |= {"terminated": no, "truncated": no, "action": torch.zeros(*shape, 4)}
    batch |= {"features": torch.zeros(*shape, 2), "next_features": torch.zeros(*shape, 2)}
    found = critic.health(batch | {"next_action": torch.zeros(*shape, 2, 4)})
    assert found["train/q_bias"] == pytest.approx(12 - (7 + 4.5 + 3.25) / 3)
    assert found["train/q_explained_variance"] == pytest.approx(0, abs=1e-6)
    assert found["train/q_disagreement"] == pytest.approx(2)


# --- the learner ---


TINY = RLDTConfig(
    num_envs=8,
    num_steps=4,
    num_blocks=2,
    critic_steps=2,
    actor_steps=2,
    actor_share=0.5,
    critic_warmup=1,
    replay_iterations=3,
    balanced_replay=True,
    critic=CriticConfig(width=16, stage_input=True, normalize_reward=True),
)


def tiny(config: RLDTConfig = TINY) -> RLDT:
    torch.manual_seed(0)
    policy = point_policy(width=16, depth=2)
    return RLDT(policy, PointEnv(8), config, torch.Generator().manual_seed(0))


def test_two_and_two_iterations_are_four_bit_for_bit():
    whole = tiny()
    for _ in range(4):
        whole.iterate()
    first = tiny()
    for _ in range(2):
        first.iterate()
    second = tiny()
    second.load_state_dict(first.state_dict())
    second.collector = first.collector  # the environments go on by themselves
    for _ in range(2):
        second.iterate()
    for name in ("policy", "reference", "base", "critic", "target"):
        a, b = (x.state_dict()[name] for x in (whole, second))
        assert all(torch.equal(a[k], b[k]) for k in a), name
    assert not torch.equal(
        whole.policy.velocity_field.head.bias, whole.base.velocity_field.head.bias
    )


@pytest.mark.parametrize("reference", ["previous", "base"])
def test_reference_is_what_it_is_called(reference):
    learner = tiny(dataclasses.replace(TINY, reference=reference))
    learner.iterate()
    learner.iterate()
    policy, base, ref = (
        p.velocity_field.head.bias for p in (learner.policy, learner.base, learner.reference)
    )
    expected = {"previous": policy, "base": base}
    assert torch.allclose(ref, expected[reference])


def test_warm_up_leaves_the_policy_alone():
    learner = tiny()
    metrics = learner.iterate()
    assert torch.equal(
        learner.policy.velocity_field.head.bias, learner.base.velocity_field.head.bias
    )
    assert "train/transport_loss" not in metrics
    metrics = learner.iterate()
    logged = {name.removeprefix("train/") for name in metrics if name.startswith("train/")}
    assert logged >= {
        *(
            "transport_loss",
            "consistency_loss",
            "constraint_loss",
            "critic_loss",
            "q_mean",
            "q_bias",
        ),
        *(
            "q_explained_variance",
            "q_disagreement",
            "gradient_agreement",
            "attraction",
            "repulsion",
        ),
        *(
            "landing_error",
            "sample_spread",
            "spread_ratio",
            "reference_distance",
            "actor_grad_norm",
        ),
    }
    assert all(np.isfinite(metrics[f"train/{name}"]) for name in logged)


def test_the_critic_is_asked_about_actions_as_they_would_be_executed():
    learner = tiny()
    with torch.no_grad():
        learner.policy.velocity_field.head.weight.normal_(std=3.0)
    learner.iterate()
    segments = learner.replay.sample(4, learner.generator)
    action = learner.critic_batch(segments, learner.generator)["next_action"].unflatten(-1, (2, 2))
    policy = learner.policy
    low, high = (policy.normalize_action(x) for x in (policy.action_low, policy.action_high))
    assert (action == low).any()  # so the test sees some that were held
    assert (action == high).any()
    assert ((action >= low) & (action <= high)).all()


def told(learner: RLDT) -> dict:
    """Segments whose stage is the sum of their observation before a chunk, and minus that after it."""
    block = learner.replay.sample(learner.config.num_segments, learner.generator)
    before, after = block["obs"]["features"], block["final_obs"]["features"]
    return block | {"return_before": before.sum(-1), "return_after": -after.sum(-1)}


def test_the_critic_is_told_what_was_before_a_chunk_and_what_is_after_it():
    """Without noise the policy has one answer: M times that, to the observation after the chunk."""
    learner = tiny(dataclasses.replace(TINY, start_noise=(0.0, 0.0), gamma=0.9))
    learner.iterate()
    policy, block = learner.policy, told(learner)
    assert block["discount"].min().item() == pytest.approx(0.81)  # of two control steps
    batch = learner.critic_batch(block, learner.generator)
    before, after = block["obs"]["features"], block["final_obs"]["features"]
    assert torch.equal(
        batch["features"], torch.cat([before, block["return_before"][..., None]], -1)
    )
    expected = torch.cat([after, block["return_after"][..., None]], -1)
    assert torch.equal(batch["next_features"], expected)
    rows = {"features": after.flatten(0, 1)}
    answer = policy.normalize_action(policy.sample(rows, torch.zeros(4 * 8, 2, 2)))
    answer = answer.view(4, 8, 1, 4).expand(-1, -1, 2, -1)
    assert answer.std() > 0.1
    assert torch.allclose(batch["next_action"], answer, atol=1e-5)


@pytest.mark.parametrize(("kernel", "centers"), [("rbf", "final"), ("delta", "landing")])
def test_the_actor_asks_the_critic_about_the_state_that_its_particles_are_in(
    kernel, centers, monkeypatch
):
    transport = rldt.TransportConfig(kernel)
    learner = tiny(dataclasses.replace(TINY, transport=transport, segments_per_block=4))
    learner.iterate()
    seen, loss, gradient = {}, rldt.actor_loss, learner.critic.gradient

    def asked(features, actions, *limits):
        seen.update(features=features, actions=actions)
        return gradient(features, actions, *limits)

    def watched(policy, reference, obs, transport, *rest):
        def field(landing, final):
            seen.update(landing=landing, final=final)
            return transport(landing, final)

        seen.update(obs=obs["features"])
        return loss(policy, reference, obs, field, *rest)

    monkeypatch.setattr(learner.critic, "gradient", asked)
    monkeypatch.setattr(rldt, "actor_loss", watched)
    learner.actor_step(told(learner))
    assert len(seen["obs"]) == 2 * 4  # half of the segments
    assert torch.equal(seen["features"][:, :-1], seen["obs"])
    assert torch.equal(seen["features"][:, -1], seen["obs"].sum(-1))
    assert torch.equal(seen["actions"], seen[centers])
    assert not torch.equal(seen["landing"], seen["final"])


def test_an_update_draws_what_its_settings_say(monkeypatch):
    """Fresh segments alone; or, balanced, two of four old ones are the only success there was."""
    for settings in ({"fresh_share": 1.0}, {"fresh_share": 0.0, "balanced_replay": True}):
        learner = tiny(dataclasses.replace(TINY, num_blocks=5, **settings))
        learner.iterate(), learner.iterate()
        fresh, old = learner.replay.ages()
        data = learner.replay._data
        data["return_after"][:], data["return_before"][:] = 0.0, 0.0
        data["return_after"][old[0]], data["return_after"][fresh] = 1.0, 2.0
        drawn, batch = [], learner.critic_batch

        def watched(block, generator, drawn=drawn, batch=batch):
            drawn.append(block["return_after"][0])
            return batch(block, generator)

        monkeypatch.setattr(learner, "critic_batch", watched)
        learner.update()
        counts = torch.stack([d.int().bincount(minlength=3) for d in drawn])
        expected = [0, 0, 8] if settings["fresh_share"] else [2, 2, 4]
        assert torch.equal(counts, torch.tensor(expected).expand(5, -1))


def test_rewards_are_divided_by_a_running_mean_of_their_size(generator):
    """Of Winning's rewards, of one that is negative, and of none at all, which changes nothing."""
    torch.manual_seed(0)
    learner = RLDT(point_policy(width=16, depth=2), Winning(8), TINY, generator)
    learner.iterate()
    critic, block = learner.critic, learner.replay.sample(8, learner.generator)
    scale = None
    for row in block["reward"].abs().mean(1).tolist():
        scale = row if scale is None else 0.99 * scale + 0.01 * row
    assert critic.reward_scale == pytest.approx(scale)
    batch = learner.critic_batch(block, learner.generator)
    assert torch.allclose(batch["reward"], block["reward"] / scale)
    critic.observe_rewards(torch.tensor([[3.0, -5.0], [0.0, 0.0]]))
    assert critic.reward_scale == pytest.approx(0.99 * scale + 0.01 * 4)
    other = tiny()
    other.critic.load_state_dict(critic.state_dict())
    assert other.critic.reward_scale == critic.reward_scale


def test_the_gradient_of_the_actor_is_clipped():
    """Far below what Adam divides by at least, nothing moves."""
    learner = tiny(dataclasses.replace(TINY, max_grad_norm=1e-13))
    learner.iterate()
    before = learner.policy.velocity_field.head.weight.clone()
    assert learner.actor_step(told(learner))["actor_grad_norm"] > 1e-3
    moved = (learner.policy.velocity_field.head.weight - before).abs().max()
    assert moved < 1e-3 * learner.actor_optimizer.param_groups[0]["lr"]


def test_the_first_steps_of_the_actor_are_small():
    learner = tiny(dataclasses.replace(TINY, actor_warmup_steps=4, actor_learning_rate=1e-3))
    learner.iterate()
    rates = []
    for _ in range(6):
        learner.actor_step(told(learner))
        rates.append(learner.actor_optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3, 1e-3])


def test_the_target_network_follows_at_its_decay():
    learner = tiny()
    learner.iterate()
    batch = learner.critic_batch(learner.replay.sample(8, learner.generator), learner.generator)
    before = [p.clone() for p in learner.critic.target.parameters()]
    learner.critic.step(batch)
    critic = learner.critic
    parameters = list(critic.ensemble.parameters())
    for new, old, aim in zip(critic.target.parameters(), before, parameters, strict=True):
        torch.testing.assert_close(new, 0.995 * old + 0.005 * aim)


@pytest.mark.parametrize("split", [True, False])
def test_segments_are_dealt_to_the_members_in_turn(split):
    """What member 0 learns does not depend on the targets of odd segments, unless all see all."""
    critic = dataclasses.replace(TINY.critic, split_data=split, td_lambda=0.0)

    def learned(spoiled: slice) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        learner = tiny(dataclasses.replace(TINY, critic=critic))
        learner.iterate()
        segments = learner.replay.sample(8, learner.generator)
        batch = learner.critic_batch(segments, torch.Generator().manual_seed(0))
        batch["reward"][:, spoiled] += 5.0
        learner.critic.step(batch)
        return tuple([p[i].clone() for p in learner.critic.ensemble.parameters()] for i in range(2))

    plain, odd = learned(slice(0, 0)), learned(slice(1, None, 2))
    same = [all(map(torch.equal, a, b)) for a, b in zip(plain, odd, strict=True)]
    assert same == [split, False]


def test_actions_that_are_not_executed_get_no_field(monkeypatch):
    torch.manual_seed(0)
    spec = point_policy().spec.replace(action_horizon=4)
    policy = FlowPolicy(spec, NetworkConfig(width=16, depth=2))
    learner = RLDT(policy, PointEnv(8), TINY, torch.Generator().manual_seed(0))
    learner.iterate()
    fields, loss = [], rldt.actor_loss

    def watched(policy, reference, obs, transport, *rest):
        def field(landing, final):
            fields.append(transport(landing, final))
            return fields[-1]

        return loss(policy, reference, obs, field, *rest)

    monkeypatch.setattr(rldt, "actor_loss", watched)
    learner.iterate()
    for field in fields:
        assert field.shape[2:] == (4, 2)
        assert (field[:, :, :2].abs().amax((0, 1)) > 0).all()
        assert (field[:, :, 2:] == 0).all()


def test_the_field_does_not_push_past_the_joint_limits():
    learner = tiny()
    learner.iterate()
    features, policy = torch.zeros(1, learner.policy.num_features + 1), learner.policy
    limits = [policy.normalize_action(x) for x in (policy.action_low, policy.action_high)]
    at_limit = torch.tensor([1.5, -1.5]).expand(1, 8, 2, 2).clone()
    gradient, _ = learner.critic.gradient(features, at_limit, *limits)
    assert (gradient[..., 0] <= 0).all()
    assert (gradient[..., 1] >= 0).all()
    held = at_limit.clamp(*limits)
    assert not torch.equal(held, at_limit)
    assert torch.equal(gradient, learner.critic.gradient(features, held, *limits)[0])
    inside, agreement = learner.critic.gradient(features, 0.1 * at_limit, *limits)
    action = (0.1 * at_limit).requires_grad_()
    ensemble = learner.critic.ensemble
    q = ensemble(ensemble.embed(features), action.flatten(0, 1).flatten(1)).mean(0).sum()
    assert torch.allclose(inside, torch.autograd.grad(q, action)[0], atol=1e-7)
    assert -1 <= agreement <= 1


@pytest.mark.parametrize("poison", [float("nan"), 1e12])
def test_a_loss_that_explodes_stops_the_run_before_it_spoils_the_weights(poison):
    learner = tiny()
    learner.iterate()
    with torch.no_grad():
        learner.critic.ensemble.head.fill_(poison)
    before = learner.critic.ensemble.from_action.clone()
    with pytest.raises(RunFailed, match=r"critic loss is"):
        learner.iterate()
    assert torch.equal(before, learner.critic.ensemble.from_action)
    other = tiny()
    other.iterate()
    block = other.replay.sample(8, other.generator)
    before = other.policy.velocity_field.head.bias.clone()
    with torch.no_grad():
        other.reference.velocity_field.head.bias.add_(poison)
    with pytest.raises(RunFailed, match=r"constraint loss is"):
        other.actor_step(block)
    assert torch.equal(before, other.policy.velocity_field.head.bias)


def test_exploration_noise_follows_the_curvature_of_the_flow(generator):
    learner = tiny()
    obs = {"features": torch.zeros(4000, 2)}
    _, trace = learner.explore(obs)
    quiet = trace["exploration_std"] < 1e-5
    assert 0.4 < quiet.float().mean() < 0.6  # at the last step the landing point is the action
    for how, std in (("none", 0.0), ("gaussian", 0.3)):
        config = dataclasses.replace(TINY, exploration=how, exploration_scale=0.3)
        learner.config = config
        assert torch.allclose(learner.explore(obs)[1]["exploration_std"], torch.tensor(std))
    limit = learner.policy.normalize_action(learner.policy.action_high)
    assert (trace["action"] <= limit + 1e-6).all()  # what is kept is what is executed
    # Of the same draws: the root mean square per element, or the norm of the chunk's four, and its scale.
    sizes = []
    for norm, scale in ((False, 1.0), (False, 0.5), (True, 1.0)):
        learner.config = dataclasses.replace(
            TINY, explore_by_norm=norm, exploration_scale=scale, start_noise=(0.0, 1.0)
        )
        learner.generator.manual_seed(1)
        sizes.append(learner.explore(obs)[1]["exploration_std"])
    assert torch.allclose(sizes[1], 0.5 * sizes[0])
    assert torch.allclose(sizes[2], 2 * sizes[0])


@pytest.mark.parametrize(("spread", "warned"), [(0.05, True), (0.5, False)])
def test_samples_that_collapse_are_reported(spread, warned, monkeypatch, caplog):
    learner = tiny()
    spreads = iter([torch.tensor(spread), torch.tensor(1.0)])
    monkeypatch.setattr(rldt, "sample_spread", lambda actions: next(spreads))
    metrics = learner.iterate()  # the policy's spread, then the base policy's
    assert metrics["train/spread_ratio"] == pytest.approx(spread)
    assert ("mode collapse" in caplog.text) == warned

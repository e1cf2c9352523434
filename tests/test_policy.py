"""What a policy sees (fields, images) and continues (a prefix of actions already under way)."""

import copy

import numpy as np
import pytest
import torch
from point_world import PointEnv, point_policy
from toys import looks_trained, random_obs, small_policy, small_spec, untrained_policy

from flow_policy_rl.algorithms import bc
from flow_policy_rl.algorithms.bc import cfm_loss
from flow_policy_rl.algorithms.gaussian import Gaussian, GaussianConfig
from flow_policy_rl.algorithms.ppo import PPO, PPOConfig
from flow_policy_rl.algorithms.score_flow import ScoreFlow, ScoreFlowConfig
from flow_policy_rl.errors import InputError
from flow_policy_rl.evaluate import evaluate
from flow_policy_rl.flow import interpolate
from flow_policy_rl.networks import ImageEncoder, fit, random_shift, shift_images
from flow_policy_rl.policy import FlowPolicy, NetworkConfig, to_tensors
from flow_policy_rl.rollout import Collector, flatten
from flow_policy_rl.spec import ObservationField, PolicySpec
from sim.tasks import make_task
from sim.vec_env import VecEnv


def image_policy() -> FlowPolicy:
    camera = ObservationField("front_image", "image", (), "", "front", resolution=(24, 32))
    joints = ObservationField("joint_pos", "joint_position", ("a", "b"), "rad")
    torch.manual_seed(0)
    return FlowPolicy(small_spec(observations=(joints, camera)), NetworkConfig(width=16, depth=2))


@pytest.mark.parametrize("integrator", ["euler", "midpoint", "heun", "rk4"])
def test_the_chunk_starts_with_the_prefix_bit_for_bit_and_the_rest_depends_on_it(
    integrator, generator
):
    policy = small_policy(execute_horizon=3, prefix_horizon=3)
    obs = random_obs(policy, 4, generator)
    noise = torch.randn(4, *policy.chunk_shape, generator=generator)
    prefix = 0.3 * torch.randn(4, 3, 2, generator=generator)
    delay = torch.tensor([0, 1, 2, 3])
    given = {**obs, "prefix": prefix, "inference_delay": delay}
    chunk = policy.sample(given, noise, integrator=integrator)
    plain = policy.sample(obs, noise, integrator=integrator)
    for row, known in enumerate(delay.tolist()):
        assert torch.equal(chunk[row, :known], prefix[row, :known])
    torch.testing.assert_close(chunk[0], plain[0])
    assert (chunk[1:, 3:] - plain[1:, 3:]).abs().amax() > 1e-4
    # What lies beyond the delay in the prefix is not read.
    other = prefix.clone()
    other[1, 1:] += 1.0
    again = policy.sample({**given, "prefix": other}, noise, integrator=integrator)
    assert torch.equal(again[1], chunk[1])


def test_known_actions_carry_no_loss_and_no_gradient(generator):
    policy = small_policy(execute_horizon=3, prefix_horizon=3)
    obs = random_obs(policy, 5, generator)
    x_1, x_0 = (torch.randn(5, *policy.chunk_shape, generator=generator) for _ in range(2))
    t = torch.full((5, 6), 0.4)
    t[:, :2] = 1.0
    velocity = policy.velocity_field(interpolate(x_0, x_1, t), t, policy.embed(obs))
    expected = (velocity - (x_1 - x_0))[:, 2:].square().mean(dim=(1, 2))
    torch.testing.assert_close(cfm_loss(policy, obs, x_1, x_0, t), expected)


@pytest.mark.parametrize("num_flow_steps", [1, 4, 10])
def test_a_policy_that_predicts_the_chunk_carries_all_noise_to_it(generator, num_flow_steps):
    policy = looks_trained(small_policy(predicts="chunk"))
    with torch.no_grad():
        policy.velocity_field.head.weight.zero_()
    noise = torch.randn(50, *policy.chunk_shape, generator=generator)
    x = policy.carry(
        noise, policy.embed(random_obs(policy, 50, generator)), None, None, num_flow_steps
    )
    wanted = policy.velocity_field.head.bias.view(policy.chunk_shape).expand_as(x)
    torch.testing.assert_close(x, wanted, atol=1e-5, rtol=0)


def test_one_chunk_per_observation_is_imitated_better_by_predicting_the_chunk(generator):
    """Distance of a sample to the only right chunk after equal training: the noise costs a velocity field its width."""
    miss = {}
    for predicts in ("velocity", "chunk"):
        policy = small_policy(predicts=predicts)
        data = random_obs(policy, 512, generator.manual_seed(0))
        x_1 = torch.tanh(policy.features(data)[:, :1, None] * torch.linspace(0.5, 2, 12).view(6, 2))
        optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
        for _ in range(400):
            x_0 = torch.randn(x_1.shape, generator=generator)
            t = bc.flow_times(len(x_1), generator).expand(x_1.shape[:2])
            loss = bc.cfm_loss(policy, data, x_1, x_0, t).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            x = policy.carry(torch.randn(x_1.shape, generator=generator), policy.embed(data))
        miss[predicts] = (x - x_1).square().mean().sqrt().item()
    assert miss["chunk"] < 0.7 * miss["velocity"]


def test_flow_times_of_imitation_lie_near_the_noise(generator, monkeypatch):
    """Density 2 (1 - t): the mean is 1/3 and three quarters are before 1/2; t = 1, where nothing is left, never."""
    t = bc.flow_times(100_000, generator)
    assert t.shape == (100_000, 1)
    assert abs(t.mean() - 1 / 3) < 0.005
    assert abs((t < 0.5).float().mean() - 0.75) < 0.005
    for extreme in (0.0, 1 - 2**-24):  # the ends of torch.rand
        monkeypatch.setattr(torch, "rand", lambda *a, value=extreme, **k: torch.full(a, value))
        assert 0 <= bc.flow_times(3, generator).max() < 1


def test_keypoints_follow_a_bright_spot():
    encoder = ImageEncoder((96, 96), keypoints=1)
    with torch.no_grad():  # one map that is bright where the image is
        for layer in encoder.convolutions:
            if hasattr(layer, "weight"):
                layer.weight.fill_(0.02)
                layer.bias.zero_()
        encoder.convolutions[-1].weight *= 50
    image = torch.zeros(2, 96, 96, 3, dtype=torch.uint8)
    image[0, 20:28, 60:68] = 255  # middle at row 23.5, column 63.5
    image[1, 70:78, 10:18] = 255
    x, y = encoder(image).detach().numpy().T
    np.testing.assert_allclose(x, [2 * 63.5 / 95 - 1, 2 * 13.5 / 95 - 1], atol=0.13)  # one cell
    np.testing.assert_allclose(y, [2 * 23.5 / 95 - 1, 2 * 73.5 / 95 - 1], atol=0.13)  # one cell


def test_a_larger_picture_is_cropped_about_its_middle_and_resized():
    wide = torch.zeros(1, 1, 48, 128)
    wide[..., 32:96] = 1.0  # the middle that has the right shape
    assert torch.equal(fit(wide, (24, 32)), torch.ones(1, 1, 24, 32))


def test_a_random_shift_moves_whole_pictures_and_repeats_their_edges(generator):
    image = torch.randint(256, (64, 8, 9, 3), generator=generator).to(torch.uint8)
    moved = random_shift(image, 2, generator)
    padded = np.pad(image.numpy(), ((0, 0), (2, 2), (2, 2), (0, 0)), mode="edge")
    places = set()
    for one, wide in zip(moved.numpy(), padded, strict=True):
        fits = [
            (y, x)
            for y in range(5)
            for x in range(5)
            if np.array_equal(one, wide[y : y + 8, x : x + 9])
        ]
        assert len(fits) == 1
        places.add(fits[0])
    assert len(places) > 15  # of 25
    obs = {"front_image": image}
    assert shift_images(obs, obs, 0, generator)["front_image"] is image


@pytest.mark.parametrize("train_encoder", [False, True])
def test_a_rollout_learns_from_the_moved_pictures_it_acted_on(train_encoder, generator):
    task = make_task("lift", cameras=True)
    torch.manual_seed(0)
    policy = untrained_policy(task, 4, 2)
    estimator = ScoreFlow(policy, ScoreFlowConfig(drift="none"))
    config = PPOConfig(num_steps=2, num_minibatches=1, random_shift=8, train_encoder=train_encoder)
    loop = PPO(policy, estimator, VecEnv(task, 2), config, generator)
    rollout = loop.collect()
    obs, trace = flatten(rollout.obs), flatten({**rollout.trace, "executed": rollout.executed})
    log_ratio, _ = estimator.evaluate(obs, trace)
    assert log_ratio.abs().max() < 1e-4
    # An unmoved picture would not do: the same place seen again gives another number.
    env = VecEnv(task, 2)
    plain = policy.features(to_tensors(env.reset()))
    seen = policy.features({k: v[0] for k, v in rollout.obs.items()})
    assert (seen - plain).abs().max() > 1e-4


@pytest.mark.parametrize("from_scratch", [False, True])
@pytest.mark.parametrize("train_encoder", [False, True])
def test_an_update_from_pictures_moves_the_encoder_only_where_asked(
    train_encoder, from_scratch, generator
):
    task = make_task("lift", cameras=True)
    torch.manual_seed(0)
    policy = untrained_policy(task, 4, 2)
    sizes = {"num_steps": 2, "num_epochs": 1, "num_minibatches": 1, "critic_warmup": 0}
    config = PPOConfig(train_encoder=train_encoder, **sizes)
    estimator = ScoreFlow(policy, ScoreFlowConfig(drift="none"))
    loop = PPO(policy, estimator, VecEnv(task, 2), config, generator, from_scratch)
    before = copy.deepcopy(policy)
    loop.iterate()
    moved = {
        name.partition(".")[0]
        for (name, new), old in zip(policy.named_parameters(), before.parameters(), strict=True)
        if not torch.equal(new, old)
    }
    assert moved == {"velocity_field"} | ({"encoders"} if train_encoder else set())


def test_one_ratio_cannot_end_an_update(generator):
    """One chunk in a hundred whose ratio is e^30 counts as ten times the target, a tenth of what ends an update."""
    env = PointEnv(20)
    policy = point_policy(width=16, depth=2)
    config = PPOConfig(num_envs=20, num_steps=5, target_kl=0.3)
    loop = PPO(policy, Gaussian(policy, GaussianConfig()), env, config, generator)
    log_ratio = torch.zeros(100, requires_grad=True)
    far = torch.zeros(100)
    far[7] = 30.0
    loop.estimator.evaluate = lambda obs, trace: (log_ratio + far, None)
    advantage = torch.full((100,), -1.0)
    metrics = loop._actor_step({}, {}, advantage, torch.arange(100), 100)
    assert metrics["train/approx_kl"] == pytest.approx(0.1 * config.target_kl)
    assert log_ratio.grad[7] == 0
    assert (log_ratio.grad[:7] > 0).all()  # less of what was bad


def test_features_given_are_features_computed(generator):
    policy = image_policy()
    obs = {
        "joint_pos": torch.randn(3, 2, generator=generator),
        "front_image": torch.randint(256, (3, 24, 32, 3), generator=generator).to(torch.uint8),
    }
    noise = torch.zeros(3, *policy.chunk_shape)
    features = policy.features(obs)
    assert features.shape == (3, policy.num_features)
    torch.testing.assert_close(
        policy.sample({"features": features}, noise), policy.sample(obs, noise)
    )


def test_an_observation_far_beyond_the_demonstrations_counts_as_ten_spreads():
    """A cube that nobody knocked over has a tiny spread; the first one that falls ended whole updates."""
    normalizer = small_policy().normalizer
    name, size = next(iter(normalizer.fields.items()))
    spreads = torch.tensor([-3.0, 9.5, 50.0, -1e6])
    obs = {other: torch.zeros(4, width) for other, width in normalizer.fields.items()}
    obs[name] = normalizer.mean[:size] + spreads[:, None] * normalizer.std[:size]
    expected = torch.tensor([-3.0, 9.5, 10.0, -10.0])[:, None].expand(4, size)
    assert torch.allclose(normalizer(obs)[:, :size], expected, rtol=1e-4)


def test_the_environment_draws_what_the_policy_sees_and_only_that():
    task = make_task("lift", cameras=True)
    env = VecEnv(task, 3)
    first = env.reset([1, 2, 3])
    assert list(first) == [f.name for f in task.obs_fields]
    assert "object_pose" not in first
    image = first["front_image"]
    assert image.dtype == np.uint8
    assert image.shape == (3, 96, 96, 3)
    assert image.std() > 10
    red = (image[..., 0] > 100) & (image[..., 1] < 80)
    assert (red.sum(axis=(1, 2)) > 30).all()  # the cube is in the picture, and not a dot
    again = VecEnv(task, 1).reset([2])
    np.testing.assert_array_equal(again["front_image"][0], image[1])
    env.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prefix_horizon": 3}, "prefix_horizon"),
        ({"observations": (ObservationField("i", "image", (), "", "front"),)}, "resolution"),
        ({"observations": (ObservationField("noise", "pose", ("x",), "m"),)}, "taken"),
    ],
)
def test_specs_that_cannot_be(changes, message):
    with pytest.raises(InputError, match=message):
        small_spec(**changes)


def test_a_spec_with_a_camera_survives_the_round_trip():
    spec = image_policy().spec
    assert PolicySpec.from_json(spec.to_json()) == spec
    assert spec.cameras == ("front",)


def numbered_chunks(env: VecEnv, horizon: int):
    """A policy whose k-th chunk holds the targets of the start pose plus k + h/100 mrad, and what it was given."""
    given = []
    home = env.world.home_qpos[env.world.joint_qpos]

    def act(obs, noise):
        given.append(obs)
        steps = 1e-3 * (len(given) + np.arange(horizon) / 100)
        return np.tile(home + steps[:, None], (env.num_envs, 1, 1))

    return act, given


@pytest.mark.parametrize("prefix_horizon", [0, 3])
def test_an_inference_that_takes_two_steps_leaves_two_old_actions_to_execute(
    prefix_horizon, monkeypatch
):
    env = VecEnv(make_task("lift"), 2)
    act, given = numbered_chunks(env, 8)
    executed = []
    plain_step = env.step
    monkeypatch.setattr(
        env, "step", lambda chunk: executed.append(chunk.copy()) or plain_step(chunk)
    )
    evaluate(env, act, [1, 2], (8, 8), 5, inference_delay=2, prefix_horizon=prefix_horizon)
    env.close()
    home = env.world.home_qpos[env.world.joint_qpos]
    numbers = np.round(1e3 * (np.stack(executed) - home)[:, 0, :, 0], 4)
    np.testing.assert_allclose(numbers[0], 1 + np.arange(5) / 100)
    np.testing.assert_allclose(numbers[1], [1.05, 1.06, 2.02, 2.03, 2.04])
    np.testing.assert_allclose(numbers[2], [2.05, 2.06, 3.02, 3.03, 3.04])
    if prefix_horizon:
        assert [int(obs["inference_delay"][0]) for obs in given[:3]] == [0, 2, 2]
        np.testing.assert_allclose(
            1e3 * (given[1]["prefix"] - home)[0, :, 0], [1.05, 1.06, 1.07], atol=1e-6
        )


def test_rollouts_see_all_parts_of_an_episode_and_count_whole_ones():
    """What the moved time limits cut short ends in every rollout and is not counted, also after a restart."""
    env = VecEnv(make_task("lift"), 32)
    collector = Collector(env, 5, 0.99)
    hold = torch.as_tensor(env.world.home_qpos[env.world.joint_qpos]).repeat(32, 5, 1)
    rollouts = []
    for _ in range(2 * env.task.episode_steps // 25 + 1):
        collector.restore(collector.state())
        rollouts.append(collector.collect(lambda obs: (hold, {}), 5))
    env.close()
    ended = torch.cat([rollout.truncated | rollout.terminated for rollout in rollouts])
    assert all(rollout.truncated.any() for rollout in rollouts)
    assert sum(len(rollout.outcomes) for rollout in rollouts) == int(ended.sum()) - 32
    first = rollouts[0].metrics()
    assert first["rollout/episodes"] == 0
    assert "rollout/success_rate" not in first
    last = rollouts[-1].metrics()
    assert last["rollout/success_rate"] == 0.0
    assert last["rollout/episode_steps"] == env.task.episode_steps  # whoever holds still ends none


class Apart(PointEnv):
    """Time limits are moved apart."""

    def stagger(self):
        self.age[:] = np.arange(self.num_envs) % self.episode_steps


def test_every_rollout_counts_successes_and_failures_as_often_as_they_happen():
    """Three of ten succeed, after an eighth of the time that the others fail in; in whichever rollout one looks."""

    def act(obs):
        going = obs["position"][:, 0] > 0.04  # starts are even on -0.1 to 0.1
        return torch.where(going, 0.25, 0.0)[:, None, None] * torch.tensor([[[1.0, 0.0]] * 2]), {}

    collector = Collector(Apart(2000, episode_steps=24), 2, 0.99)
    seen = [collector.collect(act, 8).metrics() for _ in range(6)]
    assert seen[0]["rollout/episodes"] == 0  # nobody's time is up
    # Four strides of 0.25 reach a goal within 0.2 of 1 from 0.04 to 0.05, three from further on.
    steps = 0.3 * (3 + (0.05 - 0.04) / 0.06) + 0.7 * 24
    for rollout in seen[1:]:
        spread = np.sqrt(0.3 * 0.7 / rollout["rollout/episodes"])
        assert rollout["rollout/success_rate"] == pytest.approx(0.3, abs=4 * spread)
        assert rollout["rollout/episode_steps"] == pytest.approx(steps, abs=4 * spread * 24)


def test_episodes_are_as_long_as_their_rewards_are_many():
    """Of a robot that falls: each control step pays one for being healthy, the one in which it falls does not."""
    env = VecEnv(make_task("hopper"), 8)
    env.task.forward_weight = env.task.control_weight = 0.0
    collector = Collector(env, 4, 0.99)
    generator = torch.Generator().manual_seed(0)
    rollouts = [
        collector.collect(lambda obs: (2 * torch.rand(8, 4, 3, generator=generator) - 1, {}), 300)
        for _ in range(2)
    ]
    env.close()
    for rollout in rollouts:
        seen = rollout.metrics()
        assert seen["rollout/episodes"] > 8
        assert seen["rollout/episode_steps"] == pytest.approx(seen["rollout/return"] + 1)


def test_rollouts_of_a_slow_policy_carry_the_actions_under_way():
    env = VecEnv(make_task("lift"), 4)
    collector = Collector(env, 5, 0.99, prefix_horizon=3)
    chunks = []

    def act(obs):
        chunk = torch.as_tensor(env.world.home_qpos[env.world.joint_qpos]).repeat(4, 8, 1)
        chunks.append(chunk + 1e-3 * torch.randn(chunk.shape, dtype=chunk.dtype))
        return chunks[-1], {}

    rollout = collector.collect(act, 30)
    env.close()
    prefix, delay = rollout.obs["prefix"], rollout.obs["inference_delay"]
    ended = rollout.terminated | rollout.truncated
    assert ended.any()
    assert (delay[0] == 0).all()
    assert (delay[1:][ended[:-1]] == 0).all()
    assert set(delay[1:][~ended[:-1]].tolist()) == {0, 1, 2, 3}
    for k in range(1, 30):
        torch.testing.assert_close(prefix[k], chunks[k - 1][:, 5:8], check_dtype=False)

"""Named settings: one function per algorithm, which returns the settings for a task, from a checkpoint or from scratch.

`clean` is what we recommend. `paper` is what was published or released, as far as this design has the same switch
(the docs page of an algorithm lists the rest); `lift` is nobody's benchmark, it takes the nearest task's settings.
"""

import dataclasses
import math
from typing import Literal

from flow_policy_rl.algorithms.bc import BCConfig
from flow_policy_rl.algorithms.fpo import FPOConfig
from flow_policy_rl.algorithms.gaussian import GaussianConfig
from flow_policy_rl.algorithms.ppo import PPOConfig
from flow_policy_rl.algorithms.rldt import RLDTConfig, TransportConfig
from flow_policy_rl.algorithms.rldt_critic import CriticConfig
from flow_policy_rl.algorithms.score_flow import ScoreFlowConfig

Preset = Literal["clean", "paper"]
ASSEMBLY = ("one_leg", "lamp", "round_table")
STAGED = (*ASSEMBLY, "kitchen")  # done in stages
# Parts fit by millimetres: exploring as widely as on `lift` hardly ever succeeds.
PRECISE = ("insert", *ASSEMBLY)
LOCOMOTION = ("hopper", "walker2d", "halfcheetah", "ant", "humanoid")


# Fine-tuning of an imitated policy on a sparse reward: many environments, small steps, a budget of KL per update.
SPARSE = PPOConfig(
    num_iterations=12,
    num_envs=256,
    num_minibatches=4,
    actor_learning_rate=3e-5,
    target_kl=0.3,
)

# Noise of a fifth makes the same step five times as far in KL.
FINE = dataclasses.replace(SPARSE, actor_learning_rate=6e-6)


def _locomotion(
    task: str,
    from_scratch: bool,
    actor_learning_rate: float,
    num_minibatches: int = 16,
    target_kl: float = 0.1,
    **changes,
) -> PPOConfig:
    """Dense rewards, from scratch or from a medium policy.

    A medium Ant that looks a hundred steps ahead learns to run faster and to fall over (docs/log.md).
    """
    return PPOConfig(
        num_iterations=150,
        num_envs=64,
        num_steps=64,
        num_epochs=5,
        num_minibatches=num_minibatches,
        gamma=0.999 if task == "ant" and not from_scratch else 0.99,
        actor_learning_rate=actor_learning_rate,
        target_kl=target_kl,
        critic_warmup=0,
        scale_rewards=True,
        **changes,
    )


def bc(task: str, preset: Preset = "clean", from_scratch: bool = True) -> BCConfig:
    """Flow-matching pre-training."""
    return BCConfig(num_steps=4000)


def score_flow(task: str, preset: Preset = "clean", from_scratch: bool = False) -> dict:
    """ScoRe-Flow fine-tuning."""
    if preset == "paper":
        return _score_flow_paper(task)
    if task in LOCOMOTION:
        # A chunk of 17 joints is at 0.1 after 9 of 40 gradient steps (docs/log.md).
        target_kl = 0.5 if task == "humanoid" and not from_scratch else 0.1
        ppo = _locomotion(task, from_scratch, 1e-4, num_minibatches=8, target_kl=target_kl)
        return {"ppo": ppo, "score_flow": ScoreFlowConfig(0.1, 0.3)}
    if task in PRECISE:
        # A learned drift leaves a thirtieth of the starting noise in what is deployed (docs/log.md).
        kernel = ScoreFlowConfig(0.005, 0.02, drift="matched", start_noise=0.0)
        return {"ppo": FINE, "score_flow": kernel}
    return {"ppo": SPARSE, "score_flow": ScoreFlowConfig(0.03, 0.08, start_noise=0.0)}


def reinflow(task: str, preset: Preset = "clean", from_scratch: bool = False) -> dict:
    """ReinFlow: the same without a drift."""
    settings = score_flow(task, preset, from_scratch)
    kernel = dataclasses.replace(settings["score_flow"], drift="none")
    return {**settings, "score_flow": kernel}


def _score_flow_paper(task: str) -> dict:
    """The released configurations, by family of tasks (docs/score_flow.md has the table)."""
    if task in LOCOMOTION:
        quick = task == "walker2d"
        ppo = PPOConfig(
            num_iterations=200 if task == "humanoid" else 1000,
            num_envs=40,
            num_steps=500,
            num_epochs=5,
            num_minibatches=4,
            gamma=0.9975,  # 0.99 per chunk of four
            clip_range=0.01,
            dual_clip=0.0,
            actor_learning_rate=4e-4 if quick else 4.5e-5,
            critic_learning_rate=4e-3 if quick else 6.5e-4,
            learning_rate_floor=1.0 if quick else 0.45,
            learning_rate_cycle=100,
            learning_rate_warmup=10,
            entropy_coef=0.03,
            critic_warmup=5 if quick else 0,
            max_grad_norm=math.inf,
            scale_rewards=True,
        )
        low, high = (0.08, 0.16) if task in ("ant", "humanoid") else (0.10, 0.24)
        return {"ppo": ppo, "score_flow": _paper_kernel(low, high, decay=0.3)}
    if task == "kitchen":
        ppo = PPOConfig(
            num_iterations=300,
            num_envs=40,
            num_steps=200,
            num_epochs=10,
            num_minibatches=14,
            gamma=0.9975,
            clip_range=0.01,
            dual_clip=0.0,
            actor_learning_rate=4.5e-5,
            critic_learning_rate=6.5e-4,
            learning_rate_floor=0.45,
            learning_rate_cycle=100,
            learning_rate_warmup=10,
            critic_warmup=0,
            max_grad_norm=math.inf,
            scale_rewards=True,
        )
        return {"ppo": ppo, "score_flow": _paper_kernel(0.05, 0.12, decay=0.3)}
    ppo = PPOConfig(
        num_iterations=150,
        num_envs=50,
        num_steps=300,
        num_epochs=10,
        num_minibatches=10,
        gamma=0.99975,  # 0.999 per chunk of four
        clip_range=0.01,
        dual_clip=0.0,
        actor_learning_rate=2e-5,
        critic_learning_rate=6.5e-4,
        learning_rate_floor=0.5,
        learning_rate_cycle=100,
        learning_rate_warmup=10,
        entropy_coef=0.01,
        target_kl=0.01,
        critic_warmup=5,
        max_grad_norm=25.0,
        scale_rewards=True,
    )
    return {"ppo": ppo, "score_flow": _paper_kernel(0.08, 0.14, decay=0.0)}


def _paper_kernel(sigma_min: float, sigma_max: float, decay: float) -> ScoreFlowConfig:
    # The released gain learns at the field's rate; 4.5e-5 is that of most tasks.
    return ScoreFlowConfig(
        sigma_min,
        sigma_max,
        sigma_decay=decay,
        head_learning_rate=4.5e-5,
        likelihood="per_dim_mean",
    )


def fpo(task: str, preset: Preset = "clean", from_scratch: bool = False) -> dict:
    """FPO: one ratio per action."""
    if preset == "paper":
        ppo = PPOConfig(
            num_iterations=61,
            num_envs=2048,
            num_steps=480,
            num_epochs=16,
            num_minibatches=32,
            gamma=0.995,
            clip_range=0.05,
            dual_clip=0.0,
            actor_learning_rate=3e-4,
            critic_learning_rate=3e-4,
            max_grad_norm=1e9,
            critic_warmup=0,
        )
        ratio = FPOConfig(
            ratio="per_action",
            loss="noise",
            reduction="mean",
            times="grid",
            antithetic=False,
            loss_clamp=0.0,
            log_ratio_clamp=0.0,
            action_noise=0.0,
        )
        return {"ppo": ppo, "fpo": ratio}
    if task in LOCOMOTION:
        # Without noise that stays, one ratio per action narrows the flow until nothing is tried any more.
        ratio = FPOConfig(ratio="per_action", action_noise=0.15)
        return {"ppo": _locomotion(task, from_scratch, 3e-4, clip_range=0.1), "fpo": ratio}
    # One ratio per action follows its draws closely: at 3e-5 and 0.05 success falls again after eight iterations.
    # Where parts fit by millimetres, which no ratio sees, 1e-5 loses everything (docs/log.md).
    rate, noise = (2e-6, 0.005) if task in PRECISE else (1e-5, 0.02)
    ppo = dataclasses.replace(SPARSE, actor_learning_rate=rate, clip_range=0.02)
    return {"ppo": ppo, "fpo": FPOConfig(ratio="per_action", action_noise=noise)}


def fpo_plus_plus(task: str, preset: Preset = "clean", from_scratch: bool = False) -> dict:
    """FPO++: one ratio per draw, and its asymmetric trust region."""
    if preset == "paper" and task in LOCOMOTION:
        ppo = PPOConfig(
            num_iterations=1500,
            num_envs=4096,
            num_steps=24,
            num_epochs=16,
            num_minibatches=4,
            gamma=0.99,
            clip_range=0.05,
            dual_clip=0.0,
            trust_region="aspo",
            actor_learning_rate=1e-4,
            critic_learning_rate=1e-4,
            critic_warmup=0,
            value_width=768,
        )
        ratio = FPOConfig(num_mc_samples=16, times="uniform", antithetic=False)
        return {"ppo": ppo, "fpo": ratio}
    if preset == "paper":  # fine-tuning of manipulation policies with chunks
        ppo = PPOConfig(
            num_iterations=104,
            num_envs=30,
            num_steps=100,
            num_epochs=10,
            num_minibatches=8,
            gamma=0.99,
            gae_lambda=0.99,
            clip_range=0.02,
            dual_clip=0.0,
            actor_learning_rate=1e-5,
            critic_learning_rate=1e-4,
            max_grad_norm=5.0,
            critic_warmup=1,
        )
        ratio = FPOConfig(
            reduction="joint_mean",
            times="uniform",
            t_min=0.0,
            antithetic=False,
            loss_clamp=0.0,
            log_ratio_clamp=5.0,
            action_noise=0.0,
        )
        return {"ppo": ppo, "fpo": ratio}
    if task in LOCOMOTION:
        # Pulled back at a bad action, one ratio per draw raises the loss of what is to be done less, update after
        # update: a policy that walks loses what it can, slower at the paper's rate and clip (docs/log.md).
        rate, clip, region = (5e-4, 0.3, "aspo") if from_scratch else (1e-4, 0.05, "ppo")
        ppo = _locomotion(task, from_scratch, rate, clip_range=clip, trust_region=region)
        # aspo squares the ratio: at exp(10) one draw's gradient is beyond what counts as exploded.
        return {"ppo": ppo, "fpo": FPOConfig(action_noise=0.15, log_ratio_clamp=5.0)}
    rate, noise = (6e-6, 0.005) if task in PRECISE else (3e-5, 0.02)
    ppo = dataclasses.replace(
        SPARSE, actor_learning_rate=rate, clip_range=0.05, trust_region="aspo"
    )
    return {"ppo": ppo, "fpo": FPOConfig(action_noise=noise)}


def gaussian_ppo(task: str, preset: Preset = "clean", from_scratch: bool = False) -> dict:
    """The control: noise and steps of ScoRe-Flow, but from scratch on walkers, where so little noise finds nothing."""
    if task in LOCOMOTION and from_scratch:
        return {"ppo": _locomotion(task, from_scratch, 3e-4), "gaussian": GaussianConfig(0.2, 1.5)}
    same = score_flow(task)
    noise = same["score_flow"]
    return {"ppo": same["ppo"], "gaussian": GaussianConfig(noise.sigma_min, noise.sigma_max)}


def rldt(task: str, preset: Preset = "clean", from_scratch: bool = False) -> dict:
    """RLDT, density transport."""
    if preset == "paper":
        return {"rldt": _rldt_paper(task)}
    if task in LOCOMOTION:
        return {"rldt": _rldt_locomotion()}
    precise = task in PRECISE
    # Held to what returns can be, [0, 1], targets taught less on `pick_place` and `one_leg`; on `insert` open ones lost
    # more (docs/log.md).
    held = {"value_low": 0.0, "value_high": 1.0} if task == "insert" else {}
    return {
        "rldt": RLDTConfig(
            num_iterations=16 if task == "lift" else 24,  # beyond lift: not tuned
            num_envs=128,
            segments_per_block=64,
            critic_steps=8,
            balanced_replay=True,
            # A success of `one_leg` takes 300 steps: at 0.995 its first chunks are worth a fifth of it.
            gamma=0.9994 if task in ASSEMBLY else 0.995,
            # Held to the previous policy only, what was gained falls again after its peak (docs/log.md).
            reference="base",
            actor_learning_rate=2e-5 if precise else 1e-4,
            exploration_scale=0.3 if precise else 1.0,
            start_noise=(0.0, 1.0),
            # Divided by P as published, it is up to eight times shorter, and the base policy holds it back.
            transport=TransportConfig(row_normalized=not precise),
            critic=CriticConfig(layer_norm=True, stage_input=task in STAGED, **held),
        )
    }


def _rldt_locomotion() -> RLDTConfig:
    """Dense rewards: most of a return is not the chunk's doing, so the critic needs time, data and deviations to see.

    The landing gap of a policy that predicts chunks is a hundredth, which shows it nothing of other actions.
    """
    return RLDTConfig(
        num_iterations=130,
        num_envs=128,
        segments_per_block=64,
        critic_steps=8,
        critic_warmup=20,
        replay_iterations=100,
        gamma=0.99,
        reference="base",
        constraint_coef=0.05,
        actor_learning_rate=1e-4,
        exploration="gaussian",
        exploration_scale=0.15,
        start_noise=(0.0, 1.0),
        critic=CriticConfig(
            layer_norm=True, normalize_reward=True, td_lambda=0.9, target_decay=0.98
        ),
    )


def _rldt_paper(task: str) -> RLDTConfig:
    """The released configurations, by benchmark (docs/rldt.md has the table). Their gamma is per chunk."""
    critic = CriticConfig(init_std=0.1, time_limit_is_terminal=True)
    common = RLDTConfig(num_envs=100, explore_by_norm=True)
    if task in LOCOMOTION:
        return dataclasses.replace(
            common,
            num_iterations=71,
            num_steps=500,
            gamma=0.99 ** (1 / 4),
            critic=dataclasses.replace(critic, td_lambda=0.0, normalize_reward=True),
        )
    if task in ASSEMBLY:
        return dataclasses.replace(
            common,
            num_iterations=251,
            num_envs=1000,
            num_steps=88 if task == "one_leg" else 125,
            balanced_replay=True,
            gamma=0.995 ** (1 / 8),
            critic=dataclasses.replace(
                critic,
                width=512,
                learning_rate=5e-4,
                value_low=0.0,
                value_high=1.0 if task == "one_leg" else 2.0,
                stage_input=True,
            ),
        )
    return dataclasses.replace(  # Robomimic Square and Transport
        common,
        num_iterations=101 if task == "transport" else 201,
        num_envs=64,
        num_steps=200,
        replay_iterations=10,
        balanced_replay=True,
        gamma=0.999 ** (1 / (8 if task == "transport" else 4)),
        actor_warmup_steps=64,
        train_encoder=True,
        critic=dataclasses.replace(critic, value_low=0.0, value_high=1.0),
    )


def demo_data(task: str, cameras: bool) -> dict:
    """How the demo's demonstrations are collected."""
    noise = None if task in PRECISE else 0.03
    return {"episodes": 200 if cameras else 50, "noise": noise, "cameras": cameras}


def demo_bc(task: str, cameras: bool) -> BCConfig:
    """Pre-training in the demo. `lift` gets so little that room is left for RL: 3,500 steps imitate it perfectly.

    Through a camera it gets enough: what learned for 600 steps loses 15 points over ROS (docs/log.md).
    """
    if cameras:
        return BCConfig(num_steps=1500, batch_size=128, ema_decay=0.998)
    return BCConfig(num_steps=500 if task == "lift" else 3500, ema_decay=0.999)


PRESETS = {
    "bc": bc,
    "fpo": fpo,
    "fpo_plus_plus": fpo_plus_plus,
    "score_flow": score_flow,
    "reinflow": reinflow,
    "rldt": rldt,
    "gaussian_ppo": gaussian_ppo,
}

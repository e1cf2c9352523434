"""Named settings: one function per algorithm, which returns the settings for a task."""

from flow_policy_rl.algorithms.bc import BCConfig
from flow_policy_rl.algorithms.ppo import PPOConfig
from flow_policy_rl.algorithms.score_flow import ScoreFlowConfig


def bc(task: str) -> BCConfig:
    """Flow-matching pre-training."""
    return BCConfig(num_steps=4000)


def score_flow(task: str) -> tuple[PPOConfig, ScoreFlowConfig]:
    """ScoRe-Flow fine-tuning."""
    ppo = PPOConfig(
        num_iterations=24,
        num_envs=256,
        num_minibatches=4,
        actor_learning_rate=1e-5,
        target_kl=0.3,
    )
    return ppo, ScoreFlowConfig(sigma_min=0.03, sigma_max=0.08, start_noise=0.0)


def demo_data(task: str, cameras: bool) -> dict:
    """How the demo's demonstrations are collected: few enough that imitation leaves room to improve."""
    return {"episodes": 200 if cameras else 50, "noise": 0.03, "cameras": cameras}


def demo_bc(task: str, cameras: bool) -> BCConfig:
    """Pre-training in the demo."""
    if cameras:
        return BCConfig(num_steps=3000, batch_size=128, ema_decay=0.998)
    return BCConfig(num_steps=3500, ema_decay=0.999)


PRESETS = {"bc": bc, "score_flow": score_flow}

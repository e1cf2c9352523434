"""Value targets over chunks: generalised advantages (Schulman et al., arXiv 1506.02438) and TD(lambda) returns."""

import torch
from torch import Tensor


def generalized_advantages(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    discount: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    gae_lambda: float,
) -> tuple[Tensor, Tensor]:
    """Advantages and value targets of T chunk steps in N environments.

    A chunk is one macro-action: `reward` is already discounted inside the chunk and `discount` is
    gamma to the number of control steps executed. A termination is worth nothing beyond; a
    truncation is worth `next_value`. Both cut the trace.

    Args:
        reward, discount, terminated, truncated: (T, N).
        value: (T, N) of the observation before the chunk.
        next_value: (T, N) of the observation after it, the final one of its own episode where that ended.

    Returns:
        advantage and returns = advantage + value, (T, N) each.
    """
    bootstrap = discount * next_value * (~terminated)
    delta = reward + bootstrap - value
    carry = discount * gae_lambda * (~(terminated | truncated))
    advantage = torch.empty_like(delta)
    following = torch.zeros_like(delta[0])
    for step in reversed(range(len(delta))):
        following = delta[step] + carry[step] * following
        advantage[step] = following
    return advantage, advantage + value


def lambda_returns(
    reward: Tensor,
    next_value: Tensor,
    discount: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    td_lambda: float,
) -> Tensor:
    """TD(lambda) targets (T, N) of T chunk steps, for critics of the action, where no V of the observation is at hand.

        G_t = r_t + discount_t * [ (1 - lambda) V_{t+1} + lambda G_{t+1} ]

    A termination is worth nothing beyond. A truncation and the last step are worth V_{t+1} alone.
    Arguments as in `generalized_advantages`.
    """
    targets = torch.empty_like(reward)
    following = next_value[-1]
    for step in reversed(range(len(reward))):
        mixed = torch.lerp(next_value[step], following, td_lambda)
        beyond = torch.where(truncated[step], next_value[step], mixed) * (~terminated[step])
        following = targets[step] = reward[step] + discount[step] * beyond
    return targets

"""A step along gradients summed over the processes, unless loss or gradient is not finite or has exploded."""

import math

import torch
from torch import nn

from flow_policy_rl import distributed
from flow_policy_rl.errors import RunFailed

LOSS_LIMIT = 1e8  # a loss beyond this has exploded


def apply_gradient(
    optimizer: torch.optim.Optimizer, loss: float, max_grad_norm: float, term: str
) -> float:
    """Step along the gradients summed over the processes; returns their norm before clipping.

    Raises:
        RunFailed: the loss or its gradient is not finite, or the loss has exploded. No weight was changed.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    distributed.sum_gradients(parameters)
    require_sound(loss, term)
    norm = nn.utils.clip_grad_norm_(parameters, max_grad_norm).item()
    require_sound(norm, f"gradient of the {term}")
    optimizer.step()
    return norm


def require_sound(value: float, term: str) -> None:
    """Refuse a number that is not finite or has exploded."""
    if not math.isfinite(value) or abs(value) > LOSS_LIMIT:
        raise RunFailed(f"{term} is {value:.4g}")

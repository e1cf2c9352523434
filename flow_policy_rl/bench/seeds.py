"""What stands behind a number of several seeds: their range while they are few, from five on a bootstrap interval."""

from collections.abc import Callable

import numpy as np

FEW_SEEDS = 4


def interquartile_mean(values: np.ndarray) -> np.ndarray:
    """Mean (...) of the middle half of the last axis (..., n): as robust as the median, and less noisy (Agarwal et al.,
    arXiv 2108.13264)."""
    cut = values.shape[-1] // 4
    return np.sort(values)[..., cut : values.shape[-1] - cut].mean(axis=-1)


def mean(values: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    return values.mean(axis=-1)


def between(
    values: np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray] = interquartile_mean,
    draws: int = 10_000,
) -> tuple[float, float]:
    """Lowest and highest of n seeds' values (n,) up to `FEW_SEEDS`, then a statistic's 95 % percentile bootstrap.

    Of up to four seeds the bootstrap of the inter-quartile mean is that range, whatever the values are: all draws from
    the lowest, and all from the highest, are more than 2.5 % of the draws. It holds the median of all seeds that there
    could be with 75 % for three, and is therefore called what it is.

    Args:
        statistic: over the last axis.
    """
    if len(values) <= FEW_SEEDS:
        return float(values.min()), float(values.max())
    picks = np.random.default_rng(0).integers(len(values), size=(draws, len(values)))
    drawn = np.sort(statistic(values[picks]))
    # On either side; not interpolated, since diverged seeds are at minus infinity.
    beyond = draws // 40
    return float(drawn[beyond]), float(drawn[-1 - beyond])


def span_name(seeds: int) -> str:
    """What `between` gives."""
    return "range" if seeds <= FEW_SEEDS else "95 % interval"

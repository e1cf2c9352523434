"""Running mean and variance of batches (Chan, Golub and LeVeque, 1983), over all processes."""

import torch
from torch import Tensor

from flow_policy_rl import distributed


class RunningStatistics(torch.nn.Module):
    """Mean and variance of all rows ever added, as if they had come at once."""

    def __init__(self, size: int):
        super().__init__()
        for name in ("count", "mean", "squares"):  # squares: sum of squared deviations
            shape = () if name == "count" else (size,)
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float64))

    @torch.no_grad()
    def add(self, rows: Tensor) -> None:
        """Merge a batch (n, size)."""
        rows = rows.double().cpu()
        count = distributed.sums([len(rows)])[0]
        mean = distributed.total(rows.sum(0)) / count
        squares = distributed.total((rows - mean).square().sum(0))
        both = self.count + count
        shift = mean - self.mean
        self.squares += squares + shift.square() * self.count * count / both
        self.mean += shift * count / both
        self.count.copy_(both)

    @property
    def std(self) -> Tensor:
        """(size,), of the population."""
        return (self.squares / self.count.clamp_min(1)).sqrt()

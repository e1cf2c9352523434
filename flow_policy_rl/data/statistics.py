"""Statistics of a data set, gathered frame by frame: what normalisers and a health page need.

Numbers are kept as float32 columns (a hundred bytes per step); pixels only as histograms.
"""

from array import array

import numpy as np

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
PIXEL_STRIDE = 8  # every eighth pixel of every eighth row is counted


class ArrayStatistics:
    """Of a field of numbers (size,)."""

    def __init__(self, size: int):
        self.size = size
        self._values = array("f")

    def add(self, values: np.ndarray) -> None:
        """One step."""
        self._values.frombytes(np.asarray(values, np.float32).tobytes())

    @property
    def values(self) -> np.ndarray:
        """(T, size)."""
        return np.frombuffer(self._values, np.float32).reshape(-1, self.size)

    def since(self, step: int) -> np.ndarray:
        """Steps from `step` on."""
        return self.values[step:]

    def cut(self, step: int) -> None:
        """Forget the steps from `step` on."""
        del self._values[step * self.size :]

    def summary(self) -> dict[str, list[float]]:
        """min, max, mean, std, count and quantiles."""
        return summarise(self.values)


def summarise(values: np.ndarray) -> dict[str, list[float]]:
    """Of (T, size)."""
    if not len(values):
        return {"count": [0]}
    result = {
        "min": values.min(axis=0).tolist(),
        "max": values.max(axis=0).tolist(),
        "mean": values.mean(axis=0, dtype=float).tolist(),
        "std": values.std(axis=0, dtype=float).tolist(),
        "count": [len(values)],
    }
    levels = np.quantile(values, list(QUANTILES.values()), axis=0)
    return result | {name: level.tolist() for name, level in zip(QUANTILES, levels, strict=True)}


class ImageStatistics:
    """Of a camera: a histogram per channel, in units of 0 to 1."""

    def __init__(self):
        self.counts = np.zeros((3, 256), np.int64)
        self.frames = 0

    def add(self, pixels: np.ndarray) -> None:
        """One image (height, width, 3) uint8."""
        sample = pixels[::PIXEL_STRIDE, ::PIXEL_STRIDE].reshape(-1, 3)
        for channel in range(3):
            self.counts[channel] += np.bincount(sample[:, channel], minlength=256)
        self.frames += 1

    def merge(self, other: "ImageStatistics") -> None:
        """Count what another has counted."""
        self.counts += other.counts
        self.frames += other.frames

    def summary(self) -> dict[str, list]:
        """As LeRobot stores it: (3, 1, 1) per number."""
        if not self.frames:
            return {"count": [0]}
        levels = np.arange(256) / 255
        total = self.counts.sum(axis=1)
        mean = self.counts @ levels / total
        std = np.sqrt(np.maximum(self.counts @ levels**2 / total - mean**2, 0))
        share = np.cumsum(self.counts, axis=1) / total[:, None]
        result = {
            "min": [levels[np.flatnonzero(c)[0]] for c in self.counts],
            "max": [levels[np.flatnonzero(c)[-1]] for c in self.counts],
            "mean": mean,
            "std": std,
        }
        for name, quantile in QUANTILES.items():
            result[name] = [levels[np.searchsorted(s, quantile)] for s in share]
        shaped = {name: np.reshape(v, (3, 1, 1)).tolist() for name, v in result.items()}
        return shaped | {"count": [self.frames]}

"""Batched inference while a bag is read. Noise depends on the seed and the number of the inference only."""

import time
from collections.abc import Mapping

import numpy as np

from flow_policy_rl.errors import InputError
from flow_policy_rl.offline.recording import Inference
from flow_policy_rl.serving.onnx_policy import OnnxPolicy

BATCH = 32
TIMED = 200  # inferences of one observation that are timed for the latency


class Predictor:
    """Collects observations, infers in batches, keeps the chunks.

    Args:
        noise: where the flow starts for the chunk that is judged: zero, or random.
        samples: further chunks per observation from random noise, for best-of-N and spread.

    Attributes:
        latencies_s: seconds of single inferences on real observations.
    """

    def __init__(self, policy: OnnxPolicy, noise: str = "zero", seed: int = 0, samples: int = 0):
        if noise not in ("zero", "random"):
            raise InputError(f"--noise must be zero or random, not '{noise}'")
        self.policy, self.noise, self.seed, self.samples = policy, noise, seed, samples
        self._waiting: list[tuple[int, Mapping[str, np.ndarray]]] = []
        self._chunks: list[np.ndarray] = []
        self._others: list[np.ndarray] = []
        self.latencies_s: list[float] = []

    def __call__(self, inference: Inference) -> None:
        """One observation."""
        row, obs = inference.row, inference.obs
        if len(self.latencies_s) < TIMED:
            self._time(row, obs)
        self._waiting.append((row, obs))
        if len(self._waiting) >= BATCH:
            self._run()

    def _time(self, row: int, obs: Mapping[str, np.ndarray]) -> None:
        single = {name: np.asarray(values)[None] for name, values in obs.items()}
        noise = self._noise(row)[:1]
        start = time.perf_counter()
        self.policy.infer(single, noise)
        self.latencies_s.append(time.perf_counter() - start)

    def _noise(self, row: int) -> np.ndarray:
        """(1 + samples, H, A)."""
        draws = np.random.default_rng((self.seed, row)).standard_normal(
            (1 + self.samples, *self.policy.chunk_shape), dtype=np.float32
        )
        if self.noise == "zero":
            draws[0] = 0.0
        return draws

    def _run(self) -> None:
        if not self._waiting:
            return
        repeats = 1 + self.samples
        obs = {
            name: np.repeat(np.stack([o[name] for _, o in self._waiting]), repeats, axis=0)
            for name in self._waiting[0][1]
        }
        noise = np.concatenate([self._noise(row) for row, _ in self._waiting])
        chunks = self.policy.infer(obs, noise)
        chunks = chunks.reshape(len(self._waiting), repeats, *self.policy.chunk_shape)
        self._chunks.append(chunks[:, 0])
        self._others.append(chunks[:, 1:])
        self._waiting = []

    def finish(self) -> tuple[np.ndarray, np.ndarray]:
        """Chunks (n, H, A), and the further samples (n, N, H, A)."""
        self._run()
        shape = self.policy.chunk_shape
        if not self._chunks:
            return np.zeros((0, *shape)), np.zeros((0, self.samples, *shape))
        return (
            np.concatenate(self._chunks).astype(float),
            np.concatenate(self._others).astype(float),
        )

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
            self._time(inference)
        self._waiting.append((row, obs))
        if len(self._waiting) >= BATCH:
            self._run()

    def _time(self, inference: Inference) -> None:
        start = time.perf_counter()
        self.single(inference)
        self.latencies_s.append(time.perf_counter() - start)

    def single(
        self, inference: Inference, prefix: Mapping[str, np.ndarray] | None = None
    ) -> np.ndarray:
        """Chunk (H, A) of one observation, alone as on the robot; `prefix` for a policy that continues its last one."""
        obs = {name: np.asarray(values)[None] for name, values in inference.obs.items()}
        noise = np.repeat(self._noise(inference.row)[:1], self.policy.batch or 1, axis=0)
        inputs = self._inputs(obs, len(noise))
        for name, values in (prefix or {}).items():
            inputs[name] = np.repeat(values, len(noise), axis=0)
        return self.policy.infer(inputs, noise)[0]

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
        chunks = self._infer(obs, noise).reshape(
            len(self._waiting), repeats, *self.policy.chunk_shape
        )
        self._chunks.append(chunks[:, 0])
        self._others.append(chunks[:, 1:])
        self._waiting = []

    def _infer(self, obs: dict[str, np.ndarray], noise: np.ndarray) -> np.ndarray:
        """Chunks of a batch; a graph of a fixed batch gets it in pieces, the last one filled up."""
        if self.policy.batch is None:
            return self.policy.infer(self._inputs(obs, len(noise)), noise)
        size, chunks = self.policy.batch, []
        for at in range(0, len(noise), size):
            rows = np.minimum(np.arange(at, at + size), len(noise) - 1)
            part = self._inputs({name: values[rows] for name, values in obs.items()}, size)
            chunks.append(self.policy.infer(part, noise[rows]))
        return np.concatenate(chunks)[: len(noise)]

    def _inputs(self, obs: dict[str, np.ndarray], batch: int) -> dict[str, np.ndarray]:
        """With an empty prefix, where the policy takes one: the recorded robot did not execute its chunks."""
        spec = self.policy.spec
        if len(next(iter(obs.values()))) != batch:
            obs = {name: np.repeat(values, batch, axis=0) for name, values in obs.items()}
        if not spec.prefix_horizon:
            return obs
        prefix = np.zeros((batch, spec.prefix_horizon, spec.num_joints), np.float32)
        return obs | {"prefix": prefix, "inference_delay": np.zeros(batch, np.int64)}

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

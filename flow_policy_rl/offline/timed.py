"""Replay with latency: chunks come late, pass the real safety filter and scheduler, and a controller follows them.

An event simulation on the clock of the bag. One inference runs at a time; the newest of the observations that come
meanwhile waits, as in the node. Observations stay those of the bag: what the robot would have seen after a different
motion is not known.
"""

import time
from collections import Counter, deque
from dataclasses import dataclass

import numpy as np

from flow_policy_rl.errors import InputError
from flow_policy_rl.offline import metrics
from flow_policy_rl.offline.predict import Predictor
from flow_policy_rl.offline.recording import Inference, Recording
from flow_policy_rl.serving.chunk_scheduler import ChunkScheduler
from flow_policy_rl.serving.commander import Commander
from flow_policy_rl.serving.onnx_policy import OnnxPolicy
from flow_policy_rl.serving.robot import Robot
from flow_policy_rl.serving.safety import Rejected, SafetyFilter


@dataclass
class _Chunk:
    """One that is being computed or waits to be: (H, A), stamp of its observation, and when it is there (ns)."""

    chunk: np.ndarray
    inference: Inference
    latency: int
    ready: int = 0


class Commanded:
    """What the robot would be told: the node's own `Commander` (joining, safety filter), fed with chunks."""

    def __init__(self, policy: OnnxPolicy, robot: Robot, joining: str):
        spec = policy.spec
        scheduler = ChunkScheduler(spec, joining=joining)
        self._commander = Commander(
            scheduler, SafetyFilter(robot, spec.joint_names, spec.control_dt)
        )
        self.limited = self.sent = 0

    def forget(self) -> None:
        """Nothing was commanded yet."""
        self._commander.forget()

    def prefix_inputs(self, stamp: int) -> dict[str, np.ndarray]:
        """What a policy that continues its last chunk gets beside an observation of this time."""
        return self._commander.prefix_inputs(stamp)

    def accept(self, chunk: np.ndarray, stamp: int, now: int, measured: np.ndarray) -> None:
        """Put a chunk (H, A) observed at `stamp` in force at `now` (ns).

        Raises:
            Rejected: it is refused; what was in force stays so.
        """
        outcome = self._commander.accept(chunk, stamp, now, measured)
        self.sent += 1
        self.limited += outcome.checked.num_changed

    def at(self, time: float) -> np.ndarray | None:
        """Commanded position (A,) at a time (s)."""
        plan = self._commander.plan
        return None if plan is None else plan.at(round(time * 1e9)).position


class TimedPredictor:
    """Takes the place of `Predictor`: infers one by one, and keeps the motion that results.

    Args:
        latency_ms: of every inference; None takes the time that it takes here.
        joining: how consecutive chunks join, as in the node.

    Attributes:
        inference_s, latencies_s: of each inference: what it took here, and what was reckoned with.
    """

    def __init__(
        self,
        policy: OnnxPolicy,
        robot: Robot,
        noise: str,
        seed: int,
        latency_ms: float | None,
        joining: str,
    ):
        if latency_ms is not None and not 0 <= latency_ms <= 10_000:
            raise InputError(f"--latency-ms must be between 0 and 10000, not {latency_ms:g}")
        self._predictor = Predictor(policy, noise, seed)
        self._policy, self._latency_ms = policy, latency_ms
        self._commanded = Commanded(policy, robot, joining)
        self._running: _Chunk | None = None
        self._waiting: _Chunk | None = None
        self._segment = -1
        self._ticks: deque[tuple[int, int, float]] = deque()
        self.chunks: list[np.ndarray] = []
        self.motion: list[np.ndarray] = []
        self.inference_s: list[float] = []
        self.latencies_s: list[float] = []
        self.refused: Counter = Counter()
        self.skipped = 0

    def __call__(self, inference: Inference) -> None:
        """One observation, in the order of time."""
        spec, stamp = self._policy.spec, inference.stamp
        if inference.segment != self._segment:
            self._finish_segment()
            self._segment = inference.segment
        self._run_until(stamp)
        start = time.perf_counter_ns()
        chunk = self._predictor.single(inference, self._commanded.prefix_inputs(stamp))
        took = time.perf_counter_ns() - start
        latency = took if self._latency_ms is None else round(self._latency_ms * 1e6)
        self.chunks.append(chunk)
        self.inference_s.append(took / 1e9)
        self.latencies_s.append(latency / 1e9)
        self.motion.append(np.full((spec.execute_horizon, spec.num_joints), np.nan))
        for step in range(spec.execute_horizon):
            due = stamp / 1e9 + (step + 1) * spec.control_dt
            self._ticks.append((inference.row, step, due))
        new = _Chunk(chunk, inference, latency)
        if self._running is None:
            new.ready, self._running = stamp + latency, new
        else:
            self.skipped += self._waiting is not None
            self._waiting = new

    def _run_until(self, now: int) -> None:
        """Chunks that are there by now take effect, each at its time."""
        while self._running is not None and self._running.ready <= now:
            done, self._running = self._running, None
            self._sample(done.ready / 1e9)
            try:
                inference = done.inference
                self._commanded.accept(done.chunk, inference.stamp, done.ready, inference.measured)
            except Rejected as error:
                self.refused[str(error)] += 1
            if self._waiting is not None:
                self._running, self._waiting = self._waiting, None
                self._running.ready = done.ready + self._running.latency

    def _sample(self, until: float) -> None:
        """The command at every control step up to a time."""
        while self._ticks and self._ticks[0][2] <= until:
            row, step, due = self._ticks.popleft()
            values = self._commanded.at(due)
            if values is not None:
                self.motion[row][step] = values

    def _finish_segment(self) -> None:
        self._run_until(1 << 62)
        self._sample(np.inf)
        self._ticks.clear()
        self._commanded.forget()

    def finish(self) -> np.ndarray:
        """Chunks (n, H, A) as they were computed."""
        self._finish_segment()
        return np.array(self.chunks, float).reshape(len(self.chunks), *self._policy.chunk_shape)

    def numbers(self, recording: Recording, robot: Robot) -> dict:
        """What came out: errors of the command against the truth, smoothness, limits, and what was late."""
        spec = self._policy.spec
        dt, executed = spec.control_dt, spec.execute_horizon
        shape = (len(self.motion), executed, spec.num_joints)
        motion = np.array(self.motion).reshape(shape)
        error = motion - recording.truth[:, :executed]
        parts = metrics.stitch(motion, recording.times, recording.segment, executed, dt)
        limits = {
            what: robot.limit_array(spec.joint_names, what)
            for what in ("position", "velocity", "acceleration")
        }
        latencies = np.array(self.latencies_s)
        sent = self._commanded.sent
        return {
            "latency_ms": metrics.percentiles(latencies * 1e3),
            "latency_simulated": self._latency_ms is not None,
            "delay_steps_p50": float(np.median(latencies) / dt) if len(latencies) else None,
            "mae": metrics.mean(np.abs(error)),
            "rmse": metrics.rms(error),
            "joints": metrics.errors_by_joint(spec.joint_names, error),
            "smoothness": metrics.smoothness(parts, dt),
            "limit_violations": metrics.motion_violations(parts, limits, dt),
            "chunks_sent": sent,
            "limited_actions_per_chunk": self._commanded.limited / sent if sent else None,
            "refused": dict(self.refused),
            "skipped_observations": self.skipped,
        }

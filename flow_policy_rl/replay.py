"""`flow-policy replay`: judge a policy on a recorded rosbag, with the decoding and timing code of the live node.

Teacher-forced: wherever the live node would have started an inference, the policy sees the recorded
observation and its chunk is compared with what the robot's controller was really commanded in that
time. No ROS needed.

Open-loop error does not predict closed-loop success: this is a test of wiring and of regressions.
"""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from flow_policy_rl.data.bags import Message, deserialize, read_bag
from flow_policy_rl.errors import InputError
from flow_policy_rl.serving.chunk_scheduler import ChunkScheduler
from flow_policy_rl.serving.decode import stamp_ns
from flow_policy_rl.serving.onnx_policy import OnnxPolicy
from flow_policy_rl.serving.robot import Robot, load_robot
from flow_policy_rl.serving.streams import NotReady, Streams, topics_of
from flow_policy_rl.serving.trajectory_controller import TrajectoryController, TrajectoryRejected
from flow_policy_rl.spec import ObservationField, PolicySpec

SCHEMA_VERSION = 1
MEASURED = "measured_joint_pos"
GAP_S = 0.5  # a longer silence ends a segment
JUMP_MARGIN = 0.05  # rad or m beyond what the velocity limits allow: the robot was put elsewhere
LATENCY_TOPIC = "/sim_node/end_to_end_latency"


@dataclass(frozen=True)
class Config:
    """Compare a policy's chunks with the commands in a recorded bag.

    Example: flow-policy replay --bag bag --policy policy.onnx --out report

    Attributes:
        bag: rosbag2 folder with MCAP storage, or one .mcap file (also one that was cut off).
        policy: exported policy.
        out: folder for report.html and replay.json.
        robot: name of a robot, or path of a robot file (default: the one in the policy).
        noise: where the flow starts: zero, or random from `seed`.
        seed: of random noise.
        max_mae: gate on the mean error (rad, m); exit code 1 above it.
        json: print one JSON object.
    """

    bag: Path
    policy: Path
    out: Path = Path("replay")
    robot: str | None = None
    noise: str = "zero"
    seed: int = 0
    max_mae: float | None = None
    json: bool = False


@dataclass
class Recording:
    """What a bag holds for one policy.

    Attributes:
        snapshots: observations at which the live node would infer: values by field, time in s.
        segment: number of the uninterrupted piece each belongs to.
        reference: commanded position (n, A) at the end of each of the H control steps after a
        snapshot, (n, H, A); nan where the
            controller had no trajectory yet or the segment ends before.
        latencies_s: end-to-end latencies on the latency topic.
        problems: number of messages that could not be used, by reason.
    """

    obs: dict[str, np.ndarray]
    times: np.ndarray
    segment: np.ndarray
    measured: np.ndarray
    reference: np.ndarray
    latencies_s: np.ndarray
    problems: dict[str, int] = field(default_factory=dict)


def main(config: Config) -> dict:
    """Replay, write the report."""
    policy = OnnxPolicy(config.policy)
    robot = load_robot(config.robot or policy.spec.robot)
    recording = read_recording(config.bag, policy.spec, robot)
    if len(recording.times) == 0:
        reasons = "; ".join(f"{reason} ({count}x)" for reason, count in recording.problems.items())
        raise InputError(
            f"bag '{config.bag}' has no complete observation for the policy: {reasons or 'no messages'}"
        )
    chunks, inference_s = predict(policy, recording, config.noise, config.seed)
    result = metrics(policy.spec, recording, chunks, inference_s)
    result["gates"] = (
        {} if config.max_mae is None else {"mae": {"value": result["mae"], "limit": config.max_mae}}
    )
    result["passed"] = all(g["value"] <= g["limit"] for g in result["gates"].values())
    result |= {
        "schema_version": SCHEMA_VERSION,
        "bag": str(config.bag),
        "policy": str(config.policy),
    }
    config.out.mkdir(parents=True, exist_ok=True)
    result["report"] = str(config.out / "report.html")
    (config.out / "replay.json").write_text(json.dumps(result, indent=2) + "\n")
    write_report(config.out / "report.html", policy.spec, recording, chunks, result)
    return result


# --- from bag to observations and commands ---


def read_recording(bag: Path, spec: PolicySpec, robot: Robot) -> Recording:
    """One pass over the bag. Times are those of message headers; a command counts from the newest header before it."""
    fields = topics_of(spec, robot.topics)
    measured = ObservationField(MEASURED, "joint_position", spec.joint_names, "")
    fields.setdefault(robot.topics.joint_states, []).append(measured)
    streams, scheduler = Streams(fields, max_age_s=GAP_S), ChunkScheduler(spec)
    limits = robot.limit_array(spec.joint_names, "velocity")
    reader = _Reader(spec, streams, scheduler, limits)
    topics = [*fields, robot.topics.command, LATENCY_TOPIC]
    for message in read_bag(bag, topics):
        if message.topic == robot.topics.command:
            reader.command(message)
        elif message.topic == LATENCY_TOPIC:
            reader.latencies.append(deserialize(message).data)
        else:
            reader.observation(message)
    return reader.finish()


class _Reader:
    """State of the pass."""

    def __init__(
        self,
        spec: PolicySpec,
        streams: Streams,
        scheduler: ChunkScheduler,
        velocity_limit: np.ndarray,
    ):
        self.spec, self.streams, self.scheduler = spec, streams, scheduler
        self.velocity_limit = velocity_limit
        self.latencies: list[float] = []
        self.problems: dict[str, int] = {}
        self.now = 0
        self.segment = 0
        self.last: tuple[int, np.ndarray] | None = None
        self.controller: TrajectoryController | None = None
        self.grid: list[tuple[float, int, np.ndarray]] = []  # time, segment, commanded position
        self.snapshots: list[tuple[float, int, dict]] = []

    def _problem(self, reason: str) -> None:
        self.problems[reason] = self.problems.get(reason, 0) + 1

    def observation(self, message: Message) -> None:
        msg = deserialize(message)
        stamp = stamp_ns(msg) or message.log_time
        self.streams.push(message.topic, stamp, msg)
        self.now = max(self.now, stamp) if stamp > self.now - 1e9 else stamp
        try:
            snapshot = self.streams.snapshot(stamp)
        except NotReady as error:
            self._problem(str(error))
            return
        here = snapshot.obs[MEASURED]
        if self.last is not None and snapshot.stamp != self.last[0]:
            elapsed = (snapshot.stamp - self.last[0]) / 1e9
            reach = self.velocity_limit * max(elapsed, 0) * 1.5 + JUMP_MARGIN
            if not 0 < elapsed <= GAP_S or (np.abs(here - self.last[1]) > reach).any():
                self.segment += 1
                self.controller = None
                self.scheduler.reset()
        if self.last is None or snapshot.stamp != self.last[0]:
            self.last = (snapshot.stamp, here)
            if self.controller is not None:
                at = snapshot.stamp / 1e9
                self.grid.append((at, self.segment, self.controller.sample(at)[0]))
        if self.scheduler.due(snapshot.stamp):
            self.scheduler.started(snapshot.stamp)
            self.snapshots.append((snapshot.stamp / 1e9, self.segment, snapshot.obs))

    def command(self, message: Message) -> None:
        msg = deserialize(message)
        if self.last is None:
            return self._problem("command before the first complete observation")
        if self.controller is None:
            self.controller = TrajectoryController(self.spec.joint_names, self.last[1])
        times = np.array(
            [p.time_from_start.sec + p.time_from_start.nanosec * 1e-9 for p in msg.points]
        )
        positions = np.array([p.positions for p in msg.points])
        with_velocity = len(msg.points) > 0 and len(msg.points[0].velocities) > 0
        velocities = np.array([p.velocities for p in msg.points]) if with_velocity else None
        try:
            self.controller.accept(msg.joint_names, times, positions, velocities, self.now / 1e9)
        except (TrajectoryRejected, ValueError) as error:
            self._problem(f"command rejected: {error}")

    def finish(self) -> Recording:
        spec = self.spec
        times = np.array([t for t, _, _ in self.snapshots])
        segment = np.array([s for _, s, _ in self.snapshots], dtype=int)
        names = [MEASURED, *(f.name for f in spec.observations)]
        obs = {name: np.array([o[name] for _, _, o in self.snapshots]) for name in names}
        reference = np.full((len(times), spec.action_horizon, spec.num_joints), np.nan)
        grid_times = np.array([t for t, _, _ in self.grid])
        grid_segment = np.array([s for _, s, _ in self.grid], dtype=int)
        grid_command = np.array([c for _, _, c in self.grid]).reshape(-1, spec.num_joints)
        for i, start in enumerate(times):
            rows = np.flatnonzero((grid_segment == segment[i]) & (grid_times > start - 1e-9))
            if len(rows) < 2:
                continue
            due = start + (np.arange(spec.action_horizon) + 1) * spec.control_dt
            for joint in range(spec.num_joints):
                reference[i, :, joint] = np.interp(
                    due, grid_times[rows], grid_command[rows, joint], left=np.nan, right=np.nan
                )
        measured = obs.pop(MEASURED)
        return Recording(
            obs, times, segment, measured, reference, np.array(self.latencies), self.problems
        )


# --- prediction and judgement ---


def predict(
    policy: OnnxPolicy, recording: Recording, noise: str, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Chunks (n, H, A) for every snapshot, one inference each as on the robot, and the seconds each took."""
    if noise not in ("zero", "random"):
        raise InputError(f"--noise must be zero or random, not '{noise}'")
    rng = np.random.default_rng(seed)
    shape = (1, *policy.chunk_shape)
    chunks, seconds = [], []
    for i in range(len(recording.times)):
        draw = (
            rng.standard_normal(shape, dtype=np.float32)
            if noise == "random"
            else np.zeros(shape, np.float32)
        )
        obs = {name: values[i : i + 1] for name, values in recording.obs.items()}
        start = time.perf_counter()
        chunks.append(policy.infer(obs, draw)[0])
        seconds.append(time.perf_counter() - start)
    return np.array(chunks, dtype=np.float64), np.array(seconds)


def metrics(
    spec: PolicySpec, recording: Recording, chunks: np.ndarray, inference_s: np.ndarray
) -> dict:
    """Errors over the executed part of each chunk, against two baselines; seams; latencies."""
    executed = slice(0, spec.execute_horizon)
    reference = recording.reference[:, executed]
    error = chunks[:, executed] - reference
    hold = recording.measured[:, None] - reference
    # The command in force when the observation was made: the reference just before the first step.
    last = np.concatenate(
        [recording.measured[:1], recording.reference[:-1, spec.execute_horizon - 1]]
    )
    same = np.concatenate([[False], recording.segment[1:] == recording.segment[:-1]])
    copy_last = np.where(same[:, None], last, recording.measured)[:, None] - reference
    joints = {
        name: {
            "mae": _mean(np.abs(error[..., j])),
            "rmse": float(np.sqrt(_mean(error[..., j] ** 2))),
        }
        for j, name in enumerate(spec.joint_names)
    }
    seams = seam_jumps(spec, recording, chunks)
    latencies = recording.latencies_s * 1e3 if len(recording.latencies_s) else inference_s * 1e3
    return {
        "joints": joints,
        "mae": _mean(np.abs(error)),
        "mae_hold": _mean(np.abs(hold)),
        "mae_copy_last": _mean(np.abs(copy_last)),
        "mae_by_step": [_mean(np.abs(error[:, k])) for k in range(error.shape[1])],
        "seam_jump": {
            "mean": _mean(seams),
            "max": float(np.nanmax(seams)) if np.isfinite(seams).any() else None,
        },
        "latency_ms": percentiles(latencies),
        "latency_source": LATENCY_TOPIC
        if len(recording.latencies_s)
        else "inference in this replay",
        "inference_ms": percentiles(inference_s * 1e3),
        "chunks": len(chunks),
        "compared_chunks": int(np.isfinite(error).all(axis=(1, 2)).sum()),
        "segments": int(recording.segment.max()) + 1,
        "problems": recording.problems,
    }


def seam_jumps(spec: PolicySpec, recording: Recording, chunks: np.ndarray) -> np.ndarray:
    """How far consecutive chunks disagree where one takes over from the other, (n - 1, A), nan across segments."""
    k = spec.execute_horizon
    if k >= spec.action_horizon:
        return np.full((max(len(chunks) - 1, 1), spec.num_joints), np.nan)
    jumps = np.abs(chunks[1:, 0] - chunks[:-1, k])
    on_time = np.abs(np.diff(recording.times) - k * spec.control_dt) < spec.control_dt / 2
    return np.where((on_time & (np.diff(recording.segment) == 0))[:, None], jumps, np.nan)


def _mean(values: np.ndarray) -> float:
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


def percentiles(values_ms: np.ndarray) -> dict[str, float]:
    """p50, p95, p99 and max."""
    p50, p95, p99 = np.percentile(values_ms, [50, 95, 99])
    return {"p50": float(p50), "p95": float(p95), "p99": float(p99), "max": float(values_ms.max())}


# --- for people ---


def write_report(
    path: Path, spec: PolicySpec, recording: Recording, chunks: np.ndarray, result: dict
) -> None:
    """One self-contained page."""
    from flow_policy_rl import report

    verdict = (
        "better than both baselines"
        if result["mae"] < min(result["mae_hold"], result["mae_copy_last"])
        else ("NOT better than the baselines: check joint order, units, rate and inputs")
    )
    sections = [
        report.Text(
            f"{result['compared_chunks']} of {result['chunks']} chunks compared with the commanded reference, in "
            f"{result['segments']} uninterrupted segments. Ground truth: the trajectories on the command topic. "
            f"Mean error {result['mae']:.4f} (rad, m): {verdict}. Open-loop error does not predict closed-loop success."
        ),
        report.Table(
            "Error per joint",
            ["joint", "mean absolute", "root mean square"],
            [[n, f"{v['mae']:.5f}", f"{v['rmse']:.5f}"] for n, v in result["joints"].items()],
        ),
        report.Table(
            "Against baselines",
            ["", "mean absolute error"],
            [
                ["policy", f"{result['mae']:.5f}"],
                ["hold position", f"{result['mae_hold']:.5f}"],
                ["copy last command", f"{result['mae_copy_last']:.5f}"],
            ],
        ),
        report.chunk_figure(spec, recording.times, chunks, recording.reference, recording.segment),
        report.latency_figure(recording.latencies_s * 1e3),
    ]
    if result["problems"]:
        rows = [[reason, str(count)] for reason, count in result["problems"].items()]
        sections.append(report.Table("Not used", ["reason", "messages"], rows))
    report.write(path, "Replay", f"{result['policy']} on {result['bag']}", sections)


def text(result: dict) -> str:
    """For people."""
    return (
        f"{result['compared_chunks']} chunks: mean error {result['mae']:.4f} (hold {result['mae_hold']:.4f}, "
        f"copy last {result['mae_copy_last']:.4f}); latency p50 {result['latency_ms']['p50']:.2f} ms, "
        f"p99 {result['latency_ms']['p99']:.2f} ms\nreport: {result['report']}"
    )

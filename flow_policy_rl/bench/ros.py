"""`flow-policy bench ros`: the policy node and a robot's stand-in, two processes of real rclpy on this machine.

End to end is from publishing the observation that triggered an inference to the command's bytes in the other process.
Node overhead is what the node adds to the inference itself, from the arrival of the observation to `publish()`
returning. By default one inference per control step (joining: ensemble), so that there are twenty a second to measure.

An observation is as old as the older of its streams when the newer one comes: with a camera beside joint states of
100 Hz up to 10 ms, however short transport is. That of the frames is measured apart, from the stamp, which is taken
before publishing, to the callback; then their decoding.
"""

import json
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flow_policy_rl import ros
from flow_policy_rl.errors import InputError, RunFailed
from flow_policy_rl.progress import Progress
from flow_policy_rl.serving import shipped

SAMPLE_S = 1.0
STARTED_S = 8.0  # memory and CPU count from here on
WARM_UP_SHARE = 0.1  # or from this share of a long run on
MARGIN_S = 60.0
PERCENTILES = ("p50", "p95", "p99", "max")


@dataclass(frozen=True)
class Config:
    """Latency, overhead, CPU share and memory of the policy node between real processes.

    Example: flow-policy bench ros --duration-s 60 --images

    Attributes:
        policy: exported policy, the name of one that ships, or `fresh`: random weights of the demo's size, whose plans
            break every limit (None: `lift`, with images `lift_camera`).
        images: the policy looks through a 640x480 camera at 30 Hz as well.
        duration_s: how long to measure; 600 for a soak.
        joining: how chunks join; ensemble infers once per control step.
        json: print one JSON object.
    """

    policy: Path | None = None
    images: bool = False
    duration_s: float = 20.0
    joining: str = "ensemble"
    json: bool = False


def main(config: Config) -> dict:
    """Run both processes and judge."""
    if config.duration_s < 1:
        raise InputError(f"--duration-s must be at least 1, not {config.duration_s}")
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        name = str(config.policy or ("lift_camera" if config.images else "lift"))
        fresh = name == "fresh"
        policy = fresh_policy(home / "policy.onnx", config.images) if fresh else shipped.find(name)
        from flow_policy_rl.serving.onnx_policy import OnnxPolicy

        spec = OnnxPolicy(policy).spec
        out = home / "bench.json"
        nodes = {
            "policy_node": {
                "policy": str(policy.absolute()),
                "robot": spec.robot,
                "armed": True,
                "joining": config.joining,
                # The arm does what it likes here: only time is measured. The limits stay on.
                "max_start_distance": 10.0,
                "max_tracking_error": 0.0,
                "max_limited_in_a_row": 0,
            },
            "bench_peer": {
                "robot": spec.robot,
                "duration_s": float(config.duration_s),
                "images": config.images,
                "out": str(out),
            },
        }
        samples = _watch(nodes, home / "logs", config.duration_s)
        measured = json.loads(out.read_text())
    due = 1 if config.joining == "ensemble" else spec.execute_horizon
    return _judge(measured, samples, config, name, due * spec.control_dt)


def _watch(nodes: dict, logs: Path, duration_s: float) -> list[tuple[float, float, float]]:
    """Run until the peer is done; (time s, CPU s, memory MB) of the policy node once a second."""
    samples = []
    deadline = time.monotonic() + duration_s + MARGIN_S
    with (
        ros.processes(nodes, logs) as running,
        Progress("measure", round(duration_s), "s") as progress,
    ):
        begin = time.monotonic()
        while running["bench_peer"].running:
            for process in running.values():
                process.check()
            if time.monotonic() > deadline:
                raise RunFailed(f"bench_peer did not end within {duration_s + MARGIN_S:.0f} s")
            samples.append((time.monotonic(), *_usage(running["policy_node"].pid)))
            progress.reach(min(round(duration_s), int(time.monotonic() - begin)))
            time.sleep(SAMPLE_S)
        running["bench_peer"].check()
    return samples


def _usage(pid: int) -> tuple[float, float]:
    """CPU time in s and resident memory in MB of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    ticks, pages = int(fields[11]) + int(fields[12]), int(fields[21])
    return ticks / os.sysconf("SC_CLK_TCK"), pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def _judge(measured: dict, samples: list, config: Config, policy: str, period: float) -> dict:
    """What they measured of a policy that is due to infer once per `period` s."""
    records = measured["records"]
    if not measured["end_to_end_ms"]:
        raise RunFailed(
            "no command could be paired with its observation: DDS sequence numbers are needed, which Humble and "
            "Cyclone DDS do not give"
        )
    stage = lambda name: np.array([float(r[name]) for r in records])  # noqa: E731
    started = max(STARTED_S, WARM_UP_SHARE * config.duration_s)
    settled = [s for s in samples if s[0] - samples[0][0] > started] or samples
    times, cpu, memory = np.array(settled).T
    span = max(times[-1] - times[0], 1e-9)
    slope = float(np.polyfit(times, memory, 1)[0] * 60) if len(times) > 2 else float("nan")
    stamps = stage("observation_stamp") / 1e9
    return {
        "policy": policy,
        "joining": config.joining,
        "images": config.images,
        "messages": len(records),
        "end_to_end_ms": percentiles(np.array(measured["end_to_end_ms"])),
        "node_overhead_ms": percentiles(stage("overhead_ms")),
        "stages_ms": {
            name.removesuffix("_ms"): percentiles(stage(name))
            for name in (
                "observation_age_ms",
                "decode_ms",
                "wait_ms",
                "inference_ms",
                "safety_ms",
                "publish_ms",
            )
        },
        "deadline_misses": int((np.diff(stamps) > 2.5 * period).sum()),
        "frames": measured["frames"],
        "cameras_ms": {
            topic: {what: dict(zip(PERCENTILES, row, strict=True)) for what, row in rows.items()}
            for topic, rows in measured["cameras_ms"].items()
        },
        "node_cpu_share": float((cpu[-1] - cpu[0]) / span),
        "node_rss_mb": {"start": float(memory[0]), "end": float(memory[-1])},
        "node_rss_mb_per_minute": slope,
        "load_average": os.getloadavg()[0],
    }


def percentiles(values: np.ndarray) -> dict[str, float]:
    """p50, p95, p99 and max."""
    return dict(zip(PERCENTILES, np.percentile(values, [50, 95, 99, 100]).tolist(), strict=True))


def fresh_policy(out: Path, images: bool = False, **changes) -> Path:
    """An exported policy of the demo's size with random weights, for task lift with or without camera."""
    import torch

    from flow_policy_rl.export import export_policy
    from flow_policy_rl.policy import FlowPolicy, NetworkConfig
    from flow_policy_rl.spec import ObservationField, PolicySpec
    from sim.tasks import make_task

    task = make_task("lift", cameras=images or None)
    world = task.world
    fields = tuple(
        ObservationField(f.name, f.kind, f.elements, f.unit, f.source, resolution=f.resolution)
        for f in task.obs_fields
    )
    values = {
        "task": task.name,
        "robot": task.robot,
        "joint_names": world.joint_names,
        "action_low": tuple(world.target_low.tolist()),
        "action_high": tuple(world.target_high.tolist()),
        "observations": fields,
        "control_dt": task.control_dt,
        "action_horizon": 12,
        "execute_horizon": 8,
    }
    torch.manual_seed(0)
    policy = FlowPolicy(PolicySpec(**(values | changes)), NetworkConfig()).eval()
    export_policy(policy, out)
    return out


def text(result: dict) -> str:
    """For people."""
    lines = [f"{'':<18}" + "".join(f"{k:>9}" for k in PERCENTILES) + "  ms"]
    rows = {
        "end to end": result["end_to_end_ms"],
        "node overhead": result["node_overhead_ms"],
        **{name.replace("_", " "): row for name, row in result["stages_ms"].items()},
    }
    for camera in result["cameras_ms"].values():
        rows |= {f"frame {what}": row for what, row in camera.items()}
    for name, row in rows.items():
        lines.append(f"{name:<18}" + "".join(f"{row[k]:>9.3f}" for k in PERCENTILES))
    if result["images"]:
        frames = result["frames"]
        lines.append(
            f"camera: {frames['published']} frames published, {frames['received']} received, {frames['lost']} lost, "
            f"{frames['used']} used (counted by the node once a second)"
        )
    memory = result["node_rss_mb"]
    lines.append(
        f"{result['messages']} inferences, {result['deadline_misses']} late by more than a period and a half; the node "
        f"takes {result['node_cpu_share']:.0%} of a core and {memory['end']:.0f} MB "
        f"({result['node_rss_mb_per_minute']:+.2f} MB per minute); load average {result['load_average']:.1f}"
    )
    return "\n".join(lines)

"""`flow-policy bench delay`: success over ROS 2 under injected inference delay.

The nodes of a deployment (simulated arm, policy node, runner of episodes), each a process of real rclpy. The policy
node's `inject_delay_s` lets every inference take so much longer, by the simulation's clock, so that a slower or faster
simulation changes nothing about it. Chunks join as the node joins them by default. What the machine adds is in
`end to end`, in real time: at a real-time factor of 0.5 the arm feels half of it.
"""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flow_policy_rl.bench.ros import percentiles
from flow_policy_rl.errors import InputError
from flow_policy_rl.over_ros import run_episodes
from flow_policy_rl.ros import task_options
from flow_policy_rl.serving import shipped


@dataclass(frozen=True)
class Config:
    """Success of a policy over ROS 2 when its inferences take longer.

    Example: flow-policy bench delay --policy policy.onnx --delays-ms 0 300 --episodes 20

    Attributes:
        policy: exported policy for one of the tasks, or the name of one that ships.
        delays_ms: inference delays to inject, ms of simulated time, up to 10,000.
        episodes: per delay, the same seeds everywhere.
        seed: of the first episode.
        joining: how chunks join; auto is rtc for a policy trained with a prefix, else replace.
        soft_start_s: of each episode; see the node's parameter.
        real_time_factor: simulated seconds per second; lower where the machine is slow or busy.
        json: print one JSON object.
    """

    policy: Path = Path("lift")
    delays_ms: tuple[float, ...] = (0, 100, 200, 300)
    episodes: int = 40
    seed: int = 10_000
    joining: str = "auto"
    soft_start_s: float = 0.5
    real_time_factor: float = 1.0
    json: bool = False


def main(config: Config) -> dict:
    """All delays, one after the other."""
    from flow_policy_rl.serving.onnx_policy import OnnxPolicy

    wrong = [d for d in config.delays_ms if not 0 <= d <= 10_000]
    if wrong or not config.delays_ms:
        raise InputError(f"--delays-ms must be between 0 and 10000, not {wrong or 'nothing'}")
    if config.episodes < 1:
        raise InputError(f"--episodes must be at least 1, not {config.episodes}")
    policy = shipped.find(config.policy)
    spec = OnnxPolicy(policy).spec
    cameras = any(f.kind == "image" for f in spec.observations)
    rows = []
    for delay_ms in config.delays_ms:
        nodes = {
            "sim_node": {
                "task": spec.task,
                "robot": spec.robot,
                "first_seed": config.seed,
                "real_time_factor": config.real_time_factor,
                "state_rate_hz": 2 / spec.control_dt,
                "image_rate_hz": 1 / spec.control_dt if cameras else 0.0,
                **task_options(spec.task_options),
            },
            "policy_node": {
                "policy": str(policy.absolute()),
                "robot": spec.robot,
                "armed": True,
                "use_sim_time": True,
                "joining": config.joining,
                "soft_start_s": float(config.soft_start_s),
                "inject_delay_s": delay_ms / 1e3,
            },
        }
        with tempfile.TemporaryDirectory() as folder:
            row = run_episodes(nodes, config.episodes, Path(folder), f"{delay_ms:g} ms")
        times_ms = row.pop("end_to_end_s") * 1e3
        row["end_to_end_ms"] = percentiles(times_ms) if len(times_ms) else None
        rows.append({"delay_ms": delay_ms, **row})
    return {
        "policy": str(config.policy),
        "task": spec.task,
        "seed": config.seed,
        "real_time_factor": config.real_time_factor,
        "rows": rows,
        "load_average": os.getloadavg()[0],
    }


def text(result: dict) -> str:
    """For people."""
    lines = [f"{'delay':>8} {'success':>8} {'95 %':>12} {'stops':>6} {'end to end p50, p99':>22}"]
    for row in result["rows"]:
        low, high = row["success_ci95"]
        times = row["end_to_end_ms"] or dict.fromkeys(("p50", "p99"), np.nan)
        lines.append(
            f"{row['delay_ms']:>5g} ms {row['success_rate']:>8.1%} {low:>5.0%} to {high:>4.0%} "
            f"{row['emergency_stops']:>6} {times['p50']:>10.1f}, {times['p99']:>6.1f} ms"
        )
    lines.append(
        f"{result['task']}, {result['rows'][0]['episodes']} episodes each from seed {result['seed']}, real-time factor "
        f"{result['real_time_factor']:g}, load average {result['load_average']:.1f}"
    )
    return "\n".join(lines)

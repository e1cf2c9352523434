"""`flow-policy bench joining`: how methods of joining chunks bear inference delay, in closed loop without ROS.

One episode at a time, in simulated time: states at 100 Hz, an inference wherever the node would start one, its chunk
handed over `delay` later to the same `Commander` that the node uses (joining, safety, stopping), and followed by the
same controller as over ROS. The simulated robot has perfect transport; what is measured is joining alone.

A seam is where a new chunk takes over: its first target, with rtc the first after the prefix. Its velocity jump is how
far that target is from the one in force for the same moment, over the control step: root mean square over the joints
of the arm, before the safety filter smooths it. `own` is by how much velocity changes from one action to the next
within the chunks anyway. `plan` is the CPU time from chunk to plan: joining and safety.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from flow_policy_rl.errors import InputError, refuse_below
from flow_policy_rl.evaluate import check_fits, task_of, wilson_interval
from flow_policy_rl.progress import Progress
from flow_policy_rl.serving.chunk_scheduler import METHODS, ChunkScheduler
from flow_policy_rl.serving.commander import Commander
from flow_policy_rl.serving.onnx_policy import OnnxPolicy
from flow_policy_rl.serving.robot import load_robot
from flow_policy_rl.serving.safety import Rejected, SafetyFilter
from flow_policy_rl.serving.trajectory_controller import TrajectoryController
from sim.live import LiveWorld

TICK_S = 0.01


@dataclass(frozen=True)
class Config:
    """Success and seam velocity jumps of every joining method under injected inference delay.

    Example: flow-policy bench joining --policy policy.onnx --delays-ms 0 100 300 --methods rtc replace

    Attributes:
        policy: exported policy.
        methods: joining methods; rtc only for a policy that was trained with a prefix.
        delays_ms: inference delays to inject, ms.
        episodes: per method and delay, the same seeds everywhere.
        seed: of the first episode.
        soft_start_s: time from the first command of an episode until full speed; the node's parameter of this name.
        json: print one JSON object.
    """

    policy: Path
    methods: tuple[str, ...] = METHODS
    delays_ms: tuple[float, ...] = (0, 100, 200, 300)
    episodes: int = 20
    seed: int = 10_000
    soft_start_s: float = 0.0
    json: bool = False


@dataclass
class Episode:
    """What happened: success, velocity jumps (rad/s) at seams and within chunks, plans that had to be limited,
    rejected chunks, CPU time (ms) from each chunk to its plan."""

    success: bool
    jumps: list[float]
    own: list[float]
    limited: int
    plans: int
    rejected: int
    plan_ms: list[float] = field(default_factory=list)


def main(config: Config) -> dict:
    """All methods and delays."""
    refuse_below(config, episodes=1, delays_ms=0, soft_start_s=0)
    policy = OnnxPolicy(config.policy)
    methods = [m for m in config.methods if m != "rtc" or policy.spec.prefix_horizon]
    if not methods:
        raise InputError("joining rtc needs a policy that was trained with a prefix")
    task = task_of(policy.spec)
    check_fits(policy.spec, task, str(config.policy))
    rows = []
    total = len(methods) * len(config.delays_ms) * config.episodes
    with Progress("joining", total, "episode") as progress:
        for method in methods:
            for delay_ms in config.delays_ms:
                episodes = []
                for seed in range(config.seed, config.seed + config.episodes):
                    episode = run_episode(
                        task, policy, seed, method, delay_ms / 1e3, config.soft_start_s
                    )
                    episodes.append(episode)
                    progress.update(1, f"{method}, {delay_ms:g} ms")
                rows.append(summary(method, delay_ms, episodes))
    return {"policy": str(config.policy), "task": task.name, "seed": config.seed, "rows": rows}


def summary(method: str, delay_ms: float, episodes: list[Episode]) -> dict:
    """One row."""
    won = sum(e.success for e in episodes)
    jumps = np.array([j for e in episodes for j in e.jumps] or [np.nan])
    own = [j for e in episodes for j in e.own]
    plans = max(1, sum(e.plans for e in episodes))
    return {
        "method": method,
        "delay_ms": delay_ms,
        "episodes": len(episodes),
        "success_rate": won / len(episodes),
        "success_ci95": list(wilson_interval(won, len(episodes))),
        "seam_velocity_jump": {
            "mean": float(np.nanmean(jumps)),
            "p95": float(np.nanpercentile(jumps, 95)),
        },
        "own_velocity_jump_mean": float(np.mean(own)) if own else float("nan"),
        "limited_share": sum(e.limited for e in episodes) / plans,
        "rejected": sum(e.rejected for e in episodes),
        "plan_ms_p50": float(np.median([ms for e in episodes for ms in e.plan_ms] or [np.nan])),
    }


def run_episode(
    task,
    policy: OnnxPolicy,
    seed: int,
    method: str,
    delay_s: float,
    soft_start_s: float = 0.0,
    **safety_options,
) -> Episode:
    """One closed-loop episode in simulated time."""
    spec, world = policy.spec, task.world
    safety = SafetyFilter(
        load_robot(spec.robot), spec.joint_names, spec.control_dt, **safety_options
    )
    scheduler = ChunkScheduler(spec, joining=method)
    commander = Commander(scheduler, safety, soft_start_s=soft_start_s)
    live = LiveWorld(world, task.initial_state(np.random.default_rng(seed)))
    controller = TrajectoryController(spec.joint_names, live.command)
    per_tick = max(1, round(TICK_S / world.physics_dt))
    per_step = round(world.control_dt / (per_tick * world.physics_dt))
    pending: tuple[int, int, np.ndarray] | None = None  # ready at, observed at, chunk
    result, ticks, held, steps = Episode(False, [], [], 0, 0, 0), 0, 0, 0
    delay = round(delay_s * 1e9)
    # Steps count from the first plan; a policy whose every chunk is refused never gets one.
    while steps < task.episode_steps and ticks < 2 * task.episode_steps * per_step:
        now = round(live.time * 1e9)
        if pending is None and commander.due(now):
            scheduler.started(now)
            pending = now + delay, now, infer(policy, task, live, commander)
        if pending is not None and pending[0] <= now:
            _hand_over(commander, controller, live, pending, now, result)
            pending = None
        live.advance(per_tick, lambda at: controller.sample(at)[0])
        ticks += 1
        if ticks % per_step or (not result.plans and not held):
            continue
        steps += 1
        held = held + 1 if bool(task.is_success(live.state)) else 0
        if held >= task.success_hold_steps:
            result.success = True
            break
    return result


def infer(policy: OnnxPolicy, task, live: LiveWorld, commander: Commander) -> np.ndarray:
    """The chunk (H, A) for the present state, with the prefix that the plan in force gives."""
    obs = {name: values[None] for name, values in task.observe(live.state).items()}
    obs |= commander.prefix_inputs(round(live.time * 1e9))
    noise = np.zeros((1, *policy.chunk_shape), np.float32)
    return policy.infer(obs, noise)[0].astype(np.float64)


def _hand_over(commander, controller, live, pending, now: int, result: Episode) -> None:
    _, stamp, chunk = pending
    measured, begin = controller.sample(live.time)[0], time.thread_time_ns()
    try:
        outcome = commander.accept(chunk, stamp, now, measured)
    except Rejected:
        result.rejected += 1
        return
    result.plan_ms.append((time.thread_time_ns() - begin) / 1e6)
    result.plans += 1
    result.limited += bool(outcome.checked.num_changed)
    if outcome.targets.seam_jump is not None:
        arm = commander.safety.arm
        result.jumps.append(_rms(outcome.targets.seam_jump[arm]))
        scheduler = commander.scheduler
        own = np.diff(chunk[: scheduler.execute_horizon, arm], n=2, axis=0) / scheduler.control_dt
        result.own += [_rms(row) for row in own]
    times, positions, velocities = outcome.plan.points(now)
    controller.accept(commander.safety.joint_names, times, positions, velocities, live.time)


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(values**2)))


def text(result: dict) -> str:
    """For people."""
    lines = [
        f"{'method':<10} {'delay':>7} {'success':>9} {'seam jump':>10} {'p95':>7} {'own':>7} {'limited':>8} {'plan':>8}"
    ]
    for row in result["rows"]:
        jump = row["seam_velocity_jump"]
        lines.append(
            f"{row['method']:<10} {row['delay_ms']:>4.0f} ms {row['success_rate']:>9.0%} "
            f"{jump['mean']:>10.3f} {jump['p95']:>7.3f} {row['own_velocity_jump_mean']:>7.3f} "
            f"{row['limited_share']:>8.0%} {row['plan_ms_p50']:>5.2f} ms"
        )
    return "\n".join(lines)

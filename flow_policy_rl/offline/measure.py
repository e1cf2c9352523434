"""Every number of `replay.json` about one policy on one recording."""

import numpy as np

from flow_policy_rl.offline import metrics, wiring
from flow_policy_rl.offline.recording import Recording
from flow_policy_rl.serving.robot import Robot
from flow_policy_rl.spec import PolicySpec


def measure(
    spec: PolicySpec,
    robot: Robot,
    recording: Recording,
    chunks: np.ndarray,
    inference_s: np.ndarray,
    samples: np.ndarray | None = None,
) -> dict:
    """All numbers: errors over the executed part of each chunk unless they say otherwise.

    Args:
        chunks: (n, H, A), one per inference of the recording.
        inference_s: of the first inferences.
        samples: (n, S, H, A), further chunks per inference.
    """
    executed, dt = slice(0, spec.execute_horizon), spec.control_dt
    truth = recording.truth
    error = chunks - truth
    hold, copied = metrics.baselines(recording.measured, recording.before, truth[:, executed])
    latencies = recording.latencies_s if len(recording.latencies_s) else inference_s
    place = (recording.times, recording.segment, spec.execute_horizon, dt)
    ours, theirs = metrics.stitch(chunks, *place), metrics.stitch(truth, *place)
    limits = {
        what: robot.limit_array(spec.joint_names, what)
        for what in ("position", "velocity", "acceleration")
    }
    mae = metrics.mean(np.abs(error[:, executed]))
    mae_hold, mae_copied = metrics.mean(np.abs(hold)), metrics.mean(np.abs(copied))
    checks = wiring.check(recording, spec, robot)
    compared_only = metrics.stitch(np.where(np.isfinite(truth), chunks, np.nan), *place)
    smooth = {
        "policy": metrics.smoothness(compared_only, dt),
        "truth": metrics.smoothness(theirs, dt),
    }
    smooth["ratio"] = {
        name: value / smooth["truth"][name] if value is not None and smooth["truth"][name] else None
        for name, value in smooth["policy"].items()
    }
    compared = int(np.isfinite(error[:, executed]).all(axis=(1, 2)).sum())
    return {
        "chunks": len(chunks),
        "compared_chunks": compared,
        "segments": int(recording.segment.max()) + 1,
        "duration_s": recording.duration,
        "joints": metrics.errors_by_joint(spec.joint_names, error[:, executed]),
        "mae": mae,
        "rmse": metrics.rms(error[:, executed]),
        "mae_hold": mae_hold,
        "mae_copy_last": mae_copied,
        "beats_baselines": bool(mae < min(mae_hold, mae_copied)) if compared else None,
        "first_action_mae": metrics.mean(np.abs(error[:, 0])),
        "chunk_l1": metrics.mean(np.abs(error).sum(axis=(1, 2))),
        "by_step": {
            "mae": [metrics.mean(np.abs(error[:, k])) for k in range(spec.action_horizon)],
            "rmse": [metrics.rms(error[:, k]) for k in range(spec.action_horizon)],
            "joints": {
                name: [metrics.mean(np.abs(error[:, k, j])) for k in range(spec.action_horizon)]
                for j, name in enumerate(spec.joint_names)
            },
        },
        "gripper": _gripper(spec, robot, ours, theirs),
        "end_effector": _end_effector(spec, robot, chunks[:, executed], truth[:, executed]),
        "best_of_n": None
        if samples is None
        else metrics.best_of(samples[:, :, executed], truth[:, executed]),
        "smoothness": smooth,
        "seams": metrics.seams(chunks, *place),
        "limit_violations": metrics.violations(chunks, recording.before, limits, dt),
        "latency_ms": metrics.percentiles(latencies * 1e3),
        "latency_source": "end to end, recorded in the bag"
        if len(recording.latencies_s)
        else "inference, measured in this replay",
        "inference_ms": metrics.percentiles(inference_s * 1e3),
        "stages_ms": {name: d.summary_ms() for name, d in recording.stages.items()},
        "deadline": _deadline(spec, latencies),
        "skew_ms": recording.skew.summary_ms(),
        "streams": {
            topic: {
                "type": s.type,
                "messages": s.count,
                "unusable": s.bad,
                "rate_hz": metrics.mean(np.array([s.rate_hz()])),
                "period_ms": s.periods.summary_ms(),
                "longest_gap_s": s.periods.max,
                "longest_gap_at_s": s.periods.max_at,
                "stamp_to_reception_ms": s.delays.summary_ms(),
                "backward_stamps": s.backward,
            }
            for topic, s in recording.streams.items()
        },
        "out_of_distribution": metrics.out_of_distribution(recording.obs, spec.observations),
        "wiring": checks,
        "wiring_errors": sum(c["level"] == "error" for c in checks),
        "wiring_warnings": sum(c["level"] == "warning" for c in checks),
        "problems": recording.problems.rows(),
        "problem_count": recording.problems.total,
    }


def _deadline(spec: PolicySpec, latencies_s: np.ndarray) -> dict:
    """A chunk must come before the last action of the one before it is due, and late by so many control steps."""
    spare = (spec.action_horizon - spec.execute_horizon) * spec.control_dt
    deadline = spare if spare > 0 else spec.control_dt
    known = len(latencies_s) > 0
    return {
        "deadline_ms": deadline * 1e3,
        "misses": int((latencies_s > deadline).sum()),
        "miss_share": float((latencies_s > deadline).mean()) if known else None,
        "delay_steps_p99": float(np.percentile(latencies_s, 99) / spec.control_dt)
        if known
        else None,
    }


def _gripper(spec: PolicySpec, robot: Robot, ours: list, theirs: list) -> dict:
    found = {}
    for name, limits in robot.gripper.items():
        if name not in spec.joint_names or not ours:
            continue
        joint = spec.joint_names.index(name)
        gap = np.full((1, len(spec.joint_names)), np.nan)
        one, other = (
            np.concatenate([row for m in motions for row in (m, gap)])[:, joint]
            for motions in (ours, theirs)
        )
        found[name] = metrics.gripper_agreement(one, other, *limits.position, spec.control_dt)
    return found


def _end_effector(
    spec: PolicySpec, robot: Robot, chunks: np.ndarray, truth: np.ndarray
) -> dict | None:
    """Distance of the tool (m) between predicted and true joints, by forward kinematics of the robot file."""
    kinematics = robot.chain
    known = np.isfinite(truth).all(axis=2)
    if kinematics is None or not known.any():
        return None
    ours, theirs = (
        kinematics.tool_position(spec.joint_names, values[known]) for values in (chunks, truth)
    )
    distance = np.linalg.norm(ours - theirs, axis=1)
    return {"position_mean_m": float(distance.mean()), "position_m": metrics.percentiles(distance)}

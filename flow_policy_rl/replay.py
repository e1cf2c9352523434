"""`flow-policy replay`: judge a policy on a recorded rosbag, with the decoding and timing code of the live node.

    grid    teacher-forced: wherever the live node would have inferred, the policy sees the recorded observation; its
            chunk is compared with the ground truth of that time. Batched, as fast as the machine allows.
    timed   the same with latency: chunks come late, are joined by the real scheduler and limited by the real safety
            filter, and the resulting command is compared.
    graph   the bag is played into the real node over ROS 2, and what the node planned is compared.

No ROS needed but for `graph`. Open-loop error does not predict closed-loop success: this is a test of wiring and of
regressions.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from flow_policy_rl import __version__, rerun_log
from flow_policy_rl.data.bags import Bag
from flow_policy_rl.errors import InputError, RunFailed, refuse_below, refuse_unread, unknown_name
from flow_policy_rl.offline import gates, metrics
from flow_policy_rl.offline.measure import measure
from flow_policy_rl.offline.predict import Predictor
from flow_policy_rl.offline.recording import Inference, Recording, Sink, read_recording
from flow_policy_rl.rerun_log import RerunLog
from flow_policy_rl.run_folder import claimed
from flow_policy_rl.serving.onnx_policy import OnnxPolicy
from flow_policy_rl.serving.robot import Robot, load_robot
from flow_policy_rl.spec import PolicySpec

SCHEMA_VERSION = 2
TRUTHS = {
    "command": "what was received on the command topic",
    "controller": "the reference that the controller published",
    "state": "the measured joints when each action was due",
}
# The live node of mode graph has its own noise and joining, in its parameters.
ONLY_IN_MODES = {
    "samples": ("grid",),
    "latency_ms": ("timed",),
    "joining": ("timed",),
    "noise": ("grid", "timed"),
    "seed": ("grid", "timed"),
}
CAVEAT = "Open-loop error does not predict closed-loop success: read this as a test of wiring and of regressions."


@dataclass(frozen=True)
class Config:
    """Compare a policy's chunks with what a recorded robot was told or did.

    Example: flow-policy replay --bag bag --policy policy.onnx --out report

    Attributes:
        bag: rosbag2 folder, or one .mcap or .db3 file (also one that was cut off).
        policy: exported policy, or the name of one that ships (flow-policy list policies).
        compare: a second policy, judged on the same observations and seeds.
        out: folder for report.html, replay.json, steps.csv, replay.png and the bag of predicted chunks.
        robot: name of a robot, or path of a robot file (None: the one in the policy).
        topics: NAME=TOPIC pairs that override the robot file; NAME is joint_states, command, an object or a camera.
        ground_truth: what the actions are compared with: command topic, controller reference, or next measured state.
        truth_topic: topic of the command or of the controller state (empty: that of the robot file).
        mode: grid (teacher-forced), timed (with latency, scheduler and safety), or graph (into the real node).
        latency_ms: latency of an inference in mode timed (None: as measured while replaying).
        joining: how consecutive chunks join in mode timed, as the parameter of the node.
        noise: where the flow starts in modes grid and timed: zero, or random from `seed`.
        seed: of all noise in these modes.
        samples: in mode grid, further chunks per observation from random noise, for best-of-N and spread.
        gates: YAML file of thresholds; exit code 1 when one fails.
        max_mae: a gate on the mean error (rad, m).
        rerun: file for the Rerun viewer as well: chunks, joints, pictures and latencies over the time of the bag.
        json: print one JSON object.
    """

    bag: Path
    policy: Path
    compare: Path | None = None
    out: Path = Path("replay")
    robot: str | None = None
    topics: tuple[str, ...] = ()
    ground_truth: Literal["command", "controller", "state"] = "command"
    truth_topic: str = ""
    mode: Literal["grid", "timed", "graph"] = "grid"
    latency_ms: float | None = None
    joining: Literal["replace", "crossfade", "ensemble", "rtc", "sync"] = "replace"
    noise: Literal["zero", "random"] = "zero"
    seed: int = 0
    samples: int = 0
    gates: Path | None = None
    max_mae: float | None = None
    rerun: Path | None = None
    json: bool = False


@dataclass(frozen=True)
class Judged:
    """One policy on one bag: its spec, what was recorded, chunks (n, H, A), s of the first inferences, all numbers."""

    policy: Path
    spec: PolicySpec
    robot: Robot
    recording: Recording
    chunks: np.ndarray
    inference_s: np.ndarray
    numbers: dict


def main(config: Config) -> dict:
    """Replay, write the reports; where that is refused, leave no empty folder."""
    refuse_below(config, samples=0, latency_ms=0)
    for name, modes in ONLY_IN_MODES.items():
        if config.mode not in modes:
            valid = " or ".join(modes)
            refuse_unread(config, f"is of --mode {valid}, and this is --mode {config.mode}", name)
    with claimed(config.out, "--out"):
        return _replay(config)


def _replay(config: Config) -> dict:
    from flow_policy_rl.offline import output

    refuse_to_replace(config)
    limits = {} if config.gates is None else gates.load(config.gates)
    if config.max_mae is not None:
        limits["mae"] = limits.get("mae", {}) | {"max": config.max_mae}
    log = None if config.rerun is None else RerunLog(config.rerun, "bag_time", stamps=True)
    judged = [judge(config, config.policy, log)]
    if config.compare is not None:
        judged.append(judge(config, config.compare))
    first = judged[0]
    result = {
        "schema_version": SCHEMA_VERSION,
        "version": __version__,
        "bag": str(config.bag),
        "policy": str(config.policy),
        "mode": config.mode,
        "ground_truth": {
            "kind": config.ground_truth,
            "topic": config.truth_topic or truth_topic(config, first.robot),
            "meaning": TRUTHS[config.ground_truth],
        },
        "noise": config.noise,
        "seed": config.seed,
        **first.numbers,
    }
    if len(judged) == 2:
        result["compare"] = side_by_side(*judged)
    result["gates"] = gates.judge(result, limits)
    compared = result["compared_chunks"] > 0
    result["passed"] = compared and all(g["passed"] for g in result["gates"].values())
    result |= {
        "report": str(config.out / "report.html"),
        "files": ["replay.json", "steps.csv", "replay.png", "chunks"],
    }
    output.write_steps(config.out / "steps.csv", first)
    output.write_picture(config.out / "replay.png", first)
    output.write_chunks(config.out / "chunks", first)
    output.write_page(config.out / "report.html", judged, result)
    if log is not None:
        rerun_log.replay(log, judged)
        log.close()
        result["rerun"] = str(config.rerun)
    (config.out / "replay.json").write_text(json.dumps(result, indent=2, default=_plain) + "\n")
    return json.loads(json.dumps(result, default=_plain))


def refuse_to_replace(config: Config) -> None:
    """Folders inside `--out` that a replay begins anew are those of an earlier replay, and not what is to be read.

    Raises:
        InputError: names the folder that is in the way.
    """
    graph = ("graph", "second/graph") if config.mode == "graph" else ()
    for name in ("chunks", *graph):
        folder = config.out / name
        read = folder.resolve() in (config.bag.resolve(), *config.bag.resolve().parents)
        earlier = folder.is_dir() and (config.out / "steps.csv").is_file()
        if read or (folder.exists() and not earlier):
            what = "the bag to read" if read else "not known to be of an earlier replay"
            raise InputError(
                f"--out '{config.out}' would replace '{folder}', which is {what}: choose another --out"
            )


def _plain(value):
    return value.item() if isinstance(value, np.generic) else str(value)


def mapped(robot: Robot, pairs: tuple[str, ...]) -> Robot:
    """The robot with some topics replaced.

    Raises:
        InputError: not NAME=TOPIC, or an unknown name.
    """
    plain = {f.name: getattr(robot.topics, f.name) for f in dataclasses.fields(robot.topics)}
    for pair in pairs:
        name, found, topic = pair.partition("=")
        if not found or not topic.startswith("/"):
            raise InputError(f"--topics wants NAME=/TOPIC, not '{pair}'")
        if isinstance(plain.get(name), str):
            plain[name] = topic
            continue
        groups = [g for g in ("poses", "images") if name in plain[g]]
        if not groups:
            valid = [n for n, v in plain.items() if isinstance(v, str)]
            raise unknown_name("topic name", name, [*valid, *plain["poses"], *plain["images"]])
        plain[groups[0]] = {**plain[groups[0]], name: topic}
    return dataclasses.replace(robot, topics=dataclasses.replace(robot.topics, **plain))


def truth_topic(config: Config, robot: Robot) -> str:
    """Where the ground truth comes from."""
    topics = mapped(robot, config.topics).topics
    names = {"command": "command", "controller": "controller_state", "state": "joint_states"}
    return getattr(topics, names[config.ground_truth], "")


def judge(config: Config, path: Path, log: RerunLog | None = None) -> Judged:
    """One policy on the bag; what it sees goes to `log` as well.

    Raises:
        InputError: the bag holds no observation for it; the reasons follow.
    """
    policy = OnnxPolicy(path)
    spec = policy.spec
    robot = mapped(load_robot(config.robot or spec.robot), config.topics)
    bag = Bag(config.bag)

    def read(infer: Sink | None, stamps: Iterable[int] | None = None) -> Recording:
        def both(inference: Inference) -> None:
            if infer is not None:
                infer(inference)
            if log is not None:
                rerun_log.observation(log, inference)

        recording = read_recording(
            bag, spec, robot, config.ground_truth, config.truth_topic, both, stamps
        )
        refuse_empty(recording, config.bag)
        return recording

    if config.mode == "graph":
        return through_the_node(config, path, read, spec, robot)
    if config.mode == "timed":
        return with_latency(config, path, read, policy, robot)
    predictor = Predictor(policy, config.noise, config.seed, config.samples)
    recording = read(predictor)
    chunks, samples = predictor.finish()
    refuse_not_finite(chunks, recording, path)
    latencies = np.array(predictor.latencies_s)
    samples = samples if config.samples else None
    numbers = measure(spec, robot, recording, chunks, latencies, samples)
    return Judged(path, spec, robot, recording, chunks, latencies, numbers)


Read = Callable[..., Recording]  # (sink, stamps) -> the bag, once


def with_latency(
    config: Config, path: Path, read: Read, policy: OnnxPolicy, robot: Robot
) -> Judged:
    """Chunks that come late, through scheduler and safety filter."""
    from flow_policy_rl.offline.timed import TimedPredictor

    spec = policy.spec
    timed = TimedPredictor(
        policy, robot, config.noise, config.seed, config.latency_ms, config.joining
    )
    recording = read(timed)
    chunks, latencies = timed.finish(), np.array(timed.inference_s)
    refuse_not_finite(chunks, recording, path)
    source = {}
    if config.latency_ms is not None:
        recording.latencies_s = np.array(timed.latencies_s)
        recording.latency_times = recording.times
        source = {"latency_source": "simulated, --latency-ms"}
    numbers = measure(spec, robot, recording, chunks, latencies) | source
    numbers["timed"] = timed.numbers(recording, robot)
    return Judged(path, spec, robot, recording, chunks, latencies, numbers)


def refuse_empty(recording: Recording, bag: Path) -> None:
    """No inference, no verdict."""
    if not len(recording.times):
        reasons = recording.problems or "no messages"
        raise InputError(f"bag '{bag}' has no complete observation for the policy: {reasons}")


def refuse_not_finite(chunks: np.ndarray, recording: Recording, policy: Path) -> None:
    """Errors leave out what is not known: a policy that fails would be judged by the rest of its chunks (n, H, A).

    Raises:
        RunFailed: some are not numbers.
    """
    bad = np.flatnonzero(~np.isfinite(chunks).all(axis=(1, 2)))
    if len(bad):
        raise RunFailed(
            f"policy '{policy}' gave actions that are not finite for {len(bad)} of {len(chunks)} observations, "
            f"first at {recording.times[bad[0]]:.3f} s: it cannot be judged"
        )


def through_the_node(
    config: Config, path: Path, read: Read, spec: PolicySpec, robot: Robot
) -> Judged:
    """Chunks that the real node planned while the bag was played into it."""
    from flow_policy_rl.offline import graph

    graph.require_ros()
    name = config.robot or spec.robot
    out = config.out if path == config.policy else config.out / "second"
    out.mkdir(parents=True, exist_ok=True)
    found = graph.play(config.bag, path, name, robot, load_robot(name), spec, out)
    recording = read(None, found)
    recording.stages, recording.latencies_s = graph.stages(out / "graph")
    recording.latency_times = np.full(len(recording.latencies_s), np.nan)
    chunks = np.array([found[stamp] for stamp in recording.stamps])
    inferences = np.zeros(0)
    numbers = measure(spec, robot, recording, chunks, inferences)
    seen = {"planned": len(found), "compared_with_the_bag": len(chunks), "bag": str(out / "graph")}
    source = {"latency_source": "in the node, from message to command"}
    numbers |= source | {"graph": seen}
    return Judged(path, spec, robot, recording, chunks, inferences, numbers)


def side_by_side(first: Judged, second: Judged) -> dict:
    """What differs between two policies on the same bag."""
    keys = ("mae", "rmse", "first_action_mae", "beats_baselines", "chunks", "compared_chunks")
    result = {"policy": str(second.policy), **{key: second.numbers[key] for key in keys}}
    result |= {
        "joints": second.numbers["joints"],
        "smoothness": second.numbers["smoothness"]["policy"],
        "seams": second.numbers["seams"],
        "inference_ms": second.numbers["inference_ms"],
        "best_of_n": second.numbers["best_of_n"],
    }
    same = (
        first.spec.joint_names == second.spec.joint_names
        and first.spec.control_dt == second.spec.control_dt
        and np.array_equal(first.recording.times, second.recording.times)
    )
    result["paired"] = metrics.compare(_by_chunk(first), _by_chunk(second)) if same else None
    return result


def _by_chunk(judged: Judged) -> np.ndarray:
    """Mean error (n,) over the executed part; nan where not all of it is known."""
    executed = slice(0, judged.spec.execute_horizon)
    error = np.abs(judged.chunks[:, executed] - judged.recording.truth[:, executed])
    return error.mean(axis=(1, 2))


def verdict(numbers: dict) -> str:
    """In words."""
    if not numbers["compared_chunks"]:
        return (
            "NOTHING COULD BE COMPARED: no chunk has a ground truth for all of its executed actions"
        )
    if numbers["beats_baselines"]:
        return "better than both baselines"
    return "NOT better than holding still or repeating the last command: check joint order, units, rate and inputs"


def text(result: dict) -> str:
    """For people."""
    if not result["compared_chunks"]:
        errors = verdict(result)
    else:
        errors = (
            f"{result['compared_chunks']} chunks against the {result['ground_truth']['kind']}: mean error "
            f"{result['mae']:.4f} (hold {result['mae_hold']:.4f}, copy last {result['mae_copy_last']:.4f}): "
            f"{verdict(result)}"
        )
    lines = [errors]
    if "timed" in result and result["timed"]["mae"] is not None:
        timed = result["timed"]
        lines.append(
            f"with a latency of {timed['latency_ms']['p50']:.1f} ms: mean error of the command {timed['mae']:.4f}; "
            f"{sum(timed['refused'].values())} chunks refused, {timed['skipped_observations']} observations skipped"
        )
    if "compare" in result and result["compare"]["mae"] is not None:
        paired = result["compare"]["paired"]
        lines.append(f"second policy: mean error {result['compare']['mae']:.4f}")
        if paired and paired["difference"] is not None:
            low, high = paired["ci95"]
            lines[-1] += (
                f", difference {paired['difference']:+.4f} (95 %: {low:+.4f} to {high:+.4f})"
            )
    for check in result["wiring"]:
        if check["level"] in ("error", "warning"):
            lines.append(f"{check['level']}: {check['name']}: {check['detail']}")
    lines += [
        f"not used: {p['topic']}: {p['reason']} ({p['count']}x, first at {p['first']})"
        for p in result["problems"][:8]
    ]
    lines += [
        f"gate {'passed' if g['passed'] else 'FAILED'}: {name} = {g['value']}"
        for name, g in result["gates"].items()
    ]
    latency = result["latency_ms"]
    if latency["p50"] is not None:
        lines.append(
            f"latency p50 {latency['p50']:.2f} ms, p99 {latency['p99']:.2f} ms ({result['latency_source']})"
        )
    return "\n".join([*lines, f"report: {result['report']}"])

"""What a replay leaves behind: a page, a table of steps, a picture, and a bag of the predicted chunks for Foxglove."""

import csv
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import plotly.graph_objects as go

from flow_policy_rl import report
from flow_policy_rl.data.bags import TYPESTORE, BagWriter
from flow_policy_rl.replay import CAVEAT, Judged, verdict

MAX_DRAWN = 60  # chunks in the figure of plans, from the longest segments
MAX_POINTS = 2000  # of the error over time
TRAJECTORY, JOINTS, NUMBER = (
    "trajectory_msgs/msg/JointTrajectory",
    "sensor_msgs/msg/JointState",
    "std_msgs/msg/Float64",
)


def write_steps(path: Path, judged: Judged) -> None:
    """CSV: one row per inference and action, with prediction and truth of every joint. Unknown truth is empty."""
    spec, recording = judged.spec, judged.recording
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        columns = [f"{kind}/{name}" for kind in ("policy", "truth") for name in spec.joint_names]
        writer.writerow(
            ["inference", "segment", "observed_s", "step", "due_s", "executed", *columns]
        )
        for i, start in enumerate(recording.times):
            for k in range(spec.action_horizon):
                values = [f"{v:.6f}" if np.isfinite(v) else "" for v in judged.chunks[i, k]]
                values += [f"{v:.6f}" if np.isfinite(v) else "" for v in recording.truth[i, k]]
                due = start + (k + 1) * spec.control_dt
                place = [i, recording.segment[i], f"{start:.6f}", k, f"{due:.6f}"]
                writer.writerow([*place, int(k < spec.execute_horizon), *values])


def write_chunks(folder: Path, judged: Judged) -> None:
    """A rosbag2 (MCAP) with planned chunks, the truth and the error at each observation; opens in Foxglove."""
    spec, recording, types = judged.spec, judged.recording, TYPESTORE.types
    if folder.exists():
        shutil.rmtree(folder)

    def header(seconds: float):
        ns = round(seconds * 1e9)
        stamp = types["builtin_interfaces/msg/Time"](ns // 1_000_000_000, ns % 1_000_000_000)
        return types["std_msgs/msg/Header"](stamp, "")

    def trajectory(at: float, values: np.ndarray) -> bytes:
        points = []
        for k, position in enumerate(values):
            ns = round((k + 1) * spec.control_dt * 1e9)
            due = types["builtin_interfaces/msg/Duration"](ns // 1_000_000_000, ns % 1_000_000_000)
            none = np.zeros(0)
            points.append(
                types["trajectory_msgs/msg/JointTrajectoryPoint"](position, none, none, none, due)
            )
        msg = types[TRAJECTORY](header(at), list(spec.joint_names), points)
        return bytes(TYPESTORE.serialize_cdr(msg, TRAJECTORY))

    writer = BagWriter(folder)
    for topic, kind in {
        "/replay/planned_chunk": TRAJECTORY,
        "/replay/true_chunk": TRAJECTORY,
        "/replay/joint_states": JOINTS,
        "/replay/error": NUMBER,
    }.items():
        writer.add_topic(topic, kind)
    error = np.abs(judged.chunks - recording.truth)[:, : spec.execute_horizon].mean(axis=(1, 2))
    for i, at in enumerate(recording.times):
        ns = round(at * 1e9)
        writer.write("/replay/planned_chunk", ns, trajectory(at, judged.chunks[i]))
        known = np.isfinite(recording.truth[i]).all(axis=1)
        if known[0]:
            length = len(known) if known.all() else int(known.argmin())
            writer.write("/replay/true_chunk", ns, trajectory(at, recording.truth[i, :length]))
        none = np.zeros(0)
        state = types[JOINTS](header(at), list(spec.joint_names), recording.measured[i], none, none)
        writer.write("/replay/joint_states", ns, bytes(TYPESTORE.serialize_cdr(state, JOINTS)))
        if np.isfinite(error[i]):
            value = types[NUMBER](float(error[i]))
            writer.write("/replay/error", ns, bytes(TYPESTORE.serialize_cdr(value, NUMBER)))
    writer.close()


def write_picture(path: Path, judged: Judged) -> None:
    """PNG: error by joint and step, and the plans of one segment over the truth."""
    from matplotlib.figure import Figure

    spec, numbers = judged.spec, judged.numbers
    figure = Figure(figsize=(11, 7), layout="constrained", dpi=110)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.3))
    grid = np.array([numbers["by_step"]["joints"][n] for n in spec.joint_names], float)
    image = left.imshow(grid, aspect="auto", cmap="viridis", vmin=0)
    left.set_yticks(range(spec.num_joints), spec.joint_names)
    left.axvline(spec.execute_horizon - 0.5, color="white", linestyle=":")
    left.set(xlabel="action of the chunk", title="Mean absolute error (rad, m)")
    figure.colorbar(image, ax=left, location="bottom")
    rows = drawn_rows(judged)
    start = judged.recording.times[rows[0]] if len(rows) else 0.0
    due = (np.arange(spec.action_horizon) + 1) * spec.control_dt
    for joint, name in enumerate(spec.joint_names):
        color = report.COLORS[joint % len(report.COLORS)]
        for i in rows:
            x = judged.recording.times[i] - start + due
            right.plot(x, judged.recording.truth[i, :, joint], color=color, linewidth=3, alpha=0.3)
            label = name if i == rows[0] else None
            right.plot(x, judged.chunks[i, :, joint], color=color, linewidth=1, label=label)
    right.set(xlabel="s", title="Planned (thin) and true (wide) positions")
    if len(rows):
        right.legend(fontsize=7, ncols=2, loc="upper left")
    error = f"mean error {_number(numbers['mae'])} rad, m: {verdict(numbers)}"
    figure.suptitle(error, fontsize=10)
    figure.savefig(path)


def drawn_rows(judged: Judged) -> np.ndarray:
    """Inferences of one segment of ordinary length."""
    segment = judged.recording.segment
    if not len(segment):
        return np.zeros(0, int)
    sizes = np.bincount(segment)
    there = np.flatnonzero(sizes > min(1, sizes.max() - 1))
    ordinary = there[np.argmin(np.abs(sizes[there] - np.median(sizes[there])))]
    return np.flatnonzero(segment == ordinary)[:MAX_DRAWN]


# --- the page ---


def write_page(path: Path, judged: Sequence[Judged], result: dict) -> None:
    """One self-contained page."""
    first = judged[0]
    compared = result.get("compare")
    sections = [
        report.Text(_summary(result)),
        report.Text(CAVEAT),
        report.Table(
            "Against baselines", ["", "mean absolute error"], _baselines(result), strong=0
        ),
        _gates(result),
        report.Table(
            "Wiring",
            ["", "question", "answer"],
            [[c["level"], c["name"], c["detail"]] for c in result["wiring"]],
            marks=[c["level"] for c in result["wiring"]],
        ),
        plan_figure(first),
        step_figure(first),
        error_figure(judged),
        report.Table("Error per joint", *_joints(result, compared)),
        _others(result),
        report.Table("Smoothness", *_smoothness(result, compared)),
        _timed(result),
        _limits(result),
        report.Table("Timing", *_timing(result)),
        report.latency_figure(first.recording.latencies_s * 1e3),
        report.Table("Topics", *_streams(result)),
        _problems(result),
    ]
    subtitle = f"{result['policy']} on {result['bag']}"
    if compared:
        subtitle = f"{result['policy']} and {compared['policy']} on {result['bag']}"
    report.write(path, "Replay", subtitle, sections)


def _summary(result: dict) -> str:
    truth = result["ground_truth"]
    return (
        f"{result['compared_chunks']} of {result['chunks']} chunks could be compared, in {result['segments']} "
        f"uninterrupted pieces of {result['duration_s']:.0f} s. Ground truth: {truth['meaning']} ({truth['topic']}). "
        f"Mode: {result['mode']}. Mean error {_number(result['mae'])} (rad, m): {verdict(result)}."
    )


def _number(value, digits: int = 5) -> str:
    return "unknown" if value is None else f"{value:.{digits}f}"


def _baselines(result: dict) -> list[list[str]]:
    rows = [["policy", _number(result["mae"])]]
    if "compare" in result:
        rows.append(["second policy", _number(result["compare"]["mae"])])
        paired = result["compare"]["paired"]
        if paired and paired["difference"] is not None:
            low, high = paired["ci95"]
            text = f"{paired['difference']:+.5f} (95 % interval {low:+.5f} to {high:+.5f})"
            rows.append(["second minus first", text])
            rows.append(
                ["second is better in", f"{paired['share_second_better']:.0%} of the chunks"]
            )
    rows += [
        ["hold the measured position", _number(result["mae_hold"])],
        ["repeat the last command", _number(result["mae_copy_last"])],
        ["first action only", _number(result["first_action_mae"])],
    ]
    return rows


def _gates(result: dict) -> report.Table | None:
    if not result["gates"]:
        return None
    rows, marks = [], []
    for name, gate in result["gates"].items():
        limits = ", ".join(f"{k} {gate[k]}" for k in ("min", "max", "equals") if k in gate)
        rows.append(["passed" if gate["passed"] else "FAILED", name, str(gate["value"]), limits])
        marks.append("ok" if gate["passed"] else "error")
    return report.Table("Gates", ["", "number", "value", "limits"], rows, marks=marks)


def _joints(result: dict, compared: dict | None) -> tuple[list[str], list[list[str]]]:
    header = ["joint", "mean absolute", "root mean square", "largest"]
    rows = [
        [name, *(_number(v[k]) for k in ("mae", "rmse", "max"))]
        for name, v in result["joints"].items()
    ]
    if compared:
        header.append("second policy, mean absolute")
        for row in rows:
            row.append(_number(compared["joints"].get(row[0], {}).get("mae")))
    return header, rows


def _others(result: dict) -> report.Table | None:
    rows = []
    if result["end_effector"]:
        tool = result["end_effector"]
        far = ", ".join(f"{tool['position_m'][k] * 1e3:.2f}" for k in ("p95", "max"))
        rows.append(["tool position, mean", f"{tool['position_mean_m'] * 1e3:.2f} mm"])
        rows.append(["tool position, p95 and largest", f"{far} mm"])
    for name, grip in result["gripper"].items():
        if grip["accuracy"] is not None:
            f1 = "" if grip["f1"] is None else f", F1 {grip['f1']:.3f}"
            rows.append([f"{name} open or closed", f"right {grip['accuracy']:.1%} of the time{f1}"])
        if grip["timing_s"] is not None:
            rows.append(
                [
                    f"{name} switches",
                    f"{grip['switches']}, on average {grip['timing_s'] * 1e3:.0f} ms off",
                ]
            )
    best = result["best_of_n"]
    if best:
        rows.append([f"best of {best['samples']} samples", _number(best["best_mae"])])
        rows.append([f"mean of {best['samples']} samples", _number(best["mean_mae"])])
        rows.append(["spread of the samples (std)", _number(best["spread"])])
    return report.Table("Tool, gripper, samples", ["", ""], rows) if rows else None


def _smoothness(result: dict, compared: dict | None) -> tuple[list[str], list[list[str]]]:
    smooth = result["smoothness"]
    header = ["", "policy", "truth", "ratio"] + (["second policy"] if compared else [])
    rows = []
    for name, value in smooth["policy"].items():
        row = [
            name.replace("_", " "),
            *(_short(v) for v in (value, smooth["truth"][name], smooth["ratio"][name])),
        ]
        rows.append(row + ([_short(compared["smoothness"][name])] if compared else []))
    for name, value in result["seams"].items():
        row = [f"seam jump, {name.replace('_', ', ')}", _short(value), "", ""]
        rows.append(row + ([_short(compared["seams"][name])] if compared else []))
    return header, rows


def _short(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4g}"


def _timed(result: dict) -> report.Table | None:
    timed = result.get("timed")
    if not timed:
        return None
    kind = "simulated" if timed["latency_simulated"] else "as measured here"
    rows = [
        [
            f"latency, {kind}: p50, p99 (ms)",
            ", ".join(_short(timed["latency_ms"][k]) for k in ("p50", "p99")),
        ],
        ["mean error of the command", _number(timed["mae"])],
        ["jerk of the command, rms", _short(timed["smoothness"]["jerk_rms"])],
        ["jerk of the chunks, rms", _short(result["smoothness"]["policy"]["jerk_rms"])],
        ["chunks sent", str(timed["chunks_sent"])],
        ["actions limited, per chunk", _short(timed["limited_actions_per_chunk"])],
        ["observations skipped", str(timed["skipped_observations"])],
        *([f"refused: {why}", str(n)] for why, n in timed["refused"].items()),
    ]
    return report.Table("With latency, scheduler and safety filter", ["", ""], rows)


def _limits(result: dict) -> report.Table:
    rows = [
        [name, "unknown" if v is None else f"{v:.2%}"]
        for name, v in result["limit_violations"].items()
    ]
    timed = result.get("timed")
    header = ["actions beyond the robot's limit", "as predicted"]
    if timed:
        header.append("after the safety filter")
        for row in rows:
            value = timed["limit_violations"].get(row[0])
            row.append("unknown" if value is None else f"{value:.2%}")
    return report.Table("Limits", header, rows)


def _timing(result: dict) -> tuple[list[str], list[list[str]]]:
    rows = [
        [result["latency_source"], *_ms(result["latency_ms"])],
        ["inference here", *_ms(result["inference_ms"])],
    ]
    rows += [
        [f"node: {name.replace('_', ' ')}", *_ms(v)] for name, v in result["stages_ms"].items()
    ]
    rows.append(["between the newest stamps of the streams", *_ms(result["skew_ms"])])
    deadline = result["deadline"]
    share = deadline["miss_share"]
    missed = "unknown" if share is None else f"{deadline['misses']} ({share:.1%})"
    rows.append([f"deadline of {deadline['deadline_ms']:.0f} ms missed", missed, "", "", ""])
    return ["ms", "p50", "p95", "p99", "max"], rows


def _ms(values: dict) -> list[str]:
    return ["" if values[k] is None else f"{values[k]:.2f}" for k in ("p50", "p95", "p99", "max")]


def _streams(result: dict) -> tuple[list[str], list[list[str]]]:
    header = [
        "topic",
        "messages",
        "unusable",
        "rate (Hz)",
        "longest gap",
        "stamp to reception, p95",
    ]
    rows = []
    for topic, s in result["streams"].items():
        delay = s["stamp_to_reception_ms"]["p95"]
        gap = f"{s['longest_gap_s'] * 1e3:.0f} ms at {s['longest_gap_at_s']:.1f} s"
        late = "" if delay is None else "another clock" if delay > 60_000 else f"{delay:.1f} ms"
        rows.append(
            [topic, str(s["messages"]), str(s["unusable"]), _number(s["rate_hz"], 1), gap, late]
        )
    return header, rows


def _problems(result: dict) -> report.Table | None:
    if not result["problems"]:
        return None
    rows = [
        [p["topic"], p["reason"], str(p["count"]), p["first"], p["last"]]
        for p in result["problems"]
    ]
    return report.Table("Not used", ["where", "reason", "count", "first", "last"], rows)


def plan_figure(judged: Judged) -> report.Figure | None:
    """Planned chunks over the truth, one joint at a time."""
    spec, recording, rows = judged.spec, judged.recording, drawn_rows(judged)
    if not len(rows):
        return None
    figure, start = go.Figure(), recording.times[rows[0]]
    due = (np.arange(spec.action_horizon) + 1) * spec.control_dt
    x = [v for i in rows for v in (*np.round(recording.times[i] + due - start, 4), None)]

    def line(values: np.ndarray, joint: int) -> list:
        return [
            None if v is None or not np.isfinite(v) else round(float(v), 5)
            for i in rows
            for v in (*values[i, :, joint], None)
        ]

    for joint in range(spec.num_joints):
        shown = {"x": x, "visible": joint == 0, "mode": "lines"}
        wide, thin = ({"color": report.COLORS[k], "width": w} for k, w in ((0, 4), (1, 1.5)))
        figure.add_scatter(y=line(recording.truth, joint), name="truth", line=wide, **shown)
        figure.add_scatter(y=line(judged.chunks, joint), name="planned", line=thin, **shown)
    buttons = [
        {
            "label": name,
            "method": "update",
            "args": [{"visible": [k // 2 == joint for k in range(2 * spec.num_joints)]}],
        }
        for joint, name in enumerate(spec.joint_names)
    ]
    report.layout(figure, "s", "rad or m")
    menu = {"buttons": buttons, "x": 0, "xanchor": "left", "y": 1.22, "yanchor": "top"}
    figure.update_layout(
        updatemenus=[menu],
        hovermode="closest",
        margin={"t": 80},
        legend={"x": 1, "xanchor": "right"},
    )
    number = recording.segment[rows[0]]
    caption = (
        f"Piece {number}, of ordinary length. The next chunk takes over before the end of one."
    )
    return report.Figure("Planned and true", figure, caption, height=420)


def step_figure(judged: Judged) -> report.Figure:
    """Error by joint and step of the chunk."""
    by_step = judged.numbers["by_step"]["joints"]
    figure = go.Figure()
    figure.add_heatmap(
        z=list(by_step.values()),
        x=list(range(judged.spec.action_horizon)),
        y=[name.replace("_joint", " ") for name in by_step],
        colorscale="Viridis",
        colorbar={"thickness": 10, "orientation": "h", "y": -0.45},
        hovertemplate="action %{x}, %{y}: %{z:.4f}<extra></extra>",
    )
    report.layout(figure, "action of the chunk", "").update_yaxes(automargin=True)
    figure.add_vline(x=judged.spec.execute_horizon - 0.5, line={"dash": "dot", "color": "white"})
    caption = "Mean absolute error (rad, m). Actions right of the dotted line are replaced by the next chunk."
    return report.Figure(
        "Error by joint and step", figure, caption, height=200 + 28 * judged.spec.num_joints
    )


def error_figure(judged: Sequence[Judged]) -> report.Figure | None:
    """Mean error of each chunk over time, thinned to what can be seen."""
    figure = go.Figure()
    for number, one in enumerate(judged):
        times = one.recording.times
        if not len(times):
            return None
        executed = slice(0, one.spec.execute_horizon)
        error = np.abs(one.chunks - one.recording.truth)[:, executed].mean(axis=(1, 2))
        every = -(-len(times) // MAX_POINTS)
        name = "policy" if number == 0 else "second policy"
        x, y = (
            (times - times[0])[::every],
            [None if np.isnan(v) else float(v) for v in error[::every]],
        )
        figure.add_scatter(
            x=np.round(x, 3).tolist(), y=y, name=name, mode="lines+markers", marker={"size": 4}
        )
    report.layout(figure, "s", "mean error (rad, m)")
    return report.Figure(
        "Error over time", figure, "One point per chunk, over its executed actions."
    )

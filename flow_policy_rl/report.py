"""Self-contained HTML reports: one template, interactive plots, films.

Everything is escaped by the template; figures travel as JSON. The page opens from disk and asks the
network for nothing. `flow-policy report` makes the page of a training run.
"""

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import av
import jinja2
import numpy as np
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs
from plotly.subplots import make_subplots

from flow_policy_rl import __version__
from flow_policy_rl.errors import InputError
from flow_policy_rl.logger import read_metrics
from flow_policy_rl.spec import PolicySpec

COLORS = ("#2563ab", "#d97706", "#2f9e60", "#b8336a", "#6d5bd0", "#0891a5", "#8a6d3b", "#5c6678")


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str
    kind: str = "text"


@dataclass(frozen=True)
class Code:
    """Preformatted lines."""

    title: str
    text: str
    kind: str = "code"


@dataclass(frozen=True)
class Table:
    """Cells are strings; row `strong` is set off; `marks` colours rows: ok, note, warning or error."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    strong: int = -1
    marks: Sequence[str] = ()
    kind: str = "table"


@dataclass(frozen=True)
class Figure:
    """A plotly figure."""

    title: str
    figure: go.Figure
    caption: str = ""
    height: int = 380
    kind: str = "figure"

    @property
    def json(self) -> str:
        """For a script element: nothing in it can close the element."""
        return self.figure.to_json().replace("<", "\\u003c")


@dataclass(frozen=True)
class Film:
    """H.264 in MP4, base64."""

    data: str
    caption: str


@dataclass(frozen=True)
class Films:
    """Films side by side."""

    title: str
    films: Sequence[Film] = field(default_factory=list)
    kind: str = "films"


def write(path: Path, title: str, subtitle: str, sections: Sequence) -> None:
    """Render the page. `None` among the sections is skipped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("flow_policy_rl"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    sections = [s for s in sections if s is not None]
    plots = any(s.kind == "figure" for s in sections)
    page = environment.get_template("report.html").render(
        title=title,
        subtitle=subtitle,
        sections=sections,
        plots=plots,
        plotly_js=get_plotlyjs() if plots else "",
        version=__version__,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def encode_film(frames: Sequence[np.ndarray], fps: int) -> str:
    """(height, width, 3) uint8 RGB frames of even size to H.264 that browsers play, base64."""
    buffer = io.BytesIO()
    height, width, _ = frames[0].shape
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream(
            "libx264", rate=fps, options={"crf": "26", "preset": "veryfast"}
        )
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for frame in frames:
            container.mux(
                stream.encode(
                    av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
                )
            )
        container.mux(stream.encode())
    return base64.b64encode(buffer.getvalue()).decode()


def layout(figure: go.Figure, x: str, y: str) -> go.Figure:
    """The look all figures share."""
    figure.update_layout(
        template="none",
        margin={"l": 55, "r": 15, "t": 30, "b": 45},
        legend={"orientation": "h", "y": 1.12},
        colorway=COLORS,
        hovermode="x unified",
    )
    figure.update_xaxes(title_text=x)
    figure.update_yaxes(title_text=y)
    return figure


def learning_figure(rows: Sequence[dict[str, float]], base: float | None = None) -> Figure:
    """Success over environment steps, exploring and on the mean flow, from the base policy's on."""
    figure = go.Figure()
    names = {
        "rollout/success_rate": "while exploring",
        "eval/success_rate": "evaluation (100 episodes)",
    }
    for name, label in names.items():
        points = [(r["time/env_steps"], r[name]) for r in rows if name in r]
        if base is not None and name.startswith("eval/"):
            points.insert(0, (0, base))
        figure.add_scatter(
            x=[p[0] for p in points], y=[p[1] for p in points], name=label, mode="lines+markers"
        )
    layout(figure, "control steps in simulation", "success rate").update_yaxes(
        range=[0, 1.02], tickformat=".0%"
    )
    return Figure("Learning curve", figure, "Sparse reward: one for success, nothing else.")


def chunk_figure(
    spec: PolicySpec,
    times: np.ndarray,
    chunks: np.ndarray,
    reference: np.ndarray,
    segment: np.ndarray,
) -> Figure | None:
    """Planned chunks over the commanded reference, per joint, in a segment of ordinary length."""
    if len(times) == 0:
        return None
    sizes = np.bincount(segment)
    ordinary = np.argmin(np.abs(sizes - np.median(sizes[sizes > 1]))) if (sizes > 1).any() else 0
    rows = np.flatnonzero(segment == ordinary)[:16]
    due = (np.arange(spec.action_horizon) + 1) * spec.control_dt
    figure = make_subplots(
        rows=-(-spec.num_joints // 2), cols=2, subplot_titles=spec.joint_names, shared_xaxes=True
    )
    start = times[rows[0]]
    for joint in range(spec.num_joints):
        at = {"row": joint // 2 + 1, "col": joint % 2 + 1}
        done = slice(0, spec.execute_horizon)
        x = np.concatenate([times[i] + due[done] - start for i in rows])
        y = np.concatenate([reference[i, done, joint] for i in rows])
        first = {"showlegend": joint == 0}
        figure.add_scatter(
            x=x, y=y, name="commanded", line={"color": COLORS[0], "width": 3}, **first, **at
        )
        gaps_x, gaps_y = [], []
        for i in rows:
            gaps_x += [*(times[i] + due - start), None]
            gaps_y += [*chunks[i, :, joint], None]
        line = {"color": COLORS[1], "width": 1.5}
        figure.add_scatter(x=gaps_x, y=gaps_y, name="planned chunks", line=line, **first, **at)
    layout(figure, "", "").update_layout(hovermode="closest", legend={"y": 1.1}, margin={"t": 75})
    caption = "Targets in rad (gripper in m) over seconds. The next chunk takes over before the end of one."
    return Figure(
        "Planned and commanded", figure, caption, height=130 * (-(-spec.num_joints // 2)) + 120
    )


def latency_figure(latencies_ms: np.ndarray) -> Figure | None:
    """Histogram of end-to-end latencies."""
    if len(latencies_ms) == 0:
        return None
    figure = go.Figure()
    top = float(np.percentile(latencies_ms, 99.5))
    figure.add_histogram(x=np.minimum(latencies_ms, top), nbinsx=60, name="messages")
    layout(figure, "ms, from publishing a state to receiving the command it triggered", "messages")
    p50, p99 = np.percentile(latencies_ms, [50, 99])
    return Figure(
        "Latency over ROS",
        figure,
        f"{len(latencies_ms)} commands: p50 {p50:.2f} ms, p99 {p99:.2f} ms.",
    )


@dataclass(frozen=True)
class Config:
    """HTML report of a training run: learning curve, settings, environment.

    Example: flow-policy report --run-dir runs/rl

    Attributes:
        run_dir: folder that flow-policy train wrote.
        json: print one JSON object.
    """

    run_dir: Path
    json: bool = False


def main(config: Config) -> dict:
    """Write `report.html` into the run folder."""
    metrics = config.run_dir / "metrics.csv"
    if not metrics.is_file():
        raise InputError(
            f"run folder '{config.run_dir}' has no metrics.csv: give a folder that flow-policy train wrote"
        )
    rows = read_metrics(metrics)
    settings = json.loads((config.run_dir / "config.json").read_text())
    environment = json.loads((config.run_dir / "environment.json").read_text())
    sections = []
    if any("rollout/success_rate" in row for row in rows):
        sections.append(learning_figure(rows))
    names = sorted(
        {n for row in rows for n in row if n.startswith(("train/", "eval/", "rollout/"))}
    )
    for name in names:
        points = [(r["step"], r[name]) for r in rows if name in r]
        figure = go.Figure().add_scatter(
            x=[p[0] for p in points], y=[p[1] for p in points], name=name
        )
        sections.append(Figure(name, layout(figure, "step", ""), height=260))
    sections += [
        Code("Settings", json.dumps(settings, indent=2)),
        Code("Environment", json.dumps(environment, indent=2)),
    ]
    out = config.run_dir / "report.html"
    write(out, "Training run", str(config.run_dir), sections)
    return {"report": str(out), "rows": len(rows)}


def text(result: dict) -> str:
    """For people."""
    return f"report: {result['report']}"

"""Self-contained HTML reports: the parts of a page, one template, interactive plots, films.

Everything is escaped by the template; figures travel as JSON. The page opens from disk and asks the network for
nothing, is light or dark as the reader's system is, fits a phone and prints. Every command that reports uses this.
"""

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import av
import jinja2
import numpy as np
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from flow_policy_rl import __version__
from flow_policy_rl.errors import output_file
from flow_policy_rl.spec import PolicySpec

# Readable on white and on dark paper.
COLORS = ("#3b82c4", "#e08a1e", "#35a36b", "#cc4a7e", "#8271dd", "#17a2b8", "#a1824a", "#7a869a")
NUMBER = re.compile(r"[-+±≈<>~]?\d.{0,24}|yes|no|unknown|-|")


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str
    kind: str = "text"


@dataclass(frozen=True)
class Tiles:
    """Headline numbers, side by side: (value, what it is, small print)."""

    tiles: Sequence[tuple[str, str, str]]
    kind: str = "tiles"


@dataclass(frozen=True)
class Code:
    """Preformatted lines; `folded` ones show when the reader opens them."""

    title: str
    text: str
    folded: bool = False
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

    @property
    def numeric(self) -> list[bool]:
        """Which columns are flush right: all but the first whose cells all begin with a digit."""
        columns = range(len(self.header))
        return [
            i > 0 and all(NUMBER.fullmatch(row[i]) for row in self.rows if i < len(row))
            for i in columns
        ]


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
class Figures:
    """Small figures in as many columns as fit; `names` in the order of `COLORS` are a key to all of them."""

    title: str
    figures: Sequence[Figure]
    caption: str = ""
    names: Sequence[str] = ()
    kind: str = "figures"

    @property
    def key(self) -> list[tuple[str, str]]:
        """Colour and name."""
        return [(COLORS[i % len(COLORS)], name) for i, name in enumerate(self.names)]


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
    plots = any(s.kind in ("figure", "figures") for s in sections)
    page = environment.get_template("report.html").render(
        title=title,
        subtitle=subtitle,
        sections=sections,
        titles=[(i, s.title) for i, s in enumerate(sections, 1) if s.kind not in ("text", "tiles")],
        plots=plots,
        plotly_js=get_plotlyjs() if plots else "",
        version=__version__,
    )
    output_file(path)
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
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        colorway=COLORS,
        hovermode="x unified",
    )
    figure.update_xaxes(title={"text": x, "standoff": 8}, automargin=True)
    figure.update_yaxes(title={"text": y, "standoff": 8}, automargin=True)
    return figure


def learning_figure(rows: Sequence[dict[str, float]], base: float | None = None) -> Figure:
    """Success over environment steps, exploring and on the mean flow, from the base policy's on."""
    figure = go.Figure()
    names = {"rollout/success_rate": "while exploring", "eval/success_rate": "evaluation"}
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
    figure.update_layout(showlegend=True)  # a single curve, too, is one of the two
    evaluated = any("eval/success_rate" in row for row in rows)
    caption = (
        "Evaluation is on fixed episodes, without exploration."
        if evaluated
        else ("Nothing was evaluated: these are the episodes of the roll-outs, with exploration.")
    )
    return Figure("Learning curve", figure, caption)


def chunk_figure(
    spec: PolicySpec,
    times: np.ndarray,
    chunks: np.ndarray,
    reference: np.ndarray,
    segment: np.ndarray,
) -> Figures | None:
    """Planned chunks over the commanded reference, per joint, in a segment of ordinary length."""
    if len(times) == 0:
        return None
    sizes = np.bincount(segment)
    ordinary = np.argmin(np.abs(sizes - np.median(sizes[sizes > 1]))) if (sizes > 1).any() else 0
    rows = np.flatnonzero(segment == ordinary)[:16]
    due = (np.arange(spec.action_horizon) + 1) * spec.control_dt
    start, done = times[rows[0]], slice(0, spec.execute_horizon)
    figures = []
    for joint, name in enumerate(spec.joint_names):
        figure = go.Figure()
        x = np.concatenate([times[i] + due[done] - start for i in rows])
        y = np.concatenate([reference[i, done, joint] for i in rows])
        figure.add_scatter(x=x, y=y, name="commanded", line={"color": COLORS[0], "width": 4})
        gaps_x, gaps_y = [], []
        for i in rows:
            gaps_x += [*(times[i] + due - start), None]
            gaps_y += [*chunks[i, :, joint], None]
        line = {"color": COLORS[1], "width": 1.5}
        figure.add_scatter(x=gaps_x, y=gaps_y, name="planned", line=line)
        layout(figure, "s", "").update_layout(hovermode="closest", showlegend=False)
        figures.append(Figure(name, figure, height=220))
    caption = "Targets in rad (gripper in m). The next chunk takes over before the end of one."
    return Figures("Planned and commanded", figures, caption, ("commanded", "planned"))


def latency_figure(latencies_ms: np.ndarray) -> Figure | None:
    """Histogram of end-to-end latencies."""
    if len(latencies_ms) == 0:
        return None
    figure = go.Figure()
    top = float(np.percentile(latencies_ms, 99.5))
    figure.add_histogram(x=np.minimum(latencies_ms, top), nbinsx=60, name="messages")
    layout(figure, "ms", "messages")
    p50, p99 = np.percentile(latencies_ms, [50, 99])
    return Figure(
        "Latency over ROS",
        figure,
        "From publishing a state to receiving the command that it triggered, in the other process. "
        f"{len(latencies_ms)} commands: p50 {p50:.2f} ms, p99 {p99:.2f} ms.",
    )

"""Is a data set fit to learn from? Coverage, frozen cameras, jumps, dead joints, short or odd episodes."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import plotly.graph_objects as go

from flow_policy_rl import report
from flow_policy_rl.data.robomimic import DemoLayout, Demonstrations
from flow_policy_rl.data.statistics import ArrayStatistics, ImageStatistics
from flow_policy_rl.serving.robot import Robot

FROZEN_STEPS = 10  # equal pictures in a row
DEAD_STD = 1e-5
FINGERPRINT_STRIDE = 16


class Health:
    """Fed frame by frame.

    Args:
        robot: for limits; without it coverage and jumps are not judged.
    """

    def __init__(self, layout: DemoLayout, robot: Robot | None = None):
        self.layout = layout
        self.limits = None
        if robot is not None and set(layout.joint_names) <= set(robot.limits):
            names = layout.joint_names
            self.limits = robot.limit_array(names, "position"), robot.limit_array(names, "velocity")
        self.numbers = {
            f.name: ArrayStatistics(f.size) for f in layout.observations if f.kind != "image"
        }
        self.numbers["actions"] = ArrayStatistics(len(layout.joint_names))
        self.cameras = [f.name for f in layout.observations if f.kind == "image"]
        self.pictures = {name: ImageStatistics() for name in self.cameras}
        self.lengths: list[int] = []
        self.successes: list[bool | None] = []
        self.jumps: list[tuple[int, int, str, float]] = []
        self.frozen = dict.fromkeys(self.cameras, 0)
        self._open()

    def _open(self) -> None:
        """The next episode: what is seen of it counts once it is kept."""
        self._fingerprints: dict[str, tuple[bytes, int]] = {}
        self._steps = 0
        self._last: np.ndarray | None = None
        self._open_jumps: list[tuple[int, int, str, float]] = []
        self._open_pictures = {name: ImageStatistics() for name in self.cameras}
        self._open_frozen = dict.fromkeys(self.cameras, 0)

    def frame(self, obs: dict[str, np.ndarray], action: np.ndarray) -> None:
        """One step of the open episode."""
        for name, statistics in self.numbers.items():
            statistics.add(action if name == "actions" else obs[name])
        for name, statistics in self._open_pictures.items():
            statistics.add(obs[name])
            self._look(name, obs[name])
        if self.limits is not None and self._last is not None:
            reach = self.limits[1] * self.layout.control_dt * 1.5 + 1e-3
            change = np.abs(action - self._last)
            for joint in np.flatnonzero(change > reach):
                name = self.layout.joint_names[joint]
                self._open_jumps.append(
                    (len(self.lengths), self._steps, name, float(change[joint]))
                )
        self._last = np.asarray(action, float)
        self._steps += 1

    def _look(self, name: str, pixels: np.ndarray) -> None:
        mark = pixels[::FINGERPRINT_STRIDE, ::FINGERPRINT_STRIDE].tobytes()
        before, count = self._fingerprints.get(name, (b"", 0))
        count = count + 1 if mark == before else 0
        self._open_frozen[name] += count == FROZEN_STEPS  # each stretch counts once
        self._fingerprints[name] = (mark, count)

    def end(self, keep: bool = True, success: bool | None = None) -> None:
        """The episode ended; one that is not kept leaves no trace."""
        if keep:
            self.lengths.append(self._steps)
            self.successes.append(success)
            self.jumps += self._open_jumps
            for name in self.cameras:
                self.pictures[name].merge(self._open_pictures[name])
                self.frozen[name] += self._open_frozen[name]
        else:
            for statistics in self.numbers.values():
                statistics.cut(sum(self.lengths))
        self._open()

    def summary(self) -> dict:
        """Statistics by field, and findings: what a person should look at."""
        statistics = {name: s.summary() for name, s in self.numbers.items()}
        statistics |= {name: p.summary() for name, p in self.pictures.items()}
        return {
            "episodes": len(self.lengths),
            "steps": int(sum(self.lengths)),
            "seconds": float(sum(self.lengths) * self.layout.control_dt),
            "lengths": self.lengths,
            "successes": sum(s is True for s in self.successes),
            "statistics": statistics,
            "coverage": self._coverage(),
            "findings": self._findings(),
        }

    def _coverage(self) -> dict[str, float]:
        """By joint: share of its range that lies between the 1 % and 99 % quantile of the actions."""
        values = self.numbers["actions"].values
        if self.limits is None or not len(values):
            return {}
        low, high = np.quantile(values, [0.01, 0.99], axis=0)
        span = self.limits[0][:, 1] - self.limits[0][:, 0]
        return dict(zip(self.layout.joint_names, ((high - low) / span).tolist(), strict=True))

    def _findings(self) -> list[dict]:
        found = []

        def say(level: str, what: str, detail: str) -> None:
            found.append({"level": level, "name": what, "detail": detail})

        if not self.lengths:
            say("error", "episodes", "none was kept")
            return found
        values = self.numbers["actions"].values
        for joint, name in enumerate(self.layout.joint_names):
            if values[:, joint].std() < DEAD_STD:
                say("warning", "dead joint", f"{name} is never commanded to move")
        for field, statistics in self.numbers.items():
            if field == "actions":
                continue
            still = statistics.values.std(axis=0) < DEAD_STD
            f = next(f for f in self.layout.observations if f.name == field)
            names = [e for e, dead in zip(f.elements, still, strict=True) if dead]
            if names:
                say("note", "constant input", f"{field}: {', '.join(names)}")
        for camera, count in self.frozen.items():
            if count:
                text = f"{camera}: {count} stretches of more than {FROZEN_STEPS} equal pictures"
                say("warning", "frozen camera", text)
        if self.jumps:
            episode, step, name, size = max(self.jumps, key=lambda j: j[3])
            text = f"{len(self.jumps)} faster than the limits allow; largest {size:.3f}"
            say(
                "warning", "jumps of the action", f"{text} ({name}, episode {episode}, step {step})"
            )
        outside = self._outside(values)
        if outside:
            say("warning", "actions outside limits", outside)
        median = float(np.median(self.lengths))
        odd = [i for i, n in enumerate(self.lengths) if n < median / 3 or n > median * 3]
        if odd:
            listed = ", ".join(map(str, odd[:8]))
            say(
                "note",
                "odd lengths",
                f"{len(odd)} episodes are far from the median of {median:.0f} steps: {listed}",
            )
        if len(self.lengths) < 10:
            say(
                "note",
                "few episodes",
                f"{len(self.lengths)}: nothing can be held out for validation",
            )
        if any(s is False for s in self.successes):
            failed = sum(s is False for s in self.successes)
            say(
                "warning",
                "failures",
                f"{failed} episodes are marked as failures (of a bag, --splitting.only-success leaves "
                "them out)",
            )
        return found or [{"level": "ok", "name": "nothing found", "detail": "no check objected"}]

    def _outside(self, values: np.ndarray) -> str:
        if self.limits is None:
            return ""
        low, high = self.limits[0].T
        bad = (values < low - 1e-4) | (values > high + 1e-4)
        names = [n for n, b in zip(self.layout.joint_names, bad.any(axis=0), strict=True) if b]
        return f"{bad.any(axis=1).mean():.2%} of the steps: {', '.join(names)}" if names else ""

    # --- for people ---

    def write_page(self, path: Path, title: str, subtitle: str, tables: Sequence = ()) -> None:
        """The health page."""
        summary = self.summary()
        sections = [
            report.Text(
                f"{summary['episodes']} episodes, {summary['steps']} steps, {summary['seconds']:.0f} s at "
                f"{1 / self.layout.control_dt:g} Hz. Task: {self.layout.task}. Robot: {self.layout.robot}."
            ),
            report.Table(
                "Findings",
                ["", "what", "detail"],
                [[f["level"], f["name"], f["detail"]] for f in summary["findings"]],
                marks=[f["level"] for f in summary["findings"]],
            ),
            *tables,
            self._length_figure(),
            self._range_figure(),
            *(
                self._statistics_table(n, s)
                for n, s in summary["statistics"].items()
                if n in self.numbers
            ),
            self._picture_table(summary["statistics"]),
        ]
        report.write(path, title, subtitle, sections)

    def _length_figure(self) -> report.Figure | None:
        if not self.lengths:
            return None
        figure = go.Figure().add_bar(y=self.lengths, name="steps")
        return report.Figure(
            "Episode lengths", report.layout(figure, "episode", "steps"), height=260
        )

    def _range_figure(self) -> report.Figure | None:
        values = self.numbers["actions"].values
        if not len(values):
            return None
        figure = go.Figure()
        thin = values[:: max(1, len(values) // 2000)]
        for joint, name in enumerate(self.layout.joint_names):
            column = thin[:, joint]
            if self.limits is not None:
                low, high = self.limits[0][joint]
                column = (column - low) / (high - low)
            figure.add_box(
                y=np.round(column, 4).tolist(), name=name.split("_")[-1], showlegend=False
            )
        y = "share of the joint's range" if self.limits is not None else "action"
        return report.Figure("Where the actions are", report.layout(figure, "", y))

    def _statistics_table(self, name: str, summary: dict) -> report.Table | None:
        if "mean" not in summary:
            return None
        if name == "actions":
            elements = self.layout.joint_names
        else:
            elements = next(f for f in self.layout.observations if f.name == name).elements
        header = ["", "mean", "std", "min", "q01", "q50", "q99", "max"]
        rows = [
            [element, *(f"{summary[k][i]:.4g}" for k in header[1:])]
            for i, element in enumerate(elements)
        ]
        return report.Table(name, header, rows)

    def _picture_table(self, statistics: dict) -> report.Table | None:
        rows = []
        for name in self.cameras:
            s = statistics[name]
            if "mean" in s:
                mean, std = (np.mean(s[k]) for k in ("mean", "std"))
                rows.append([name, f"{mean:.3f}", f"{std:.3f}", str(self.frozen[name])])
        header = ["camera", "mean brightness", "std", "frozen stretches"]
        return report.Table("Cameras", header, rows) if rows else None


def of_demonstrations(demos: Demonstrations, robot: Robot | None) -> Health:
    """Of a data set in memory."""
    health = Health(demos.layout, robot)
    for episode in demos.episodes:
        for t in range(len(episode.actions)):
            health.frame({k: v[t] for k, v in episode.obs.items()}, episode.actions[t])
        health.end(success=episode.succeeded)
    return health

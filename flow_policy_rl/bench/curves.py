"""Learning curves: runs become a mean and what it lies between, and a picture in plain SVG that Markdown can show."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from xml.sax.saxutils import escape

import numpy as np

from flow_policy_rl.bench.seeds import between, mean
from flow_policy_rl.report import COLORS

Run = list[tuple[float, float]]  # (env steps or seconds, metric), in order


@dataclass(frozen=True)
class Curve:
    """Mean of a metric over seeds, its range or interval (`bench/seeds.py`), and how many they are; (n,) each."""

    task: str
    label: str
    axis: str
    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    seeds: np.ndarray

    def rows(self) -> list[dict]:
        """One per point."""
        return [
            {
                "task": self.task,
                "algorithm": self.label,
                "axis": self.axis,
                "x": float(x),
                "mean": float(m),
                "low": float(low),
                "high": float(high),
                "seeds": int(seeds),
            }
            for x, m, low, high, seeds in zip(
                self.x, self.mean, self.low, self.high, self.seeds, strict=True
            )
        ]


def mean_curve(
    task: str, label: str, axis: str, runs: Sequence[Run], diverged: Sequence[bool] = ()
) -> Curve:
    """Mean of runs, and what it lies between, wherever one of them was looked at, as far as all go.

    Args:
        diverged: which runs ended early: they cut no other short, and count as far as they go (default: none).
    """
    whole = [run for run, early in zip_longest(runs, diverged) if run and not early]
    runs = [run for run in runs if run]
    if not runs:
        return Curve(task, label, axis, *np.zeros((5, 0)))
    first = max(run[0][0] for run in runs)
    last = min(run[-1][0] for run in whole) if whole else max(run[-1][0] for run in runs)
    seen = np.unique([x for run in runs for x, _ in run])
    x = seen[(first <= seen) & (seen <= last)] if last > first else np.array([last])
    values = np.stack([np.interp(x, *np.array(run).T, right=np.nan) for run in runs], 1)
    looks = [look[np.isfinite(look)] for look in values]  # n of (seeds that go as far,)
    means, spans = [look.mean() for look in looks], [between(look, mean) for look in looks]
    low, high = np.transpose(spans)
    return Curve(task, label, axis, x, np.array(means), low, high, np.array([*map(len, looks)]))


WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 560, 340, 56, 40, 28, 150


def draw(
    curves: Sequence[Curve],
    title: str,
    x_label: str,
    y_label: str,
    x_ticks: Mapping[float, str] | None = None,
) -> str:
    """An SVG: lines, what they lie between as bands, axes, a legend.

    Args:
        x_ticks: place -> label, where round numbers do not do.
    """
    shown = [c for c in curves if len(c.x)]
    if not shown:
        return f'<svg xmlns="http://www.w3.org/2000/svg"><title>{escape(title)}</title></svg>'
    x_low, x_high = span(np.concatenate([c.x for c in shown]))
    y_low, y_high = span(np.concatenate([[*c.low, *c.high] for c in shown]))
    plot_w, plot_h = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    legend = 30 + 6 * max(len(c.label) for c in shown)  # at font size 11, on the safe side
    width = LEFT + plot_w + max(RIGHT, legend)

    def at(x: float, y: float) -> str:
        across = LEFT + plot_w * (x - x_low) / (x_high - x_low)
        return f"{across:.1f},{TOP + plot_h * (1 - (y - y_low) / (y_high - y_low)):.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT}" width="{width}" height="{HEIGHT}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="16" font-size="13">{escape(title)}: {escape(y_label)}</text>',
        f'<text x="{LEFT + plot_w / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>',
    ]
    for y in round_ticks(y_low, y_high):
        left, right = at(x_low, y), at(x_high, y)
        row = left.split(",")[1]
        parts += [
            f'<polyline points="{left} {right}" stroke="#ddd" fill="none"/>',
            f'<text x="{LEFT - 6}" y="{row}" dy="4" text-anchor="end">{short(y)}</text>',
        ]
    places = x_ticks or {x: short(x) for x in round_ticks(x_low, x_high)}
    for x, label in places.items():
        column = at(x, y_low).split(",")[0]
        parts.append(
            f'<text x="{column}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{label}</text>'
        )
    for i, curve in enumerate(shown):
        color = COLORS[i % len(COLORS)]
        stroke = f'stroke="{color}" fill="none"'
        if i >= len(COLORS):
            stroke += ' stroke-dasharray="5 2"'
        there = [at(x, y) for x, y in zip(curve.x, curve.high, strict=True)]
        back = [at(x, y) for x, y in zip(curve.x[::-1], curve.low[::-1], strict=True)]
        line = [at(x, y) for x, y in zip(curve.x, curve.mean, strict=True)]
        row = TOP + 14 * (i + 1)
        parts += [
            f'<polygon points="{" ".join(there + back)}" fill="{color}" opacity="0.15"/>',
            f'<polyline points="{" ".join(line)}" {stroke} stroke-width="1.8"/>',
            f'<path d="M {WIDTH - RIGHT + 10} {row - 3} h 12" {stroke} stroke-width="3"/>',
            f'<text x="{WIDTH - RIGHT + 26}" y="{row}">{escape(curve.label)}</text>',
        ]
    return "\n".join([*parts, "</svg>\n"])


def span(values: np.ndarray) -> tuple[float, float]:
    """Smallest and largest, never the same."""
    low, high = float(values.min()), float(values.max())
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def round_ticks(low: float, high: float) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten between two values: three to eight of them."""
    power = 10 ** math.floor(math.log10((high - low) / 3))
    step = max(factor * power for factor in (1, 2, 5) if factor * power <= (high - low) / 3)
    return [step * k for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def short(value: float) -> str:
    """1,200,000 -> 1.2M."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"

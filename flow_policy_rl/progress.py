"""Progress of long work, on standard error: on a terminal a bar with rate and time left, under a live table of the
metrics where there are any; plain lines elsewhere.
"""

import sys
import time
from collections.abc import Mapping

LINE_EVERY_S = 10.0
SPARKS = "▁▂▃▄▅▆▇█"
SPARK_POINTS = 24  # latest values that a spark line shows


class Progress:
    """`with Progress("train", total=100, unit="it") as progress: progress.update(1, "success 60 %")`.

    Args:
        done: of the total before this began, of work that goes on; it says nothing about the pace.
    """

    def __init__(
        self, label: str, total: int, unit: str = "it", quiet: bool = False, done: int = 0
    ):
        self._label, self._total, self._unit = label, total, unit
        self._screen = (
            Screen(label, total, unit, done) if sys.stderr.isatty() and not quiet else None
        )
        self._before, self._done, self._note, self._quiet = done, done, "", quiet
        self._start = self._last_line = time.monotonic()

    def update(self, count: int = 1, note: str = "", metrics: Mapping[str, float] = {}) -> None:
        """`count` more are done; `note` is shown beside the bar until the next one, `metrics` in the table."""
        self._done += count
        self._note = note or self._note
        if self._screen is not None:
            self._screen.update(self._done, self._note, metrics)
        elif not self._quiet and time.monotonic() - self._last_line >= LINE_EVERY_S:
            self._line()

    def reach(self, done: int, note: str = "", metrics: Mapping[str, float] = {}) -> None:
        """`done` are done in all."""
        self.update(done - self._done, note, metrics)

    def _line(self) -> None:
        self._last_line = time.monotonic()
        spent = self._last_line - self._start
        print(
            f"{self._label}: {self._done}/{self._total} {self._unit}, "
            + pace(self._done - self._before, self._total - self._before, spent)
            + (f", {self._note}" if self._note else ""),
            file=sys.stderr,
            flush=True,
        )

    def __enter__(self) -> "Progress":
        if self._screen is not None:
            self._screen.start()
        return self

    def __exit__(self, *exc) -> None:
        if self._screen is not None:
            self._screen.stop()


def pace(done: int, total: int, spent_s: float) -> str:
    """How fast it goes and how long it will take: what is done in a second, or how long one takes; how long it has
    gone on while nothing is done."""
    if done == 0:
        return f"after {spent_s:.0f} s"
    each = spent_s / done
    speed = f"{each:.0f} s each" if each >= 10 else f"{1 / max(each, 1e-9):.1f}/s"
    left = max(each * (total - done), 0.0)
    return f"{speed}, {left:.0f} s left" if left < 600 else f"{speed}, {left / 60:.0f} min left"


class Screen:
    """What a terminal shows while work goes on; the bar goes away at the end, the table stays."""

    def __init__(self, label: str, total: int, unit: str, done: int = 0, console=None):
        from rich import progress
        from rich.console import Console
        from rich.live import Live

        self._bar = progress.Progress(
            progress.TextColumn("[bold]{task.description}"),
            progress.BarColumn(),
            progress.TextColumn(f"{{task.completed:.0f}}/{{task.total:.0f}} {unit}"),
            progress.TimeElapsedColumn(),
            progress.TextColumn("left"),
            progress.TimeRemainingColumn(),
        )
        self._task = self._bar.add_task(label, total=total, completed=done)
        self._note = ""
        self._history: dict[str, list[float]] = {}
        self._over = False
        console = console or Console(stderr=True)
        self._live = Live(get_renderable=self._render, console=console, refresh_per_second=4)

    def start(self) -> None:
        """Begin to draw."""
        self._live.start()

    def stop(self) -> None:
        """Leave the table behind."""
        self._over = True
        self._live.stop()

    def update(self, done: int, note: str, metrics: Mapping[str, float]) -> None:
        """Take in the latest numbers."""
        self._bar.update(self._task, completed=done)
        self._note = note
        for name, value in metrics.items():
            self._history.setdefault(name, []).append(value)

    def _render(self):
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        parts = [] if self._over else [self._bar]
        if self._note and not self._over:
            parts.append(Text(self._note, style="dim", no_wrap=True, overflow="ellipsis"))
        if self._history:
            table = Table(box=None, pad_edge=False, header_style="dim")
            for column in ("metric", "now", "lowest", "highest"):
                table.add_column(column, justify="left" if column == "metric" else "right")
            table.add_column(f"last {SPARK_POINTS}")
            for name, values in sorted(self._history.items()):
                numbers = (f"{v:.4g}" for v in (values[-1], min(values), max(values)))
                table.add_row(Text(name), *numbers, spark_line(values[-SPARK_POINTS:]))
            parts.insert(0, table)
        return Group(*parts)


def spark_line(values: list[float]) -> str:
    """Values as a row of little bars, the lowest one empty and the highest full."""
    low, high = min(values), max(values)
    scale = (len(SPARKS) - 1) / (high - low) if high > low else 0.0
    return "".join(SPARKS[round((v - low) * scale)] for v in values)

"""Progress of long work: a bar with rate and time left on a terminal, plain lines elsewhere. Always
on standard error."""

import sys
import time

from tqdm import tqdm

LINE_EVERY_S = 10.0


class Progress:
    """`with Progress("train", total=100, unit="it") as progress: progress.update(1, "success 60 %")`."""

    def __init__(self, label: str, total: int, unit: str = "it", quiet: bool = False):
        self._label, self._total, self._unit = label, total, unit
        self._bar = (
            tqdm(total=total, desc=label, unit=unit, leave=False)
            if sys.stderr.isatty() and not quiet
            else None
        )
        self._done, self._note, self._quiet = 0, "", quiet
        self._start = self._last_line = time.monotonic()

    def update(self, count: int = 1, note: str = "") -> None:
        """`count` more are done; `note` is shown beside the bar until the next one."""
        self._done += count
        self._note = note or self._note
        if self._bar is not None:
            self._bar.set_postfix_str(self._note, refresh=False)
            self._bar.update(count)
        elif not self._quiet and time.monotonic() - self._last_line >= LINE_EVERY_S:
            self._line()

    def reach(self, done: int, note: str = "") -> None:
        """`done` are done in all."""
        self.update(done - self._done, note)

    def _line(self) -> None:
        self._last_line = time.monotonic()
        spent = self._last_line - self._start
        left = spent / max(self._done, 1) * (self._total - self._done)
        rate = self._done / max(spent, 1e-9)
        print(
            f"{self._label}: {self._done}/{self._total} {self._unit}, {rate:.1f}/s, {left:.0f} s left"
            + (f", {self._note}" if self._note else ""),
            file=sys.stderr,
            flush=True,
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc) -> None:
        if self._bar is not None:
            self._bar.close()

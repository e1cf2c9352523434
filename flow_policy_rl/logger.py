"""A run's numbers: `metrics.csv` always, TensorBoard events where it is installed, trackers where asked for."""

import csv
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from flow_policy_rl.errors import InputError

Tracker = Literal["wandb", "trackio"]  # modules with the same init, log and finish
PROJECT = "flow_policy_rl"


class RunLogger:
    """One row per call. New names become new columns; the file is whole after every call.

    Args:
        resume_from: keep the rows up to this step of a run that goes on; 0 begins a new file.
        trackers: what else the numbers go to.
        settings: of the run, for the trackers.

    Raises:
        InputError: a tracker that is not installed.
    """

    def __init__(
        self,
        run_dir: Path,
        resume_from: int = 0,
        trackers: Sequence[Tracker] = (),
        settings: Mapping = {},
    ):
        self._trackers = [start_tracker(name, run_dir, settings) for name in trackers]
        run_dir.mkdir(parents=True, exist_ok=True)
        self._path = run_dir / "metrics.csv"
        self._rows: list[dict[str, float]] = []
        self._columns: list[str] = ["step"]
        if resume_from and self._path.is_file():
            rows = read_metrics(self._path)
            self._rows = [
                row | {"step": int(row["step"])} for row in rows if row["step"] <= resume_from
            ]
            self._columns += [
                name for name in {k: 0 for row in rows for k in row} if name != "step"
            ]
            self._write("w", self._rows)
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self._events = None
        else:
            # What another process logged beyond this step is not shown.
            events = str(run_dir / "tensorboard")
            self._events = SummaryWriter(events, purge_step=resume_from + 1)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record metrics of a step."""
        row = {"step": step, **metrics}
        new = [name for name in row if name not in self._columns]
        self._columns += new
        self._rows.append(row)
        self._write("w" if new else "a", self._rows if new else [row])
        if self._events is not None:
            for name, value in metrics.items():
                self._events.add_scalar(name, value, step)
        for tracker in self._trackers:
            tracker.log(dict(metrics), step=step)

    def _write(self, mode: str, rows: list[dict[str, float]]) -> None:
        whole = mode == "w"
        path = self._path.with_suffix(".partial") if whole else self._path
        with path.open(mode, newline="") as file:
            writer = csv.DictWriter(file, self._columns, restval="")
            if whole:
                writer.writeheader()
            writer.writerows(rows)
        if whole:  # a kill on the way leaves the old one
            path.rename(self._path)

    def close(self) -> None:
        """Flush the event file, and tell the trackers that this is all."""
        if self._events is not None:
            self._events.close()
        for tracker in self._trackers:
            tracker.finish()


def start_tracker(name: Tracker, run_dir: Path, settings: Mapping):
    """Begin a run in Weights & Biases or trackio, named like its folder; returns the module."""
    try:
        tracker = importlib.import_module(name)
    except ModuleNotFoundError:
        raise InputError(
            f"--track {name}: not installed; pip install 'flow_policy_rl[{name}]'"
        ) from None
    tracker.init(project=PROJECT, name=str(run_dir), config=dict(settings))
    return tracker


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Rows of a `metrics.csv`, without the empty cells, and without a last row that is still being written.

    Raises:
        InputError: something in it is not a number.
    """
    with path.open(newline="") as file:
        whole = [line for line in file if line.endswith("\n")]
    try:
        return [
            {name: float(cell) for name, cell in row.items() if cell}
            for row in csv.DictReader(whole)
        ]
    except (ValueError, TypeError) as error:  # TypeError: a row with more cells than columns
        raise InputError(f"metrics '{path}' cannot be read: {error}") from None

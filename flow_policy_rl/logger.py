"""A run's numbers: `metrics.csv` always, TensorBoard events where TensorBoard is installed."""

import csv
from pathlib import Path


class RunLogger:
    """One row per call. New names become new columns; the file is whole after every call.

    Args:
        resume_from: keep the rows up to this step of a run that goes on; 0 begins a new file.
    """

    def __init__(self, run_dir: Path, resume_from: int = 0):
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
            self._events = SummaryWriter(str(run_dir / "tensorboard"))

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

    def _write(self, mode: str, rows: list[dict[str, float]]) -> None:
        with self._path.open(mode, newline="") as file:
            writer = csv.DictWriter(file, self._columns, restval="")
            if mode == "w":
                writer.writeheader()
            writer.writerows(rows)

    def close(self) -> None:
        """Flush the event file."""
        if self._events is not None:
            self._events.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Rows of a `metrics.csv`, without the empty cells."""
    with path.open(newline="") as file:
        return [
            {name: float(cell) for name, cell in row.items() if cell}
            for row in csv.DictReader(file)
        ]

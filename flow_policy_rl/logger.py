"""A run's numbers: `metrics.csv` always, TensorBoard events where TensorBoard is installed."""

import csv
from pathlib import Path


class RunLogger:
    """One row per call. New names become new columns; the file is whole after every call."""

    def __init__(self, run_dir: Path):
        run_dir.mkdir(parents=True, exist_ok=True)
        self._path = run_dir / "metrics.csv"
        self._rows: list[dict[str, float]] = []
        self._columns: list[str] = ["step"]
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
        with self._path.open("w" if new else "a", newline="") as file:
            writer = csv.DictWriter(file, self._columns, restval="")
            if new:
                writer.writeheader()
                writer.writerows(self._rows)
            else:
                writer.writerow(row)
        if self._events is not None:
            for name, value in metrics.items():
                self._events.add_scalar(name, value, step)

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

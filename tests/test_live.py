"""What a person sees while work goes on, and where the numbers go."""

import csv
import io
import os
import pty
import re
import subprocess
import sys
import types

import pytest
from rich.console import Console

from flow_policy_rl import cli
from flow_policy_rl.errors import InputError
from flow_policy_rl.logger import RunLogger, start_tracker
from flow_policy_rl.progress import Progress, Screen, pace, spark_line

WORK = """
import time
from flow_policy_rl.progress import Progress
with Progress("train toy", 3, "it") as progress:
    for i in range(3):
        time.sleep(0.3)
        progress.update(1, f"note {i}", {"train/loss": 1 / (i + 1), "eval/[success]": i / 2})
print("end")
"""


def on_a_terminal(code: str) -> str:
    """What a program writes to a terminal of its own."""
    terminal, inside = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=inside,
        stdout=inside,
        stderr=inside,
        close_fds=True,
        env=os.environ | {"TERM": "xterm-256color", "COLUMNS": "120"},
    )
    os.close(inside)
    written = b""
    while True:
        try:
            part = os.read(terminal, 65536)
        except OSError:  # the other side is closed
            break
        if not part:
            break
        written += part
    os.close(terminal)
    assert child.wait() == 0
    return written.decode()


def test_a_terminal_shows_a_bar_under_a_table_of_metrics():
    written = on_a_terminal(WORK)
    for word in ("train toy", "/3 it", "note", "train/loss", "eval/[success]", "highest", "\x1b["):
        assert word in written
    last = written.rpartition("metric")[2]
    assert "0.3333" in last
    assert "/3 it" not in last  # the bar is gone, the table stays


def test_elsewhere_there_are_plain_lines(capsys, monkeypatch):
    monkeypatch.setattr("flow_policy_rl.progress.LINE_EVERY_S", 0.0)
    with Progress("train", 2) as progress:
        progress.update(1, "note", {"loss": 1.0})
    out, err = capsys.readouterr()
    assert (out, "\x1b" in err) == ("", False)
    assert err.startswith("train: 1/2 it, ")
    assert err.endswith("s left, note\n")


def test_work_that_goes_on_says_its_own_pace(capsys, monkeypatch):
    """98 of 100 were there; the next one takes ten seconds, and so will the last."""
    clock = iter([0.0, 10.0, 10.0])
    monkeypatch.setattr("flow_policy_rl.progress.time.monotonic", lambda: next(clock))
    with Progress("train", 100, done=98) as progress:
        progress.update(1)
    assert capsys.readouterr().err == "train: 99/100 it, 10 s each, 10 s left\n"


def test_the_pace_is_told_in_the_unit_that_fits():
    assert pace(50, 100, 5.0) == "10.0/s, 5 s left"
    assert pace(2, 12, 240.0) == "120 s each, 20 min left"
    assert pace(128, 100, 64.0) == "2.0/s, 0 s left"  # more than asked for came back


def test_the_table_has_the_latest_and_the_extremes():
    text = io.StringIO()
    screen = Screen("x", 4, "it", console=Console(file=text, force_terminal=True, width=100))
    screen.start()
    for value in (2.0, 5.0, 1.0, 3.0):
        screen.update(1, "", {"loss": value})
    screen.stop()
    row = text.getvalue().rpartition("loss")[2].split()
    assert row[:3] == ["3", "1", "5"]


def test_spark_line():
    assert spark_line([0.0, 7.0, 3.5]) == "▁█▅"
    assert spark_line([2.0, 2.0]) == "▁▁"


@pytest.fixture
def tracker(monkeypatch):
    """A module that stands for wandb and notes what it is told."""
    calls = []
    module = types.ModuleType("wandb")
    module.init = lambda **given: calls.append(("init", given))
    module.log = lambda metrics, step: calls.append(("log", step, metrics))
    module.finish = lambda: calls.append(("finish",))
    monkeypatch.setitem(sys.modules, "wandb", module)
    return calls


def test_a_tracker_gets_settings_every_metric_and_the_end(tracker, tmp_path):
    logger = RunLogger(tmp_path, trackers=("wandb",), settings={"seed": 3})
    logger.log(1, {"loss": 0.5})
    logger.close()
    assert tracker[0][1] == {
        "project": "flow_policy_rl",
        "name": str(tmp_path),
        "config": {"seed": 3},
    }
    assert tracker[1:] == [("log", 1, {"loss": 0.5}), ("finish",)]
    with (tmp_path / "metrics.csv").open() as file:
        assert list(csv.DictReader(file)) == [{"step": "1", "loss": "0.5"}]


def test_a_tracker_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(InputError, match=r"--track trackio: not installed; pip install"):
        start_tracker("trackio", tmp_path, {})


def test_only_known_trackers(capsys):
    line = "train bc --task lift --demos x.hdf5 --track wanb"
    assert cli.main(line.split()) == 2
    assert "did you mean 'wandb'" in capsys.readouterr().err


def test_foxglove_layout_shows_topics_that_exist():
    """Every topic in it is one that a node publishes or a robot file names; every panel is placed."""
    import json

    from toys import ROOT

    package = ROOT / "ros_ws/src/flow_policy_ros/flow_policy_ros"
    layout = json.loads((package / "config/foxglove.json").read_text())
    words = json.dumps(layout["configById"])
    topics = {t for t in re.findall(r'"(/[a-z_/]+)', words)}
    sources = "".join(p.read_text() for p in [*package.glob("*.py"), ROOT / "robots/panda.yaml"])
    for topic in topics:
        node, _, own = topic[1:].partition("/")
        assert topic in sources or (
            (package / f"{node}.py").is_file() and f'"~/{own}"' in sources
        ), topic
    placed = set(re.findall(r'"([A-Za-z]+![a-z]+)"', json.dumps(layout["layout"])))
    assert placed == set(layout["configById"])


def test_the_viewer_says_that_it_needs_a_display(monkeypatch):
    from sim import viewer
    from sim.errors import SimulationError

    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SimulationError, match="no display to open a window on"):
        viewer.show(None, None)

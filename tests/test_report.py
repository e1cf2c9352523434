"""Reports in a real browser: nothing asked of the network, no error, plots drawn, films playing, phones and paper."""

import json

import numpy as np
import plotly.graph_objects as go
import pytest
from browser import CHROMIUM, Browser
from hypothesis import given
from hypothesis import strategies as st

from flow_policy_rl import cli, report, run_report
from flow_policy_rl.logger import RunLogger, read_metrics

EVIL = "<script>document.title = 'hacked'</script>"
DRAWN = "document.querySelectorAll('.plot .main-svg').length >= 2 * document.querySelectorAll('.plot').length"


@pytest.fixture(scope="module")
def browser():
    """One for all tests."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    browser = Browser()
    yield browser
    browser.close()


def make_run(folder, seed: int = 0, rate: float = 0.5, **settings) -> None:
    """A run folder as `flow-policy train` leaves it, with invented numbers."""
    logger = RunLogger(folder)
    for step in range(1, 21):
        metrics = {
            "rollout/success_rate": rate * step / 20,
            "train/policy_loss": 1 / step,
            "time/env_steps": 1000 * step,
            "time/wall_s": 2.0 * step,
        }
        if step % 5 == 0:
            metrics["eval/success_rate"] = rate
        logger.log(step, metrics)
    logger.close()
    config = {
        "task": "lift",
        "seed": seed,
        "run_dir": str(folder),
        "ppo": {"clip_range": 0.2},
        **settings,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "environment.json").write_text(json.dumps({"command": f"train {EVIL}"}))


@given(st.integers(1, 200))
def test_a_row_that_is_still_being_written_is_not_read(tmp_path_factory, cut):
    """A number cut short would be another number."""
    folder = tmp_path_factory.mktemp("run")
    make_run(folder)
    file = folder / "metrics.csv"
    whole, before = file.read_bytes(), read_metrics(file)
    file.write_bytes(whole[:-cut])
    rows = read_metrics(file)
    assert rows == before[: len(rows)]
    assert len(rows) == whole[:-cut].count(b"\n") - 1


@pytest.fixture(scope="module")
def every_part(tmp_path_factory):
    """A page with every kind of section, and an attack in every string."""
    path = tmp_path_factory.mktemp("page") / "page.html"
    frames = [np.full((64, 96, 3), 10 * i, np.uint8) for i in range(20)]
    wide = report.layout(go.Figure().add_scatter(x=[1, 2], y=[3, 4], name=EVIL), "x", "y")
    menu = {"buttons": [{"label": EVIL, "method": "update", "args": [{"visible": [True]}]}]}
    chosen = go.Figure(wide).update_layout(updatemenus=[menu])
    cells = [[EVIL, "1.5", "x" * 90], ["b", "2.25", "y"]]
    sections = [
        None,
        report.Text(EVIL),
        report.Tiles([("99.9%", EVIL, "note")] * 5),
        report.Table(EVIL, ["name", "number", "long"], cells, strong=1, marks=["error"]),
        report.Figure(EVIL, chosen, "caption"),
        report.Figures("small", [report.Figure(EVIL, wide, height=200)] * 4, "all", [EVIL, "b"]),
        report.Films("films", [report.Film(report.encode_film(frames, 20), EVIL)]),
        report.Code("code", EVIL + "z" * 300),
        report.Code("folded", EVIL, folded=True),
    ]
    report.write(path, EVIL, EVIL, sections)
    return path


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_every_part_of_a_page_works_and_is_text_not_code(browser, every_part, dark):
    browser.open(every_part, dark=dark)
    browser.wait(DRAWN)
    assert browser.problems == []
    assert browser.requests == []
    assert browser.value("document.title") == EVIL
    assert browser.value("document.querySelector('h1').textContent") == EVIL
    assert (
        browser.value("document.querySelectorAll('script').length") == 2 + 5
    )  # plotly, ours, data of five plots
    browser.wait("document.querySelector('video').currentTime > 0.2")
    assert browser.value("document.querySelector('video').videoWidth") == 96
    ink = browser.value("getComputedStyle(document.body).color")
    paper = browser.value("getComputedStyle(document.body).backgroundColor")
    light = [sum(map(int, c[c.index("(") + 1 : -1].split(",")[:3])) for c in (ink, paper)]
    assert (light[0] > light[1]) == dark
    tick = browser.value("getComputedStyle(document.querySelector('.xtick text')).fill")
    assert tick == ink


@pytest.mark.parametrize("width", [390, 768, 1280])
def test_no_horizontal_scroll(browser, every_part, width):
    browser.open(every_part, width=width)
    browser.wait(DRAWN)
    assert browser.value("document.documentElement.scrollWidth <= innerWidth")
    over = "e => e.getBoundingClientRect().right > innerWidth"
    assert (
        browser.value(f"[...document.querySelectorAll('.plot, video, pre')].filter({over}).length")
        == 0
    )


def test_words_in_tables_are_not_broken_to_fit_a_phone(browser, tmp_path):
    """A wide table scrolls in its own box; its cells stay readable."""
    cells = [["fine-tuned, over ROS 2", "95.0%", "91.0% to 97.3%", "200", "17", "1,000,000"]]
    header = ["policy", "success", "95 % interval", "episodes", "seed", "control steps"]
    report.write(tmp_path / "page.html", "t", "s", [report.Table("Success", header, cells)])
    browser.open(tmp_path / "page.html", width=390)
    assert browser.value("document.querySelector('td').offsetWidth") > 60
    assert browser.value("document.documentElement.scrollWidth <= innerWidth")


def test_numbers_are_flush_right_and_words_are_not(tmp_path):
    table = report.Table("t", ["joint", "error", "why"], [["1", "0.5", "a"], ["b", "-2 %", "3 b"]])
    assert table.numeric == [False, True, False]


def test_printed_on_light_paper(browser, every_part):
    browser.open(every_part, dark=True)
    browser.wait(DRAWN)
    pdf = browser.pdf()
    assert pdf.startswith(b"%PDF")
    browser.call("Emulation.setEmulatedMedia", media="print")
    assert browser.value("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    browser.call("Emulation.setEmulatedMedia", media="")


def test_page_of_a_run_and_of_several(browser, tmp_path, capsys):
    make_run(tmp_path / "a" / "s0", 0, 0.6)
    make_run(tmp_path / "a" / "s1", 1, 0.8)
    make_run(tmp_path / "b", 0, 0.9, ppo={"clip_range": EVIL})
    result = {
        "success_rate": 0.9,
        "success_ci95": [0.8, 0.95],
        "return_std": 0.1,
        "return_mean": 0.9,
    }
    result |= {"episodes": 50, "steps_mean": 60.0, "seed": 1}
    (tmp_path / "b" / "evaluation.json").write_text(json.dumps(result))
    folders = [str(tmp_path / name) for name in ("a/s0", "a/s1", "b")]
    assert cli.main(["report", "--run-dir", folders[2], "--json"]) == 0
    page = json.loads(capsys.readouterr().out)["report"]
    out = tmp_path / "all.html"
    assert cli.main(["report", "--run-dir", *folders, "--out", str(out), "--json"]) == 0
    for path in (page, out):
        browser.open(tmp_path / path)
        browser.wait(DRAWN)
        assert (browser.problems, browser.requests) == ([], [])
        assert browser.value("document.documentElement.scrollWidth <= innerWidth")
    words = browser.value("document.body.innerText")
    assert "a/s0 and 1 more" in words  # two seeds of one setting
    assert "90.0%" in words
    assert EVIL in words


def test_repetitions_are_runs_that_differ_in_their_seed_alone(tmp_path):
    make_run(tmp_path / "a", 0)
    make_run(tmp_path / "b", 1)
    make_run(tmp_path / "c", 0, ppo={"clip_range": 0.1})
    make_run(tmp_path / "d", 0, checkpoint="other")  # the same seed: not a repetition of a
    runs = [run_report.read_run(tmp_path / name) for name in "abcd"]
    groups = [[r.name[-1] for r in group] for group in run_report.repetitions(runs[:3])]
    assert groups == [["a", "b"], ["c"]]
    assert [len(g) for g in run_report.repetitions([runs[0], runs[3]])] == [1, 1]
    x, low, mean, high = run_report.band([([1, 2], [0.0, 4.0]), ([1, 2, 3], [2.0, 0.0, 9.0])])
    assert (x, low, mean, high) == ([1, 2], [0.0, 0.0], [1.0, 2.0], [2.0, 4.0])


@pytest.mark.slow
def test_page_of_an_evaluation(browser, tmp_path, capsys):
    """Real episodes, real films."""
    pytest.importorskip("mujoco")
    from toys import untrained_policy

    from flow_policy_rl import checkpoint
    from sim.tasks import make_task

    task = make_task("lift")
    checkpoint.save(tmp_path / "p.safetensors", untrained_policy(task))
    out = tmp_path / "eval"
    line = f"eval --policy {tmp_path}/p.safetensors --episodes 3 --out {out} --json"
    assert cli.main(line.split()) == 0
    result = json.loads(capsys.readouterr().out)
    assert len((out / "episodes.csv").read_text().splitlines()) == 4
    browser.open(out / "report.html", width=390)
    browser.wait(DRAWN)
    assert (browser.problems, browser.requests) == ([], [])
    assert browser.value("document.documentElement.scrollWidth <= innerWidth")
    assert result["report"] == str(out / "report.html")
    if browser.value("document.querySelectorAll('video').length"):
        browser.wait("document.querySelector('video').currentTime > 0.2")


def test_a_curve_without_evaluation_is_not_called_one():
    """Under --eval-every 0 the only curve is that of the exploring policy, and it is named, though alone."""
    rows = [{"time/env_steps": k, "rollout/success_rate": 0.5} for k in (100.0, 200.0)]
    alone = report.learning_figure(rows)
    assert alone.caption.startswith(
        "Nothing was evaluated: these are the episodes of the roll-outs"
    )
    assert alone.figure.layout.showlegend
    both = report.learning_figure([*rows, {"time/env_steps": 200.0, "eval/success_rate": 0.7}])
    assert both.caption == "Evaluation is on fixed episodes, without exploration."

"""The page of a study: its arithmetic, its curves, and what it says of the cells."""

import csv
import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

from flow_policy_rl.bench import learn, learn_page
from flow_policy_rl.bench.curves import draw, mean_curve, round_ticks
from flow_policy_rl.bench.seeds import between, interquartile_mean
from flow_policy_rl.bench.studies import STUDIES


def test_interquartile_mean():
    assert interquartile_mean(np.array([0.0, 1, 2, 3, 4, 5, 6, 100])) == 3.5
    assert interquartile_mean(np.array([1.0, 5.0, 6.0])) == 4.0


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (3880, 5680), (245_760, 2e6), (-0.5, 0.5), (7e-4, 8e-4)]
)
def test_ticks_are_round_and_inside(low, high):
    ticks = np.array(round_ticks(low, high))
    assert 3 <= len(ticks) <= 8
    assert ticks.min() >= low
    assert ticks.max() <= high * (1 + 1e-9)
    step = ticks[1] - ticks[0]
    assert np.allclose(np.diff(ticks), step)
    assert np.isclose(step / 10 ** np.floor(np.log10(step * 1.001)), [1, 2, 5]).any()
    assert np.allclose(ticks / step, np.round(ticks / step))


def test_curves_are_means_at_every_look_between_the_lowest_and_the_highest_seed():
    runs = [[(0, 0.0), (10, 1.0)], [(2, 0.0), (8, 0.6), (12, 1.0)]]
    curve = mean_curve("lift", "rldt", "env_steps", runs)
    assert curve.x.tolist() == [2, 8, 10]
    assert curve.mean == pytest.approx([(0.2 + 0) / 2, (0.8 + 0.6) / 2, (1 + 0.8) / 2])
    assert curve.low == pytest.approx([0, 0.6, 0.8])
    assert curve.high == pytest.approx([0.2, 0.8, 1])
    picture = draw([curve], "a < b", "steps", "success")
    assert picture.startswith("<svg")
    assert "a &lt; b" in picture
    import xml.etree.ElementTree as ElementTree

    ElementTree.fromstring(picture)
    assert draw([mean_curve("t", "l", "a", [])], "t", "x", "y").startswith("<svg")


def test_a_seed_that_diverged_ends_its_own_curve_only():
    whole, early = [(0, 0.0), (4, 0.4), (10, 1.0)], [(0, 0.2), (4, 0.8)]
    curve = mean_curve("lift", "rldt", "env_steps", [whole, early], [False, True])
    assert curve.x.tolist() == [0, 4, 10]
    assert curve.mean == pytest.approx([0.1, 0.6, 1.0])
    assert [point["seeds"] for point in curve.rows()] == [2, 2, 1]
    both = mean_curve("lift", "rldt", "env_steps", [whole, early], [True, True])
    assert both.rows() == curve.rows()
    # One that took longer ends nothing early: seconds of seeds differ, and none of them is missing a part.
    assert mean_curve("lift", "rldt", "wall_s", [whole, early]).x.tolist() == [0, 4]


def test_more_curves_than_colours_are_drawn_by_algorithm(tmp_path):
    """Each curve once, in the line of its key, and no two lines alike."""
    labels = [
        f"{a}{v}" for a in ("rldt", "fpo") for v in ("", *(f", change {i}" for i in range(8)))
    ]
    curves = [mean_curve("lift", n, "env_steps", [[(0, 0.0), (9, 1.0)]]) for n in labels]
    pictures = learn_page.write_pictures(tmp_path, STUDIES["ablations"], curves)
    assert [p.name for p in pictures] == [f"curve_lift_{a}_env_steps.svg" for a in ("rldt", "fpo")]
    drawn = [p.read_text() for p in pictures]
    assert all(sum(f">{n}</text>" in text for text in drawn) == 1 for n in labels)
    for text in drawn:
        lines = re.findall(r'<(polyline|path) [^>]*(stroke="#(?!ddd)[^/]*?) stroke-width', text)
        curves, keys = ([s for tag, s in lines if tag == name] for name in ("polyline", "path"))
        assert curves == keys
        assert len(set(curves)) == len(curves) == 9


def fake_cell(root: Path, label: str, seed: int, rates: list[float]) -> learn.Cell:
    """A cell whose commands have run, with these success rates on the way and the last at the end."""
    where = root / "cells" / f"lift-{label}-{seed}"
    where.mkdir(parents=True)
    lines = ["step,time/env_steps,time/wall_s,eval/success_rate"]
    lines += [f"{i},{1000 * i},{10 * i},{rate}" for i, rate in enumerate(rates, start=1)]
    (where / "metrics.csv").write_text("\n".join(lines) + "\n")
    result = {"return_mean": rates[-1], "success_rate": rates[-1], "episodes": 100}
    for noise in learn.NOISES:
        (where / f"eval_{noise}.json").write_text(json.dumps(result))
    environment = {
        "machine": {"cpu": f"cpu of {label}", "cores": 1, "system": "Linux"},
        "git_revision": "c0ffee",
        "versions": {"torch": "2.13.0", "mujoco": "3.9.0"},
    }
    (where / "environment.json").write_text(json.dumps(environment))
    base = root / "bases" / f"lift-{seed}"
    base.mkdir(parents=True, exist_ok=True)
    result |= {"return_mean": 0.25, "success_rate": 0.25}
    (base / "eval_zero.json").write_text(json.dumps(result))
    return learn.Cell("lift", label, seed, where, base, (), 0.9)


def test_results_and_page_say_what_the_cells_did(tmp_path):
    rates = {
        "rldt": [[0.5, 0.92, 0.95], [0.4, 0.6, 0.91]],
        "fpo": [[0.4, 0.5, 0.5], [0.5, 0.6, 0.9]],
    }
    cells = [fake_cell(tmp_path, n, s, r) for n, both in rates.items() for s, r in enumerate(both)]
    kept = {"return_mean": 0.97, "success_rate": 0.97, "episodes": 100}
    (cells[1].dir / "eval_best.json").write_text(json.dumps(kept))
    (cells[1].dir / "eval_best.done").touch()
    for cell in cells:
        learn.write_result(cell)
    rows = [json.loads((c.dir / "result.json").read_text()) for c in cells]
    assert [r["steps_to_threshold"] for r in rows] == [2000, 3000, None, 3000]
    assert {
        "algorithm",
        "task",
        "seed",
        "env_steps",
        "wall_s",
        "return_mean",
        "success_rate",
    } <= set(rows[0])
    study = STUDIES["manipulation"]
    curves = learn_page.learning_curves(learn.histories(cells), "success_rate", rows)
    for curve in curves:  # from what the base policies do
        assert curve.x[0] == 0
        assert curve.mean[0] == curve.low[0] == curve.high[0] == 0.25
    assert curves[0].x[-1] == 3000
    from_nothing = [dataclasses.replace(cell, base=None) for cell in cells]
    assert learn.base_line(from_nothing) == "From scratch. "
    first = learn.histories(from_nothing)["lift", "rldt"][0][0]
    assert (first["time/env_steps"], first["eval/success_rate"]) == (1000, 0.5)
    assert curves[0].mean[-1] == pytest.approx((0.95 + 0.91) / 2)
    pictures = learn_page.write_pictures(tmp_path, study, curves)
    said = learn.paragraphs(learn.Config(seeds=2, out=tmp_path), study, cells, rows, ["lamp"])
    page = learn_page.markdown("manipulation", study, rows, said, pictures)
    line = next(part for part in page.splitlines() if part.startswith("| rldt"))
    assert "93.0% (88.6% to 95.8%)" in line  # 186 of 200
    assert "| 95.0%, 91.0% | not kept, 97.0% | 2,500 (2 of 2 seeds, a look every 1 k)" in line
    assert (
        "| not reached (1 of 2 seeds, a look every 1 k) |" in page
    )  # fpo: the median of all seeds, not of those that arrived
    assert "return" not in page.split("| --- |")[0].split("| algorithm")[1]
    of_returns = learn_page.summarize(
        [r | {"success_rate": None, "return_mean_random_noise": 2.0} for r in rows],
        "lift",
        "rldt",
        learn_page.COLUMNS["return"].values(),
    )
    assert of_returns[1:4] == ["1 (1 to 1)", "2 (2 to 2)", "1, 1"]  # 0.95 and 0.91
    late = learn_page.columns(STUDIES["ablations"])["success, inference takes 2"]
    shown = ["success_rate", late]
    of_delay = learn_page.summarize([r | {late: 0.5} for r in rows], "lift", "rldt", shown)
    assert of_delay[2] == "50.0% (43.1% to 56.9%)"
    exploded = [r | {"diverged": r["seed"] == 1} for r in rows]
    said_so = learn_page.summarize(exploded, "lift", "fpo", ["success_rate"])
    assert said_so[0] == "fpo (1 of 2 seeds diverged)"
    assert "hence not run: lamp" in page
    assert (  # what the cells ran on, whatever writes the page
        "Machine: cpu of rldt, cores a cell: 1, Linux (2 cells); cpu of fpo, cores a cell: 1, Linux (2 cells). "
        "Code: c0ffee. Versions: torch 2.13.0, mujoco 3.9.0."
    ) in page
    assert "Base policies at zero noise, by seed: 25.0%, 25.0%." in page
    first = "**lift**: best at the end rldt (93.0%). Threshold first: rldt, after 2,500 steps"
    assert page.splitlines()[4].startswith(first)
    level = [r | {"success_rate": 0.9} if r["algorithm"] == "fpo" else r for r in rows]
    assert "rldt (93.0%), not told apart from fpo" in learn_page.verdict(
        level, "lift", "success_rate"
    )
    one_seed = [
        r | {"success_rate": 0.92} if r["algorithm"] == "fpo" and r["seed"] else r for r in rows
    ]
    # 71 of 100 on average, but not with seed 1
    told = learn_page.verdict(one_seed, "lift", "success_rate")
    assert "rldt (93.0%), not told apart from fpo" in told
    together = [r | {"steps_to_threshold": 3000} for r in rows]
    told = learn_page.verdict(together, "lift", "success_rate")
    assert "Threshold first: rldt; fpo, after 3,000 steps" in told
    docs, made = tmp_path / "docs", learn.histories(cells)
    learn_page.write(tmp_path, "manipulation", study, made, rows, said, docs / "learn.md")
    linked = set(re.findall(r"\]\((.*?)\)", (docs / "learn.md").read_text()))
    assert linked == {f.name for f in docs.iterdir()} - {"learn.md"}
    with (docs / "learn_results.csv").open() as file:
        assert [float(row["success_rate"]) for row in csv.DictReader(file)] == [
            0.95,
            0.91,
            0.5,
            0.9,
        ]


def rows_of(label: str, returns: list[float], steps: list[int | None], look=114_000) -> list[dict]:
    """Results of a walker's cells."""
    common = {"task": "hopper", "algorithm": label, "success_rate": None, "episodes": 100}
    common |= {"env_steps": 996_000, "wall_s": 600.0, "steps_between_looks": look}
    return [
        common
        | {"seed": seed, "return_mean": level, "return_mean_random_noise": level}
        | {"return_mean_best_look": level}
        | {"steps_to_threshold": count, "diverged": False}
        for seed, (level, count) in enumerate(zip(returns, steps, strict=True))
    ]


def test_who_crosses_the_threshold_within_a_look_of_the_first_is_level_with_it():
    """Steps are counted where a rollout ends, which is no sooner for who ends fewer episodes in it."""
    rows = [
        *rows_of("score_flow", [3300.0] * 3, [113_990] * 3),
        *rows_of("fpo", [3300.0] * 3, [114_051] * 3),
        *rows_of("reinflow", [3300.0] * 3, [113_990, 228_392, 342_000]),
        *rows_of("rldt", [3300.0] * 3, [342_500] * 3),
    ]
    told = learn_page.verdict(rows, "hopper", "return")
    assert "Threshold first: score_flow; fpo; reinflow, after 113,990 steps" in told
    assert "level within one look" in told
    # One that looks half as often may have been there as soon; one that looks as often was later.
    rows = rows_of("rldt", [1.0] * 3, [75_926] * 3, look=15_180)
    rows += rows_of("fpo", [1.0] * 3, [91_081] * 3, look=30_360)
    rows += rows_of("reinflow", [1.0] * 3, [121_288] * 3, look=30_320)
    told = learn_page.verdict(rows, "hopper", "return")
    assert "Threshold first: rldt; fpo, after 75,926 steps" in told


def test_who_is_first_by_more_than_a_look_is_named_alone():
    rows = rows_of("fpo", [3300.0] * 3, [114_051] * 3) + rows_of(
        "rldt", [3300.0] * 3, [342_500] * 3
    )
    apart = learn_page.verdict(rows, "hopper", "return")
    assert "Threshold first: fpo, after 114,051 steps (median of all seeds)." in apart


def test_the_verdict_and_the_table_take_the_same_median_of_steps():
    """A seed that never arrived counts as later than all; it does not take its label out of the comparison."""
    rows = rows_of("fpo", [1.0] * 3, [50_000, 60_000, None], look=10_000)
    rows += rows_of("rldt", [1.0] * 3, [90_000] * 3, look=10_000)
    assert "Threshold first: fpo, after 60,000 steps" in learn_page.verdict(
        rows, "hopper", "return"
    )
    assert learn_page.summarize(rows, "hopper", "fpo", ["return_mean"])[4].startswith(
        "60,000 (2 of 3"
    )
    never = [r | {"steps_to_threshold": None} for r in rows[1:]]
    assert "Threshold" not in learn_page.verdict([*rows[:1], *never], "hopper", "return")


@pytest.mark.parametrize("returns", [[1.0, 2.0, 9.0], [4.0, -5.0, 4.0, 4.1], [3.0, float("-inf")]])
def test_behind_the_return_of_a_few_seeds_stands_their_range_and_is_called_so(returns, tmp_path):
    """Resampling them gives it, and that holds the median of all seeds with 75 % for three, not with 95."""
    assert between(np.array(returns)) == (min(returns), max(returns))
    study, rows = STUDIES["locomotion"], rows_of("fpo", returns, [None] * len(returns))
    near = rows + rows_of("rldt", returns[::-1], [None] * len(returns))
    assert "(ranges overlap" in learn_page.verdict(near, "hopper", "return")
    config = learn.Config(study="locomotion", out=tmp_path, seeds=len(returns))
    how = learn.paragraphs(config, study, [], near, [])["how"]
    assert "range of the seeds" in how
    assert "95 %" not in how


def test_behind_the_return_of_many_seeds_stands_a_bootstrap_interval(tmp_path):
    """As scipy draws it, within what 10,000 draws are apart."""
    stats = pytest.importorskip("scipy.stats")
    returns = np.random.default_rng(3).normal(1000, 200, size=8)
    rows = rows_of("fpo", list(returns), [None] * 8)
    low, high = between(returns)
    theirs = stats.bootstrap(
        (returns,),
        lambda draws, axis: stats.trim_mean(draws, 0.25, axis=axis),
        method="percentile",
        random_state=1,
    ).confidence_interval
    assert (low, high) == pytest.approx(tuple(theirs), abs=5)
    assert returns.min() < low - 20
    assert high + 20 < returns.max()
    assert (
        f"({low:,.0f} to {high:,.0f})"
        in learn_page.summarize(rows, "hopper", "fpo", ["return_mean"])[1]
    )
    near = rows + rows_of("rldt", list(returns[::-1]), [None] * 8)
    assert "(95 % intervals overlap" in learn_page.verdict(near, "hopper", "return")
    config = learn.Config(study="locomotion", out=tmp_path, seeds=8)
    assert (
        "bootstrap interval over seeds (95 %)"
        in learn.paragraphs(config, STUDIES["locomotion"], [], near, [])["how"]
    )


def test_a_curve_is_drawn_with_the_range_of_its_seeds(tmp_path):
    curve = mean_curve("hopper", "fpo", "env_steps", [[(0, v), (9, v)] for v in (1.0, 2.0, 9.0)])
    assert (curve.low[-1], curve.mean[-1], curve.high[-1]) == (1, 4, 9)
    picture = learn_page.write_pictures(tmp_path, STUDIES["locomotion"], [curve])[0].read_text()
    assert "mean and range of 3 seeds" in picture


def test_a_curve_of_many_seeds_is_drawn_with_the_interval_of_its_mean(tmp_path):
    """As scipy draws it; where one diverged and four go on, with their range."""
    stats = pytest.importorskip("scipy.stats")
    ends = np.random.default_rng(4).normal(0.5, 0.2, size=5)
    runs = [[(0, 0.0), (5, 2 * v), (9, v)] for v in ends]
    curve = mean_curve("lift", "fpo", "env_steps", runs)
    theirs = stats.bootstrap((ends,), np.mean, method="percentile", random_state=1)
    assert (curve.low[-1], curve.high[-1]) == pytest.approx(
        tuple(theirs.confidence_interval), abs=0.005
    )
    assert curve.mean[-1] == pytest.approx(ends.mean())
    assert ends.min() < curve.low[-1] - 0.02
    picture = learn_page.write_pictures(tmp_path, STUDIES["manipulation"], [curve])[0].read_text()
    assert "mean and 95 % interval of 5 seeds" in picture
    early = [runs[0][:2], *runs[1:]]
    curve = mean_curve("lift", "fpo", "env_steps", early, [True] + [False] * 4)
    assert (curve.low[-1], curve.high[-1]) == (ends[1:].min(), ends[1:].max())


def test_one_seed_tells_nobody_apart():
    rows = rows_of("fpo", [10.0], [10_000], look=10_000)
    rows += rows_of("rldt", [9000.0], [900_000], look=10_000)
    assert learn_page.verdict(rows, "hopper", "return") == (
        "**hopper**: best at the end rldt (9,000), of one seed, which tells nobody apart."
    )
    assert learn_page.summarize(rows, "hopper", "fpo", ["return_mean"])[1] == "10 (one seed)"
    curve = mean_curve("hopper", "fpo", "env_steps", [[(0, 0.0), (9, 1.0)]])
    assert learn_page.how_many([curve]) == "one seed"


def test_a_return_that_is_no_number_is_last():
    rows = rows_of("fpo", [float("nan"), 4000.0], [None] * 2) + rows_of(
        "rldt", [1.0, 2.0], [None] * 2
    )
    told = learn_page.verdict(rows, "hopper", "return")
    assert "best at the end rldt (2), not told apart from fpo" in told
    rows[1]["return_mean"] = float("nan")
    assert learn_page.verdict(rows, "hopper", "return") == "**hopper**: best at the end rldt (2)."
    runs = [
        {"time/env_steps": x, "time/wall_s": x, "eval/return": y}
        for x, y in ((0.0, 1.0), (1.0, 2.0))
    ]
    runs.append({"time/env_steps": 2.0, "time/wall_s": 2.0, "eval/return": float("nan")})
    curves = learn_page.learning_curves({("hopper", "fpo"): [runs]}, "return", rows[:1])
    assert curves[0].mean.tolist() == [1, 2]
    page = learn_page.markdown("x", STUDIES["locomotion"], rows, {"how": "", "hopper": ""}, [])
    assert "ends there" not in page
    rows[0]["diverged"] = True
    page = learn_page.markdown("x", STUDIES["locomotion"], rows, {"how": "", "hopper": ""}, [])
    assert "The curve of a seed that diverged ends there" in page


def test_a_base_policy_above_the_threshold_took_no_steps_to_it(tmp_path):
    cells = [fake_cell(tmp_path, "fpo", seed, [0.95, 0.97]) for seed in range(2)]
    level = {"return_mean": 0.93, "success_rate": 0.93, "episodes": 100}
    (cells[1].base / "eval_zero.json").write_text(json.dumps(level))
    rows = []
    for cell in (*cells, dataclasses.replace(cells[1], base=None)):
        learn.write_result(cell)
        rows.append(json.loads((cell.dir / "result.json").read_text()))
    assert [r["steps_to_threshold"] for r in rows] == [1000, 0, 1000]
    assert {r["steps_between_looks"] for r in rows} == {1000}
    steps = learn_page.summarize(rows[:2], "lift", "fpo", ["success_rate"])[4]
    assert steps == "500 (2 of 2 seeds, 1 of them before training, a look every 1 k)"
    config = learn.Config(seeds=2, out=tmp_path)
    how = learn.paragraphs(config, STUDIES["manipulation"], cells, rows[:2], [])["how"]
    assert "a base policy above the threshold took 0 control steps to it" in how


def test_looks_are_as_far_apart_as_the_farthest_two(tmp_path):
    """The steps of a run over its looks are fewer: the last look follows the one before it at once."""
    cell = fake_cell(tmp_path, "fpo", 0, [0.5, 0.5])
    with (cell.dir / "metrics.csv").open("a") as file:
        file.write("3,2001,30,0.5\n")
    learn.write_result(cell)
    assert json.loads((cell.dir / "result.json").read_text())["steps_between_looks"] == 1000


def test_what_people_wrote_above_the_page_stays(tmp_path):
    page = tmp_path / "learn.md"
    new = f"# Study: x\n\n{learn_page.REMARKS_END}\n\n"
    learn_page.copy_page(page, f"{new}old numbers\n", [])
    page.write_text(page.read_text().replace("# Study: x\n", "# Walkers\n\nSeed 2 limps.\n"))
    learn_page.copy_page(page, f"{new}new numbers\n", [])
    assert page.read_text() == (
        f"# Walkers\n\nSeed 2 limps.\n\n{learn_page.REMARKS_END}\n\nnew numbers\n"
    )

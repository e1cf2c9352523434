"""The page of a study: curves, a verdict and a table per task, with what seeds differ by."""

import csv
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from flow_policy_rl.bench.curves import Curve, draw, mean_curve
from flow_policy_rl.bench.seeds import between, interquartile_mean, span_name
from flow_policy_rl.bench.studies import Study
from flow_policy_rl.evaluate import wilson_interval
from flow_policy_rl.report import COLORS

REMARKS_END = "<!-- From here on `flow-policy bench learn` writes; what stands above is kept. -->"
RESULTS, CURVES = "results.csv", "curves.csv"
Histories = Mapping[tuple[str, str], list[list[dict]]]  # (task, label) -> metrics of each seed


def write(
    root: Path,
    title: str,
    study: Study,
    histories: Histories,
    rows: list[dict],
    paragraphs: Mapping[str, str],
    copy: Path | None,
) -> None:
    """Tables, curves and README.md in the folder of the study, and a copy of all that somewhere else.

    Args:
        rows: results of the cells.
        paragraphs: what is said below the question, and at the beginning of each task.
    """
    curves = learning_curves(histories, study.metric, rows)
    write_csv(root / RESULTS, rows)
    write_csv(root / CURVES, [point for c in curves for point in c.rows()])
    pictures = write_pictures(root, study, curves)
    page = markdown(title, study, rows, paragraphs, pictures)
    (root / "README.md").write_text(page)
    if copy is not None:
        copy_page(copy, page, [*pictures, root / RESULTS, root / CURVES])


def learning_curves(histories: Histories, metric: str, rows: list[dict]) -> list[Curve]:
    """One curve per task, label and axis, over seeds. What is no number is no look."""
    curves, seen = [], f"eval/{metric}"
    for (task, label), runs in histories.items():
        early = [r["diverged"] for r in rows if (r["task"], r["algorithm"]) == (task, label)]
        for axis, column in (("env_steps", "time/env_steps"), ("wall_s", "time/wall_s")):
            points = [
                [(r[column], r[seen]) for r in run if math.isfinite(r.get(seen, math.nan))]
                for run in runs
            ]
            curves.append(mean_curve(task, label, axis, points, early))
    return curves


def write_csv(path: Path, rows: list[dict]) -> None:
    """A table with the keys of its first row as header."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else ["empty"])
        writer.writeheader()
        writer.writerows(rows)


def write_pictures(root: Path, study: Study, curves: list[Curve]) -> list[Path]:
    """One SVG per task and axis; with more curves than colours, one for each algorithm and its variations."""
    pictures = []
    axes = {"env_steps": "control steps", "wall_s": "seconds"}
    for task, axis in dict.fromkeys((c.task, c.axis) for c in curves):
        together = [c for c in curves if (c.task, c.axis) == (task, axis)]
        groups = {"": together}
        if len(together) > len(COLORS):
            families = [c.label.split(",")[0] for c in together]
            groups = {
                f"{family}_": [
                    c for c, own in zip(together, families, strict=True) if own == family
                ]
                for family in dict.fromkeys(families)
            }
        for group, chosen in groups.items():
            path = root / f"curve_{task}_{group}{axis}.svg"
            what = f"{study.metric.replace('_', ' ')}, {how_many(chosen)}"
            path.write_text(draw(chosen, task, axes[axis], what))
            pictures.append(path)
    return pictures


def how_many(curves: Sequence[Curve]) -> str:
    """What lines and bands of a picture are."""
    seeds = max((int(c.seeds.max()) for c in curves if len(c.x)), default=0)
    return "one seed" if seeds == 1 else f"mean and {span_name(seeds)} of {seeds} seeds"


def pooled(rows: list[dict], key: str) -> tuple[float, float, float]:
    """Over seeds, with an interval: a success rate of all episodes, or the inter-quartile mean of returns."""
    if key.startswith("return"):
        returns = np.array([r[key] for r in rows])
        return float(interquartile_mean(returns)), *between(returns)
    trials = sum(r["episodes"] for r in rows)
    successes = round(sum(r[key] * r["episodes"] for r in rows))
    return successes / trials, *wilson_interval(successes, trials)


def verdict(rows: list[dict], task: str, metric: str) -> str:
    """For a reader in a hurry: who is best at the end, who cannot be told apart from that, who was there first."""
    key = {"success_rate": "success_rate", "return": "return_mean"}[metric]
    # What is no number is below all numbers.
    mine = [
        r | {key: -math.inf if math.isnan(r[key]) else r[key]} for r in rows if r["task"] == task
    ]
    by_label = {
        label: [r for r in mine if r["algorithm"] == label]
        for label in dict.fromkeys(r["algorithm"] for r in mine)
    }
    scores = {label: pooled(own, key) for label, own in by_label.items()}
    best = max(scores, key=lambda label: scores[label][0])
    shown = f"{scores[best][0]:.1%}" if metric == "success_rate" else f"{scores[best][0]:,.0f}"
    said = f"**{task}**: best at the end {best} ({shown})"
    seeds = len({r["seed"] for r in mine})
    if seeds == 1:
        return f"{said}, of one seed, which tells nobody apart."
    reached = {(r["algorithm"], r["seed"]): r[key] for r in mine}

    def close(label: str) -> bool:
        """Intervals of pooled episodes are narrower than seeds are apart, so the best has to be ahead with each."""
        everywhere = all(reached[best, r["seed"]] > r[key] for r in by_label[label])
        return scores[label][2] >= scores[best][1] or not everywhere

    near = [label for label in scores if label != best and close(label)]
    what = "intervals" if metric == "success_rate" else f"{span_name(seeds)}s"
    why = f"({what} overlap, or not ahead with every seed)"
    apart = f", not told apart from {'; '.join(near)} {why}" if near else ""
    return f"{said}{apart}.{first_there(by_label)}"


def first_there(by_label: Mapping[str, list[dict]]) -> str:
    """Whose seeds are at the threshold first. When between two looks that was, nobody saw."""
    steps = {label: steps_to_threshold(rows) for label, rows in by_label.items()}
    first = min(steps, key=lambda label: steps[label])
    if math.isinf(steps[first]):
        return ""

    def level(label: str) -> bool:
        # The same look of two runs is tens of steps apart, as episodes end within chunks; hence the 1.1.
        return steps[label] - steps[first] <= 1.1 * steps_between_looks(by_label[label])

    near = [label for label in steps if level(label)]
    how = "median of all seeds, level within one look" if near[1:] else "median of all seeds"
    return f" Threshold first: {'; '.join(near)}, after {steps[first]:,.0f} steps ({how})."


def steps_to_threshold(rows: list[dict]) -> float:
    """Median of all seeds; one that did not get there took infinitely many."""
    steps = [r["steps_to_threshold"] for r in rows]
    return float(np.median([math.inf if s is None else s for s in steps]))


def steps_between_looks(rows: list[dict]) -> float:
    """Median of all seeds."""
    return float(np.median([r["steps_between_looks"] for r in rows]))


COLUMNS = {  # of the page, by what a study measures
    "success_rate": {
        "success, zero noise": "success_rate",
        "success, random noise": "success_rate_random_noise",
    },
    "return": {
        "return, zero noise (IQM of seeds)": "return_mean",
        "return, random noise": "return_mean_random_noise",
    },
}


def columns(study: Study) -> dict[str, str]:
    """Keys of the results that the page shows, by their headings; delays in control steps."""
    what, zero = study.metric.removesuffix("_rate"), next(iter(COLUMNS[study.metric].values()))
    late = {f"{what}, inference takes {n}": f"{zero}_delay_{n}" for n in study.delays}
    return COLUMNS[study.metric] | late


def by_seed(rows: list[dict], key: str) -> str:
    """A result of each seed. All algorithms begin with a seed's base policy, so seeds are what to compare them by."""
    form = "{:,.0f}" if key.startswith("return") else "{:.1%}"
    values = [r[key] for r in sorted(rows, key=lambda r: r["seed"])]
    return ", ".join("not kept" if v is None else form.format(v) for v in values)


def summarize(rows: list[dict], task: str, label: str, keys: Collection[str]) -> list[str]:
    """One line of the page: label, these results, the first of them by seed, also of the policy that did best while it
    was watched, steps to the threshold, all, wall time."""
    mine = [r for r in rows if (r["task"], r["algorithm"]) == (task, label)]
    diverged = sum(r["diverged"] for r in mine)
    cells = [f"{label} ({diverged} of {len(mine)} seeds diverged)" if diverged else label]
    for key in keys:
        form = "{:.1%} ({:.1%} to {:.1%})"
        if key.startswith("return"):
            form = "{:,.0f} ({:,.0f} to {:,.0f})" if mine[1:] else "{:,.0f} (one seed)"
        cells.append(form.format(*pooled(mine, key)))
    first = next(iter(keys))
    cells += [by_seed(mine, first), by_seed(mine, f"{first}_best_look")]
    median = steps_to_threshold(mine)
    cells.append(f"{median:,.0f}" if math.isfinite(median) else "not reached")
    reached = sum(r["steps_to_threshold"] is not None for r in mine)
    above = sum(r["steps_to_threshold"] == 0 for r in mine)
    begun = f", {above} of them before training" if above else ""
    looks = steps_between_looks(mine) / 1000
    cells[-1] += f" ({reached} of {len(mine)} seeds{begun}, a look every {looks:,.0f} k)"
    cells.append(f"{np.mean([r['env_steps'] for r in mine]):,.0f}")
    cells.append(f"{np.mean([r['wall_s'] for r in mine]):.0f}")
    return cells


def markdown(
    title: str,
    study: Study,
    rows: list[dict],
    paragraphs: Mapping[str, str],
    pictures: list[Path],
) -> str:
    """The page."""
    shown = columns(study)
    header = ["algorithm", *shown, "zero noise, by seed", "the same of the best look"]
    header += ["control steps to threshold (median of all seeds)", "control steps", "seconds"]
    tasks, labels = (list(dict.fromkeys(r[key] for r in rows)) for key in ("task", "algorithm"))
    parts = [
        f"# Study: {title}",
        REMARKS_END,
        *(verdict(rows, task, study.metric) for task in tasks),
        study.question,
        paragraphs["how"],
    ]
    for task in tasks:
        lines = [summarize(rows, task, label, shown.values()) for label in labels]
        mine = [p for p in pictures if p.stem.startswith(f"curve_{task}_")]
        drawn = " ".join(f"![{p.stem}]({p.name})" for p in mine)
        parts += [f"## {task}", paragraphs[task], table(header, lines), drawn]
        if any(r["diverged"] for r in rows if r["task"] == task):
            parts.append(
                "The curve of a seed that diverged ends there, and the mean goes on over the others; "
                "the table judges its last good checkpoint."
            )
    parts.append(f"Numbers: [of each cell]({RESULTS}), [of the curves]({CURVES}).")
    parts += [paragraphs[last] for last in ("missing", "where") if last in paragraphs]
    return "\n\n".join(parts) + "\n"


def where_made(environments: Sequence[dict]) -> str:
    """Machines, code and versions of the cells' trainings, as their run folders say; how many cells, if they differ."""
    told = {
        "Machine": lambda e: "{cpu}, cores a cell: {cores}, {system}".format(**e["machine"]),
        "Code": lambda e: e["git_revision"] or "no revision known",
        "Versions": lambda e: ", ".join(f"{k} {v}" for k, v in e["versions"].items()),
    }
    sentences = []
    for what, tell in told.items():
        cells = Counter(map(tell, environments))
        texts = [f"{text} ({n} cells)" for text, n in cells.items()] if len(cells) > 1 else cells
        sentences.append(f"{what}: {'; '.join(texts)}.")
    return " ".join(sentences)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def copy_page(page: Path, body: str, files: list[Path]) -> None:
    """The page and the files that it links to somewhere else, these named after the page.

    What people wrote at the beginning of a page that is there, down to `REMARKS_END`, stays.
    """
    page.parent.mkdir(parents=True, exist_ok=True)
    for file in files:
        name = f"{page.stem}_{file.name}"
        (page.parent / name).write_text(file.read_text())
        body = body.replace(f"({file.name})", f"({name})")
    remarks, written, _ = (
        page.read_text().partition(REMARKS_END) if page.is_file() else ("", "", "")
    )
    if written:
        body = remarks + written + body.partition(REMARKS_END)[2]
    page.write_text(body)

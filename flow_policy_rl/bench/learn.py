"""`flow-policy bench learn`: every algorithm from the same base policies, on the same episodes and seeds.

A study (`studies.py`) is algorithms x tasks x seeds. Each cell is a chain of ordinary commands in its own
folder; what a cell has finished is kept, so an interrupted study goes on where it was.

    OUT/bases/<task>-<seed>/     expert, demonstrations, base policy and its evaluation
    OUT/bases/<task>-<seed>-<what>/    the base policy of a variant with its own, from the same demonstrations
    OUT/cells/<task>-<label>-<seed>/   the run folder of `train`, evaluations, result.json
    OUT/results.csv  curves.csv  curve_<task>_<axis>.svg  README.md
"""

import dataclasses
import json
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

from flow_policy_rl.bench import learn_page
from flow_policy_rl.bench.seeds import span_name
from flow_policy_rl.bench.stages import Stage, last_command, read_json, result_of, run_chains
from flow_policy_rl.bench.studies import STUDIES, Budget, Study, Variant
from flow_policy_rl.errors import InputError, RunFailed, output_file, refuse_below, unknown_name
from flow_policy_rl.logger import read_metrics
from flow_policy_rl.nesting import flat
from flow_policy_rl.run_folder import (
    BEST_POLICY_FILE,
    POLICY_FILE,
    RAW_POLICY_FILE,
    claimed,
    end_like_ctrl_c,
    failed_file,
    state_file,
)
from sim.tasks import task_names

EVAL_SEED = 10_000  # episodes of the table; training watches others
NOISES = ("zero", "random")
# Settings that change where a study's folder is moved, or its bases are copied.
MAY_MOVE = {"checkpoint", "demos"}
# What stands in brackets behind a result.
SPANS = {
    "success": "Success pools the seeds' episodes (Wilson, 95 %: other episodes, not other seeds).",
    "range": "Behind a return stands the range of the seeds, which is no interval of confidence.",
    "95 % interval": "Behind a return stands its bootstrap interval over seeds (95 %).",
}


@dataclass(frozen=True)
class Config:
    """A fair comparison of algorithms: table, CSV, learning curves and a page.

    Example: flow-policy bench learn --study manipulation --tasks lift --seeds 3

    Attributes:
        study: locomotion, from-scratch, manipulation, vision or ablations (docs/studies.md says what each asks).
        budget: `small` ends within half an hour per cell on two cores, `full` takes days; `tiny` only shows that
            everything runs.
        seeds: how many of every cell: 0, 1, ...
        tasks: only these (empty: all of the study).
        variants: only these labels (empty: all of the study).
        out: folder of the study (None: runs/learn/STUDY-BUDGET).
        env_steps: control steps of training per cell, in place of the budget's.
        points: at least so many evaluations on the way, in place of the budget's. Each takes 100 episodes, of a long
            task as many control steps as an iteration of training or two; what is learned does not depend on them.
        jobs: cells at a time, each on cores of its own. Compare wall times only within a study of one number of jobs.
        page: where to write the page as well, e.g. docs/learn_manipulation.md, with its pictures beside it.
        json: print one JSON object.
    """

    study: str = "manipulation"
    budget: Literal["tiny", "small", "full"] = "small"
    seeds: int = 3
    tasks: tuple[str, ...] = ()
    variants: tuple[str, ...] = ()
    out: Path | None = None
    env_steps: int | None = None
    points: int | None = None
    jobs: int = 1
    page: Path | None = None
    json: bool = False


@dataclass(frozen=True)
class Cell:
    """One algorithm on one task with one seed.

    Attributes:
        base: folder of its base policy; None: from scratch.
    """

    task: str
    label: str
    seed: int
    dir: Path
    base: Path | None
    stages: tuple[Stage, ...]
    threshold: float | None


# --- what a study comes to ---


def plan(config: Config) -> tuple[Study, list[Cell], list[str]]:
    """The study, its cells in order, and the tasks that are not there.

    Raises:
        InputError: unknown study, task or label, or no seed.
    """
    if config.study not in STUDIES:
        raise unknown_name("study", config.study, STUDIES)
    refuse_below(config, seeds=1, points=1, env_steps=1)
    cores = len(os.sched_getaffinity(0))
    if not 1 <= config.jobs <= cores:
        raise InputError(f"--jobs must be 1 to {cores}, the number of cores, not {config.jobs}")
    study = STUDIES[config.study]
    for name in config.tasks:
        if name not in study.tasks:
            raise unknown_name("task of the study", name, study.tasks)
    for name in config.variants:
        if name not in study.variants:
            raise unknown_name("variant of the study", name, study.variants)
    tasks = [t for t in study.tasks if not config.tasks or t in config.tasks]
    for name in config.variants:
        if not any(study.variants[name].of(task) for task in tasks):
            only = ", ".join(study.variants[name].tasks)
            raise InputError(
                f"--variants '{name}' is a row of {only} only, not of {', '.join(tasks)}"
            )
    missing = [t for t in tasks if t not in task_names()]
    budget = getattr(study, config.budget)
    changes = {"env_steps": config.env_steps, "points": config.points}
    budget = dataclasses.replace(budget, **{k: v for k, v in changes.items() if v is not None})
    root = folder(config)
    cells = []
    for task in tasks:
        if task in missing:
            continue
        for label in chosen_variants(config, study, task):
            cells += [
                make_cell(study, task, label, seed, budget, root) for seed in range(config.seeds)
            ]
    return study, cells, missing


def chosen_variants(config: Config, study: Study, task: str) -> list[str]:
    """Labels of a task's rows."""
    return [
        label
        for label, variant in study.variants.items()
        if variant.of(task) and (not config.variants or label in config.variants)
    ]


def by_task(values: dict, task: str):
    """What a study says of a task, or of all others; None if nothing."""
    return values.get(task, values.get("*"))


def folder(config: Config) -> Path:
    """Where the study lives."""
    return config.out or Path("runs/learn") / f"{config.study}-{config.budget}"


def slug(label: str) -> str:
    """A label as part of a file name."""
    return re.sub(r"[^a-z0-9_]+", "-", label.lower()).strip("-")


def make_cell(study: Study, task: str, label: str, seed: int, budget: Budget, root: Path) -> Cell:
    """One cell and all that it needs: its base policy if the study has one, training, evaluation."""
    variant, where = study.variants[label], root / "cells" / f"{task}-{slug(label)}-{seed}"
    base, stages, start, horizon = None, (), (), None
    if study.base:
        common = root / "bases" / f"{task}-{seed}"
        base = base_folder(common, variant)
        stages = base_stages(study, variant, task, seed, budget, common, base)
        start = ("--checkpoint", str(base / "base" / POLICY_FILE))
        horizon = variant.execute_horizon or by_task(study.base.execute_horizon, task)
    watch = ("--eval-episodes", str(min(100, budget.episodes)))
    command = (variant.algorithm, "--task", task, "--seed", str(seed), *start)
    command += by_task(study.train, task) or ()
    length = training_length((*command, *variant.flags), budget.env_steps, horizon, budget.points)
    learning = training(("train", *command, *length, *watch, *variant.flags), where)
    learning = dataclasses.replace(learning, diverged=failed_file(where))
    stages += (learning, *evaluations(where, task, where, budget, study.delays))
    return Cell(task, label, seed, where, base, stages, by_task(study.threshold, task))


def base_stages(
    study: Study, variant: Variant, task: str, seed: int, budget: Budget, common: Path, own: Path
) -> tuple[Stage, ...]:
    """Expert if it has to be learned, demonstrations, imitation, evaluation.

    Args:
        common: folder of expert and demonstrations, which are everybody's.
        own: folder of the variant's base policy, as `base_folder` names it.
    """
    base, stages, demonstrator = study.base, [], ()
    which = ("--task", task, "--seed", str(seed))
    if base.expert:
        expert = common / "expert"
        algorithm, *flags = base.expert
        length = training_length((algorithm, *which, *flags), budget.expert_steps, None, 0)
        if task in base.skill:
            length += ("--stop-at", str(base.skill[task]), "--eval-episodes", "20")
            length += ("--eval-every", str(by_task(base.looks, task)))
        stages.append(training(("train", algorithm, *which, *length, *flags), expert))
        demonstrator = ("--policy", str(expert / POLICY_FILE))
    demos = common / "demos.hdf5"
    collect = ("collect", *which, *demonstrator, "--episodes", str(by_task(base.episodes, task)))
    collect += (*by_task(base.collect, task), "--out", str(demos), "--json")
    stages.append(Stage(collect, common / "collect", output=demos))

    horizon = str(variant.execute_horizon or by_task(base.execute_horizon, task))
    run_dir = own / "base"
    imitate = ("train", "bc", *which, "--demos", str(demos), "--run-dir", str(run_dir), "--json")
    imitate += ("--action-horizon", str(base.action_horizon), "--execute-horizon", horizon)
    imitate += (*by_task(base.imitate, task), *variant.imitate)
    if budget.imitation_steps is not None:  # a later flag wins
        imitate += ("--bc.num-steps", str(budget.imitation_steps))
    stages.append(Stage(imitate, own / "imitate", state=state_file(run_dir)))
    return (*stages, *evaluations(run_dir, task, own, budget, study.delays))


def base_folder(common: Path, variant: Variant) -> Path:
    """Where a variant's base policy lives: everybody's folder, or one beside it that says what differs."""
    horizon = (f"execute-{variant.execute_horizon}",) if variant.execute_horizon else ()
    own = slug("-".join((*horizon, *variant.imitate)))
    return common.with_name(f"{common.name}-{own}") if own else common


def training(command: tuple[str, ...], run_dir: Path) -> Stage:
    """An RL run, which goes on from its own state."""
    return Stage(
        (*command, "--run-dir", str(run_dir), "--json"),
        run_dir / "train",
        state=state_file(run_dir),
    )


def training_length(
    arguments: Sequence[str], env_steps: int, execute_horizon: int | None, points: int
) -> tuple[str, ...]:
    """Flags that make `train` go on for so many control steps, with so many evaluations on the way.

    Args:
        arguments: of `train`, its algorithm first; they decide the size of a rollout.
        execute_horizon: of the policy that it starts from; None: from scratch.
    """
    from flow_policy_rl import cli  # which starts this module

    _, config = cli.parse_train(list(arguments), None)
    algorithm, loop = arguments[0], config.loop
    horizon = execute_horizon or config.scratch.execute_horizon
    iterations = max(2, round(env_steps / (loop.num_envs * loop.num_steps * horizon)))
    group = "rldt" if algorithm == "rldt" else "ppo"
    every = max(1, iterations // points) if points else 0
    return (f"--{group}.num-iterations", str(iterations), "--eval-every", str(every))


def evaluations(
    run_dir: Path, task: str, where: Path, budget: Budget, delays: Sequence[int]
) -> tuple[Stage, ...]:
    """Whole episodes on fixed seeds: from zero and random noise, under delays, of raw weights that are apart, and of
    what did best while it was watched."""
    judged = [(POLICY_FILE, noise, noise, 0) for noise in NOISES]
    judged.append((RAW_POLICY_FILE, "zero", "raw", 0))
    judged.append((BEST_POLICY_FILE, "zero", "best", 0))
    judged += [(POLICY_FILE, "zero", f"delay_{delay}", delay) for delay in delays]
    stages = []
    for file, noise, name, delay in judged:
        command = ("eval", "--policy", str(run_dir / file), "--task", task, "--noise", noise)
        command += ("--seed", str(EVAL_SEED), "--episodes", str(budget.episodes), "--json")
        if delay:
            command += ("--inference-delay", str(delay))
        stages.append(Stage(command, where / f"eval_{name}", needs=run_dir / file))
    return tuple(stages)


# --- running it ---


def main(config: Config) -> dict:
    """Run what is not finished, then write table, curves and page. SIGTERM ends it like Ctrl-C.

    Raises:
        InputError: what `plan`, `begin` and `check_recipes` refuse, or a page that cannot be written.
        RunFailed: a command did not end well; all that does not need it was run nevertheless.
    """
    study, cells, missing = plan(config)
    if config.page is not None:
        output_file(config.page)
    root = folder(config)
    end_like_ctrl_c()
    with claimed(root, "--out"):
        begin(root, config)
        check_recipes(cells)
        chains = {cell.dir.name: cell.stages for cell in cells}
        failures = run_chains(chains, config.jobs, f"study {config.study}")
        if failures:
            raise RunFailed(
                f"{len(failures)} of the study's commands failed, what is finished is kept and the same command goes "
                f"on; the first: {failures[0]}"
            )
        for cell in cells:
            write_result(cell, study.delays)
        rows = [json.loads((cell.dir / "result.json").read_text()) for cell in cells]
        said = paragraphs(config, study, cells, rows, missing)
        learn_page.write(root, config.study, study, histories(cells), rows, said, config.page)
    return {"study": config.study, "rows": rows, "page": str(config.page or root / "README.md")}


def begin(root: Path, config: Config) -> None:
    """Write down what runs; refuse to mix two budgets in one folder.

    Raises:
        InputError: the folder holds a study with other settings; names them.
    """
    settings = {"study": config.study, "budget": config.budget, "env_steps": config.env_steps}
    file = root / "study.json"
    held = read_json(file, file) if file.is_file() else settings
    if held != settings:
        said = (
            f"{k} {held.get(k)} there, {v} here" for k, v in settings.items() if held.get(k) != v
        )
        raise InputError(
            f"'{root}' holds a study with other settings: {'; '.join(said)}; choose another --out"
        )
    root.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(settings) + "\n")


def check_recipes(cells: Sequence[Cell]) -> None:
    """Refuse what ended with other settings than today's: the study or a preset has changed since.

    Where a run was begun and not ended, `train --resume` does so.

    Raises:
        InputError: names the folder and what differs.
    """
    stages = {stage.name: stage for cell in cells for stage in cell.stages}
    for stage in stages.values():
        if not stage.name.with_suffix(".done").is_file():
            continue
        then, now = settings_of(stage) if stage.command[0] == "train" else flags_of(stage)
        changed = sorted(
            f"{name} {then.get(name, 'not given')} (now {now.get(name, 'not given')})"
            for name in then.keys() | now.keys()
            if then.get(name) != now.get(name)
        )
        if changed:
            raise InputError(
                f"'{stage.name}' was made with other settings: {', '.join(changed)}; remove "
                f"'{stage.name.parent}' and what was made from it, or choose another --out"
            )


def settings_of(stage: Stage) -> tuple[dict, dict]:
    """Settings with which a training ended, and which it would have today, of what both know."""
    from flow_policy_rl import cli, resume

    _, config = cli.parse_train(list(stage.command[1:]), None)
    settings = read_json(config.run_dir / "config.json", stage.name.parent)
    then, now = (flat(resume.comparable(s), ".") for s in (settings, dataclasses.asdict(config)))
    both = (then.keys() & now.keys()) - MAY_MOVE
    return {name: then[name] for name in both}, {name: now[name] for name in both}


def flags_of(stage: Stage) -> tuple[dict, dict]:
    """Flags of the command that made something else, and of today's, where they are no paths; both empty where the log
    does not say (of studies before 2026-11-23)."""
    ran = last_command(stage)
    return (pathless(ran), pathless(stage.command)) if ran else ({}, {})


def pathless(command: Sequence[str]) -> dict[str, str]:
    """Flags of a command with their values, without those that are paths: a study may be moved."""
    flags = {}
    for word in command:
        if word.startswith("--"):
            flags[word] = []
        elif flags:
            list(flags.values())[-1].append(word)
    return {
        flag: shlex.join(values) or "given"
        for flag, values in flags.items()
        if not any(os.sep in word for word in values)
    }


def write_result(cell: Cell, delays: Sequence[int] = ()) -> None:
    """One row of the table, from what the cell's commands left."""
    history = learned(cell)
    zero, random = (result_of(cell.dir / f"eval_{noise}") for noise in NOISES)
    raw = result_if_any(cell.dir / "eval_raw") or zero
    best = (
        result_if_any(cell.dir / "eval_best") or {}
    )  # nothing from trainings that did not keep it
    metric = "eval/return" if zero["success_rate"] is None else "eval/success_rate"
    looks = [(row["time/env_steps"], row[metric]) for row in history if metric in row]
    crossed = [at for at, level in looks if cell.threshold is not None and level >= cell.threshold]
    seen = [0.0, *(at for at, _ in looks)]
    row = {
        "algorithm": cell.label,
        "task": cell.task,
        "seed": cell.seed,
        "env_steps": int(history[-1]["time/env_steps"]),
        "wall_s": round(history[-1]["time/wall_s"], 1),
        "return_mean": zero["return_mean"],
        "success_rate": zero["success_rate"],
        "steps_to_threshold": int(crossed[0]) if crossed else None,
        "steps_between_looks": int(max((b - a for a, b in pairwise(seen)), default=0)),
        "return_mean_random_noise": random["return_mean"],
        "success_rate_random_noise": random["success_rate"],
        "return_mean_raw_weights": raw["return_mean"],
        "success_rate_raw_weights": raw["success_rate"],
        "return_mean_best_look": best.get("return_mean"),
        "success_rate_best_look": best.get("success_rate"),
        "episodes": zero["episodes"],
        "diverged": failed_file(cell.dir).is_file(),
    }
    for delay in delays:
        delayed = result_of(cell.dir / f"eval_delay_{delay}")
        row |= {f"{name}_delay_{delay}": delayed[name] for name in ("return_mean", "success_rate")}
    (cell.dir / "result.json").write_text(json.dumps(row) + "\n")


def result_if_any(stage_name: Path) -> dict | None:
    """Result of an evaluation, where there was something to evaluate."""
    return result_of(stage_name) if stage_name.with_suffix(".done").is_file() else None


def learned(cell: Cell) -> list[dict]:
    """Metrics of a cell's training; what its base policy does on the test episodes comes first."""
    history = read_metrics(cell.dir / "metrics.csv")
    if cell.base is None:
        return history
    level = result_of(cell.base / "eval_zero")
    seen = {"eval/return": level["return_mean"], "eval/success_rate": level["success_rate"]}
    return [{"time/env_steps": 0.0, "time/wall_s": 0.0, **seen}, *history]


def histories(cells: Sequence[Cell]) -> learn_page.Histories:
    """What the cells learned, all seeds, by task and label."""
    found: dict[tuple[str, str], list] = {}
    for cell in cells:
        found.setdefault((cell.task, cell.label), []).append(learned(cell))
    return found


def paragraphs(
    config: Config, study: Study, cells: Sequence[Cell], rows: list[dict], missing: list[str]
) -> dict:
    """What the page says of how the study ran, and where the policies of each task start and shall arrive."""
    command = f"flow-policy bench learn --study {config.study} --budget {config.budget} --seeds {config.seeds}"
    command += f" --env-steps {config.env_steps}" if config.env_steps else ""
    command += f" --points {config.points}" if config.points else ""
    command += f" --jobs {config.jobs}" if config.jobs > 1 else ""
    for flag, chosen in (("tasks", config.tasks), ("variants", config.variants)):
        command += f" --{flag} {shlex.join(chosen)}" if chosen else ""
    spans = "success" if study.metric == "success_rate" else span_name(config.seeds)
    said = {
        "how": f"`{command}`: budget `{config.budget}`, seeds 0 to {config.seeds - 1}, "
        f"{rows[0]['episodes'] if rows else 0} whole episodes per cell and noise on seeds from {EVAL_SEED}. "
        f"{SPANS[spans]} The full budget: the same command with `--budget full`"
        f"{', without `--env-steps`' if config.env_steps else ''} ({study.full.env_steps:,} control steps a cell)."
    }
    if study.base:
        said["how"] += (
            " Curves begin with the base policies on these episodes, and go on with others; "
            "a base policy above the threshold took 0 control steps to it."
        )
    for task in dict.fromkeys(cell.task for cell in cells):
        threshold = f"{study.metric.replace('_', ' ')} of {by_task(study.threshold, task):g}"
        said[task] = f"{base_line([c for c in cells if c.task == task])}Threshold: {threshold}."
    if cells:
        environments = [read_json(c.dir / "environment.json", c.dir) for c in cells]
        said["where"] = learn_page.where_made(environments)
    if missing:
        said["missing"] = f"Not in this installation, hence not run: {', '.join(missing)}."
    return said


def base_line(cells: Sequence[Cell]) -> str:
    """What the base policies of a task do, one number per seed: everybody's, then those of variants with their own."""
    if cells[0].base is None:
        return "From scratch. "
    said: dict[Path, str] = {}
    for label in dict.fromkeys(cell.label for cell in cells):
        mine = [cell for cell in cells if cell.label == label]
        numbers = ", ".join(base_level(cell.base) for cell in mine)
        shared = mine[0].base.name == f"{mine[0].task}-{mine[0].seed}"
        said.setdefault(mine[0].base, numbers if shared else f"that of {label}: {numbers}")
    return f"Base policies at zero noise, by seed: {'; '.join(said.values())}. "


def base_level(where: Path) -> str:
    """Success or return of a base policy."""
    result = result_of(where / "eval_zero")
    rate = result["success_rate"]
    return f"{result['return_mean']:.4g}" if rate is None else f"{rate:.1%}"


def text(result: dict) -> str:
    """For people."""
    lines = [f"{'task':<12} {'algorithm':<28} seed  success  return"]
    for row in result["rows"]:
        rate = "" if row["success_rate"] is None else f"{row['success_rate']:.1%}"
        lines.append(
            f"{row['task']:<12} {row['algorithm']:<28} {row['seed']:<5} {rate:<8} {row['return_mean']:.4g}"
        )
    return "\n".join([*lines, f"page: {result['page']}"])

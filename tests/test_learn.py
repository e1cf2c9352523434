"""`bench learn`: what a study comes to, and how it goes on after an interruption."""

import dataclasses
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flow_policy_rl import cli, progress, train_run
from flow_policy_rl.bench import learn, stages
from flow_policy_rl.bench.studies import STUDIES, Budget, Variant
from flow_policy_rl.errors import InputError, RunFailed
from flow_policy_rl.presets import PRESETS
from flow_policy_rl.run_folder import claimed, state_file


def words(stage: stages.Stage) -> str:
    return " ".join(stage.command)


@pytest.mark.parametrize("study", STUDIES)
def test_every_command_of_every_study_parses(study, tmp_path, monkeypatch):
    """All flags exist: the command line accepts each command up to the point where it would run."""
    ran = []
    monkeypatch.setattr(cli, "parse_train", checked(cli.parse_train, ran))
    config = learn.Config(study=study, seeds=1, out=tmp_path)
    _, cells, missing = learn.plan(config)
    assert cells
    assert set(missing).isdisjoint({c.task for c in cells})
    for cell in cells:
        for stage in cell.stages:
            if stage.command[0] == "train":
                cli.parse_train(list(stage.command[1:]), None)
    assert ran


@pytest.mark.parametrize("study", STUDIES)
def test_every_training_goes_on_from_the_state_in_its_own_folder(study, tmp_path):
    """One that begins anew in a folder with a trained policy is refused, and the study with it."""
    _, cells, _ = learn.plan(learn.Config(study=study, seeds=1, out=tmp_path))
    trained = [s for cell in cells for s in cell.stages if s.command[0] == "train"]
    assert trained
    for stage in trained:
        run_dir = Path(stage.command[stage.command.index("--run-dir") + 1])
        assert stage.state == state_file(run_dir)


def test_help_names_every_study(capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", "learn", "--help"])
    said = capsys.readouterr().out
    assert [name for name in STUDIES if name not in said] == []


def checked(parse, ran):
    def call(*arguments):
        ran.append(arguments)
        return parse(*arguments)

    return call


def test_everybody_of_a_task_and_seed_starts_from_the_same_file(tmp_path):
    _, cells, _ = learn.plan(
        learn.Config(study="manipulation", tasks=("lift",), seeds=2, out=tmp_path)
    )
    for seed in (0, 1):
        mine = [c for c in cells if c.seed == seed]
        assert len({c.label for c in mine}) == len(mine) == len(STUDIES["manipulation"].variants)
        trainings = [
            stage.command for c in mine for stage in c.stages if stage.name == c.dir / "train"
        ]
        starts = {value(command, "--checkpoint") for command in trainings}
        assert starts == {str(tmp_path / f"bases/lift-{seed}/base/policy.safetensors")}
    assert all(
        "--checkpoint" not in words(c.stages[0])
        for c in learn.plan(learn.Config(study="from-scratch", tasks=("hopper",), out=tmp_path))[1]
    )


def value(command, flag: str) -> str:
    """What a command gives a flag; the last one wins."""
    return command[len(command) - command[::-1].index(flag)]


def test_a_variant_with_a_base_policy_of_its_own_shares_demonstrations_only(tmp_path):
    """Other flow steps or another execute horizon: imitated apart from the same demonstrations, trained as long."""
    config = learn.Config(study="ablations", seeds=1, out=tmp_path)
    study, cells, _ = learn.plan(config)
    cell = {c.label: c for c in cells}

    def commands(label, name):
        return [s.command for s in cell[label].stages if s.name.name == name]

    usual, other = "score_flow", ("score_flow, 8 flow steps", "score_flow, 4 of 12 executed")
    for label in other:
        assert commands(label, "collect") == commands(usual, "collect")
        imitated, trained = commands(label, "imitate")[0], commands(label, "train")[0]
        assert value(imitated, "--demos") == value(commands(usual, "imitate")[0], "--demos")
        assert value(trained, "--checkpoint").startswith(value(imitated, "--run-dir"))
        assert value(trained, "--checkpoint") != value(commands(usual, "train")[0], "--checkpoint")
    assert value(commands(other[0], "imitate")[0], "--num-flow-steps") == "8"
    assert value(commands(other[1], "imitate")[0], "--execute-horizon") == "4"
    iterations = [
        int(value(commands(label, "train")[0], "--ppo.num-iterations"))
        for label in (usual, other[1])
    ]
    assert iterations[1] == pytest.approx(2 * iterations[0], abs=1)  # chunks half as long
    late = [value(s.command, "--inference-delay") for s in cell[usual].stages[-2:]]
    assert late == ["1", "2"] == [str(n) for n in study.delays]


def test_what_a_study_trains_a_task_with_reaches_every_row_and_no_evaluation(tmp_path):
    for cell in learn.plan(
        learn.Config(tasks=("lift", "insert", "one_leg"), seeds=1, out=tmp_path)
    )[1]:
        limits = ["--time-limit" in stage.command for stage in cell.stages]
        trains = [
            stage.command[0] == "train" and "bc" not in stage.command for stage in cell.stages
        ]
        assert limits == [cell.task != "lift" and t for t in trains]


@pytest.mark.parametrize("study", STUDIES)
def test_no_two_rows_of_a_task_are_the_same_training(study, tmp_path):
    """A row whose only change is what the task's preset has anyway costs its hours for nothing."""
    rows: dict[tuple, str] = {}
    for cell in learn.plan(learn.Config(study=study, seeds=1, out=tmp_path))[1]:
        command = next(s.command for s in cell.stages if str(cell.dir) in s.command)
        _, config = cli.parse_train(list(command[1:]), None)
        settings = repr(dataclasses.replace(config, run_dir=None))
        assert rows.setdefault((command[1], settings), cell.label) == cell.label


def test_where_less_of_a_chunk_is_executed_rollouts_are_shorter_and_more(tmp_path):
    config = learn.Config(
        tasks=("lift", "kitchen"),
        variants=("score_flow",),
        seeds=1,
        out=tmp_path,
        env_steps=400_000,
    )
    iterations = {}
    for cell in learn.plan(config)[1]:
        imitate, train = (s.command for s in cell.stages if s.command[0] == "train")
        horizon = int(value(imitate, "--execute-horizon"))
        iterations[horizon] = int(value(train, "--ppo.num-iterations"))
    assert sorted(iterations) == [4, 8]
    assert iterations[4] == pytest.approx(2 * iterations[8], abs=1)


def test_fewer_looks_change_how_often_a_cell_is_judged_and_nothing_else(tmp_path):
    plain, fewer = (
        learn.plan(
            learn.Config(tasks=("lift",), variants=("fpo",), seeds=1, out=tmp_path, points=points)
        )[1][0].stages
        for points in (None, 6)
    )
    for one, other in zip(plain, fewer, strict=True):
        changed = {(a, b) for a, b in zip(one.command, other.command, strict=True) if a != b}
        assert changed == ({("1", "3")} if one.command[:2] == ("train", "fpo") else set())


def test_training_is_as_long_as_the_budget_says():
    """Whatever the flags of a row say about its rollouts."""
    for arguments, chunks in (
        (("rldt",), None),
        (("fpo_plus_plus", "--ppo.num-envs", "10", "--ppo.num-steps", "25"), 250),
        (("score_flow", "--preset", "paper"), 50 * 300),
    ):
        arguments = (*arguments, "--task", "lift", "--checkpoint", "base")
        flags = learn.training_length(arguments, 1_000_000, 8, 10)
        iterations = int(flags[1])
        loop = cli.parse_train([*arguments, *flags], None)[1].loop
        assert loop.num_iterations == iterations
        assert chunks in (None, loop.num_envs * loop.num_steps)
        steps = iterations * loop.num_envs * loop.num_steps * 8
        assert steps == pytest.approx(1_000_000, rel=0.05)
        assert int(flags[3]) == max(1, iterations // 10)


def python(code: str, name: Path, **kwargs) -> stages.Stage:
    return stages.Stage(("-c", code), name, **kwargs)


@pytest.fixture
def plain_python(monkeypatch):
    """Stages run python code in place of a command."""
    real = subprocess.Popen

    def start(command, **options):
        return real([sys.executable, *command[3:]], **options)

    monkeypatch.setattr(stages.subprocess, "Popen", start)


def test_a_stage_runs_once_goes_on_from_its_state_and_names_its_failure(tmp_path, plain_python):
    code = "import sys; print('{\"n\": 1}'); open(sys.argv[-1] if 0 else 'count', 'a').write('x')"
    count = tmp_path / "count"
    code = f"print('{{\"n\": 1}}'); open({str(count)!r}, 'a').write('x')"
    stage = python(code, tmp_path / "a")
    stages.run_stage(stage, stages.Running())
    stages.run_stage(stage, stages.Running())
    assert count.read_text() == "x"
    assert stages.result_of(tmp_path / "a") == {"n": 1}

    resumed = python("import sys; print(sys.argv[1:])", tmp_path / "b", state=count)
    stages.run_stage(resumed, stages.Running())
    assert "--resume" in (tmp_path / "b.json").read_text()

    failing = python("raise SystemExit('no such joint')", tmp_path / "c")
    with pytest.raises(RunFailed, match="no such joint"):
        stages.run_stage(failing, stages.Running())
    assert not (tmp_path / "c.done").exists()
    idle = python("1 / 0", tmp_path / "d", needs=tmp_path / "absent")
    stages.run_stage(idle, stages.Running())  # nothing to do

    out = tmp_path / "out"  # left by a run that was killed before it was written down
    out.touch()
    careful = python(f"open({str(out)!r}, 'x')", tmp_path / "f", output=out)
    stages.run_stage(careful, stages.Running())

    diverging = python("1 / 0", tmp_path / "e", diverged=tmp_path / "failed-0.safetensors")
    with pytest.raises(RunFailed, match="ZeroDivisionError"):
        stages.run_stage(diverging, stages.Running())  # failed, but not because it diverged
    diverging.diverged.touch()
    with pytest.raises(RunFailed, match="ZeroDivisionError"):
        stages.run_stage(diverging, stages.Running())  # before there was anything to judge
    (tmp_path / "policy.safetensors").touch()
    stages.run_stage(diverging, stages.Running())
    assert (tmp_path / "e.done").exists()


def test_what_cells_share_runs_once_and_a_failure_stops_only_what_needs_it(
    tmp_path, plain_python, capsys
):
    """Two jobs: each has cores of its own, if there are two."""
    jobs = min(2, len(os.sched_getaffinity(0)))
    ran = tmp_path / "ran"
    base = python(f"open({str(ran)!r}, 'a').write('x')", tmp_path / "base")
    broken = python("raise SystemExit('no such joint')", tmp_path / "broken")
    meet = tmp_path / "meet"  # as many at once as there are jobs
    meet.mkdir()
    cores = f"""
import os, tempfile, time
tempfile.mkstemp(dir={str(meet)!r})
while len(os.listdir({str(meet)!r})) < {jobs}:
    time.sleep(0.01)
print(sorted(os.sched_getaffinity(0)))
"""
    chains = {
        str(number): (broken if number == 1 else base, python(cores, tmp_path / f"{number}/train"))
        for number in range(4)
    }
    chains["4"] = chains["1"]  # needs what failed already
    failures = stages.run_chains(chains, jobs, "study")
    assert len(failures) == 1
    assert "no such joint" in failures[0]
    assert capsys.readouterr().err.count("failed: ") == 1
    assert ran.read_text() == "x"
    used = [(tmp_path / f"{n}/train.json").read_text() for n in (0, 2, 3)]
    assert len(set(used)) == jobs
    assert not (tmp_path / "1").exists()


def test_progress_tells_what_each_command_said_last(tmp_path, plain_python, capsys, monkeypatch):
    monkeypatch.setattr(stages, "LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    read = tmp_path / "read"  # the command goes on until it was shown
    code = f"""
import os, sys, time
print("first\\ntrain fpo: 3/9 it", file=sys.stderr, flush=True)
while not os.path.exists({str(read)!r}):
    time.sleep(0.01)
"""
    shown = stages.last_line

    def last_line(stage):
        line = shown(stage)
        if "3/9" in line:
            read.touch()
        return line

    monkeypatch.setattr(stages, "last_line", last_line)
    chains = {"hopper-fpo-0": (python(code, tmp_path / "cell"),), "done": ()}
    stages.run_chains(chains, 1, "study")
    lines = capsys.readouterr().err.splitlines()
    assert re.match(r"study: 1/2 cell, after \d+ s", lines[0])  # nothing is known of the pace yet
    assert any("hopper-fpo-0: train fpo: 3/9 it" in line for line in lines)
    assert lines[-1].startswith("study: 2/2 cell")


def test_what_a_command_said_in_an_earlier_run_is_not_shown_as_its_own(tmp_path, plain_python):
    stage = python(
        "import sys; sys.exit('interrupted' if len(sys.argv) == 1 else 2)", tmp_path / "cell"
    )
    stage = dataclasses.replace(stage, state=tmp_path / "state")
    with pytest.raises(RunFailed, match="interrupted"):
        stages.run_stage(stage, stages.Running())
    stage.state.touch()  # from here on it resumes, and says nothing
    with pytest.raises(RunFailed, match="--resume: exit code 2"):
        stages.run_stage(stage, stages.Running())
    assert stages.last_line(stage) == ""
    begun = [line for line in (tmp_path / "cell.log").read_text().splitlines() if "$" in line]
    assert [line.endswith("--resume") for line in begun] == [False, True]


def test_nothing_begins_after_a_stop(tmp_path, plain_python):
    running = stages.Running()
    running.stop()
    with pytest.raises(KeyboardInterrupt):
        stages.run_stage(python("", tmp_path / "late"), running)
    assert not (tmp_path / "late.done").exists()


def test_an_interrupted_command_stops_the_study_and_is_no_failure(tmp_path, plain_python, capsys):
    chains = {
        "0": (python("raise SystemExit(130)", tmp_path / "a"),),
        "1": (python("", tmp_path / "b"),),
    }
    with pytest.raises(KeyboardInterrupt):
        stages.run_chains(chains, 1, "study")
    assert "failed" not in capsys.readouterr().err
    assert not (tmp_path / "a.done").exists()


@pytest.mark.parametrize(
    ("number", "background"),
    [(signal.SIGINT, False), (signal.SIGTERM, False), (signal.SIGTERM, True)],
)
def test_a_study_that_is_stopped_stops_what_it_runs(number, background, tmp_path):
    """Also where only the study is told, as `kill` and service managers do, and as a script's background job, which
    ignores SIGINT.
    """
    command = [sys.executable, "-m", "flow_policy_rl.cli", "bench", "learn"]
    command += ["--tasks", "insert", "--seeds", "1", "--budget", "small", "--out", str(tmp_path)]
    ignore = lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)  # noqa: E731
    study = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, preexec_fn=ignore if background else None
    )
    log = tmp_path / "bases/insert-0/collect.log"
    try:
        while not log.exists():  # its first command runs, for seconds
            assert study.poll() is None
            time.sleep(0.05)
        study.send_signal(number)
        _, said = study.communicate(timeout=60)
    finally:
        study.kill()
    assert study.returncode == 130
    assert said.strip().splitlines()[-1] == "interrupted"
    assert not log.with_suffix(".done").exists()


def test_what_a_killed_study_ran_ends_too(tmp_path):
    """A study begun by a process that gets SIGKILL: it ends as after Ctrl-C, and so does what it runs."""
    study = ("bench", "learn", "--tasks", "insert", "--seeds", "1", "--budget", "small")
    study += ("--out", str(tmp_path))
    begin = f"import sys; from flow_policy_rl.bench.stages import Running; Running().begin({study}, sys.stdout).wait()"
    parent = subprocess.Popen([sys.executable, "-c", begin], stdout=subprocess.PIPE, text=True)
    log = tmp_path / "bases/insert-0/collect.log"
    while not log.exists():
        assert parent.poll() is None
        time.sleep(0.05)
    parent.kill()
    said, _ = parent.communicate(timeout=60)  # until the study has closed its end
    assert said.strip().splitlines()[-1] == "interrupted"
    assert not log.with_suffix(".done").exists()
    with claimed(tmp_path):
        pass


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"jobs": 10_000}, "--jobs must be 1 to"),
        ({"points": 0}, "--points must be at least 1"),
        ({"env_steps": -1}, "--env-steps must be at least 1, not -1"),
        ({"study": "manipulaton"}, "did you mean 'manipulation'"),
        ({"tasks": ("hopper",)}, "unknown task of the study 'hopper'"),
        ({"variants": ("ppo",)}, "unknown variant of the study 'ppo'"),
        (
            {"study": "locomotion", "tasks": ("ant",), "variants": ("score_flow, KL limit 0.1",)},
            "--variants 'score_flow, KL limit 0.1' is a row of humanoid only, not of ant",
        ),
        ({"seeds": 0}, "--seeds must be at least 1"),
    ],
)
def test_bad_input_is_refused(wrong, says):
    with pytest.raises(InputError, match=says):
        learn.plan(learn.Config(**wrong))


def test_two_budgets_do_not_mix_in_one_folder(tmp_path):
    learn.begin(tmp_path, learn.Config(budget="small"))
    learn.begin(tmp_path, learn.Config(budget="small", seeds=9))
    with pytest.raises(InputError, match="settings: budget small there, full here; choose another"):
        learn.begin(tmp_path, learn.Config(budget="full"))


def test_what_a_power_cut_left_is_named_with_the_way_out(tmp_path):
    (tmp_path / "study.json").write_text('{"study": "lo')
    with pytest.raises(
        InputError, match=r"'.*study.json' is not whole: remove '.*study.json', and"
    ):
        learn.begin(tmp_path, learn.Config())
    (tmp_path / "eval_zero.json").write_text('{"success_rate": 0.')
    with pytest.raises(
        InputError, match=r"eval_zero.json' is not whole: remove '.*eval_zero.done'"
    ):
        stages.result_of(tmp_path / "eval_zero")


def test_a_page_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(learn, "run_chains", lambda *_: pytest.fail("days of work were begun"))
    with pytest.raises(InputError, match="is a folder"):
        learn.main(learn.Config(out=tmp_path / "study", page=tmp_path))


def test_a_training_of_another_recipe_is_not_kept(tmp_path):
    """A preset or a study that has changed since would stand on a page that prints today's command."""
    run_dir = tmp_path / "cells/hopper-fpo-0"
    command = ("train", "fpo", "--task", "hopper", "--ppo.num-iterations", "3", "--eval-every", "2")
    stage = learn.training(command, run_dir)
    cell = learn.Cell("hopper", "fpo", 0, run_dir, None, (stage,), None)
    learn.check_recipes([cell])  # nothing was run yet
    _, config = cli.parse_train(list(stage.command[1:]), None)
    run_dir.mkdir(parents=True)
    train_run.begin_run(config)
    stage.name.with_suffix(".done").touch()
    learn.check_recipes([cell])
    more = learn.training((*command[:-1], "1", "--ppo.num-iterations", "5"), run_dir)
    learn.check_recipes([dataclasses.replace(cell, stages=(more,))])  # these may change
    wider = learn.training((*command, "--ppo.clip-range", "0.3"), run_dir)
    with pytest.raises(
        InputError, match=r"other settings: ppo.clip_range 0.1 \(now 0.3\); remove '.*hopper-fpo-0'"
    ):
        learn.check_recipes([dataclasses.replace(cell, stages=(wider,))])


def test_demonstrations_and_evaluations_of_another_recipe_are_not_kept(tmp_path):
    plain = ("collect", "--task", "one_leg")
    noisy = (*plain, "--noise", "0.03", "--out", str(tmp_path / "d.hdf5"))
    stage = stages.Stage(noisy, tmp_path / "collect")
    stage.name.with_suffix(".log").write_text("collect: 64/300 episode, 3.1/s\n")
    stage.name.with_suffix(".done").touch()
    cell = learn.Cell("hopper", "fpo", 0, tmp_path, None, (stage,), None)
    learn.check_recipes([cell])  # of a study that did not write its commands down
    said = f"{stages.BEGUN}flow-policy {shlex.join((*noisy[:-1], '/before/it moved/d.hdf5'))}\n"
    stage.name.with_suffix(".log").write_text(said)
    learn.check_recipes([cell])
    for command, says in (
        ((*plain, "--noise", "0.02"), r"--noise 0.03 \(now 0.02\); remove"),
        (plain, r"--noise 0.03 \(now not given\); remove"),
        ((*noisy, "--cameras"), r"--cameras not given \(now given\)"),
        (("collect", "--task", "two legs", *noisy[3:]), r"--task one_leg \(now 'two legs'\)"),
    ):
        other = dataclasses.replace(stage, command=command)
        with pytest.raises(InputError, match=f"collect' was made with other settings: .*{says}"):
            learn.check_recipes([dataclasses.replace(cell, stages=(other,))])


def test_two_runs_of_a_study_do_not_write_into_one_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(learn, "run_chains", lambda *_: ["it ran"])
    with claimed(tmp_path), pytest.raises(InputError, match="choose another --out"):
        learn.main(learn.Config(out=tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_threshold_is_above_what_the_demonstrating_policy_stops_at():
    """Else a base policy has it before anybody has learned."""
    for study in STUDIES.values():
        for task, skill in (study.base.skill if study.base else {}).items():
            assert learn.by_task(study.threshold, task) > skill, task


@pytest.mark.parametrize("from_scratch", [True, False])
def test_on_policy_algorithms_look_equally_far_ahead(from_scratch):
    """Another discount is another objective, and no comparison."""
    names = ("score_flow", "reinflow", "fpo", "fpo_plus_plus", "gaussian_ppo")
    for task in STUDIES["locomotion"].tasks:
        settings = [PRESETS[name](task, "clean", from_scratch) for name in names]
        assert len({each["ppo"].gamma for each in settings}) == 1


@pytest.mark.slow
def test_a_study_runs_from_nothing_to_its_page(tmp_path, monkeypatch, capsys):
    small = (
        *("--rldt.num-envs", "4", "--rldt.num-blocks", "2", "--rldt.critic-warmup", "1"),
        *("--rldt.segments-per-block", "4", "--rldt.num-steps", "4"),
    )
    study = dataclasses.replace(
        STUDIES["manipulation"],
        tasks=("lift", "no_such_task"),
        variants={"rldt": Variant("rldt", small)},
        tiny=Budget(2_000, episodes=3, points=2, imitation_steps=20),
    )
    monkeypatch.setitem(STUDIES, "manipulation", study)
    flags = ["bench", "learn", "--budget", "tiny", "--seeds", "1", "--out", str(tmp_path), "--json"]
    assert cli.main(flags) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["study"] == "manipulation"
    assert len(result["rows"]) == 1
    page = (tmp_path / "README.md").read_text()
    assert "no_such_task" in page
    stamps = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.done")}
    # Collect, imitate, three evaluations (raw weights); train, three evaluations (the best look).
    assert len(stamps) == 9
    assert cli.main(flags) == 0
    assert stamps == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.done")}

"""Where results go: a place that cannot take them is refused before the work, and what is there already is not lost."""

import contextlib
import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
import weakref
from pathlib import Path

import numpy as np
import pytest
from toys import small_policy

from flow_policy_rl import checkpoint, cli
from flow_policy_rl.data import robomimic
from flow_policy_rl.data.demonstrations import DemoLayout, Demonstrations, Episode
from flow_policy_rl.errors import RunFailed
from flow_policy_rl.progress import Progress
from flow_policy_rl.run_folder import claimed
from sim.tasks import make_task


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with small demonstrations, a checkpoint and a trained run."""
    folder = tmp_path_factory.mktemp("place")
    layout = DemoLayout.of_task(make_task("reach"))
    rng = np.random.default_rng(0)
    obs = {f.name: rng.standard_normal((20, f.size)) for f in layout.observations}
    episode = Episode(obs, np.zeros((20, len(layout.joint_names))), np.ones(20), np.zeros((20, 1)))
    robomimic.save(folder / "demos.hdf5", Demonstrations(layout, [episode], {}))
    assert cli.main(training(folder, "run")) == 0
    checkpoint.save(folder / "policy.safetensors", small_policy())
    return folder


def training(folder: Path, name: str | Path, *more: str) -> list[str]:
    line = f"train bc --task reach --demos {folder}/demos.hdf5 --run-dir {folder / name}"
    return [*line.split(), "--bc.num-steps=2", "--bc.batch-size=8", "--network.width=8", *more]


def contents(folder) -> dict[str, bytes]:
    files = [p for p in folder.rglob("*") if p.is_file() and "tensorboard" not in p.parts]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


WRITES_A_FILE = {
    "collect": "collect --task reach --episodes 1 --out {out}.hdf5",
    "export": "export --checkpoint {here}/policy.safetensors --out {out}.onnx",
    "report": "report --run-dir {here}/run --out {out}.html",
    "bench": "bench serve --out {out}.html",
    "rerun": "eval --policy lift --episodes 1 --rerun {out}.rrd",
    "convert": "convert --input {here}/demos.hdf5 --output {out}.hdf5",
}
WRITES_A_FOLDER = {
    "train": "train bc --task reach --demos {here}/demos.hdf5 --run-dir {out}",
    "eval": "eval --policy lift --episodes 1 --out {out}",
    "replay": "replay --bag none --policy lift --out {out}",
    "demo": "demo --run-dir {out}",
    "convert to a folder": "convert --input {here}/demos.hdf5 --output {out}",
}


def refused(capsys, line: str, **names) -> str:
    code = cli.main(line.format(**names).split())
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert err.startswith("error: ")
    return err


@pytest.mark.parametrize("line", [*WRITES_A_FILE.values(), *WRITES_A_FOLDER.values()])
def test_a_place_that_cannot_take_the_result_is_refused_at_once(place, tmp_path, capsys, line):
    if "--rerun" in line:
        pytest.importorskip("rerun", reason="needs rerun-sdk (extra `rerun`)")
    (tmp_path / "file").write_text("mine")
    above = refused(capsys, line, here=place, out=tmp_path / "file" / "x")
    assert "a file is in the way" in above
    assert "/file" in above
    assert "cannot be made" in refused(capsys, line, here=place, out="/proc/none/x")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("line", WRITES_A_FILE.values())
def test_a_folder_is_no_file(place, tmp_path, capsys, line):
    (tmp_path / f"x{line.rpartition('{out}')[2]}").mkdir()
    assert refused(capsys, line, here=place, out=tmp_path / "x")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("collect --task reach --episodes 1 --out x.pkl", "must end in .hdf5 or .h5"),
        ("convert --input {here}/demos.hdf5 --output {here}/x.pkl", "is a robomimic file"),
        ("collect --task reach --episodes 1 --noise -1 --out x.hdf5", "--noise must be at least 0"),
        ("export --checkpoint {here}/run/policy.safetensors --out x.txt", "must end in .onnx"),
        ("report --run-dir {here}/run --out x.pdf", "must end in .html"),
        ("bench serve --out x.pdf", "must end in .html"),
        ("bench sim --growth --out x.pdf", "must end in .html"),
        ("eval --policy nothing", "; by name there are: lift, lift_camera"),
        ("eval --policy lfit", "(did you mean 'lift'?)"),
        ("inspect lift_camra", "(did you mean 'lift_camera'?)"),
        ("eval --policy {here}/run", "not a file, but a folder with: "),
        ("train bc --task reach --demos {here}/demo.hdf5", "(did you mean 'demos.hdf5'?)"),
    ],
)
def test_what_was_meant(place, capsys, line, says):
    assert says in refused(capsys, line, here=place)


@pytest.mark.parametrize(
    "line",
    [
        "eval --policy lift",
        "collect --task reach --out x.hdf5",
        "train bc --task reach --demos x",
        "train fpo --task reach",
        "demo",
        "replay --bag x --policy lift",
        "bench sim",
    ],
)
def test_no_seed_is_negative(capsys, line):
    assert "--seed must be at least 0, not -1" in refused(capsys, f"{line} --seed -1")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("bc --bc.num-steps 0", "bc.num_steps must be at least 1, not 0"),
        ("bc --bc.batch-size 0", "bc.batch_size must be at least 1, not 0"),
        ("bc --bc.learning-rate nan", "bc.learning_rate must be more than 0 and finite, not nan"),
        ("bc --bc.ema-decay 2", "bc.ema_decay must be from 0 to less than 1, not 2.0"),
        ("bc --bc.held-out 1", "bc.held_out must be from 0 to less than 1, not 1.0"),
        ("bc --network.depth -1", "network.depth must be at least 1, not -1"),
        ("fpo --scratch.network.width 0", "network.width must be at least 1, not 0"),
        ("fpo --ppo.actor-learning-rate -1", "ppo.actor_learning_rate must be more than 0"),
        ("fpo --ppo.critic-learning-rate inf", "ppo.critic_learning_rate must be more than 0"),
        ("fpo --ppo.clip-range -1", "ppo.clip_range must be more than 0 and finite, not -1.0"),
        ("fpo --ppo.gamma 1.5", "ppo.gamma must be from 0 to less than 1, not 1.5"),
        ("fpo --ppo.gae-lambda 3", "ppo.gae_lambda must be from 0 to 1, not 3.0"),
        ("fpo --ppo.ema-decay 1.5", "ppo.ema_decay must be from 0 to less than 1, not 1.5"),
        ("fpo --fpo.temperature 0", "fpo.temperature must be more than 0 and finite, not 0.0"),
        ("fpo --fpo.action-noise -1", "fpo.action_noise must be at least 0 and finite, not -1.0"),
        ("score_flow --score-flow.sigma-min 0", "score_flow.sigma_min must be more than 0"),
        ("score_flow --score-flow.sigma-max inf", "score_flow.sigma_max must be more than 0"),
        ("score_flow --score-flow.sigma-min 1", "score_flow: need sigma_min < sigma_max, not 1.0"),
        ("score_flow --score-flow.sigma-hold 1", "score_flow.sigma_hold must be from 0 to less"),
        ("score_flow --score-flow.sigma-decay 2", "score_flow.sigma_decay must be from 0 to 1"),
        ("score_flow --score-flow.start-noise nan", "score_flow.start_noise must be at least 0"),
        ("score_flow --score-flow.head-learning-rate -1", "score_flow.head_learning_rate must be"),
        (
            "score_flow --score-flow.drift fixed --score-flow.fixed-gain nan",
            "score_flow.fixed_gain must be positive",
        ),
        ("gaussian_ppo --gaussian.sigma-min 0", "gaussian.sigma_min must be more than 0"),
        ("gaussian_ppo --gaussian.sigma-min 1", "gaussian: need sigma_min <= sigma_max, not 1.0"),
        ("gaussian_ppo --gaussian.sigma-learning-rate nan", "gaussian.sigma_learning_rate must be"),
        ("rldt --rldt.gamma 2", "rldt.gamma must be from 0 to less than 1, not 2.0"),
        ("rldt --rldt.actor-learning-rate -1", "rldt.actor_learning_rate must be more than 0"),
        ("rldt --rldt.critic.depth 0", "rldt.critic.depth must be at least 1, not 0"),
        # A negative norm turns gradients round, one of 0 takes them away.
        ("fpo --ppo.max-grad-norm -1", "ppo.max_grad_norm must be more than 0 (inf: none), not -1"),
        ("rldt --rldt.max-grad-norm 0", "rldt.max_grad_norm must be more than 0 (inf: none)"),
        ("fpo --ppo.target-kl 0", "ppo.target_kl must be more than 0 (inf: none), not 0.0"),
        ("fpo --ppo.learning-rate-floor -1", "ppo.learning_rate_floor must be from 0 to 1"),
        ("fpo --ppo.learning-rate-cycle -1", "ppo.learning_rate_cycle must be at least 0"),
        ("bc --bc.weight-decay -1", "bc.weight_decay must be at least 0 and finite, not -1.0"),
        ("rldt --rldt.constraint-coef nan", "rldt.constraint_coef must be at least 0 and finite"),
        ("rldt --rldt.transport.bandwidth 0", "rldt.transport.bandwidth must be more than 0"),
        (
            "rldt --rldt.critic.value-low 2 --rldt.critic.value-high 1",
            "rldt.critic: need value_low < value_high, not 2 and 1",
        ),
    ],
)
def test_settings_without_sense_are_refused(tmp_path, capsys, flags, says):
    demos = "--demos x" if flags.startswith("bc") else ""
    said = refused(
        capsys, f"train {flags} --task lift --run-dir {{out}} {demos}", out=tmp_path / "run"
    )
    assert said.startswith(f"error: {says}")
    assert not (tmp_path / "run").exists()


def test_where_no_episode_can_be_held_out_progress_says_so(place, tmp_path, monkeypatch):
    notes = []
    monkeypatch.setattr(Progress, "reach", lambda self, step, note, metrics: notes.append(note))
    for name, more in (("few", ()), ("none", ("--bc.held-out", "0"))):
        assert cli.main([*training(place, tmp_path / name), *more]) == 0
    assert re.fullmatch(
        r"training loss \d+\.\d{3} \(too few episodes to hold any out: 1\)", notes[0]
    )
    assert re.fullmatch(r"training loss \d+\.\d{3}", notes[1])


def test_a_trained_policy_is_not_overwritten(place, capsys):
    before = contents(place / "run")
    assert "holds a trained policy already" in refused(capsys, " ".join(training(place, "run")))
    assert contents(place / "run") == before


def test_a_training_that_is_not_over_is_not_begun_afresh_over_its_state(place, tmp_path, capsys):
    shutil.copy(place / "run" / "state.safetensors", tmp_path)
    before = contents(tmp_path)
    line = " ".join(training(place, tmp_path))
    assert "holds a training that is not over: go on with --resume" in refused(capsys, line)
    assert contents(tmp_path) == before


def test_a_refused_resumption_changes_nothing(place, capsys):
    before = contents(place / "run")
    line = training(place, "run", "--resume", "--seed", "4")
    assert "run with other settings: seed" in refused(capsys, " ".join(line))
    assert contents(place / "run") == before


@pytest.mark.parametrize("line", [WRITES_A_FOLDER["train"], WRITES_A_FOLDER["demo"]])
def test_a_folder_belongs_to_one_run_at_a_time(place, tmp_path, capsys, line):
    with claimed(tmp_path):
        assert "another run is writing" in refused(capsys, line, here=place, out=tmp_path)
    with claimed(tmp_path):  # free again
        pass


def test_a_folder_that_nothing_was_written_to_is_left_as_it_was(place, tmp_path, capsys):
    line = training(place, "fresh/runs/bc", "--task", "lift")  # found out after it was made
    assert "have task reach; task 'lift' has lift" in refused(capsys, " ".join(line))
    assert not (place / "fresh").exists()
    (place / "mine").mkdir()
    line = training(place, "mine/runs/bc", "--task", "lift")
    refused(capsys, " ".join(line))
    assert not list((place / "mine").iterdir())
    (place / "mine").rmdir()
    with claimed(tmp_path):  # somebody else's
        pass
    assert tmp_path.is_dir()
    with claimed(tmp_path / "used"):
        (tmp_path / "used" / "metrics.csv").touch()
    assert (tmp_path / "used" / "metrics.csv").is_file()


def test_a_full_disk_is_one_line_and_leaves_nothing_behind(tmp_path):
    """The system refuses files of over 60 kB, as it would a file on a full disk; HDF5 alone would crash."""
    line = "ulimit -f 60 && exec $0 -m flow_policy_rl.cli collect --task reach --episodes 20 --out x.hdf5"
    done = subprocess.run(
        ["bash", "-c", line, sys.executable], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "failed: 'x.hdf5' cannot be written: File too large"
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_that_does_not_fit_leaves_the_old_one(tmp_path, monkeypatch):
    from safetensors import SafetensorError

    from flow_policy_rl import tensor_file

    path = tmp_path / "policy.safetensors"
    checkpoint.save(path, small_policy())
    before = path.read_bytes()

    def full(tensors, partial, metadata):
        partial.write_bytes(b"half")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(tensor_file, "save_file", full)
    with pytest.raises(RunFailed, match="cannot be written: No space left"):
        checkpoint.save(path, small_policy())
    assert contents(tmp_path) == {path.name: before}


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("Buffer dtype mismatch"), ""),
        (OSError("Can't read data"), "failed: Can't read data\n"),
    ],
)
def test_ctrl_c_stays_one_whatever_compiled_code_makes_of_it(error, said, capsys, monkeypatch):
    def work(config):
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            raise error from None

    monkeypatch.setattr("flow_policy_rl.listing.main", work)
    handler = signal.getsignal(signal.SIGINT)
    assert cli.main(["list"]) == 130
    assert capsys.readouterr().err == f"{said}interrupted\n"
    assert signal.getsignal(signal.SIGINT) is handler


def test_ctrl_c_that_python_drops_comes_again(capsys, monkeypatch):
    """What is raised in the callback of a weak reference goes nowhere, and imports have such callbacks."""
    finished = []

    def work(config):
        owner = set()
        reference = weakref.ref(owner, lambda _: os.kill(os.getpid(), signal.SIGINT))
        del owner
        assert reference() is None
        time.sleep(30)
        finished.append(True)

    monkeypatch.setattr("flow_policy_rl.listing.main", work)
    hook = sys.unraisablehook
    assert cli.main(["list"]) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert not finished
    assert sys.unraisablehook is hook


class InterruptedImport:
    """An importer for one module: Ctrl-C comes while it is looked for."""

    def find_spec(self, name, path=None, target=None):
        if name == "never_there":
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_that_an_import_swallows_comes_again(capsys, monkeypatch):
    """What compiled modules import loses it, as numpy's within torch."""
    monkeypatch.setattr(sys, "meta_path", [InterruptedImport(), *sys.meta_path])
    finished = []

    def work(config):
        with contextlib.suppress(KeyboardInterrupt):
            importlib.import_module("never_there")
        time.sleep(30)
        finished.append(True)

    monkeypatch.setattr("flow_policy_rl.listing.main", work)
    assert cli.main(["list"]) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert not finished


def test_ctrl_c_within_an_import_does_not_come_again_while_a_command_cleans_up(capsys, monkeypatch):
    monkeypatch.setattr(sys, "meta_path", [InterruptedImport(), *sys.meta_path])
    clean = []

    def work(config):
        try:
            importlib.import_module("never_there")
        finally:
            time.sleep(0.3)
            clean.append(True)

    monkeypatch.setattr("flow_policy_rl.listing.main", work)
    assert cli.main(["list"]) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert clean


def test_ctrl_c_within_executed_text_is_exit_code_130(tmp_path):
    """CPython would end `python -m` by the signal, although the exception was caught."""
    (tmp_path / "interrupted.py").write_text(
        "import os, signal, sys\n"
        "from flow_policy_rl import cli, listing\n"
        "listing.main = lambda config: exec('os.kill(os.getpid(), signal.SIGINT)')\n"
        "sys.exit(cli.main(['list']))\n"
    )
    command = [sys.executable, "-m", "interrupted"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_errors_of_the_system_are_one_line(capsys, monkeypatch):
    module = types.SimpleNamespace(main=lambda config: open("/nowhere/x", "w"))  # noqa: SIM115
    monkeypatch.setattr("flow_policy_rl.listing.main", module.main)
    assert cli.main(["list"]) == 1
    assert capsys.readouterr().err == "failed: No such file or directory: '/nowhere/x'\n"

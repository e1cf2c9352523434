"""The command line as scripts and people meet it: one clear line for bad input, JSON keys that stay."""

import contextlib
import ctypes
import dataclasses
import importlib
import itertools
import json
import re
import shutil
import subprocess
import sys
import typing
from pathlib import Path

import docstring_parser
import numpy as np
import pytest
from toys import ROOT, documented

from flow_policy_rl import cli, config_file, doctor


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = cli.main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> Path:
    """A folder in which collect, train and export have run, small; what each printed is beside what it wrote."""
    folder = tmp_path_factory.mktemp("chain")
    for line in (
        f"collect --task lift --episodes 4 --noise 0.0 --out {folder}/demos.hdf5 --json",
        f"train bc --task lift --demos {folder}/demos.hdf5 --run-dir {folder}/bc --bc.num-steps 20 "
        "--bc.batch-size 32 --network.width 32 --json",
        f"export --checkpoint {folder}/bc/policy.safetensors --out {folder}/policy.onnx --json",
    ):
        with (folder / f"{line.split()[0]}.json").open("w") as out, contextlib.redirect_stdout(out):
            assert cli.main(line.split()) == 0
    return folder


@pytest.mark.parametrize("command", ["collect", "train", "export"])
def test_what_was_printed_is_what_is_documented(chain, command):
    assert set(json.loads((chain / f"{command}.json").read_text())) == documented(command)


@pytest.mark.parametrize(
    ("line", "only"),
    [
        ("eval --policy {policy} --episodes 2", ()),
        ("eval --policy {policy} --episodes 2 --out {out}", ("--out",)),
        ("verify --policy {policy} --checkpoint {here}/bc/policy.safetensors", ()),
        ("inspect {policy}", ()),
        ("list", ()),
        ("doctor --purpose serve", ()),
        ("report --run-dir {here}/bc --out {out}.html", ()),
        ("convert --input {here}/demos.hdf5 --output {out}.hdf5", ("data set",)),
        ("completion bash", ()),
    ],
)
def test_what_is_printed_is_what_is_documented(chain, line, only, tmp_path, capsys):
    """Every field, and no other: scripts live on them."""
    names = {"policy": chain / "policy.onnx", "here": chain, "out": tmp_path / "out"}
    cli.main([*line.format(**names).split(), "--json"])
    assert set(json.loads(capsys.readouterr().out)) == documented(line.split()[0], *only)


def test_the_doctor_mends_what_is_bad_and_only_that(monkeypatch):
    monkeypatch.setattr(doctor, "in_child", lambda code: (True, "draws blank frames"))
    monkeypatch.setattr(doctor, "CHECKS", ((doctor.python, ""), (doctor.rendering, "")))
    checks = {c["name"]: c for c in doctor.main(doctor.Config())["checks"]}
    assert all(bool(c["mend"]) != c["ok"] for c in checks.values())
    assert not checks["rendering"]["ok"]


def test_what_native_code_prints_is_no_part_of_the_json(monkeypatch, capfd):
    library = ctypes.CDLL(None)
    monkeypatch.setattr(
        "flow_policy_rl.listing.main", lambda config: library.puts(b"WARNING") and {}
    )
    assert cli.main(["list", "--json"]) == 0
    library.fflush(None)
    said = capfd.readouterr()
    assert (said.out, said.err) == ("{}\n", "WARNING\n")


def test_a_number_that_is_none_is_null(monkeypatch, capsys):
    result = {"a": [float("nan"), 1.5], "b": {"c": np.float64("inf"), "d": True}, "e": (2, "f")}
    monkeypatch.setattr("flow_policy_rl.listing.main", lambda config: result)
    assert cli.main(["list", "--json"]) == 0
    said = capsys.readouterr().out
    assert said == '{"a": [null, 1.5], "b": {"c": null, "d": true}, "e": [2, "f"]}\n'


def test_every_command_that_prints_is_documented():
    page = re.findall("^## (.+)$", (ROOT / "docs/json.md").read_text(), re.MULTILINE)
    commands = set(cli.COMMANDS) - {"sim", "deploy", "bench"}
    assert set(page) == commands | {f"bench {name}" for name in cli.BENCHES}


def test_results_are_one_json_object_on_standard_output(chain, capsys):
    policy = chain / "policy.onnx"
    code, out, _ = run(capsys, "eval", "--policy", policy, "--episodes", 3, "--json")
    result = json.loads(out)
    assert code == 0
    assert {
        "success_rate",
        "success_ci95",
        "return_mean",
        "return_std",
        "episodes",
        "seed",
        "task",
        "policy",
    } <= set(result)
    assert result["episodes"] == 3
    code, out, _ = run(
        capsys,
        "verify",
        "--policy",
        policy,
        "--checkpoint",
        chain / "bc/policy.safetensors",
        "--json",
    )
    result = json.loads(out)
    assert (code, result["passed"]) == (0, True)
    assert {"max_abs_error", "max_error_in_action_range", "cases"} <= set(result)
    code, out, _ = run(capsys, "inspect", policy, "--json")
    assert json.loads(out)["spec"]["joint_names"][0] == "panda_joint1"


def test_inspect_names_everything_a_robot_engineer_asks_for(chain, capsys):
    _, out, _ = run(capsys, "inspect", chain / "policy.onnx")
    for word in ("lift", "panda_joint7", "20 Hz", "object_pose", "4 euler steps", "rad/s"):
        assert word in out


def test_same_seed_same_policy(chain, tmp_path, capsys):
    flags = [
        "--task",
        "lift",
        "--demos",
        chain / "demos.hdf5",
        "--bc.num-steps",
        20,
        "--bc.batch-size",
        32,
    ]
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert (
            run(capsys, "train", "bc", *flags, "--seed", seed, "--run-dir", tmp_path / name)[0] == 0
        )
    from flow_policy_rl import checkpoint

    a, b, c = (checkpoint.load(tmp_path / n / "policy.safetensors").state_dict() for n in "abc")
    assert all(a[k].equal(b[k]) for k in a)
    assert not all(a[k].equal(c[k]) for k in a)


def test_a_run_folder_keeps_what_made_it(chain):
    folder = chain / "bc"
    assert json.loads((folder / "config.json").read_text())["bc"]["num_steps"] == 20
    environment = json.loads((folder / "environment.json").read_text())
    assert {"versions", "machine", "git_revision", "command"} <= set(environment)
    assert (folder / "metrics.csv").read_text().startswith("step,train/cfm_loss")
    assert list((folder / "tensorboard").iterdir())


BAD = {
    "command": (["evl"], "did you mean 'eval'"),
    "algorithm": (["train", "scoreflow"], "did you mean 'score_flow'"),
    "task": (["eval", "--policy", "{chain}/policy.onnx", "--task", "lfit"], "did you mean 'lift'"),
    "missing file": (["eval", "--policy", "{chain}/polcy.onnx"], "that folder has: policy.onnx"),
    "folder for a file": (["eval", "--policy", "{chain}"], "is not a file"),
    "corrupt onnx": (["inspect", "{tmp}/corrupt.onnx"], "cannot be loaded"),
    "foreign checkpoint": (
        ["export", "--checkpoint", "{chain}/demos.hdf5"],
        "not a safetensors file",
    ),
    "checkpoint for onnx": (
        ["inspect", "{chain}/bc/policy.safetensors"],
        "is a checkpoint: make a policy.onnx of it with flow-policy export --checkpoint",
    ),
    "onnx for checkpoint": (
        ["export", "--checkpoint", "{chain}/policy.onnx"],
        "is an exported policy already: give the policy.safetensors of a run folder",
    ),
    "no episodes": (["eval", "--policy", "{chain}/policy.onnx", "--episodes", "0"], "at least 1"),
    "integrator": (
        ["export", "--checkpoint", "{chain}/bc/policy.safetensors", "--integrator", "leapfrog"],
        "must be one of euler, midpoint, heun, rk4",
    ),
    "no flow steps": (
        ["export", "--checkpoint", "{chain}/bc/policy.safetensors", "--num-flow-steps", "0"],
        "num_flow_steps must be at least 1",
    ),
    "a graph without end": (
        ["export", "--checkpoint", "{chain}/bc/policy.safetensors", "--num-flow-steps", "5000"],
        "--num-flow-steps must be at most 256, not 5000",
    ),
    "batch": (
        [
            "train",
            "bc",
            "--task",
            "lift",
            "--demos",
            "{chain}/demos.hdf5",
            "--bc.batch-size",
            "100000",
        ],
        "is larger than the",
    ),
    "demonstrations": (
        ["train", "bc", "--task", "lift", "--demos", "{tmp}/corrupt.onnx"],
        "cannot be read",
    ),
    "bag": (["replay", "--bag", "{tmp}/none", "--policy", "{chain}/policy.onnx"], "does not exist"),
    "flag": (["eval", "--polcy", "x"], "did you mean '--policy'"),
    "no task": (["train", "fpo"], "flow-policy train fpo needs --task"),
    "nested flag": (["train", "bc", "--bc.num-step", "3"], "did you mean '--bc.num-steps'"),
    "config file": (["eval", "--config"], "--config needs a file"),
    "no config file": (["eval", "--config", "{tmp}/none.yaml"], "config file"),
    "run folder": (["report", "--run-dir", "{tmp}"], "has no metrics.csv"),
    "resume": (["demo", "--resume", "--run-dir", "{tmp}/none"], "nothing to resume"),
    "nobody side by side": (["eval", "--policy", "lift", "--num-envs", "0"], "--num-envs must be"),
    "joining in no episode": (
        ["bench", "joining", "--policy", "lift", "--episodes", "0"],
        "--episodes must be at least 1, not 0",
    ),
    "a delay before its time": (
        ["bench", "joining", "--policy", "lift", "--delays-ms", "0", "-5"],
        "--delays-ms must be at least 0, not -5",
    ),
    "a walker is no robot": (["sim", "--task", "hopper"], "has no robot for ROS; of ours these"),
    "demo backwards": (["demo", "--real-time-factor", "-1"], "--real-time-factor must be between"),
    "demo of nothing": (["demo", "--episodes", "0"], "--episodes must be at least 1, not 0"),
    "demo of no task": (["demo", "--task", "lfit"], "did you mean 'lift'"),
    "demo without a robot": (["demo", "--task", "kitchen"], "has no robot for ROS"),
    "strange run folder": (["demo", "--run-dir", "{chain}"], "not a run folder"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line_and_exit_code_2(chain, tmp_path, capsys, case, monkeypatch):
    arguments, says = BAD[case]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corrupt.onnx").write_bytes(b"\x08\x07garbage")
    code, out, err = run(capsys, *(a.format(chain=chain, tmp=tmp_path) for a in arguments))
    assert code == 2
    assert says in err
    lines = [line for line in err.splitlines() if not line.startswith("[")]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert out == ""


def test_a_run_is_repeated_from_its_config_file(chain, tmp_path, capsys):
    """config.json of a run folder is a config file; flags that are typed win."""
    again = tmp_path / "again"
    code, _, err = run(
        capsys, "train", "bc", "--config", chain / "bc/config.json", "--run-dir", again
    )
    assert (code, err.startswith("error")) == (0, False)
    old, new = (json.loads((d / "config.json").read_text()) for d in (chain / "bc", again))
    assert new == old | {"run_dir": str(again), "json": new["json"]}
    from flow_policy_rl import checkpoint

    a, b = (checkpoint.load(d / "policy.safetensors").state_dict() for d in (chain / "bc", again))
    assert all(a[k].equal(b[k]) for k in a)


@pytest.mark.parametrize(
    "line",
    [
        "train score_flow --task lift --ppo.num-envs 7 --score-flow.sigma-max 0.5 --checkpoint a.safetensors",
        "train bc --task reach --demos a.hdf5 --bc.num-steps 3",
        "eval --policy a.onnx --noise random",
        "list robots",
        "inspect a.onnx --json",
        "deploy --policy a.onnx --armed",
    ],
)
def test_dumped_settings_load_to_the_same_settings(line, tmp_path, capsys):
    code, dumped, _ = run(capsys, *line.split(), "--dump-config")
    assert code == 0
    (tmp_path / "c.yaml").write_text(dumped)
    words = line.split()
    command = words[:2] if words[0] == "train" else words[:1]
    code, again, _ = run(capsys, *command, f"--config={tmp_path}/c.yaml", "--dump-config")
    assert (code, again) == (0, dumped)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("bc: {num_stpes: 3}", "bc: 'num_stpes' (did you mean 'num_steps'?)"),
        ("sed: 3", "did you mean 'seed'"),
        ("bc: 3", "bc: must be a mapping, not int"),
        ("[1, 2]", "must be a mapping, not list"),
        ("{a", "is not YAML"),
        ("!!python/object/apply:os.system ['touch hacked']", "is not YAML"),
    ],
)
def test_a_wrong_config_file_is_one_clear_line(text, says, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(text)
    code, out, err = run(capsys, "train", "bc", "--config", "c.yaml")
    assert (code, out) == (2, "")
    assert "c.yaml" in err
    assert says in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_script(shell, capsys):
    code, script, _ = run(capsys, "completion", shell)
    assert code == 0
    assert "score_flow" in script
    assert "held-out" in script


def test_bash_completes_commands_algorithms_flags_and_choices(tmp_path, capsys):
    _, script, _ = run(capsys, "completion", "bash")
    (tmp_path / "script").write_text(script)
    ask = """
    source ./script; f=$(complete -p flow-policy | sed 's/.*-F \\([^ ]*\\).*/\\1/')
    t() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=(); $f; echo "${COMPREPLY[@]}"; }
    t flow-policy ev; t flow-policy train ""; t flow-policy train bc --bc.n; t flow-policy eval --noise ""
    """
    done = subprocess.run(
        ["bash", "-c", ask], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    first, algorithms, flags, choices = done.stdout.splitlines()
    assert first == "eval"
    assert {"bc", "score_flow"} <= set(algorithms.split())
    assert flags == "--bc.num-steps"
    assert choices == "zero random"


def config_types() -> dict[str, type]:
    """The config of every command, `train ALGO` and `bench NAME` too."""
    from flow_policy_rl import train_config

    commands = {name: (c.module, c.config) for name, c in cli.COMMANDS.items() if c.config}
    commands |= {f"bench {name}": (f"bench.{name}", "Config") for name in cli.BENCHES}
    found = {
        name: getattr(importlib.import_module(f"flow_policy_rl.{module}"), config)
        for name, (module, config) in commands.items()
    }
    return found | {f"train {name}": config for name, config in train_config.ALGORITHMS.items()}


def flags_of(config_type: type, prefix: str = ""):
    """(name as it is typed, type, whether it is required, whether it is positional) of every flag."""
    required = {
        f.name
        for f in dataclasses.fields(config_type)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    hints = typing.get_type_hints(config_type)
    for name, (nested, positional) in config_file.fields(config_type).items():
        if nested is not None:
            yield from flags_of(nested, f"{prefix}{name}.")
        else:
            typed = name if positional else f"--{prefix}{name}".replace("_", "-")
            yield typed, hints[name], name in required, positional


def choices(kind) -> tuple[str, ...]:
    """The values of a Literal, none of other types."""
    return typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else ()


@pytest.mark.parametrize("command", config_types())
def test_whatever_is_wrong_with_flags_is_one_line_that_names_the_flag(command, capsys):
    """Over every flag of every command: misspelt, without its value, of the wrong type, not a choice, missing."""
    flags = list(flags_of(config_types()[command]))
    if command.startswith("train"):  # a hundred each, mostly shared
        flags = flags[::4]
    needed = {
        name: [*([] if positional else [name]), next(iter(choices(kind)), "x")]
        for name, kind, required, positional in flags
        if required and not command.startswith("train")  # whose presets fill everything
    }

    def refused(*arguments: str) -> str:
        try:
            code, out, err = run(capsys, *command.split(), *arguments, "--dump-config")
        except SystemExit as end:  # tyro's own way out
            pytest.fail(f"{arguments}: exit {end.code}, {capsys.readouterr()}")
        assert (code, out) == (2, ""), arguments
        assert len(err.splitlines()) == 1, err
        assert err.startswith("error: ")
        assert "╭" not in err
        return err

    for name, kind, _, positional in flags:
        others = [word for other in needed if other != name for word in needed[other]]
        if name in needed:
            assert f"missing: {name} (" in refused(*others)
        if valid := choices(kind):
            wrong = f"{valid[0]}x"
            error = refused(*others, *([] if positional else [name]), wrong)
            assert f"{name}: '{wrong}' (did you mean '{valid[0]}'?); valid: " in error
        if positional:
            continue
        assert f"did you mean '{name}'?" in refused(*others, f"{name}x", "1")
        if kind is bool:
            assert "'1'" in refused(*others, name, "1")
            continue
        if typing.get_origin(kind) not in (tuple, dict):  # those may be empty
            assert f"{name} needs a value" in refused(*others, name)
        if kind in (int, float):
            assert f"{name} takes a {'whole ' * (kind is int)}number, not 'x'" in refused(
                *others, name, "x"
            )
    assert "unexpected argument '-q'" in refused(*itertools.chain(*needed.values()), "-q")


def configs_within(config_type: type):
    """A config and those that are nested in it."""
    yield config_type
    for nested, _ in config_file.fields(config_type).values():
        if nested is not None:
            yield from configs_within(nested)


@pytest.mark.parametrize("command", config_types())
def test_every_flag_says_what_it_is_and_has_one_default(command):
    """tyro takes help from the docstring entry of that name alone, and adds the default, `None` too, by itself."""
    for config in configs_within(config_types()[command]):
        texts = {
            p.arg_name: p.description
            for base in config.__mro__
            for p in docstring_parser.parse(base.__doc__ or "").params
        }
        for field in dataclasses.fields(config):
            assert texts.get(field.name), f"{config.__name__}.{field.name}"
            assert "default: " not in texts[field.name], f"{config.__name__}.{field.name}"


def test_a_wrong_value_of_a_config_file_names_the_file(tmp_path, capsys):
    path = tmp_path / "c.yaml"
    path.write_text("task: lift\ndemos: a.hdf5\nbc: {num_steps: many}\n")
    code, _, err = run(capsys, "train", "bc", "--config", path)
    assert (code, len(err.splitlines())) == (2, 1)
    assert f"config file '{path}': --bc.num-steps takes a whole number, not 'many'" in err
    code, _, err = run(capsys, "train", "bc", "--config", path, "--bc.num-steps", "few")
    assert err.startswith("error: --bc.num-steps takes a whole number, not 'few'")


@pytest.mark.parametrize(
    "name",
    [n for n in cli.COMMANDS if n not in ("train", "bench")] + [f"bench {n}" for n in cli.BENCHES],
)
def test_every_command_has_help_with_an_example(name, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([*name.split(), "--help"])
    assert end.value.code == 0
    assert f"flow-policy {name}" in capsys.readouterr().out


def loaded_by(*arguments: str) -> set[str]:
    """Which heavy packages a command line has imported when it ends."""
    code = (
        "import sys\nfrom flow_policy_rl import cli\n"
        "try: cli.main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "print(*{'torch', 'mujoco', 'onnx', 'onnxruntime', 'tyro'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    return set(done.stdout.splitlines()[-1].split())


NO_PHYSICS = (
    *("doctor", "inspect", "sim", "deploy", "replay", "export", "verify", "demo", "completion"),
    *("bench serve", "bench replay", "bench ros"),
)
WITH_TORCH = ("bench train",)


@pytest.mark.parametrize("name", ["", "eval", "bench serve"])
def test_help_may_be_asked_for_first(name, capsys):
    said = []
    for line in (["help", *name.split()], [*name.split(), "--help"]):
        with contextlib.suppress(SystemExit):  # argparse's way to end after help
            cli.main(line)
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != ""


def test_help_of_a_training_shows_that_it_needs_a_task(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "fpo", "--help"])
    assert "name of the task. (required)" in capsys.readouterr().out
    cli.main(["--help"])
    assert "130 Ctrl-C" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", ["--help", "--version", "train --help", "bench --help"])
def test_an_overview_loads_nothing_heavy(arguments):
    assert loaded_by(*arguments.split()) <= {"tyro"}


@pytest.mark.parametrize(
    "name",
    [n for n in cli.COMMANDS if n not in ("train", "bench")] + [f"bench {n}" for n in cli.BENCHES],
)
def test_help_comes_without_torch(name):
    """All but the flags of `train ALGO`, whose settings live beside the algorithms, and the bench of training."""
    loaded = loaded_by(*name.split(), "--help")
    assert ("torch" in loaded) == (name in WITH_TORCH)
    if name in NO_PHYSICS:
        assert "mujoco" not in loaded


@pytest.mark.parametrize(
    "line",
    [
        "list",
        "train scoreflow --task lift",
        "eval --polcy a.onnx",
        "eval --policy no.onnx",
        "eval --policy a.onnx --dump-config",
        "export --checkpoint no.safetensors",
        "export --checkpoint no.safetensors --dump-config",
        "demo --seed x",
        "bench learn --study none",
    ],
)
def test_what_needs_no_network_comes_without_torch(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "torch" not in loaded_by(*line.split())


def test_names_that_are_listed_without_torch_are_those_that_exist():
    from flow_policy_rl import listing, networks, presets, train_config

    assert list(cli.ALGORITHMS) == list(train_config.ALGORITHMS)
    assert set(cli.ALGORITHMS) == set(presets.PRESETS)
    assert set(listing.ENCODERS) == set(networks.ENCODERS)
    assert typing.get_args(presets.Preset) == listing.PRESETS


def test_readme_commands_exist():
    text = (ROOT / "README.md").read_text()
    used = {
        line.split()[1] for line in text.splitlines() if line.strip().startswith("flow-policy ")
    }
    assert used <= set(cli.COMMANDS)
    assert shutil.which("make")

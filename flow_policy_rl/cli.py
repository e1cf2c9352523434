"""The `flow-policy` command: one table of commands, each a config dataclass (tyro makes its flags) and a function.

Exit codes: 0 ok; 1 a gate failed or the work came to no good end; 2 wrong input, in one line; 130 Ctrl-C.
"""

import _thread
import contextlib
import ctypes
import dataclasses
import importlib
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Literal, NamedTuple

from flow_policy_rl import __version__, config_file, plugins
from flow_policy_rl.errors import InputError, RunFailed, unknown_name
from flow_policy_rl.run_folder import end_with_parent


class Command(NamedTuple):
    """Where a command lives. Modules are imported only when their command runs, so that --help is quick."""

    module: str
    config: str
    main: str
    help: str


COMMANDS = {
    "list": Command("listing", "Config", "main", "names of tasks, algorithms, presets and robots"),
    "doctor": Command("doctor", "Config", "main", "check this machine and say how to mend it"),
    "inspect": Command("inspection", "Config", "main", "print what a policy.onnx says of itself"),
    "collect": Command("collect", "Config", "main", "record scripted demonstrations"),
    "train": Command("train", "", "main", "train a policy: flow-policy train ALGO --task T"),
    "eval": Command("evaluate", "Config", "main", "success rate of a policy in simulation"),
    "export": Command(
        "export_command", "ExportConfig", "main", "write one self-describing policy.onnx"
    ),
    "verify": Command(
        "export_command", "VerifyConfig", "verify", "compare a policy.onnx with its checkpoint"
    ),
    "sim": Command("ros", "SimConfig", "sim", "ROS 2 simulation node: a task as a robot"),
    "deploy": Command(
        "ros", "DeployConfig", "deploy", "ROS 2 policy node (dry run unless --armed)"
    ),
    "bench": Command("bench", "", "main", "measure this machine: flow-policy bench NAME"),
    "replay": Command("replay", "Config", "main", "judge a policy on a recorded rosbag"),
    "convert": Command("convert", "Config", "main", "bags and data sets to data sets"),
    "report": Command(
        "run_report", "Config", "main", "HTML report of a training run, or of several"
    ),
    "demo": Command(
        "demo", "Config", "main", "the whole product, from demonstrations to a ROS 2 arm"
    ),
    "completion": Command("completion", "Config", "main", "completion script for a shell"),
}


# Package that a command may miss -> extra of setup.py that brings it
EXTRAS = {
    "torch": "train",
    "safetensors": "train",
    "onnx": "train",
    "onnxscript": "train",
    "mink": "train",
    "mujoco": "sim",
    "warp": "warp",
    "mujoco_warp": "warp",
    "gymnasium": "sim",
    "onnxruntime": "serve",
    "rosbags": "bags",
    "mcap": "bags",
    "zstandard": "bags",
    "lz4": "bags",
    "h5py": "data",
    "pyarrow": "data",
    "jinja2": "report",
    "plotly": "report",
    "matplotlib": "report",
    "av": "report",
    "cv2": "report",
}

# flow-policy train ALGO: each a config of train_config.py
ALGORITHMS: dict[str, str] = {
    "bc": "imitation of demonstrations, which all others start from",
    "fpo": "PPO with a ratio from flow-matching losses",
    "fpo_plus_plus": "the same with a ratio per sample and an asymmetric trust region",
    "score_flow": "PPO on the chain of flow steps, with a score drift",
    "reinflow": "the same without the drift",
    "rldt": "samples move along the gradient of a learned critic, off policy",
    "gaussian_ppo": "PPO with Gaussian noise on the chunk, the control",
}

# flow-policy bench NAME: each a module of flow_policy_rl.bench with Config, main and text
BENCHES: dict[str, str] = {
    "learn": "algorithms compared on the same base policies",
    "replay": "replay and conversion of bags, speed and memory",
    "sim": "environment steps per second, against raw MuJoCo, Gymnasium, robosuite",
    "train": "training speed, shares of physics, policy and update, against its floor",
    "serve": "milliseconds per inference, against torch and a numpy floor",
    "joining": "methods of joining chunks under injected inference delay",
    "delay": "success over ROS 2 under injected inference delay",
    "ros": "latency, overhead, memory and CPU of the ROS 2 policy node",
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["help"]:
        arguments = [*arguments[1:], "--help"]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(overview())
        return 0
    if arguments[0] == "--version":
        print(__version__)
        return 0
    how = ""
    with interruptions() as seen:
        try:
            end_with_parent()
            code = answer(arguments[0], arguments[1:])
            if code == 0 or not seen:
                return code
        except BaseException as error:
            if not seen and not isinstance(error, KeyboardInterrupt):
                raise
            if isinstance(error, KeyboardInterrupt) and arguments[0] in ("train", "collect"):
                # What is kept; what runs within another command says it otherwise.
                how = f" {error}".rstrip()
        print(f"interrupted{how}", file=sys.stderr)
        # Where Ctrl-C hit while a text was executed (imports do that), `python -m` would end by the signal all the
        # same; CPython forgets that at the next text.
        exec("")
        return 130


@contextlib.contextmanager
def interruptions() -> Iterator[list[int]]:
    """Notes every Ctrl-C: compiled code that calls Python may make another exception of a KeyboardInterrupt. One that
    Python dropped, as it does with what is raised in a finaliser or in a callback of an import lock, comes again, and
    so does one within an import, which compiled modules may swallow, unless what cleans up after it is at work.
    """
    seen: list[int] = []
    repeated: list[bool] = []  # the next one is ours
    drop = sys.unraisablehook

    def note(number, frame):
        seen.append(number)
        cleans_up = bool(repeated) and repeated.pop() and is_handled(sys.exc_info()[1])
        if cleans_up or is_import(frame):
            # threading.Timer takes locks, which may be held here.
            _thread.start_new_thread(again, ())
        if not cleans_up:
            raise KeyboardInterrupt

    def again():
        time.sleep(0.05)
        if signal.getsignal(signal.SIGINT) is note:  # the command goes on
            repeated.append(True)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    def dropped(unraisable):
        if unraisable.exc_type is KeyboardInterrupt:
            _thread.start_new_thread(again, ())
        else:
            drop(unraisable)

    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if ours:
        signal.signal(signal.SIGINT, note)
        sys.unraisablehook = dropped
    try:
        yield seen
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            sys.unraisablehook = drop


def is_import(frame: FrameType | None) -> bool:
    """Whether a frame runs within an import."""
    while frame is not None and frame.f_code.co_filename != "<frozen importlib._bootstrap>":
        frame = frame.f_back
    return frame is not None


def is_handled(error: BaseException | None) -> bool:
    """Whether an `except` or `finally` that is at work began with a KeyboardInterrupt."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


def answer(name: str, arguments: list[str]) -> int:
    """Run one command; what is wrong with its input, or with the machine, is one line. Returns the exit code."""
    try:
        return run(name, arguments)
    except BrokenPipeError:  # somebody reads only the head of the output
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except RunFailed as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in EXTRAS:
            raise
        mend = f"pip install 'flow_policy_rl[{EXTRAS[missing]}]', or make setup for everything"
        print(
            f"error: this command needs {missing}, which is not installed: {mend}", file=sys.stderr
        )
        return 2
    except (
        OSError
    ) as error:  # of a path that the command could not check beforehand, or a disk that is full
        where = f": '{error.filename}'" if error.filename is not None else ""
        print(f"failed: {error.strerror or error}{where}", file=sys.stderr)
        return 1
    except ValueError as error:
        if not is_input_error(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2


def is_input_error(error: ValueError) -> bool:
    """Whether somebody's input is wrong, ours or the simulation's way of saying it."""
    simulation = sys.modules.get("sim.errors")
    return isinstance(error, InputError) or (
        simulation is not None and isinstance(error, simulation.SimulationError)
    )


def run(name: str, arguments: list[str]) -> int:
    """Parse the flags of one command and run it."""
    from flow_policy_rl.flags import parse  # with tyro, which --help does without

    if name not in COMMANDS:
        raise unknown_name("command", name, COMMANDS)
    command = COMMANDS[name]
    file, dump, arguments = config_file.split(arguments)
    if name in ("train", "bench") and (not arguments or arguments[0] in ("-h", "--help")):
        print(train_overview() if name == "train" else bench_overview())
        return 0 if arguments else 2
    if name == "bench":
        bench, *arguments = arguments
        if bench not in BENCHES:
            raise unknown_name("bench", bench, BENCHES)
        name = f"bench {bench}"
        command = Command(f"bench.{bench}", "Config", "main", BENCHES[bench])
    if name == "train":
        module, config = parse_train(arguments, file)
    else:
        module = importlib.import_module(f"flow_policy_rl.{command.module}")
        config = parse(getattr(module, command.config), arguments, f"flow-policy {name}", file)
    if dump:
        print(config_file.dump(config), end="")
        return 0
    apart = getattr(config, "json", False) and sys.stdout is not None  # None: it is closed
    with prints_as_errors() if apart else contextlib.nullcontext():
        result = getattr(module, command.main)(config)
    if result is not None:
        show = as_json if config.json else getattr(module, "text", as_json)
        print(show(result))
        return 0 if result.get("passed", result.get("ok", True)) else 1
    return 0


@contextlib.contextmanager
def prints_as_errors() -> Iterator[None]:
    """Whatever is printed goes to standard error, also by native code: MuJoCo prints its warnings."""
    flush = ctypes.CDLL(None).fflush
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        flush(None)
        os.dup2(kept, 1)
        os.close(kept)


def as_json(result: dict) -> str:
    """One object that every parser takes: JSON knows neither nan nor infinity, so they are null."""

    def plain(value):
        if isinstance(value, dict):
            return {key: plain(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [plain(inner) for inner in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(result))


def parse_train(arguments: list[str], file: Path | None):
    """`ALGO --task T --preset P`, and whether a checkpoint is given, decide the settings; other flags override them.

    Returns:
        module and config.
    """
    import tyro

    from flow_policy_rl.flags import one_line_errors, parse

    @dataclasses.dataclass(frozen=True)
    class Given:
        task: str | None = None
        preset: Literal["clean", "paper"] = "clean"
        checkpoint: str | None = None

    algorithm, *flags = arguments
    found = plugins.find("algorithms", algorithm, ALGORITHMS)
    prog = f"flow-policy train {algorithm}"
    if algorithm not in ALGORITHMS:  # a module of another package
        return found, parse(found.Config, flags, prog, file)
    from flow_policy_rl import train, train_config

    config_type = train_config.ALGORITHMS[algorithm]
    from_file = config_file.load(file, config_type) if file else []
    settings = [f for f in from_file + flags if f not in ("-h", "--help")]
    with one_line_errors(prog, flags, file):
        given, _ = tyro.cli(Given, args=settings, return_unknown_args=True)
    from_scratch = given.checkpoint is None
    default = train_config.default_config(
        algorithm, given.task or "lift", given.preset, from_scratch
    )
    if given.task is None and {"-h", "--help"} & set(flags):
        default = dataclasses.replace(default, task=tyro.MISSING)  # shown as required
    config = parse(config_type, flags, prog, file, default=default)
    if given.task is None:
        raise InputError(f"{prog} needs --task: a task that flow-policy list tasks names")
    if getattr(config, "algorithm", algorithm) != algorithm:
        raise InputError(
            f"{prog} is not --algorithm {config.algorithm}: the word after `train` decides"
        )
    return train, config


def table(rows: Mapping[str, str]) -> str:
    """Names and what they are, in two columns."""
    width = max(map(len, rows))
    return "\n".join(f"  {name:<{width}} {what}" for name, what in rows.items())


def train_overview() -> str:
    """The page that train --help prints."""
    others = dict.fromkeys(plugins.names("algorithms"), "of another package")
    return (
        f"usage: flow-policy train ALGO --task T [flags]\n\n{table(ALGORITHMS | others)}\n\n"
        "Each has its own flags: flow-policy train ALGO --help"
    )


def bench_overview() -> str:
    """The page that bench --help prints."""
    return (
        f"usage: flow-policy bench NAME [flags]\n\n{table(BENCHES)}\n\n"
        "Each has its own flags: flow-policy bench NAME --help"
    )


def overview() -> str:
    """The page that --help prints."""
    rows = table({name: command.help for name, command in COMMANDS.items()})
    return (
        "flow-policy: RL fine-tuning of flow-matching robot policies, MuJoCo to one ONNX file to ROS 2\n\n"
        f"usage: flow-policy COMMAND [flags]\n\n{rows}\n\n"
        "Each command: --help for its flags and an example, --json for one JSON object on standard output.\n"
        f"{config_file.ABOUT}\n"
        "Exit codes: 0 ok, 1 a gate failed, 2 wrong input, 130 Ctrl-C."
    )


if __name__ == "__main__":
    sys.exit(main())

"""Commands that each end once: what is done is skipped, what was cut off resumes, chains share cores and stages."""

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from flow_policy_rl.errors import InputError, RunFailed
from flow_policy_rl.progress import Progress
from flow_policy_rl.run_folder import PARENT, POLICY_FILE

# Exit codes of a command after Ctrl-C; the second where Python did not run yet.
INTERRUPTED = (130, -signal.SIGINT)
LOOK_EVERY_S = 10.0
BEGUN = "$ "  # before each command in its log


@dataclass(frozen=True)
class Stage:
    """One command.

    Attributes:
        command: without `flow-policy`.
        name: PATH.log keeps what it said, PATH.json its JSON result, PATH.done that it ended well.
        state: file from which an interrupted run goes on.
        needs: file without which there is nothing to do.
        output: file that the command does not overwrite; one that an interrupted run has left is removed.
        diverged: file that a training which diverged leaves. That is a result: its last good checkpoint is judged.
    """

    command: tuple[str, ...]
    name: Path
    state: Path | None = None
    needs: Path | None = None
    output: Path | None = None
    diverged: Path | None = None


class Running:
    """The commands that were begun, so that whoever stops can pass it on to those that run; after that none begins."""

    def __init__(self):
        self._lock, self._processes, self._stopped = threading.Lock(), set(), False

    def begin(self, command: Sequence[str], said: TextIO) -> subprocess.Popen:
        """Start a command, in a session of its own, which keeps the terminal's Ctrl-C from it.

        Args:
            said: where its error output goes.

        Raises:
            KeyboardInterrupt: somebody stopped all of them before.
        """
        with self._lock:
            if self._stopped:
                raise KeyboardInterrupt
            process = subprocess.Popen(
                [sys.executable, "-m", "flow_policy_rl.cli", *command],
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
                env={**os.environ, PARENT: str(os.getpid())},
                start_new_session=True,
            )
            self._processes.add(process)
            return process

    def stop(self) -> None:
        """Ctrl-C for each that has not ended."""
        with self._lock:
            self._stopped = True
            for process in self._processes:
                process.send_signal(signal.SIGINT)


def run_chains(chains: Mapping[str, Sequence[Stage]], jobs: int, title: str) -> list[str]:
    """Run chains of stages, `jobs` at a time, each on its share of the cores. What several chains need runs once.

    Args:
        chains: by the name that progress shows.

    Returns:
        what failed, one line per command. A failure stops only what needs it.

    Raises:
        KeyboardInterrupt: and the commands that ran have ended, as after a Ctrl-C of their own.
    """
    locks = {stage.name: threading.Lock() for chain in chains.values() for stage in chain}
    failures: dict[Path, str] = {}
    running, at_work = Running(), {}
    cores = sorted(os.sched_getaffinity(0))
    shares = iter([cores[i::jobs] for i in range(jobs)])

    def take_cores() -> None:  # of this thread, and so of the processes that it starts
        os.sched_setaffinity(0, next(shares))

    def run(name: str) -> None:
        for stage in chains[name]:
            with locks[stage.name]:
                if stage.name in failures:
                    break
                at_work[name] = stage
                try:
                    run_stage(stage, running)
                except RunFailed as error:
                    failures[stage.name] = str(error)
                    print(f"failed: {error}", file=sys.stderr, flush=True)
                    break
                finally:
                    del at_work[name]

    pool = ThreadPoolExecutor(jobs, initializer=take_cores)
    due = [name for name, chain in chains.items() if not all(map(finished, chain))]
    with Progress(title, len(chains), "cell", done=len(chains) - len(due)) as progress:
        try:
            waiting = {pool.submit(run, name) for name in due}
            while waiting:
                done, waiting = wait(waiting, LOOK_EVERY_S, FIRST_COMPLETED)
                for cell in done:
                    cell.result()
                said = (
                    f"{name}: {last_line(stage) or stage.name.name}"
                    for name, stage in sorted(at_work.copy().items())
                )
                progress.update(len(done), " | ".join(said))
        except KeyboardInterrupt:
            running.stop()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
    return list(failures.values())


def run_stage(stage: Stage, running: Running) -> None:
    """Run a command that has not ended well yet.

    Raises:
        RunFailed: it did not this time either; with its last line.
        KeyboardInterrupt: somebody stopped it.
    """
    if finished(stage):
        return
    stage.name.parent.mkdir(parents=True, exist_ok=True)
    begun = stage.state is not None and stage.state.is_file()
    command = (*stage.command, "--resume") if begun else stage.command
    if stage.output is not None:
        stage.output.unlink(missing_ok=True)
    log, start = stage.name.with_suffix(".log"), time.monotonic()
    with log.open("a") as said:
        said.write(f"{BEGUN}{shlex.join(('flow-policy', *command))}\n")
        said.flush()
        process = running.begin(command, said)
        printed, _ = process.communicate()
    diverged = stage.diverged is not None and stage.diverged.is_file()
    diverged = diverged and stage.diverged.with_name(POLICY_FILE).is_file()  # something to judge
    if process.returncode in INTERRUPTED:
        raise KeyboardInterrupt
    if process.returncode != 0 and not diverged:
        why = last_line(stage) or f"exit code {process.returncode}"
        raise RunFailed(f"{shlex.join(('flow-policy', *command))}: {why} (log: {log})")
    stage.name.with_suffix(".json").write_text(printed)
    stage.name.with_suffix(".done").write_text(f"{time.monotonic() - start:.1f} s\n")


def finished(stage: Stage) -> bool:
    """Whether a stage has nothing to run: it ended well, or there is nothing yet that it needs."""
    needs_nothing = stage.needs is None or stage.needs.is_file()
    return stage.name.with_suffix(".done").is_file() or not needs_nothing


def last_command(stage: Stage) -> list[str]:
    """The command that made what a stage has, without `flow-policy`; empty where its log does not say."""
    ran = [line for line in log_lines(stage) if line.startswith(BEGUN)]
    return shlex.split(ran[-1].removeprefix(BEGUN))[1:] if ran else []


def log_lines(stage: Stage) -> list[str]:
    """All that the commands of a stage said; none where it has not begun."""
    log = stage.name.with_suffix(".log")
    return log.read_text(errors="replace").split("\n") if log.is_file() else []


def last_line(stage: Stage) -> str:
    """What the command of a stage said last since it began; empty where it said nothing yet."""
    last = next((line for line in reversed(log_lines(stage)) if line.strip()), "")
    return "" if last.startswith(BEGUN) else last


def result_of(stage_name: Path) -> dict:
    """The JSON that a command of the study printed."""
    return read_json(stage_name.with_suffix(".json"), stage_name.with_suffix(".done"))


def read_json(path: Path, remove: Path) -> dict:
    """A JSON file of a study.

    Args:
        remove: without which the study makes it anew.

    Raises:
        InputError: it is not whole, as a full disk or a power cut leaves it.
    """
    try:
        return json.loads(path.read_text())
    except ValueError:
        raise InputError(
            f"'{path}' is not whole: remove '{remove}', and the same command goes on"
        ) from None

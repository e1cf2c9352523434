"""The folder of a run: the names of its files, that it belongs to one run at a time, and how a run is ended."""

import contextlib
import ctypes
import fcntl
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from flow_policy_rl.errors import InputError, output_folder

POLICY_FILE = "policy.safetensors"
RAW_POLICY_FILE = "policy_raw.safetensors"  # where POLICY_FILE is a moving average
BEST_POLICY_FILE = "policy_best.safetensors"  # of RL: what did best of all that was watched
PARENT = "FLOW_POLICY_PARENT"  # the process that began a command and stops it


def state_file(run_dir: Path, rank: int = 0) -> Path:
    """From which a process of a run goes on."""
    return run_dir / ("state.safetensors" if rank == 0 else f"state-{rank}.safetensors")


def failed_file(run_dir: Path, rank: int = 0) -> Path:
    """The state in which a process stopped because training had diverged."""
    return run_dir / f"failed-{rank}.safetensors"


def refuse_a_run(folder: Path) -> None:
    """Raise InputError where a training has left something that another one would overwrite."""
    if (folder / POLICY_FILE).exists():
        held = "holds a trained policy already"
    elif state_file(folder).exists():
        held = "holds a training that is not over"
    else:
        return
    raise InputError(
        f"run folder '{folder}' {held}: go on with --resume, or choose another --run-dir"
    )


@contextlib.contextmanager
def claimed(folder: Path, flag: str = "--run-dir") -> Iterator[None]:
    """Make the folder, and keep other runs out of it until the end, however that comes. What was made for it and is
    empty then is not left behind.

    Args:
        flag: with which another folder would be named.

    Raises:
        InputError: it cannot be made or written to, or another run has it.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    descriptor = os.open(output_folder(folder), os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise InputError(
            f"another run is writing to '{folder}': choose another {flag}, or wait for its end"
        ) from None
    except OSError:  # a file system without locks
        pass
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # one holds something
            for path in made:
                path.rmdir()
        os.close(descriptor)


def end_like_ctrl_c() -> None:
    """Of a command that starts others: SIGTERM ends it like Ctrl-C, and SIGINT ends what it starts.

    The background jobs of a script ignore SIGINT, and so would all that they start.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Of what must not be left half done: a Ctrl-C comes at its end."""
    if threading.current_thread() is not threading.main_thread():  # which alone is interrupted
        yield
        return
    came = []
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:
            signal.raise_signal(signal.SIGINT)


def end_with_parent() -> None:
    """Of a command that another one began, which it says in `PARENT`: Ctrl-C when that is gone, even if it was killed.

    On Linux only. The kernel goes by the thread that began the command; it has to wait for its end.

    Raises:
        KeyboardInterrupt: it is gone already.
    """
    parent = os.environ.pop(PARENT, None)
    if parent is None or sys.platform != "linux":
        return
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>
    ctypes.CDLL(None).prctl(set_parent_death_signal, int(signal.SIGINT))
    if str(os.getppid()) != parent:
        raise KeyboardInterrupt

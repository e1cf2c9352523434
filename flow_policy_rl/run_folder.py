"""The folder of a run: the names of its policies, and that it belongs to one run at a time."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from flow_policy_rl.errors import InputError, output_folder

POLICY_FILE = "policy.safetensors"
RAW_POLICY_FILE = "policy_raw.safetensors"  # where POLICY_FILE is a moving average


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Make the folder, and keep other runs out of it until the end, however that comes.

    Raises:
        InputError: it cannot be made or written to, or another run has it.
    """
    descriptor = os.open(output_folder(folder), os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise InputError(
            f"another run is writing to '{folder}': choose another --run-dir, or wait for its end"
        ) from None
    except OSError:  # a file system without locks
        pass
    try:
        yield
    finally:
        os.close(descriptor)

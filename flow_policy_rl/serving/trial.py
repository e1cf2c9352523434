"""The first load of a policy file happens in a child process, so that a native crash or hang of the parser stays there.

A file that loaded once on this machine is known by its SHA-256 (and the version of onnxruntime) in the user's cache
folder, and loads directly from then on: a normal start of a robot pays nothing. The child runs on the CPU
provider, without core dumps and with bounded memory, and computes one chunk from zeros.
"""

import contextlib
import hashlib
import json
import os
import resource
import select
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort

from flow_policy_rl.errors import PolicyFileError

TIMEOUT_S = 60.0  # of one load, the child's start included
MEMORY_BYTES = 16 << 30  # address space of the child


class Trial:
    """A child process that loads files one after the other. A crash ends it, and the next file gets a new one."""

    def __init__(self, timeout_s: float = TIMEOUT_S):
        self.timeout_s = timeout_s
        self.starts = 0  # children started so far
        self._child: subprocess.Popen | None = None

    def __enter__(self) -> "Trial":
        return self

    def __exit__(self, *_) -> None:
        self._end()

    def load(self, path: Path, sha256: str) -> None:
        """Load the file in the child.

        Raises:
            PolicyFileError: onnxruntime refuses it, crashes on it or does not come to an end.
        """
        if self._child is None:
            self._child = self._start()
        try:
            self._child.stdin.write(json.dumps([str(path.resolve()), sha256]) + "\n")
            self._child.stdin.flush()
            ready, _, _ = select.select([self._child.stdout], [], [], self.timeout_s)
            answer = self._child.stdout.readline() if ready else None
        except BrokenPipeError:
            answer = ""
        if answer:
            problem = json.loads(answer)
            if problem:
                raise PolicyFileError(f"policy '{path}' cannot be loaded: {problem}")
            return
        self._end()
        what = "crashed" if answer == "" else f"did not end within {self.timeout_s:g} s"
        raise PolicyFileError(
            f"policy '{path}' cannot be loaded: onnxruntime {what} on it (in a child process)"
        )

    def _start(self) -> subprocess.Popen:
        self.starts += 1
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH")) if p)
        return subprocess.Popen(
            [sys.executable, "-m", "flow_policy_rl.serving.trial"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )

    def _end(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.communicate()
            self._child = None


def is_known(sha256: str) -> bool:
    """Whether this file loaded before, on this machine and with this onnxruntime."""
    return _mark(sha256).exists()


def remember(sha256: str) -> None:
    """This file loaded. Where the cache cannot be written, the next start tries again in a child."""
    with contextlib.suppress(OSError):
        _mark(sha256).parent.mkdir(parents=True, exist_ok=True)
        _mark(sha256).touch()


def _mark(sha256: str) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "flow_policy_rl" / "loaded" / f"{sha256}-{ort.__version__}"


# --- the child ---


def problem_with(path: str, sha256: str) -> str:
    """Load the file and compute one chunk; the first line of what is wrong, or nothing."""
    data = Path(path).read_bytes()
    if hashlib.sha256(data).hexdigest() != sha256:
        return "it changed while it was read"
    try:
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 4
        session = ort.InferenceSession(
            data, options, providers=["CPUExecutionProvider"], enable_fallback=0
        )
        kinds = {"tensor(float)": np.float32, "tensor(uint8)": np.uint8, "tensor(int64)": np.int64}
        feed = {
            i.name: np.zeros([d if isinstance(d, int) else 1 for d in i.shape], kinds[i.type])
            for i in session.get_inputs()
        }
        session.run(None, feed)
    except KeyError as error:
        return f"an input of unknown type {error}"
    except Exception as error:  # onnxruntime has a class of its own for every kind of bad file
        return first_line(error)
    return ""


def first_line(error: Exception) -> str:
    """What an exception says, in one printable line."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].encode("ascii", "backslashreplace").decode()[:300]


def main() -> None:
    """Answer each line [path, sha256] on standard input with one line: what is wrong with the file, or ''."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever native code prints is no answer
    for line in sys.stdin:
        print(json.dumps(problem_with(*json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()

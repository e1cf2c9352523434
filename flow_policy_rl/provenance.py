"""Where a result comes from: versions, machine, code revision, command, file hashes."""

import hashlib
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from flow_policy_rl import __version__

PACKAGES = ("numpy", "torch", "mujoco", "onnx", "onnxruntime", "mink", "rosbags", "ros-rclpy")


def versions() -> dict[str, str]:
    """Installed versions of what results depend on."""
    found = {"flow_policy_rl": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, str | int]:
    """Processor and number of usable cores."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    return {"cpu": model, "cores": len(os.sched_getaffinity(0)), "system": platform.platform()}


def git_revision() -> str:
    """Revision of the source tree, with '+' where it has uncommitted changes; empty outside of one."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return ""
    run = lambda *args: subprocess.run(  # noqa: E731
        ["git", "-C", str(root), *args], capture_output=True, text=True, check=False
    ).stdout.strip()
    revision = run("rev-parse", "--short=12", "HEAD")
    return revision + ("+" if run("status", "--porcelain", "--untracked-files=no") else "")


def environment() -> dict:
    """All of the above and the command line."""
    return {
        "versions": versions(),
        "machine": machine(),
        "git_revision": git_revision(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file, hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()

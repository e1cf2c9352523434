"""Batched MuJoCo simulation: numpy in, numpy out. Imports nothing else of this project."""

import ctypes
import os


def _choose_gl() -> str:
    """EGL draws without a screen. Without the library, MuJoCo must not try: physics works all the same."""
    try:
        ctypes.CDLL("libEGL.so.1")
    except OSError:
        return "disable"
    return "egl"


# NOTE: MuJoCo reads this once, at its own import.
os.environ.setdefault("MUJOCO_GL", _choose_gl())

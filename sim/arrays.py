"""Arrays of NumPy or of PyTorch: the pure functions of a task take either, and give what they were given.

So states that are tensors on a GPU (`backends/warp.py`) become observations and rewards without leaving it. PyTorch
has NumPy's functions under NumPy's names, `axis` included; nothing here imports it.
"""

import sys
from types import ModuleType

import numpy as np


def namespace(array) -> ModuleType:
    """Where the functions for an array are: `torch` for a tensor, else `numpy`."""
    torch = sys.modules.get("torch")
    return torch if torch is not None and isinstance(array, torch.Tensor) else np


def constant(array, values):
    """A constant to compute with `array`: of its kind, and a tensor on its device."""
    xp = namespace(array)
    if xp is np:
        return np.asarray(values, dtype=float)
    return xp.as_tensor(values, dtype=array.dtype, device=array.device)

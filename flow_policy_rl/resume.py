"""The state of a run, from which it goes on exactly: one file of tensors per process.

Networks, optimisers, random generator, statistics, replay and environments are in it. On a CPU, 2 + 2 iterations equal
4, bit for bit.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flow_policy_rl import distributed, tensor_file
from flow_policy_rl.errors import InputError
from flow_policy_rl.nesting import flat, nested

FORMAT = "flow_policy_rl.state.3"
# Settings that a resumed run may change: what an iteration learns does not depend on them. `num_iterations` may change
# too, which moves the schedules that are shares of a run.
MAY_DIFFER = (
    *("track", "resume", "json", "run_dir", "peer_timeout_s"),
    *("eval_every", "eval_episodes", "save_every", "stop_at"),
)

PATHS = ("checkpoint", "demos")  # the same however they are written


def save(path: Path, learner, settings: dict, so_far: dict, together: bool = True) -> None:
    """Write all of it.

    Args:
        learner: has `state_dict()`, nested dicts of tensors and JSON values, and a `collector` if it simulates.
        so_far: what the run has taken and seen, as JSON: control steps, seconds, its latest look.
        together: nobody's file replaces an older one before all processes have written theirs, so that a run that is
            killed meanwhile goes on from one iteration. All have to call this then.
    """
    state = {"learner": learner.state_dict()}
    if hasattr(learner, "collector"):
        state["collector"] = learner.collector.state()
    tensors, values = flatten(state)
    facts = {
        **so_far,
        "processes": distributed.world_size(),
        "settings": comparable(settings),
        "values": values,
    }
    with tensor_file.replaced(path, tensors, FORMAT, facts=json.dumps(facts)):
        if together:
            distributed.wait_for_all()


def load(path: Path, learner, settings: dict) -> dict:
    """Put a fresh learner of the same settings where the saved one was; returns `so_far`, as in `save`.

    Raises:
        InputError: no state there, or one of other settings; names them.
    """
    if not path.is_file():
        raise InputError(f"nothing to resume: '{path}' does not exist")
    tensors, texts = tensor_file.read(path, "state", FORMAT)
    facts = json.loads(texts["facts"])
    processes = "number of processes"
    found = flat(comparable(facts.pop("settings")), ".") | {processes: facts.pop("processes")}
    wanted = flat(comparable(settings), ".") | {processes: distributed.world_size()}
    different = sorted(k for k in found.keys() | wanted if found.get(k) != wanted.get(k))
    if "algorithm" in different:  # which has settings of its own
        different = ["algorithm"]
    if different:
        said = (f"{k} {found.get(k)} there, {wanted.get(k)} here" for k in different)
        raise InputError(f"'{path}' was run with other settings: {'; '.join(said)}")
    state = unflatten(tensors | facts.pop("values"))
    learner.load_state_dict(state["learner"])
    if hasattr(learner, "collector"):
        learner.collector.restore({name: v.numpy() for name, v in state["collector"].items()})
    return facts


SEPARATOR = "|"  # occurs in no name


def flatten(state: dict) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors, and everything else, by their path in nested dicts."""
    tensors, values = {}, {}
    for path, value in flat(state, SEPARATOR).items():
        if isinstance(value, np.ndarray):
            value = torch.from_numpy(value.copy())
        if isinstance(value, Tensor):
            tensors[path] = value.detach().cpu().clone().contiguous()
        else:
            values[path] = value
    return tensors, values


def unflatten(entries: dict[str, Any]) -> dict:
    """Undo `flatten`. Names that are numbers were numbers (optimisers count their parameters)."""
    return nested(entries, SEPARATOR, lambda name: int(name) if name.isdigit() else name)


def comparable(settings: dict) -> dict:
    """What must be the same in a resumed run."""
    kept = {k: v for k, v in settings.items() if k not in MAY_DIFFER}
    kept.setdefault("algorithm", "bc")  # which has no flag for it
    for name, value in kept.items():
        if isinstance(value, dict):
            kept[name] = {k: v for k, v in value.items() if k != "num_iterations"}
        elif name in PATHS and value is not None:
            kept[name] = Path(value).resolve()
    return json.loads(json.dumps(kept, default=str))

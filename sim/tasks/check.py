"""Whether a task of another package is what `base.Task` says: a mistake is one line, before any work begins."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from sim.errors import SimulationError
from sim.tasks.base import Task

NEEDED = ("name", "robot", "control_dt", "episode_steps", "world", "obs_fields")
PACKAGE = Path(__file__).parent.parent


def check_task(task: Task, where: str) -> None:
    """Ask every function of a task once, for a batch of two states.

    Args:
        where: what the errors begin with.

    Raises:
        SimulationError: an attribute is missing, a function fails, or gives another name, shape or type than it should.
    """
    for attribute in NEEDED:
        if not hasattr(task, attribute):
            raise SimulationError(f"{where} has no attribute '{attribute}'")
    for f in task.obs_fields:
        if f.kind.startswith("joint_"):
            with said(f"{where}: observation '{f.name}'"):
                task.world.qpos_address(f.elements)
    with said(f"{where}: initial_state"):
        states = np.stack([task.initial_state(np.random.default_rng(i)) for i in range(2)])
    require(f"{where}: initial_state: a state", states[0].shape, (task.world.state_size,))
    with said(f"{where}: observe"):
        obs = task.observe(states)
    for f in task.obs_fields:
        if f.kind != "image":
            if f.name not in obs:
                raise SimulationError(
                    f"{where}: observe gives {', '.join(obs)}, not '{f.name}' of obs_fields"
                )
            require(f"{where}: observe: '{f.name}'", np.shape(obs[f.name]), (2, len(f.elements)))
    for name in ("is_failure", *(["is_success"] if task.success_hold_steps else [])):
        with said(f"{where}: {name}"):
            flag = np.asarray(getattr(task, name)(states))
        if flag.dtype != bool:
            raise SimulationError(f"{where}: {name} gives {flag.dtype}, not bool")
        require(f"{where}: {name}", flag.shape, (2,))
    with said(f"{where}: reward_terms"):
        action = task.world.initial_command(states)
        terms = task.reward_terms(states, action, states, np.zeros(2, bool))
    for name, term in terms.items():
        require(f"{where}: reward_terms: '{name}'", np.shape(term), (2,))


def require(what: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    """Refuse another shape.

    Raises:
        SimulationError: names both.
    """
    if found != wanted:
        raise SimulationError(f"{what} has shape {found}, not {wanted}")


@contextmanager
def said(what: str) -> Iterator[None]:
    """Say in one line what goes wrong within, and in which line of whose file.

    Raises:
        SimulationError: anything went wrong.
    """
    try:
        yield
    except SimulationError as error:
        raise SimulationError(f"{what}: {error}") from error
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)[1:]
        # The last line of theirs, not that of the library it calls.
        theirs = [f for f in frames if PACKAGE not in Path(f.filename).parents]
        near = [f for f in theirs if f.filename == theirs[0].filename] or frames
        text = " ".join([type(error).__name__ + ":", *str(error).split()]).rstrip(":")
        place = f"{Path(near[-1].filename).name}, line {near[-1].lineno}" if near else "no line"
        raise SimulationError(f"{what} fails: {text} ({place})") from error

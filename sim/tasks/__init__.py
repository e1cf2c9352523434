"""The tasks, by name. `base.py` says what a task is, `push.py` is a manipulation task to copy."""

import inspect
from importlib import metadata

from sim.errors import SimulationError, unknown_name
from sim.tasks.insert import Insert
from sim.tasks.kitchen import Kitchen
from sim.tasks.lamp import Lamp
from sim.tasks.lift import Lift
from sim.tasks.locomotion import LOCOMOTION
from sim.tasks.one_leg import OneLeg
from sim.tasks.pick_place import PickPlace
from sim.tasks.push import Push
from sim.tasks.reach import Reach
from sim.tasks.round_table import RoundTable
from sim.tasks.stack import Stack
from sim.tasks.transport import Transport

MANIPULATION = {
    task.name: task
    for task in (Reach, Lift, Push, Stack, PickPlace, Insert, Transport, OneLeg, Lamp, RoundTable)
}
TASKS = MANIPULATION | LOCOMOTION | {Kitchen.name: Kitchen}

PLUGINS = "flow_policy_rl.tasks"  # entry points of this group are tasks of other packages


def task_names() -> list[str]:
    """Every task that `make_task` builds, those of other packages included."""
    return sorted({*TASKS, *(entry.name for entry in metadata.entry_points(group=PLUGINS))})


def find_task(name: str):
    """The class of a task.

    Raises:
        SimulationError: unknown name, or a package that cannot be imported.
    """
    if name in TASKS:
        return TASKS[name]
    for entry in metadata.entry_points(group=PLUGINS, name=name):
        try:
            return entry.load()
        except Exception as error:
            raise SimulationError(
                f"task '{name}' of package '{entry.dist.name}' ({entry.value}) cannot be imported: "
                f"{type(error).__name__}: {error}"
            ) from error
    raise unknown_name("task", name, task_names())


def make_task(name: str, **options):
    """Build a task by name. It keeps what it was built with as `options`, without robot and cameras, which show.

    Args:
        options: what the task's class takes (`robot`, `reward`, `cameras` ...); None stands for its default.

    Raises:
        SimulationError: unknown name, option or value; the message lists the valid ones.
    """
    task = find_task(name)
    valid = inspect.signature(task).parameters
    given = {option: value for option, value in options.items() if value is not None}
    for option in given:
        if option not in valid:
            raise unknown_name(f"option of task '{name}'", option, valid)
    built = task(**given)
    built.options = {k: v for k, v in given.items() if k not in ("robot", "cameras")}
    return built

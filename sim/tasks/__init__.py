"""The tasks, by name. `base.py` says what a task is, `push.py` is a manipulation task to copy."""

import inspect
from importlib import metadata

from sim.errors import SimulationError, unknown_name
from sim.tasks.check import check_task, said
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

SWITCH = {"true": True, "false": False}

PLUGINS = "flow_policy_rl.tasks"  # entry points of this group are tasks of other packages


def task_names() -> list[str]:
    """Every task that `make_task` builds, those of other packages included."""
    return sorted({*TASKS, *(entry.name for entry in metadata.entry_points(group=PLUGINS))})


def find_task(name: str):
    """The class of a task.

    Raises:
        SimulationError: unknown name, one that two packages register, or a package that cannot be imported.
    """
    if name in TASKS:
        return TASKS[name]
    found = tuple(metadata.entry_points(group=PLUGINS, name=name))
    if not found:
        raise unknown_name("task", name, task_names())
    if len(found) > 1:
        packages = " and ".join(sorted(entry.dist.name for entry in found))
        raise SimulationError(f"task '{name}' is registered by {packages}: uninstall one of them")
    try:
        return found[0].load()
    except Exception as error:
        raise SimulationError(
            f"task '{name}' of package '{found[0].dist.name}' ({found[0].value}) cannot be imported: "
            f"{type(error).__name__}: {error}"
        ) from error


def make_task(name: str, **options):
    """Build a task by name. It keeps what it was built with as `options`, without robot and cameras, which show.

    Args:
        options: what the task's class takes (`robot`, `reward`, `cameras` ...); None stands for its default.

    Raises:
        SimulationError: unknown name, option or value; the message lists the valid ones. Or a task of another package
            that is not what a task should be.
    """
    task = find_task(name)
    valid = inspect.signature(task).parameters
    given = {option: value for option, value in options.items() if value is not None}
    for option in given:
        if option not in valid:
            raise unknown_name(f"option of task '{name}'", option, valid)
        if isinstance(valid[option].default, bool):
            given[option] = boolean(f"option {option} of task '{name}'", given[option])
    if name in TASKS:
        built = task(**given)
    else:
        where = f"task '{name}' ({task.__module__}:{task.__qualname__})"
        with said(where):
            built = task(**given)
        check_task(built, where)
    built.options = {o: v for o, v in given.items() if o not in ("robot", "cameras")}
    return built


def boolean(what: str, value: bool | str) -> bool:
    """A switch, which on the command line is a text.

    Raises:
        SimulationError: neither true nor false.
    """
    if isinstance(value, bool):
        return value
    if value not in SWITCH:
        raise SimulationError(f"{what} is true or false, not {value!r}")
    return SWITCH[value]

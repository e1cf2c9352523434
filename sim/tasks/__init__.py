"""The tasks, by name. `base.py` says what a task is, `push.py` is a manipulation task to copy."""

import inspect

from sim.errors import unknown_name
from sim.tasks.lift import Lift
from sim.tasks.locomotion import LOCOMOTION
from sim.tasks.pick_place import PickPlace
from sim.tasks.push import Push
from sim.tasks.reach import Reach
from sim.tasks.stack import Stack

MANIPULATION = {task.name: task for task in (Reach, Lift, Push, Stack, PickPlace)}
TASKS = MANIPULATION | LOCOMOTION


def make_task(name: str, **options):
    """Build a task by name.

    Args:
        options: what the task's class takes (`robot`, `reward`, `cameras` ...); None stands for its default.

    Raises:
        SimulationError: unknown name, option or value; the message lists the valid ones.
    """
    if name not in TASKS:
        raise unknown_name("task", name, TASKS)
    valid = inspect.signature(TASKS[name]).parameters
    given = {option: value for option, value in options.items() if value is not None}
    for option in given:
        if option not in valid:
            raise unknown_name(f"option of task '{name}'", option, valid)
    return TASKS[name](**given)

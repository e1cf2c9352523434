"""The tasks, by name. `base.py` says what a task is."""

import inspect

from sim.errors import unknown_name
from sim.tasks.lift import Lift

TASKS = {"lift": Lift}


def make_task(name: str, **options):
    """Build a task by name.

    Raises:
        SimulationError: unknown name or option; the message lists the valid ones.
    """
    if name not in TASKS:
        raise unknown_name("task", name, TASKS)
    valid = inspect.signature(TASKS[name]).parameters
    for option in options:
        if option not in valid:
            raise unknown_name(f"option of task '{name}'", option, valid)
    return TASKS[name](**options)

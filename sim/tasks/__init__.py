"""The tasks. A task is an MJCF model plus pure batched functions of the state (see `lift.py` for the shape of one)."""

from sim.errors import unknown_name
from sim.tasks.lift import Lift

TASKS = {"lift": Lift}


def make_task(name: str, **options):
    """Build a task by name.

    Raises:
        SimulationError: unknown name; the message lists the valid ones.
    """
    if name not in TASKS:
        raise unknown_name("task", name, TASKS)
    return TASKS[name](**options)

"""The task that a node simulates, or demonstrates: its parameters, and how it is made of them."""

import shlex
from collections.abc import Callable
from typing import Any

from flow_policy_rl.errors import InputError
from flow_policy_rl.serving.robot import Robot, load_robot
from flow_policy_rl.spec import options_text
from flow_policy_ros.parameters import Parameter
from sim.errors import SimulationError
from sim.tasks import find_task, make_task

PARAMETERS = (
    Parameter("task", "lift", "name of the task", fixed=True),
    Parameter(
        "task_options",
        "",
        "names and values of the task's own options, as in: randomness med",
        fixed=True,
    ),
    Parameter("robot", "panda", "name of a robot, or path of a robot file", fixed=True),
)


def load(get: Callable[[str], Any]) -> tuple[Any, Robot]:
    """The task on its robot, and the robot's file.

    Args:
        get: value of a parameter.

    Raises:
        InputError: unknown task, option or robot, or a value that is not valid.
    """
    name, robot = get("task"), load_robot(get("robot"))
    try:
        known = robot.name in getattr(find_task(name), "robots", ())
        given = {"robot": robot.name if known else None}
        return make_task(name, **given | _options(get("task_options"))), robot
    except SimulationError as error:
        raise InputError(str(error)) from None


def described(task) -> str:
    """A task, its robot and its options, in words."""
    return f"task '{task.name}' on {task.robot} with {options_text(task.options)}"


def _options(text: str) -> dict[str, str]:
    try:
        words = shlex.split(text)
    except ValueError:  # a quote without its end
        words = [text]
    if len(words) % 2:
        raise InputError(
            f"task_options must be names and values, as 'randomness med', not {text!r}"
        )
    return dict(zip(words[::2], words[1::2], strict=True))

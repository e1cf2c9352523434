"""Parameters with a description, a range and a say in when they may change."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rcl_interfaces.msg import (
    FloatingPointRange,
    IntegerRange,
    ParameterDescriptor,
    SetParametersResult,
)
from rclpy.node import Node

from flow_policy_rl.errors import InputError, unknown_name


@dataclass(frozen=True)
class Parameter:
    """One parameter of a node.

    Attributes:
        name, default, description: as declared; the type is that of the default.
        low, high: range of a number; both None is any.
        choices: of a text; empty is any.
        fixed: it can be set at the start only.
        when_unconfigured: a lifecycle node takes changes only while it is not configured.
    """

    name: str
    default: bool | int | float | str
    description: str
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    fixed: bool = False
    when_unconfigured: bool = False

    @property
    def descriptor(self) -> ParameterDescriptor:
        """What `ros2 param describe` shows."""
        choices = f" ({', '.join(self.choices)})" if self.choices else ""
        result = ParameterDescriptor(description=self.description + choices, read_only=self.fixed)
        if self.low is not None and isinstance(self.default, float):
            result.floating_point_range = [
                FloatingPointRange(from_value=float(self.low), to_value=float(self.high))
            ]
        elif self.low is not None:
            result.integer_range = [
                IntegerRange(from_value=int(self.low), to_value=int(self.high), step=1)
            ]
        return result


def declare(node: Node, parameters: Sequence[Parameter]) -> None:
    """Declare all of them."""
    for p in parameters:
        node.declare_parameter(p.name, p.default, p.descriptor)


def check_choices(parameters: Sequence[Parameter], get: Callable[[str], object]) -> None:
    """Texts that were given at the start, which no callback has seen.

    Raises:
        InputError: one is not among its choices.
    """
    for p in parameters:
        if p.choices and get(p.name) not in p.choices:
            raise InputError(
                f"parameter {p.name} must be one of {', '.join(p.choices)}, not '{get(p.name)}'"
            )


def check(
    parameters: Sequence[Parameter], changes: Sequence, configured: bool = False
) -> SetParametersResult:
    """Whether changes (rclpy parameters) may be made. Types and ranges rclpy has checked already."""
    known = {p.name: p for p in parameters}
    for change in changes:
        declared = known.get(change.name)
        if declared is None:
            continue
        if configured and declared.when_unconfigured:
            reason = f"{change.name} can only change while the node is unconfigured: deactivate and clean up first"
            return SetParametersResult(successful=False, reason=reason)
        if declared.choices and change.value not in declared.choices:
            error = unknown_name(change.name, str(change.value), declared.choices)
            return SetParametersResult(successful=False, reason=str(error))
    return SetParametersResult(successful=True)

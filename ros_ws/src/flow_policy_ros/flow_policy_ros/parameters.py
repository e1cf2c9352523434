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
        low, high: range of a number, both ends included; both None is any.
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

    def value(self, given: object) -> bool | int | float | str:
        """What was given, as the type that it is declared with: 1 is a number as 1.0 is.

        Raises:
            InputError: another type, or out of range.
        """
        kind = type(self.default)
        whole = type(given) is int and kind is float
        fits = type(given) is kind or whole
        if fits and self.low is not None:
            fits = self.low <= given <= self.high
        if not fits:
            raise InputError(f"parameter {self.name} must be {self._wanted}, not {given!r}")
        return kind(given)

    @property
    def _wanted(self) -> str:
        noun = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
        if self.low is None:
            return noun[type(self.default)]
        return f"{noun[type(self.default)]} from {self.low:.10g} to {self.high:.10g}"

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
    """Declare all of them, with the values that were given at the start (`-p`, `--params-file`).

    Raises:
        InputError: a value is of another type or out of range, or a name is none of the node's.
    """
    given = node._parameter_overrides  # NOTE: what nobody declares rclpy tells in no other place
    for p in parameters:
        value = p.value(given[p.name].value) if p.name in given else p.default
        node.declare_parameter(p.name, value, p.descriptor, ignore_override=True)
    # rclpy has declared its own (use_sim_time) before, but for the QoS of a topic.
    for name in given:
        if not node.has_parameter(name) and not name.startswith("qos_overrides."):
            known = (*(p.name for p in parameters), "use_sim_time")
            raise unknown_name(f"parameter of {node.get_name()}", name, known)


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

"""Robot files: what a robot's joints may do, and which topics it speaks on. A user adds a robot
without touching code."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from flow_policy_rl import plugins
from flow_policy_rl.errors import InputError, unknown_name


@dataclass(frozen=True)
class JointLimits:
    """Limits of one joint in SI units: rad and rad/s, or m and m/s."""

    position: tuple[float, float]
    velocity: float
    acceleration: float
    jerk: float


@dataclass(frozen=True)
class Topics:
    """Topic names: joint states in, trajectory out, poses by object, images by camera."""

    joint_states: str
    command: str
    poses: Mapping[str, str] = dataclasses.field(default_factory=dict)
    images: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Robot:
    """One robot file."""

    name: str
    arm: Mapping[str, JointLimits]
    gripper: Mapping[str, JointLimits]
    topics: Topics

    @property
    def limits(self) -> dict[str, JointLimits]:
        """Of every joint, by name."""
        return {**self.arm, **self.gripper}

    def limit_array(self, joint_names: tuple[str, ...], what: str) -> np.ndarray:
        """One kind of limit in the order of `joint_names`: (A,), or (A, 2) for `position`.

        Raises:
            InputError: the robot has no such joint.
        """
        for name in joint_names:
            if name not in self.limits:
                raise unknown_name(f"joint of robot '{self.name}'", name, self.limits)
        return np.array([getattr(self.limits[name], what) for name in joint_names], dtype=float)


def robot_names() -> list[str]:
    """Robots that ship with the package, and those that other packages register."""
    return sorted({*_shipped(), *plugins.names("robots")})


def _shipped() -> dict[str, Path]:
    """Robot files of ours, by name."""
    files = Path(str(resources.files("robots"))).glob("*.yaml")
    return {path.stem: path for path in files}


def load_robot(name: str) -> Robot:
    """A robot by name, or from a YAML file of one's own.

    Raises:
        InputError: unknown name, or a file with a wrong or missing key (the message says which).
    """
    own = name.endswith((".yaml", ".yml"))
    path = Path(name if own else plugins.find("robots", name, _shipped()))
    if not path.is_file():
        raise InputError(f"robot file '{path}' does not exist")
    text = path.read_text(errors="replace")
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(
            f"robot file '{name}' is not YAML: {' '.join(str(error).split())}"
        ) from None
    raw = _keys(Robot, raw, f"robot file '{name}'")
    joints = {}
    for group in ("arm", "gripper"):
        where = f"robot file '{name}': {group}"
        joints[group] = {
            joint: _limits(value, f"{where}.{joint}")
            for joint, value in _mapping(raw[group], where).items()
        }
    if not joints["arm"]:
        raise InputError(f"robot file '{name}': arm has no joints")
    topics = Topics(**_keys(Topics, raw["topics"], f"robot file '{name}': topics"))
    return Robot(str(raw["name"]), joints["arm"], joints["gripper"], topics)


def _limits(raw: Any, where: str) -> JointLimits:
    values = _keys(JointLimits, raw, where)
    try:
        low, high = (float(v) for v in values["position"])
        limits = JointLimits(
            (low, high), *(float(values[k]) for k in ("velocity", "acceleration", "jerk"))
        )
    except (TypeError, ValueError):
        raise InputError(f"{where}: limits must be numbers, position a pair [low, high]") from None
    rest = (limits.velocity, limits.acceleration, limits.jerk)
    if not low < high or not all(np.isfinite((low, high, *rest))) or min(rest) <= 0:
        raise InputError(
            f"{where}: need low < high and positive, finite velocity, acceleration and jerk"
        )
    return limits


def _mapping(raw: Any, where: str) -> Mapping:
    if not isinstance(raw, dict):
        raise InputError(f"{where} must be a mapping, not {type(raw).__name__}")
    return raw


def _keys(cls, raw: Any, where: str) -> Mapping:
    """The mapping, if its keys are those of the dataclass."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in _mapping(raw, where):
        if key not in fields:
            raise unknown_name(f"key in {where}:", str(key), fields)
    for name, f in fields.items():
        if (
            name not in raw
            and f.default is dataclasses.MISSING
            and f.default_factory is dataclasses.MISSING
        ):
            raise InputError(f"{where}: key '{name}' is missing")
    return raw

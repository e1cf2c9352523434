"""Robot files: what a robot's joints may do, and which topics it speaks on. A user adds a robot
without touching code: `--robot my_robot.yaml`."""

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
from flow_policy_rl.serving.kinematics import (
    Kinematics,
    Link,
    UrdfJoint,
    chain,
    direction,
    read_urdf,
)

GRIPPER_ACTIONS = ("GripperCommand", "ParallelGripperCommand")
LIMITS = ("position", "velocity", "acceleration", "jerk")


@dataclass(frozen=True)
class JointLimits:
    """Limits of one joint in SI units: rad and rad/s, or m and m/s."""

    position: tuple[float, float]
    velocity: float
    acceleration: float
    jerk: float


@dataclass(frozen=True)
class Topics:
    """Topic names.

    Attributes:
        joint_states: sensor_msgs/JointState, in.
        command: trajectory_msgs/JointTrajectory, out.
        poses: geometry_msgs/PoseStamped by object, in.
        images: sensor_msgs/Image (or CompressedImage where the name ends in /compressed) by camera, in.
        forward_command: std_msgs/Float64MultiArray of a forward_command_controller, out (output: per_tick).
        gripper_command: JointTrajectory of a gripper controller of its own; without it the gripper is part of
            `command`.
        controller_state: control_msgs/JointTrajectoryControllerState, read where control_msgs is installed.
        speed_scaling: std_msgs/Float64, percent of full speed at which the robot executes (a UR's speed slider), in;
            without it the robot is taken to execute at full speed always.
    """

    joint_states: str
    command: str
    poses: Mapping[str, str] = dataclasses.field(default_factory=dict)
    images: Mapping[str, str] = dataclasses.field(default_factory=dict)
    forward_command: str = "/forward_position_controller/commands"
    gripper_command: str = ""
    controller_state: str = ""
    speed_scaling: str = ""


@dataclass(frozen=True)
class GripperAction:
    """A gripper controller that takes goals instead of trajectories (needs control_msgs).

    Attributes:
        name: of the action, such as /gripper_controller/gripper_cmd.
        type: of control_msgs: GripperCommand (one joint) or ParallelGripperCommand.
        max_effort: N or Nm; 0 leaves it to the controller.
        deadband: a goal goes out when it is further than this (m or rad) from the one before.
        max_rate_hz: at most so many goals per second; each ends the one before.
    """

    name: str
    type: str = "GripperCommand"
    max_effort: float = 0.0
    deadband: float = 0.002
    max_rate_hz: float = 5.0


@dataclass(frozen=True)
class Robot:
    """One robot file.

    Attributes:
        name: what a policy's spec calls it.
        arm, gripper: limits by joint. A joint may leave out `position` and `velocity` where a URDF has them.
        topics: see `Topics`.
        gripper_action: see `GripperAction`; the gripper's joints are then no part of `command`.
        home: a pose to start from, by joint.
        urdf: path of a URDF, from the robot file's folder: limits, and with `tool` the kinematics.
        tool: link of the URDF that must stay in the workspace.
        chain: the kinematics by hand, from the base to the tool: a list of `Link` mappings.
        workspace: box {low: [x, y, z], high: [x, y, z]} (m, base frame) for the tool; needs kinematics.
    """

    name: str
    arm: Mapping[str, JointLimits]
    gripper: Mapping[str, JointLimits]
    topics: Topics
    gripper_action: GripperAction | None = None
    home: Mapping[str, float] = dataclasses.field(default_factory=dict)
    urdf: str = ""
    tool: str = ""
    chain: Kinematics | None = None
    workspace: tuple[np.ndarray, np.ndarray] | None = None

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
    text, folder = path.read_text(errors="replace"), path.parent
    where = f"robot file '{name}'"
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{where} is not YAML: {' '.join(str(error).split())}") from None
    raw = dict(_keys(Robot, raw, where))
    urdf = read_urdf(folder / str(raw["urdf"])) if raw.get("urdf") else {}
    for group in ("arm", "gripper"):
        raw[group] = {
            joint: _limits(value, urdf.get(joint), f"{where}: {group}.{joint}")
            for joint, value in _mapping(raw[group], f"{where}: {group}").items()
        }
    if not raw["arm"]:
        raise InputError(f"{where}: arm has no joints")
    both = set(raw["arm"]) & set(raw["gripper"])
    if both:
        raise InputError(f"{where}: {sorted(both)[0]} is in arm and in gripper")
    raw["name"] = str(raw["name"])
    raw["topics"] = _topics(raw["topics"], f"{where}: topics")
    if "gripper_action" in raw:
        raw["gripper_action"] = _gripper_action(raw, f"{where}: gripper_action")
    joints = {**raw["arm"], **raw["gripper"]}
    raw["home"] = _home(raw.get("home", {}), joints, f"{where}: home")
    raw["chain"] = _kinematics(raw, urdf, joints, folder, where)
    if "workspace" in raw:
        if raw["chain"] is None:
            raise InputError(f"{where}: workspace needs chain, or urdf and tool")
        raw["workspace"] = _box(raw["workspace"], f"{where}: workspace")
    return Robot(**raw)


def _limits(raw: Any, urdf: UrdfJoint | None, where: str) -> JointLimits:
    known = {k: getattr(urdf, k) for k in ("position", "velocity") if urdf and getattr(urdf, k)}
    values = _keys(JointLimits, known | dict(_mapping(raw, where)), where)
    try:
        low, high = (float(v) for v in values["position"])
        limits = JointLimits((low, high), *(float(values[k]) for k in LIMITS[1:]))
    except (TypeError, ValueError):
        raise InputError(f"{where}: limits must be numbers, position a pair [low, high]") from None
    rest = (limits.velocity, limits.acceleration, limits.jerk)
    if not low < high or not all(np.isfinite((low, high, *rest))) or min(rest) <= 0:
        raise InputError(
            f"{where}: need low < high and positive, finite velocity, acceleration and jerk"
        )
    return limits


def _topics(raw: Any, where: str) -> Topics:
    values = _keys(Topics, raw, where)
    for key, value in values.items():
        named = _mapping(value, f"{where}.{key}") if key in ("poses", "images") else {"": value}
        for name, topic in named.items():
            _check_name(topic, f"{where}.{key}{'.' if name else ''}{name}")
    return Topics(**values)


def _check_name(topic: Any, where: str) -> None:
    if not isinstance(topic, str) or " " in topic or topic.endswith("/") or "//" in topic:
        raise InputError(f"{where}: '{topic}' is not a topic name")


def _gripper_action(raw: Mapping, where: str) -> GripperAction:
    values = _keys(GripperAction, raw["gripper_action"], where)
    _check_name(values["name"], f"{where}.name")
    kind = values.get("type", GripperAction.type)
    if kind not in GRIPPER_ACTIONS:
        raise unknown_name(f"{where}.type", str(kind), GRIPPER_ACTIONS)
    for key in ("max_effort", "deadband", "max_rate_hz"):
        value = values.get(key, getattr(GripperAction, key))
        if not isinstance(value, int | float) or not 0 <= value < float("inf"):
            raise InputError(f"{where}.{key}: {value} is not a number of at least 0")
    if not values.get("max_rate_hz", 1):
        raise InputError(f"{where}.max_rate_hz: no goal would ever go out")
    if not raw["gripper"] or (kind == "GripperCommand" and len(raw["gripper"]) != 1):
        most = "exactly one joint" if kind == "GripperCommand" else "a joint"
        raise InputError(
            f"{where}: {kind} needs {most} in gripper, there are {len(raw['gripper'])}"
        )
    if raw["topics"].gripper_command:
        raise InputError(f"{where}: topics.gripper_command moves the same joints; give one of them")
    return GripperAction(**values)


def _home(raw: Any, joints: Mapping[str, JointLimits], where: str) -> dict[str, float]:
    home = {}
    for joint, value in _mapping(raw, where).items():
        if joint not in joints:
            raise unknown_name(f"joint in {where}:", str(joint), joints)
        low, high = joints[joint].position
        if not isinstance(value, int | float) or not low <= value <= high:
            raise InputError(f"{where}.{joint}: {value} is not a number within [{low}, {high}]")
        home[joint] = float(value)
    return home


def _kinematics(
    raw: Mapping, urdf: dict[str, UrdfJoint], joints: Mapping, folder: Path, where: str
) -> Kinematics | None:
    if raw.get("tool"):
        if not urdf:
            raise InputError(f"{where}: tool names a link of a URDF; give urdf")
        return chain(urdf, str(raw["tool"]), folder / str(raw["urdf"]))
    if "chain" not in raw:
        return None
    if not isinstance(raw["chain"], list):
        raise InputError(f"{where}: chain must be a list of links")
    links = []
    for i, entry in enumerate(raw["chain"]):
        values = dict(_keys(Link, entry, f"{where}: chain[{i}]"))
        if values.get("joint") and values["joint"] not in joints:
            raise unknown_name(f"joint in {where}: chain[{i}]:", str(values["joint"]), joints)
        for key in {"xyz", "rpy", "axis"} & set(values):
            values[key] = tuple(_triple(values[key], f"{where}: chain[{i}].{key}"))
        if "axis" in values:
            try:
                values["axis"] = direction(values["axis"])
            except ValueError as error:
                raise InputError(f"{where}: chain[{i}].axis: {error}") from None
        links.append(Link(**values))
    return Kinematics(links)


def _box(raw: Any, where: str) -> tuple[np.ndarray, np.ndarray]:
    raw = _mapping(raw, where)
    for key in raw:
        if key not in ("low", "high"):
            raise unknown_name(f"key in {where}:", str(key), ("low", "high"))
    low, high = (np.array(_triple(raw.get(key), f"{where}.{key}")) for key in ("low", "high"))
    if not (low < high).all():
        raise InputError(f"{where}: low must be below high")
    return low, high


def _triple(raw: Any, where: str) -> list[float]:
    numbers = isinstance(raw, list) and all(isinstance(v, int | float) for v in raw)
    if not numbers or len(raw) != 3 or not np.isfinite(raw).all():
        raise InputError(f"{where} must be a list of 3 finite numbers")
    return [float(v) for v in raw]


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

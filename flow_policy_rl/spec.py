"""`PolicySpec`: what a policy sees, commands and expects, in one JSON string. The waist between training and robot.

The task defines it, training writes it into the checkpoint, export writes it into `policy.onnx`, the node reads it
back. Everything is in SI units, and the order of joints is always the order of `joint_names`.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flow_policy_rl.errors import InputError

SCHEMA_VERSION = 1
METADATA_KEY = "flow_policy_rl.spec"  # where an ONNX file keeps the JSON
# `state` is what only a simulation knows; `control` goes to the actuator as it is.
FIELD_KINDS = ("joint_position", "joint_velocity", "pose", "image", "state")
ACTION_KINDS = ("joint_position", "control")
RESERVED_NAMES = ("noise", "prefix", "inference_delay", "action_chunk", "features")
CONTROL_DT = (1e-4, 60.0)  # s; times are whole nanoseconds
LARGEST_SIDE = 4096  # of a picture, pixels
INTEGRATORS = ("euler", "midpoint", "heun", "rk4")
# Of a field: what its numbers are, and in which order.
MEANING = ("kind", "elements", "unit", "source")


@dataclass(frozen=True)
class ObservationField:
    """One input of the policy.

    Attributes:
        name: key in observation dicts and input name of the graph.
        kind: one of `FIELD_KINDS`.
        elements: joint names; the elements of a pose (x, y, z, qx, qy, qz, qw with qw >= 0); empty for an image.
        unit: SI unit.
        source: object of a pose, camera of an image, else empty.
        mean, std: statistics of the training data, one per element or none, for an out-of-distribution check.
        resolution: height and width of an image (uint8 RGB); else empty.
    """

    name: str
    kind: str
    elements: tuple[str, ...]
    unit: str
    source: str = ""
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    resolution: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        """Numbers in the field, for a field that is not an image."""
        return len(self.elements)

    @property
    def shape(self) -> tuple[int, ...]:
        """(size,), or (height, width, 3) of an image."""
        return (*self.resolution, 3) if self.kind == "image" else (self.size,)


@dataclass(frozen=True)
class PolicySpec:
    """The contract of one policy.

    Attributes:
        task, robot: names; the node refuses a robot file of another name.
        task_options: of the task, where they were not its defaults.
        joint_names: the A commanded joints, in the order of the action.
        action_kind: one of `ACTION_KINDS`.
        action_low, action_high: limits of the command per joint, rad or m; the graph clamps to them.
        observations: the inputs, in order.
        control_dt: seconds between two actions of a chunk.
        action_horizon: H, actions in a chunk. Action k is due (k + 1) * control_dt after the observation.
        execute_horizon: actions to run before the next chunk takes over.
        prefix_horizon: P, most actions of a previous chunk that the policy can be given to continue; 0 is none.
            Such a policy takes `prefix` (P, A) and `inference_delay` (0..P) beside its observations, and its chunk
            starts with exactly these `inference_delay` actions (training-time real-time chunking, arXiv 2512.05964).
        integrator, num_flow_steps: how the flow is integrated (in the graph, for an exported policy).
        algorithm: what trained it last.
        provenance: free facts: results, hashes, versions, the command.
    """

    task: str
    robot: str
    joint_names: tuple[str, ...]
    action_low: tuple[float, ...]
    action_high: tuple[float, ...]
    observations: tuple[ObservationField, ...]
    control_dt: float
    action_horizon: int
    execute_horizon: int
    action_kind: str = "joint_position"
    prefix_horizon: int = 0
    integrator: str = "euler"
    num_flow_steps: int = 4
    algorithm: str = ""
    task_options: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self):
        problem = self._problem()
        if problem:
            raise InputError(f"policy spec: {problem}")

    def _problem(self) -> str:
        joints = len(self.joint_names)
        names = [f.name for f in self.observations]
        bounds = (*self.action_low, *self.action_high)
        checks = {
            "joint_names is empty": joints == 0,
            "joint_names has duplicates": len(set(self.joint_names)) != joints,
            f"action_low and action_high need {joints} values each": len(self.action_low) != joints
            or len(self.action_high) != joints,
            "action limits are not finite": not all(math.isfinite(b) for b in bounds),
            "action_low is not below action_high": any(
                lo >= hi for lo, hi in zip(self.action_low, self.action_high, strict=False)
            ),
            "observations is empty": not names,
            "observation names are not unique": len(set(names)) != len(names),
            f"action_kind must be one of {ACTION_KINDS}": self.action_kind not in ACTION_KINDS,
            f"integrator must be one of {INTEGRATORS}": self.integrator not in INTEGRATORS,
            "num_flow_steps must be at least 1": self.num_flow_steps < 1,
            f"control_dt must be from {CONTROL_DT[0]:g} to {CONTROL_DT[1]:g} s": not (
                CONTROL_DT[0] <= self.control_dt <= CONTROL_DT[1]
            ),
            "need 1 <= execute_horizon <= action_horizon": not (
                1 <= self.execute_horizon <= self.action_horizon
            ),
            "need 0 <= prefix_horizon <= action_horizon - execute_horizon": not (
                0 <= self.prefix_horizon <= self.action_horizon - self.execute_horizon
            ),
        }
        for f in self.observations:
            checks[f"observation '{f.name}': kind must be one of {FIELD_KINDS}"] = (
                f.kind not in FIELD_KINDS
            )
            checks[f"observation '{f.name}' has no elements"] = f.kind != "image" and f.size == 0
            checks[
                f"observation '{f.name}': an image needs a resolution of 1 to {LARGEST_SIDE} pixels each way"
            ] = f.kind == "image" and not (
                len(f.resolution) == 2 and all(0 < n <= LARGEST_SIDE for n in f.resolution)
            )
            checks[f"observation '{f.name}': mean and std need one value per element, or none"] = (
                len(f.mean) != len(f.std) or len(f.mean) not in (0, f.size)
            )
            checks[f"observation '{f.name}': std must be above zero"] = any(s <= 0 for s in f.std)
            checks[f"observation name '{f.name}' is taken"] = f.name in RESERVED_NAMES
        return next((text for text, wrong in checks.items() if wrong), "")

    @property
    def num_joints(self) -> int:
        """A."""
        return len(self.joint_names)

    @property
    def cameras(self) -> tuple[str, ...]:
        """Names of the cameras the policy sees through."""
        return tuple(f.source for f in self.observations if f.kind == "image")

    def replace(self, **changes) -> "PolicySpec":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def to_json(self) -> str:
        """One line of JSON; floats keep full precision."""
        raw = dataclasses.asdict(self)
        if not self.task_options:
            # Versions before there were options refuse a key that they do not know.
            del raw["task_options"]
        return json.dumps(raw, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "PolicySpec":
        """Read a spec back.

        Raises:
            InputError: not JSON, of a newer schema, or a key missing, unknown or of the wrong type.
        """
        try:
            raw = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"policy spec is not JSON: {error}") from None
        if not isinstance(raw, dict):
            raise InputError("policy spec is not a JSON object")
        version = raw.get("schema_version")
        if version != SCHEMA_VERSION:
            newer = isinstance(version, int) and version > SCHEMA_VERSION
            mend = "upgrade flow_policy_rl" if newer else "export or train again with this version"
            raise InputError(
                f"policy spec has schema_version {version!r}; this version reads {SCHEMA_VERSION}: {mend}"
            )
        observations = raw.get("observations")
        if not isinstance(observations, list):
            raise InputError("policy spec: 'observations' must be a list")
        raw["observations"] = tuple(
            _build(ObservationField, f, "policy spec: observation") for f in observations
        )
        return _build(cls, raw, "policy spec")


_PYTHON_TYPES: dict[Any, Any] = {
    str: str,
    int: int,
    float: (int, float),
    dict: dict,
    tuple: (list, tuple),
}


def _build(cls, raw: Any, where: str):
    """A dataclass from a JSON object, every key and type checked."""
    if not isinstance(raw, dict):
        raise InputError(f"{where} is not a JSON object")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in raw:
        if key not in fields:
            raise InputError(f"{where}: unknown key '{key}'; valid: {', '.join(fields)}")
    values = {}
    for name, f in fields.items():
        if name not in raw:
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
                raise InputError(f"{where}: key '{name}' is missing")
            continue
        values[name] = _checked(raw[name], f.type, f"{where}: '{name}'")
    return cls(**values)


def _checked(value: Any, declared: Any, where: str) -> Any:
    origin = getattr(declared, "__origin__", declared)
    if not isinstance(value, _PYTHON_TYPES[origin]) or (
        isinstance(value, bool) and origin is not bool
    ):
        raise InputError(f"{where} must be {origin.__name__}, not {type(value).__name__}")
    if origin is float:
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise InputError(f"{where} is not finite")
        return number
    if origin is tuple:
        (item, *_) = declared.__args__
        if item in (str, float, int):
            return tuple(_checked(v, item, where) for v in value)
        return tuple(value)
    return value


def options_text(options: Mapping[str, Any]) -> str:
    """Options of a task for people, who see `its defaults` where there are none."""
    return ", ".join(f"{name} {value}" for name, value in options.items()) or "its defaults"


def under_way(chunk, execute_horizon: int, prefix_horizon: int):
    """The actions (B, P, A) of a chunk (B, H, A) after the executed ones: what a next chunk may have to continue."""
    return chunk[:, execute_horizon : execute_horizon + prefix_horizon]

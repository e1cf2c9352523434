"""Forward kinematics of a chain of scalar joints, in numpy: where the tool is."""

import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flow_policy_rl.errors import InputError, unknown_name


@dataclass(frozen=True)
class Link:
    """One joint of a chain, as URDF has it: a fixed transform, then a turn about or a slide along an axis.

    Attributes:
        joint: its name; empty for a fixed transform.
        xyz, rpy: m and rad, from the link before.
        axis: unit vector in the joint's own frame.
        slides: a prismatic joint.
    """

    joint: str = ""
    xyz: tuple[float, float, float] = (0.0, 0.0, 0.0)
    rpy: tuple[float, float, float] = (0.0, 0.0, 0.0)
    axis: tuple[float, float, float] = (0.0, 0.0, 1.0)
    slides: bool = False


class Kinematics:
    """A chain from the base to the tool."""

    def __init__(self, links: Sequence[Link]):
        self.links = tuple(links)
        self._origins = [_transform(link.xyz, link.rpy) for link in self.links]

    @property
    def joint_names(self) -> list[str]:
        """Its moving joints, from the base on."""
        return [link.joint for link in self.links if link.joint]

    def tool_position(self, joint_names: Sequence[str], positions: np.ndarray) -> np.ndarray:
        """Where the tool is (n, 3) m for joint positions (n, A); joints of the chain that are not named stand at
        zero."""
        pose = np.tile(np.eye(4), (len(positions), 1, 1))
        for link, origin in zip(self.links, self._origins, strict=True):
            pose = pose @ origin
            if link.joint in joint_names:
                values = positions[:, list(joint_names).index(link.joint)]
                pose = pose @ _moved(np.array(link.axis), values, link.slides)
        return pose[:, :3, 3]


def direction(axis: Sequence[float]) -> tuple[float, float, float]:
    """An axis of any length, as a unit vector.

    Raises:
        ValueError: it is zero, or not finite.
    """
    length = math.hypot(*axis)
    if not 0 < length < math.inf:
        raise ValueError("an axis must be finite and not zero")
    x, y, z = (v / length for v in axis)
    return x, y, z


def _transform(xyz: Sequence[float], rpy: Sequence[float]) -> np.ndarray:
    """Fixed-axis roll, pitch, yaw, as URDF."""
    (cr, cp, cy), (sr, sp, sy) = np.cos(rpy), np.sin(rpy)
    pose = np.eye(4)
    pose[:3, :3] = [
        [cy * cp, cy * sp * sr - sy * cr, cy * sp * cr + sy * sr],
        [sy * cp, sy * sp * sr + cy * cr, sy * sp * cr - cy * sr],
        [-sp, cp * sr, cp * cr],
    ]
    pose[:3, 3] = xyz
    return pose


def _moved(axis: np.ndarray, values: np.ndarray, slides: bool) -> np.ndarray:
    """(n, 4, 4) of a joint at values (n,)."""
    pose = np.tile(np.eye(4), (len(values), 1, 1))
    if slides:
        pose[:, :3, 3] = values[:, None] * axis
        return pose
    x, y, z = axis
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    sine, cosine = np.sin(values)[:, None, None], np.cos(values)[:, None, None]
    pose[:, :3, :3] = np.eye(3) + sine * cross + (1 - cosine) * (cross @ cross)  # Rodrigues
    return pose


@dataclass(frozen=True)
class UrdfJoint:
    """What is taken from a URDF. Limits are None where it has none (a continuous joint)."""

    link: Link
    parent: str
    child: str
    position: tuple[float, float] | None
    velocity: float | None


def read_urdf(path: Path) -> dict[str, UrdfJoint]:
    """Joints of a URDF by name; fixed ones included.

    Raises:
        InputError: no such file, not XML, or a joint that cannot be read.
    """
    try:
        root = ElementTree.parse(path).getroot()
    except OSError as error:
        raise InputError(f"URDF '{path}' cannot be read: {error.strerror}") from None
    except ElementTree.ParseError as error:
        raise InputError(
            f"URDF '{path}' is not XML: {error} (xacro files must be expanded first)"
        ) from None
    return {
        j.get("name", ""): _urdf_joint(j, path)
        for j in root.iter("joint")
        if j.find("parent") is not None
    }


def _urdf_joint(element: ElementTree.Element, path: Path) -> UrdfJoint:
    name, kind = element.get("name", ""), element.get("type", "")

    def triple(tag: str, key: str, default: str) -> tuple[float, float, float]:
        found = element.find(tag)
        x, y, z = (
            float(v) for v in (default if found is None else found.get(key, default)).split()
        )
        if not all(map(math.isfinite, (x, y, z))):
            raise ValueError("not finite")
        return x, y, z

    try:
        moving = kind in ("revolute", "continuous", "prismatic")
        link = Link(
            name if moving else "",
            triple("origin", "xyz", "0 0 0"),
            triple("origin", "rpy", "0 0 0"),
            direction(triple("axis", "xyz", "1 0 0")) if moving else Link.axis,
            kind == "prismatic",
        )
        limit = element.find("limit")
        position = velocity = None
        if moving and limit is not None:
            if kind != "continuous":
                position = float(limit.get("lower", "0")), float(limit.get("upper", "0"))
            velocity = float(limit.get("velocity")) if limit.get("velocity") else None
        return UrdfJoint(
            link,
            element.find("parent").get("link", ""),
            element.find("child").get("link", ""),
            position,
            velocity,
        )
    except (ValueError, AttributeError):
        raise InputError(
            f"URDF '{path}': joint '{name}' has a number that cannot be read, an axis of zero, or no child"
        ) from None


def chain(joints: dict[str, UrdfJoint], tool: str, path: Path) -> Kinematics:
    """The chain of a URDF from its root to a link.

    Raises:
        InputError: there is no such link, or it hangs from itself.
    """
    by_child = {j.child: j for j in joints.values()}
    if tool not in by_child:
        raise unknown_name(f"link of URDF '{path}'", tool, by_child)
    links: list[Link] = []
    passed = set()
    while tool in by_child:
        if tool in passed:
            raise InputError(f"URDF '{path}': link '{tool}' hangs from itself")
        passed.add(tool)
        links.insert(0, by_child[tool].link)
        tool = by_child[tool].parent
    return Kinematics(links)

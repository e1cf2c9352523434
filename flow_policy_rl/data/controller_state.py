"""The layouts that `control_msgs/msg/JointTrajectoryControllerState` has had.

No store of `rosbags` has the type, sqlite3 bags of Humble and before do not define theirs, and a recorder has to.
"""

from collections.abc import Collection
from functools import cache

from rosbags.typesys import Stores, get_types_from_msg, get_typestore
from rosbags.typesys.store import Typestore

NAME = "control_msgs/msg/JointTrajectoryControllerState"
STATES = {  # its joint states, by the version of control_msgs that brought the layout; the newest first
    "5.3": "reference feedback error output",  # Jazzy and later: with a scaling factor at the end
    "5.0": "reference feedback error output",  # Jazzy of 2024
    "4.4": "reference feedback error output desired actual",  # Humble
    "4.0": "desired actual error",  # Humble until April 2023
    "2.0": "desired actual error",  # Foxy: without multi_dof
}


def definition(version: str) -> str:
    """The message in the language of .msg files."""
    states = STATES[version].split()
    lines = ["std_msgs/Header header", "string[] joint_names"]
    lines += [f"trajectory_msgs/JointTrajectoryPoint {state}" for state in states]
    if version >= "4.0":
        lines += ["string[] multi_dof_joint_names"]
        lines += [f"trajectory_msgs/MultiDOFJointTrajectoryPoint multi_dof_{s}" for s in states]
    if version >= "5.3":
        lines += ["float64 speed_scaling_factor"]
    return "\n".join(lines)


@cache
def stores() -> tuple[Typestore, ...]:
    """One for each layout, the newest first. A message has the layout that its bytes fill exactly."""
    found = []
    for version in STATES:
        store = get_typestore(Stores.ROS2_JAZZY)
        store.register(get_types_from_msg(definition(version), NAME))
        found.append(store)
    return tuple(found)


def store_with(fields: Collection[str]) -> Typestore | None:
    """That of the layout with these fields (names, in any order); None where there is none."""
    for store in stores():
        _, members = store.fielddefs[NAME]
        if {name for name, _ in members} == set(fields):
            return store
    return None

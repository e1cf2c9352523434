"""Robot arms in a scene. Everything that differs between robots is in their MJCF, found by these conventions:

`sim/assets/NAME.xml`, a key frame `home`, a site `NAME_tcp` between the finger tips (z out of the hand, fingers
move along y, hand pointing down at home), turning joints with an actuator are the arm, sliding ones the gripper
(its range is from closed to open). Each actuator is named like its joint.
"""

from dataclasses import dataclass
from functools import cache

import mujoco
import numpy as np

from sim.errors import unknown_name
from sim.world import World, asset, load_spec

ARMS = ("panda", "ur5e")


@cache
def robot_model(robot: str) -> mujoco.MjModel:
    """A robot alone, its base at the origin.

    Raises:
        SimulationError: unknown robot; the message lists the valid ones.
    """
    if robot not in ARMS:
        raise unknown_name("robot", robot, ARMS)
    return load_spec(asset(f"{robot}.xml")).compile()


@dataclass(frozen=True)
class Arm:
    """One arm of a world.

    Attributes:
        robot: name of its MJCF.
        prefix: of its names in the scene; empty for a single arm.
        joints: arm joints, in order.
        gripper: the actuated finger joint.
        opened, closed: its ends, m.
        columns: places of joints and gripper in an action, (len(joints) + 1,).
        tool: name of the tool site.
        base: pose (7,) of the base in the world.
    """

    robot: str
    prefix: str
    joints: tuple[str, ...]
    gripper: str
    opened: float
    closed: float
    columns: np.ndarray
    tool: str
    base: np.ndarray


def find_arm(world: World, robot: str, prefix: str) -> Arm:
    """The arm of a world with this prefix."""
    alone = robot_model(robot)
    names = [alone.actuator(i).name for i in range(alone.nu)]
    turning = [alone.joint(n).type[0] == mujoco.mjtJoint.mjJNT_HINGE for n in names]
    joints = tuple(prefix + n for n, turns in zip(names, turning, strict=True) if turns)
    (gripper,) = (prefix + n for n, turns in zip(names, turning, strict=True) if not turns)
    columns = np.array([world.joint_names.index(n) for n in (*joints, gripper)])
    body = world.model.body(prefix + alone.body(1).name)
    return Arm(
        robot,
        prefix,
        joints,
        gripper,
        opened=float(world.target_high[columns[-1]]),
        closed=float(world.target_low[columns[-1]]),
        columns=columns,
        tool=f"{prefix}{robot}_tcp",
        base=np.concatenate([body.pos, body.quat]),
    )


def attach_arms(scene: mujoco.MjSpec, robot: str, prefixes: tuple[str, ...]) -> mujoco.MjSpec:
    """Put one arm at the frame `<prefix>robot` for each prefix, and give the scene one key frame `home` for all."""
    alone = robot_model(robot)
    for prefix in prefixes:
        child = load_spec(asset(f"{robot}.xml"))
        scene.attach(child, frame=f"{prefix}robot", prefix=prefix)
    model = scene.compile()
    for key in list(scene.keys):  # one for each arm; they appear when the scene is compiled
        scene.delete(key)
    qpos = model.qpos0.copy()
    for prefix in prefixes:
        for i in range(alone.njnt):
            joint = alone.joint(i)
            qpos[model.joint(prefix + joint.name).qposadr] = alone.key("home").qpos[joint.qposadr]
    scene.add_key(name="home", qpos=qpos)
    return scene

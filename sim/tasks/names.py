"""Names for the elements of MuJoCo's arrays."""

import mujoco

FREE_POSITION = ("x", "y", "z", "qw", "qx", "qy", "qz")
FREE_VELOCITY = ("vx", "vy", "vz", "wx", "wy", "wz")


def scalar_names(model: mujoco.MjModel) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """A name for each element of qpos and of qvel."""
    positions, velocities = [], []
    for i in range(model.njnt):
        name = model.joint(i).name
        free = model.jnt_type[i] == mujoco.mjtJoint.mjJNT_FREE
        positions += [f"{name}_{part}" for part in FREE_POSITION] if free else [name]
        velocities += [f"{name}_{part}" for part in FREE_VELOCITY] if free else [name]
    return tuple(positions), tuple(velocities)


def body_names(model: mujoco.MjModel, per_body: int) -> tuple[str, ...]:
    """A name for each of so many numbers of every body but the world."""
    bodies = [model.body(i).name or f"body{i}" for i in range(1, model.nbody)]
    return tuple(f"{body}_{k}" for body in bodies for k in range(per_body))

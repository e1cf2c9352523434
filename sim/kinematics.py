"""Where a site is, for whole batches of joint positions at once."""

import mujoco
import numpy as np

from sim import poses
from sim.arrays import constant, namespace


class SitePose:
    """Forward kinematics of one site: a function of qpos alone, without an `MjData`.

    Covers chains of hinge, slide and free joints, which is all that the scenes have.
    """

    def __init__(self, model: mujoco.MjModel, site: str):
        found = model.site(site)
        self._site = np.concatenate([found.pos, found.quat])
        chain, body = [], int(found.bodyid[0])
        while body:
            chain.append(body)
            body = int(model.body_parentid[body])
        self._links = [_Link(model, body) for body in reversed(chain)]

    def __call__(self, qpos: np.ndarray) -> np.ndarray:
        """(..., nq) -> pose (..., 7)."""
        start = constant(qpos, [0.0, 0, 0, 1, 0, 0, 0])
        pose = namespace(qpos).broadcast_to(start, (*qpos.shape[:-1], 7))
        for link in self._links:
            pose = link.follow(pose, qpos)
        return poses.compose(pose, constant(qpos, self._site))


class _Link:
    def __init__(self, model: mujoco.MjModel, body: int):
        self.offset = np.concatenate([model.body_pos[body], model.body_quat[body]])
        first = model.body_jntadr[body]
        self.joints = [
            (
                int(model.jnt_type[j]),
                int(model.jnt_qposadr[j]),
                model.jnt_axis[j].copy(),
                model.jnt_pos[j].copy(),
                float(model.qpos0[model.jnt_qposadr[j]]),
            )
            for j in range(first, first + model.body_jntnum[body])
        ]

    def follow(self, pose: np.ndarray, qpos: np.ndarray) -> np.ndarray:
        xp = namespace(qpos)
        pose = poses.compose(pose, constant(qpos, self.offset))
        for kind, adr, axis, anchor, zero in self.joints:
            if kind == mujoco.mjtJoint.mjJNT_FREE:
                pose = qpos[..., adr : adr + 7]
                continue
            value = qpos[..., adr, None] - zero
            axis, anchor = constant(qpos, axis), constant(qpos, anchor)
            if kind == mujoco.mjtJoint.mjJNT_SLIDE:
                move = poses.pose(value * axis)
            else:
                turn = xp.concatenate([xp.cos(value / 2), xp.sin(value / 2) * axis], axis=-1)
                move = poses.pose(anchor - poses.rotate(turn, anchor), turn)
            pose = poses.compose(pose, move)
        return pose

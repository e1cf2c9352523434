"""Insert: a square nut with a handle over a square peg."""

import numpy as np

from sim import poses
from sim.arrays import constant
from sim.tasks.tabletop import BLUE, YELLOW, Start, Tabletop, block, distance, far, free_body

PEG = np.array([0.5, 0.2, 0.0])  # m, its foot
PEG_HALF, PEG_HEIGHT = 0.018, 0.08  # m
HOLE_HALF, RING, HALF_HEIGHT = 0.0215, 0.015, 0.012  # m: the nut's hole, its wall, its height
GRIP = np.array([0.075, 0.0, 0.0])  # m, middle of the handle in the nut's frame
SEATED = 0.04  # m, the nut's middle is at most this high when it is on the peg


def nut_geoms() -> str:
    """MJCF of a ring of four boxes and a handle along x. The frame is in the middle of the hole."""
    middle, out = HOLE_HALF + RING / 2, HOLE_HALF + RING
    walls = [((out, RING / 2, HALF_HEIGHT), f"0 {side * middle} 0") for side in (-1, 1)]
    walls += [((RING / 2, HOLE_HALF, HALF_HEIGHT), f"{side * middle} 0 0") for side in (-1, 1)]
    handle = block((0.03, 0.011, HALF_HEIGHT), 0.03, YELLOW, pos=f"{out + 0.03} 0 0")
    return "".join(block(size, 0.01, YELLOW, pos=at) for size, at in walls) + handle


class Insert(Tabletop):
    """A nut with a handle lies in a 16 x 20 cm area, at any yaw; a square peg stands beside it. The hole is 7 mm wider
    than the peg. Success: the nut is over the peg, its middle at most 4 cm above the table, and the hand is away, for
    ten control steps in a row. The episode ends there, or after fifteen seconds.
    """

    name = "insert"
    robots = ("panda", "ur5e")
    bodies = free_body("nut", nut_geoms()) + block(
        (PEG_HALF, PEG_HALF, PEG_HEIGHT / 2),
        0,
        BLUE,
        pos=f"{PEG[0]} {PEG[1]} {PEG_HEIGHT / 2}",
    )
    starts = {"nut": Start((0.48, -0.08, HALF_HEIGHT), (0.08, 0.10, 0))}
    observed = {"nut_pose": "nut"}
    episode_steps = 300
    demo_noise = 0.003

    def is_success(self, state):
        nut = self.pose(state, "nut")
        over = (abs(nut[..., :2] - constant(nut, PEG[:2])) <= HOLE_HALF - PEG_HALF + 0.002).all(
            axis=-1
        )
        return over & (nut[..., 2] <= SEATED) & self.released(state, "nut", away=0.10)

    def costs(self, state):
        nut = self.pose(state, "nut")
        grip = poses.compose(nut, constant(nut, poses.pose(GRIP)))[..., :3]
        return {
            "reach": far(distance(self.tool(state)[..., :3], grip)),
            "place": far(distance(nut[..., :3], constant(nut, PEG + [0, 0, HALF_HEIGHT]))),
        }

    def demonstrate(self, expert):
        """Grasp the handle, carry the nut over the peg, align it until it fits, lower, let go, rise."""
        hand = expert.hand
        while True:
            nut = expert.pose("nut")
            yaw = poses.nearest_yaw(nut, np.pi)
            grip = poses.compose(nut, constant(nut, poses.pose(GRIP)))[:3]
            yield from hand.move(grip + [0, 0, 0.10], yaw, steps=2)
            yield from hand.move(grip, yaw, steps=2)
            yield from hand.grip()
            yield from hand.move(grip + [0, 0, 0.15])
            # The nut fits at four angles: take the one that leaves the hand nearest to straight.
            quarter = poses.nearest_multiple(hand.yaw, np.pi / 2)
            yaw = poses.nearest_multiple(
                poses.yaw(expert.pose("nut")[3:]) + quarter - hand.yaw, np.pi / 2
            )
            above = PEG + [0, 0, PEG_HEIGHT + 0.03]
            yield from expert.align("nut", above, yaw, tolerance=0.002)
            yield from expert.carry("nut", above - [0, 0, 0.06], yaw, steps=3, speed=0.3)
            yield from hand.release()
            yield from hand.move(hand.position + [0, 0, 0.12], steps=10)

"""Pick and place: a can into a bin."""

import numpy as np

from sim.arrays import constant
from sim.tasks.tabletop import BLUE, RED, Start, Tabletop, block, distance, far, free_body

RADIUS, HALF_HEIGHT = 0.028, 0.05  # m, of the can
BIN = np.array([0.5, 0.28, 0.0])  # m, middle of its floor
BIN_HALF, WALL, RIM = 0.09, 0.005, 0.06  # m: half its inner side, thickness, height


def bin_walls() -> str:
    """MJCF of an open box that stands fast."""
    middle, out = RIM / 2, BIN_HALF + WALL
    walls = [((out, WALL, middle), (0, side * out, middle)) for side in (-1, 1)] + [
        ((WALL, out, middle), (side * out, 0, middle)) for side in (-1, 1)
    ]
    geoms = "".join(block(size, 0, BLUE, pos=" ".join(str(x) for x in at)) for size, at in walls)
    return f'<body name="bin" pos="{BIN[0]} {BIN[1]} {BIN[2]}">{geoms}</body>'


class PickPlace(Tabletop):
    """A can stands in a 24 x 20 cm area beside a bin. Success: the can is in the bin, upright or not, and the
    hand is away, for ten control steps in a row. The episode ends there, or after ten seconds.
    """

    name = "pick_place"
    robots = ("panda", "ur5e")
    bodies = bin_walls() + free_body(
        "can", block((RADIUS, HALF_HEIGHT), 0.15, RED, type="cylinder")
    )
    starts = {"can": Start((0.5, -0.08, HALF_HEIGHT), (0.12, 0.10, 0))}
    observed = {"can_pose": "can"}
    episode_steps = 200

    def is_success(self, state):
        can = self.pose(state, "can")
        inside = (abs(can[..., :2] - constant(can, BIN[:2])) <= BIN_HALF).all(axis=-1)
        low = can[..., 2] <= HALF_HEIGHT + 0.02
        return inside & low & self.released(state, "can")

    def costs(self, state):
        can = self.pose(state, "can")[..., :3]
        return {
            "reach": far(distance(self.tool(state)[..., :3], can)),
            "place": far(distance(can, constant(can, BIN + [0, 0, HALF_HEIGHT])), 0.2),
        }

    def demonstrate(self, expert):
        """Grasp the can near its top, over the rim, down, let go, rise."""
        hand, can = expert.hand, expert.pose("can")[:3]
        grasp = can + [0, 0, 0.02]
        yield from hand.move(grasp + [0, 0, 0.10], steps=1)
        yield from hand.move(grasp, steps=2)
        yield from hand.grip()
        yield from hand.move(grasp + [0, 0, 0.11])
        above = BIN + [0, 0, HALF_HEIGHT + 0.13]
        yield from hand.move(above, steps=2)
        yield from hand.move(above - [0, 0, 0.10], steps=2)
        yield from hand.release()
        yield from hand.move(above + [0, 0, 0.02], steps=10)

"""One leg: screw a leg into the corner of a table top (FurnitureBench-style; see `assembly.py`)."""

import numpy as np

from sim.tasks import assembly
from sim.tasks.assembly import INSERTED, SEATED, Assembly, fitted, frame, in_order, key, nut, thread
from sim.tasks.tabletop import Start, block, free_body

TOP_HALF, TOP_HEIGHT = 0.08125, 0.031  # m
LEG_HALF, LEG_HEIGHT = 0.015, 0.0625  # m, without the key
CORNER = np.array([0.05625, 0.05625, TOP_HEIGHT / 2])  # m, the hole in the frame of the top
GRIP = 0.040  # m above the shoulder
WOOD, LIGHT = "0.55 0.38 0.24 1", "0.85 0.72 0.52 1"


class OneLeg(Assembly):
    """A table top of 16 cm lies on the table, a leg stands beside it on its key. Stages: leg lifted, inserted, screwed
    in. Success: the leg is seated, upright and within 5 mm of its place, for ten control steps in a row. The episode
    ends there, or after 30 seconds. FurnitureBench-style: numbers are not comparable.
    """

    name = "one_leg"
    stages = ("lifted", "inserted", "seated")
    bodies = free_body(
        "top",
        frame(TOP_HALF, TOP_HEIGHT, 0.35, WOOD, hole=CORNER[:2]) + nut("nut", CORNER),
    ) + free_body(
        "leg",
        block((LEG_HALF, LEG_HALF, LEG_HEIGHT / 2), 0.05, LIGHT, pos=f"0 0 {LEG_HEIGHT / 2}")
        + key(0, LIGHT),
    )
    equalities = thread("nut")
    starts = {
        "top": Start((0.52, 0.10, TOP_HEIGHT / 2)),
        "leg": Start((0.45, -0.18, assembly.KEY_LENGTH)),
    }
    observed = {"top_pose": "top", "leg_pose": "leg"}
    episode_steps = 600

    def stages_done(self, state):
        top, leg = self.pose(state, "top"), self.pose(state, "leg")
        return in_order(
            leg[..., 2] >= assembly.KEY_LENGTH + 0.03,
            fitted(top, leg, CORNER, INSERTED),
            fitted(top, leg, CORNER, SEATED),
        )

    def demonstrate(self, expert):
        """Pick, insert, turn by half turns with a new grasp between them."""
        yield from assembly.screw_in(expert, "leg", GRIP, "top", CORNER, lift=0.10)

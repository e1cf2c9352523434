"""Round table: screw a leg into a table top and a foot onto the leg (FurnitureBench-style; see `assembly.py`)."""

import numpy as np

from sim.tasks import assembly
from sim.tasks.assembly import INSERTED, SEATED, Assembly, fitted, frame, in_order, key, nut, thread
from sim.tasks.tabletop import Start, block, free_body

TOP_RADIUS, TOP_HEIGHT, TOP_INNER = 0.10, 0.032, 0.073  # m
LEG_RADIUS, LEG_HEIGHT, UPPER_KEY = 0.0195, 0.051, 0.020  # m
FOOT_HALF, HUB_HALF, HUB_HEIGHT = 0.065, 0.022, 0.030  # m
SEAT = np.array([0.0, 0.0, TOP_HEIGHT / 2])  # m, the hole in the frame of the top
LEG_END = np.array([0.0, 0.0, LEG_HEIGHT])  # m, the upper shoulder in the frame of the leg
LEG_GRIP, FOOT_GRIP = 0.038, 0.056  # m above the part's origin
DARK, LIGHT = "0.42 0.28 0.2 1", "0.8 0.66 0.48 1"


def disc() -> str:
    """MJCF of a nearly round slab with a square hole: a square frame and a plate on each side."""
    out = (TOP_RADIUS - TOP_INNER) / 2
    sides = [((out, 0.045), (s * (TOP_INNER + out), 0)) for s in (-1, 1)]
    sides += [((0.045, out), (0, s * (TOP_INNER + out))) for s in (-1, 1)]
    plates = "".join(
        block((*half, TOP_HEIGHT / 2 - assembly.SLACK), 0.03, DARK, pos=f"{x} {y} 0", condim="3")
        for half, (x, y) in sides
    )
    return frame(TOP_INNER, TOP_HEIGHT, 0.3, DARK) + plates


def foot() -> str:
    """MJCF of a cross on a hub with a nut below and a knob on top. The origin is in the hub's lower face."""
    hub = frame(HUB_HALF, HUB_HEIGHT, 0.04, LIGHT, height_at=HUB_HEIGHT / 2)
    bars = "".join(
        block(size, 0.02, LIGHT, pos=f"0 0 {HUB_HEIGHT + 0.006}")
        for size in ((FOOT_HALF, 0.012, 0.006), (0.012, FOOT_HALF, 0.006))
    )
    knob = block((0.014, 0.014, 0.012), 0.01, LIGHT, pos=f"0 0 {HUB_HEIGHT + 0.024}")
    return hub + bars + knob + nut("foot_nut", (0, 0, 0), down=False)


class RoundTable(Assembly):
    """A table top lies upside down; a leg and a foot stand beside it. Stages: leg lifted, inserted, screwed in, foot
    lifted, put on, screwed on. Success: both are seated, for ten control steps in a row. The episode ends there, or
    after 50 seconds. FurnitureBench-style: numbers are not comparable.
    """

    name = "round_table"
    stages = ("leg_lifted", "leg_inserted", "leg_seated", "foot_lifted", "foot_inserted", "foot_seated")  # fmt: skip
    bodies = (
        free_body("top", disc() + nut("nut", SEAT))
        + free_body(
            "leg",
            block(
                (LEG_RADIUS, LEG_HEIGHT / 2),
                0.06,
                LIGHT,
                type="cylinder",
                pos=f"0 0 {LEG_HEIGHT / 2}",
            )
            + key(0, LIGHT)
            + key(LEG_HEIGHT, LIGHT, -UPPER_KEY),
        )
        + free_body("foot", foot())
    )
    equalities = thread("nut") + thread("foot_nut")
    starts = {
        "top": Start((0.53, 0.13, TOP_HEIGHT / 2)),
        "leg": Start((0.42, -0.08, assembly.KEY_LENGTH)),
        "foot": Start((0.53, -0.22, assembly.TRAVEL)),
    }
    apart = 0.15
    observed = {"top_pose": "top", "leg_pose": "leg", "foot_pose": "foot"}
    episode_steps = 1000

    def stages_done(self, state):
        top, leg, foot = (self.pose(state, name) for name in ("top", "leg", "foot"))
        seated = fitted(top, leg, SEAT, SEATED)
        return in_order(
            leg[..., 2] >= assembly.KEY_LENGTH + 0.03,
            fitted(top, leg, SEAT, INSERTED),
            seated,
            seated & (foot[..., 2] >= 0.04),
            seated & fitted(leg, foot, LEG_END, INSERTED),
            seated & fitted(leg, foot, LEG_END, SEATED),
        )

    def demonstrate(self, expert):
        """The leg into the top, then the foot onto the leg; both with the same moves."""
        yield from assembly.screw_in(expert, "leg", LEG_GRIP, "top", SEAT, lift=0.12)
        yield from assembly.screw_in(expert, "foot", FOOT_GRIP, "leg", LEG_END, lift=0.15)

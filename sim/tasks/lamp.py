"""Lamp: screw a bulb into a base, put a hood over it (FurnitureBench-style; see `assembly.py`)."""

import numpy as np

from sim import poses
from sim.tasks import assembly
from sim.tasks.assembly import INSERTED, SEATED, Assembly, fitted, frame, in_order, key, nut, thread
from sim.tasks.tabletop import Start, block, free_body

BASE_HALF, BASE_HEIGHT = 0.05, 0.063  # m
BULB_RADIUS, BULB_HEIGHT = 0.022, 0.086  # m, without the key
SKIRT_HALF, SKIRT_HEIGHT = 0.044, 0.070  # m, the wide part of the hood
NECK_HALF, NECK_HEIGHT = 0.030, 0.030  # m, the narrow part above it
WALL = 0.004  # m
SEAT = np.array([0.0, 0.0, BASE_HEIGHT / 2])  # m, the hole in the frame of the base
BULB_GRIP, HOOD_GRIP = 0.058, SKIRT_HEIGHT + 0.018  # m above the part's origin
DARK, GLASS, SHADE = "0.3 0.3 0.33 1", "0.95 0.92 0.75 1", "0.45 0.6 0.7 1"


def tube(outer: float, wall: float, low: float, high: float, mass: float, rgba: str) -> str:
    """MJCF of a square tube that stands upright, of four boxes."""
    mid, half, at = outer - wall / 2, (high - low) / 2, (high + low) / 2
    walls = [((outer, wall / 2), (0, s * mid)) for s in (-1, 1)]
    walls += [((wall / 2, outer - wall), (s * mid, 0)) for s in (-1, 1)]
    return "".join(
        block((*size, half), mass / 4, rgba, pos=f"{x} {y} {at}") for size, (x, y) in walls
    )


class Lamp(Assembly):
    """A base, a bulb on its key and a hood stand on the table. Stages: bulb lifted, inserted, screwed in, hood lifted,
    hood over the bulb. Success: the bulb is seated and the hood stands on the base around it, for ten control steps in
    a row. The episode ends there, or after 40 seconds. FurnitureBench-style: numbers are not comparable.
    """

    name = "lamp"
    stages = ("bulb_lifted", "bulb_inserted", "bulb_seated", "hood_lifted", "hood_placed")
    bodies = (
        free_body("base", frame(BASE_HALF, BASE_HEIGHT, 0.4, DARK) + nut("nut", SEAT))
        + free_body(
            "bulb",
            block(
                (BULB_RADIUS, BULB_HEIGHT / 2),
                0.06,
                GLASS,
                type="cylinder",
                pos=f"0 0 {BULB_HEIGHT / 2}",
            )
            + key(0, DARK),
        )
        + free_body(
            "hood",
            tube(SKIRT_HALF, WALL, 0, SKIRT_HEIGHT, 0.04, SHADE)
            + tube(
                SKIRT_HALF,
                SKIRT_HALF - NECK_HALF + WALL,
                SKIRT_HEIGHT - WALL,
                SKIRT_HEIGHT,
                0.02,
                SHADE,
            )
            + tube(NECK_HALF, WALL, SKIRT_HEIGHT, SKIRT_HEIGHT + NECK_HEIGHT, 0.02, SHADE),
        )
    )
    equalities = thread("nut")
    starts = {
        "base": Start((0.53, 0.14, BASE_HEIGHT / 2)),
        "bulb": Start((0.43, -0.06, assembly.KEY_LENGTH)),
        "hood": Start((0.52, -0.24, 0.0)),
    }
    apart = 0.13
    observed = {"base_pose": "base", "bulb_pose": "bulb", "hood_pose": "hood"}
    episode_steps = 800

    def stages_done(self, state):
        base, bulb, hood = (self.pose(state, name) for name in ("base", "bulb", "hood"))
        seated = fitted(base, bulb, SEAT, SEATED)
        placed = fitted(base, hood, SEAT, 0.003, beside=0.015)
        return in_order(
            bulb[..., 2] >= assembly.KEY_LENGTH + 0.03,
            fitted(base, bulb, SEAT, INSERTED),
            seated,
            seated & (hood[..., 2] >= 0.03),
            seated & placed,
        )

    def demonstrate(self, expert):
        """Screw the bulb in, then carry the hood above it and lower it."""
        hand = expert.hand
        yield from assembly.screw_in(expert, "bulb", BULB_GRIP, "base", SEAT, lift=0.10)
        while True:
            yield from assembly.pick(expert, "hood", HOOD_GRIP, lift=0.20)
            seat = poses.compose(expert.pose("base"), poses.pose(SEAT))
            yaw = poses.yaw(seat[3:])
            above = seat[:3] + [0, 0, BULB_HEIGHT + 0.03]
            quarter = {"period": np.pi / 2}  # the hood looks the same from four sides
            yield from expert.align("hood", above, yaw, tolerance=0.003, **quarter)
            yield from expert.carry("hood", seat[:3], yaw, steps=4, speed=0.4, **quarter)
            yield from hand.release()
            yield from hand.move(hand.position + [0, 0, 0.10], steps=12)

"""Stack: put one cube on another."""

import numpy as np

from sim import poses
from sim.arrays import constant
from sim.tasks.tabletop import GREEN, RED, Start, Tabletop, block, distance, far, free_body

HALF = 0.02  # m, of the red cube
BASE_HALF = 0.025  # m, of the green one


class Stack(Tabletop):
    """A red and a green cube lie in a 20 x 30 cm area, at any yaw, at least 9 cm apart. Success: the red one rests on
    the green one and the hand is away, for ten control steps in a row. The episode ends there, or after ten seconds.
    """

    name = "stack"
    robots = ("panda", "ur5e")
    bodies = free_body("red", block((HALF,) * 3, 0.08, RED)) + free_body(
        "green", block((BASE_HALF,) * 3, 0.15, GREEN)
    )
    starts = {
        "red": Start((0.5, 0.0, HALF), (0.10, 0.15, 0)),
        "green": Start((0.5, 0.0, BASE_HALF), (0.10, 0.15, 0)),
    }
    apart = 0.09
    observed = {"red_pose": "red", "green_pose": "green"}
    episode_steps = 200

    def is_success(self, state):
        red, green = self.pose(state, "red"), self.pose(state, "green")
        height = red[..., 2] - green[..., 2] - (HALF + BASE_HALF)
        above = distance(red[..., :2], green[..., :2]) <= BASE_HALF
        return above & (abs(height) <= 0.005) & self.released(state, "red")

    def costs(self, state):
        red, green = self.pose(state, "red")[..., :3], self.pose(state, "green")[..., :3]
        return {
            "reach": far(distance(self.tool(state)[..., :3], red)),
            "place": far(distance(red, green + constant(green, [0, 0, HALF + BASE_HALF]))),
        }

    def demonstrate(self, expert):
        """Grasp the red cube, carry it over the green one, look again where that is, lower, let go, rise."""
        hand, red = expert.hand, expert.pose("red")
        yaw = poses.nearest_yaw(red)
        yield from hand.move(red[:3] + [0, 0, 0.10], yaw, steps=2)
        yield from hand.move(red[:3], yaw, steps=2)
        yield from hand.grip()
        yield from hand.move(red[:3] + [0, 0, 0.12])
        green = expert.pose("green")
        yaw = poses.nearest_yaw(green)
        top = green[:3] + [0, 0, HALF + BASE_HALF + 0.002]
        quarter = {"period": np.pi / 2}  # the cubes have four equal sides
        yield from expert.carry("red", top + [0, 0, 0.06], yaw, steps=5, **quarter)
        yield from expert.carry("red", top, yaw, steps=3, speed=0.5, **quarter)
        yield from hand.release()
        yield from hand.move(top + [0, 0, 0.12], steps=10)

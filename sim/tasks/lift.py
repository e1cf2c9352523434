"""Lift: pick a cube off the table."""

from sim import poses
from sim.tasks.tabletop import RED, Start, Tabletop, block, distance, far, free_body

HALF = 0.0225  # m, of the cube
HEIGHT = 0.10  # m, clearance that counts as lifted


class Lift(Tabletop):
    """The cube lies anywhere in a 24 x 24 cm square, at any yaw. Success: it is held at least 10 cm above where it
    rested for ten control steps in a row (0.5 s). The episode ends there, or after six seconds.
    """

    name = "lift"
    robots = ("panda", "ur5e")
    bodies = free_body("cube", block((HALF, HALF, HALF), 0.1, RED))
    starts = {"cube": Start((0.5, 0.0, HALF), (0.12, 0.12, 0))}
    observed = {"object_pose": "cube"}

    def is_success(self, state):
        return self.pose(state, "cube")[..., 2] - HALF >= HEIGHT

    def costs(self, state):
        cube = self.pose(state, "cube")
        missing = (HALF + HEIGHT - cube[..., 2]).clip(0)
        return {
            "reach": far(distance(self.tool(state)[..., :3], cube[..., :3])),
            "height": far(missing),
        }

    def demonstrate(self, expert):
        """Above the cube, down, close, up. The grasp takes the nearest of the cube's four equal faces."""
        hand, cube = expert.hand, expert.pose("cube")
        yaw, grasp = poses.nearest_yaw(cube), cube[:3]
        yield from hand.move(grasp + [0, 0, expert.rng.uniform(0.08, 0.14)], yaw, steps=2)
        yield from hand.move(grasp, yaw, steps=2)
        yield from hand.grip()
        yield from hand.move(grasp + [0, 0, 0.17], yaw, steps=12)

"""Reach: bring the tool to a point in the air."""

from sim.tasks.tabletop import Start, Tabletop, distance, far, goal_body

CLOSE = 0.02  # m


class Reach(Tabletop):
    """The goal lies anywhere in a box of 30 x 50 x 30 cm above the table. Success: the point between the finger tips
    is within 2 cm of it for ten control steps in a row. The episode ends there, or after four seconds.
    """

    name = "reach"
    robots = ("panda", "ur5e")
    bodies = goal_body("goal", 'type="sphere" size="0.02"')
    starts = {"goal": Start((0.5, 0.0, 0.25), (0.15, 0.25, 0.15), yaw_spread=0.0)}
    observed = {"goal_pose": "goal"}
    episode_steps = 80

    def gap(self, state):
        """Tool to goal, (...,) m."""
        return distance(self.tool(state)[..., :3], self.pose(state, "goal")[..., :3])

    def is_success(self, state):
        return self.gap(state) <= CLOSE

    def costs(self, state):
        return {"reach": far(self.gap(state), 0.2)}

    def demonstrate(self, expert):
        """Straight there."""
        yield from expert.hand.move(expert.pose("goal")[:3])

"""Push: move a puck that is too wide to grasp."""

import numpy as np

from sim.script import wait
from sim.tasks.tabletop import RED, Start, Tabletop, block, distance, far, free_body, goal_body

RADIUS, HALF_HEIGHT = 0.05, 0.02  # m
CLOSE = 0.025  # m
BEHIND = 0.085  # m, from the puck's middle to the hand before a push


class Push(Tabletop):
    """A puck of 10 cm lies in a 16 x 20 cm area, and a mark on the table says where it should go, 10 to 30 cm away.
    Success: the puck's middle is within 2.5 cm of the mark for ten control steps in a row. The episode ends there, or
    after ten seconds.
    """

    name = "push"
    robots = ("panda", "ur5e")
    bodies = free_body(
        "puck",
        block((RADIUS, HALF_HEIGHT), 0.2, RED, type="cylinder", friction="0.6 0.02 0.0001"),
    ) + goal_body("goal", f'type="cylinder" size="{RADIUS} 0.001"')
    starts = {
        "puck": Start((0.5, 0.0, HALF_HEIGHT), (0.08, 0.10, 0)),
        "goal": Start((0.5, 0.0, 0.001), (0.10, 0.16, 0), yaw_spread=0.0),
    }
    apart = 0.10
    observed = {"puck_pose": "puck", "goal_pose": "goal"}
    episode_steps = 200

    def gap(self, state):
        """Puck to mark in the plane, (...,) m."""
        return distance(self.pose(state, "puck")[..., :2], self.pose(state, "goal")[..., :2])

    def is_success(self, state):
        return self.gap(state) <= CLOSE

    def costs(self, state):
        reach = distance(self.tool(state)[..., :3], self.pose(state, "puck")[..., :3])
        return {"reach": far((reach - RADIUS).clip(0)), "goal": far(self.gap(state))}

    def demonstrate(self, expert):
        """From behind, the puck between the open fingers; again from wherever it slipped to."""
        hand, goal = expert.hand, expert.pose("goal")[:2]
        while True:
            puck = expert.pose("puck")[:2]
            way = goal - puck
            along = way / np.linalg.norm(way)
            yaw = push_yaw(along)
            behind = puck - BEHIND * along
            yield from hand.move([*behind, 0.10], yaw)
            yield from hand.move([*behind, 0.02], yaw, steps=1)
            offset = 0.0
            while distance(expert.pose("puck")[:2], goal) > 0.008 and offset < 0.03:
                puck, tool = expert.pose("puck")[:2], np.array(hand.position[:2])
                to_goal = goal - puck
                ahead = to_goal @ along
                if ahead < 0.004:
                    break
                offset = abs((puck - tool) @ [-along[1], along[0]])
                yield from hand.move([*(tool + min(0.012, ahead) * along), 0.02], yaw)
            yield from hand.move([*(hand.position[:2] - 0.02 * along), 0.02], yaw)
            yield from hand.move([*hand.position[:2], 0.10], yaw, steps=2)
            if distance(expert.pose("puck")[:2], goal) < CLOSE / 2:
                yield from wait(1000)


def push_yaw(along: np.ndarray) -> float:
    """Hand turned so that the fingers stand side by side across the direction of the push, (2,) -> rad."""
    angle = np.arctan2(along[1], along[0])
    return float((angle + np.pi / 2) % np.pi - np.pi / 2)

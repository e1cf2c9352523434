"""Transport: one arm hands a bar over to another, which puts it down where the first cannot reach."""

import numpy as np

from sim import poses
from sim.arrays import namespace
from sim.script import together
from sim.tasks.tabletop import RED, Start, Tabletop, block, distance, far, free_body, goal_body

LENGTH, HALF_WIDTH = 0.20, 0.014  # m, of the bar
APART = 1.36  # m between the bases
GRIP = 0.07  # m, from the bar's middle to each hand
MEET = np.array([APART / 2, 0.0, 0.30])  # m, where the bar changes hands
CLOSE = 0.04  # m
AWAY = 0.07  # m, of each hand from the bar, wherever along it


class Transport(Tabletop):
    """Two arms face each other. A bar lies on the side of the left one, turned by up to 45 degrees; a mark lies on the
    side of the right one, out of the left one's reach. Success: the bar lies flat with its middle within 4 cm of the
    mark and both hands are 7 cm away from all of it, for ten control steps in a row. The episode ends there, or after
    twenty seconds.
    """

    name = "transport"
    bodies = free_body("bar", block((LENGTH / 2, HALF_WIDTH, HALF_WIDTH), 0.12, RED)) + goal_body(
        "goal", f'type="box" size="{LENGTH / 2} 0.05 0.001"'
    )
    starts = {
        "bar": Start((0.42, -0.10, HALF_WIDTH), (0.05, 0.08, 0), yaw_spread=np.pi / 4),
        "goal": Start((APART - 0.46, 0.10, 0.001), (0.04, 0.08, 0), yaw_spread=0.0),
    }
    observed = {"bar_pose": "bar", "goal_pose": "goal"}
    arm_places = {"left_": 'pos="0 0 0"', "right_": f'pos="{APART} 0 0" quat="0 0 0 1"'}
    table = f'size="0.85 0.6 0.02" pos="{APART / 2} 0 -0.02"'
    overview = 'pos="0.68 -1.45 0.95" xyaxes="1 0 0 0 0.45 0.893"'
    front = f'{overview} fovy="45"'
    episode_steps = 400

    def robot_name(self, arm):
        return f"dual_{arm}"

    def is_success(self, state):
        bar = self.pose(state, "bar")
        there = distance(bar[..., :2], self.pose(state, "goal")[..., :2]) <= CLOSE
        flat = bar[..., 2] <= HALF_WIDTH + 0.005
        one, two = (self.reach(state, arm) for arm in (0, 1))
        return there & flat & (one >= AWAY) & (two >= AWAY)

    def reach(self, state, arm):
        """From a hand to the nearest point of the bar's axis, (...,) m."""
        hand = poses.relative(self.pose(state, "bar"), self.tool(state, arm))[..., :3]
        beyond = (abs(hand[..., 0]) - LENGTH / 2).clip(0)
        return (beyond**2 + (hand[..., 1:] ** 2).sum(axis=-1)) ** 0.5

    def costs(self, state):
        bar = self.pose(state, "bar")
        goal = self.pose(state, "goal")[..., :3]
        one, two = (distance(self.tool(state, arm)[..., :3], bar[..., :3]) for arm in (0, 1))
        near = namespace(state).minimum(one, two)
        return {
            "reach": far((near - GRIP).clip(0)),
            "goal": far(distance(bar[..., :3], goal), 0.3),
        }

    def demonstrate(self, expert):
        """The left hand takes its end of the bar and holds it up, the right one takes its own and puts it down."""
        left, right = expert.hands
        bar = expert.pose("bar")
        yaw = poses.nearest_yaw(bar, np.pi)
        grip = poses.compose(bar, poses.pose([-GRIP, 0, 0]))[:3]
        wait_at = MEET + [GRIP, 0, 0.15]
        yield from together(
            left.move(grip + [0, 0, 0.10], yaw, steps=2), right.move(wait_at, np.pi)
        )
        yield from left.move(grip, yaw, steps=2)
        yield from left.grip()
        yield from left.move(grip + [0, 0, 0.15])
        yield from expert.align("bar", MEET, 0.0, tolerance=0.01)
        end = poses.compose(expert.pose("bar"), poses.pose([GRIP, 0, 0]))[:3]
        yield from right.move(end + [0, 0, 0.08], np.pi)
        yield from right.move(end, np.pi, steps=3, speed=0.6)
        yield from right.grip(10)
        yield from left.release(5)
        yield from left.move(left.position + [0, 0, 0.10])
        yield from left.move(left.position - [0.15, 0, 0], steps=1)
        goal = expert.pose("goal")[:3] + [0, 0, HALF_WIDTH + 0.002]
        yield from expert.carry("bar", goal + [0, 0, 0.10], 0.0, arm=1, steps=4)
        yield from expert.carry("bar", goal, 0.0, arm=1, steps=3, speed=0.6)
        yield from right.release()
        yield from right.move(right.position + [0, 0, 0.12], steps=10)

"""FurnitureBench-style assembly: parts with a key and a socket, and an emulated thread.

Sizes follow the parts of FurnitureBench (Heo et al., arXiv 2305.12821); collision geometry is our own boxes and
cylinders, starts and scoring are our own too, so **numbers are not comparable with FurnitureBench**.

A thread is a lead screw. In the hole sits a nut: a square socket on a sliding and a turning joint, which an equality
constraint couples (travel = pitch x turn). A part ends in a square key that the socket takes at four angles. Once it is
in, the key turns with the nut, and part and nut sink together until the part's shoulder is flush: `TRAVEL` m after one
`TURN`. The coupling is always on and belongs to the model, so nothing has to be switched while a chunk runs, the state
stays plain (qpos, qvel), and every backend runs it alike. Unlike a real thread it does not hold a part that is pulled
out, and the last 8 degrees of turn are play.
"""

import numpy as np

from sim import poses
from sim.arrays import constant, namespace
from sim.errors import unknown_name
from sim.script import wait
from sim.tasks.tabletop import Start, Tabletop, block, distance

TURN = 2 * np.pi  # rad, from inserted to seated
TRAVEL = 0.010  # m, how far a part sinks in that turn
PITCH = TRAVEL / TURN  # m/rad
KEY_HALF, KEY_LENGTH = (
    0.0085,
    0.025,
)  # m; the square fits into the round thread of the original (12.2 mm radius)
PLAY = 0.001  # m, between key and socket, on each side
NUT_HALF, NUT_HEIGHT = 0.0135, 0.020  # m
HOLE_HALF = 0.0145  # m
RANDOMNESS = {"low": (0.015, np.radians(5)), "med": (0.05, np.radians(15))}  # m, rad
SLACK = 0.0003  # m by which some boxes are thinner than their neighbours, so that fewer touch what they lie on
METAL = "0.6 0.62 0.65 1"


def nut(name: str, at: tuple[float, float, float], down: bool = True) -> str:
    """MJCF of a thread inside a body: its nut stands out by `TRAVEL` from the surface at `at`, and turns clockwise (as
    one looks onto that surface from outside) into it.

    Args:
        down: the surface looks up, the nut sinks down; False is the other way round.
    """
    axis = "0 0 -1" if down else "0 0 1"
    middle = (TRAVEL - NUT_HEIGHT / 2) * (1 if down else -1)
    inner = KEY_HALF + PLAY
    wall = (NUT_HALF - inner) / 2
    sides = [((NUT_HALF, wall), (0, s * (inner + wall))) for s in (-1, 1)]
    sides += [((wall, inner), (s * (inner + wall), 0)) for s in (-1, 1)]
    geoms = "".join(
        block(
            (*half, NUT_HEIGHT / 2 - (SLACK if x else 0)),
            0.01,
            METAL,
            pos=f"{x} {y} {middle}",
            condim="3",
        )
        for half, (x, y) in sides
    )
    return (
        f'<body name="{name}" pos="{at[0]} {at[1]} {at[2]}" gravcomp="1">'
        f'<joint name="{name}_travel" type="slide" axis="{axis}" range="0 {TRAVEL}" armature="2" damping="20"/>'
        f'<joint name="{name}_turn" type="hinge" axis="{axis}" range="0 {TURN}" armature="0.005" damping="0.005" '
        f'frictionloss="0.03"/>{geoms}</body>'
    )


def thread(name: str) -> str:
    """MJCF of the equality that makes a nut a lead screw."""
    return (
        f'<joint joint1="{name}_travel" joint2="{name}_turn" polycoef="0 {PITCH} 0 0 0" '
        'solref="0.01 1" solimp="0.99 0.999 0.0001"/>'
    )


def key(at: float, rgba: str, length: float = KEY_LENGTH) -> str:
    """MJCF of a key whose shoulder is at height `at` of the part; it points down, or up for a negative length."""
    return block(
        (KEY_HALF, KEY_HALF, abs(length) / 2), 0.01, rgba, pos=f"0 0 {at - length / 2}", condim="3"
    )


def frame(
    half: float, height: float, mass: float, rgba: str, hole=(0.0, 0.0), height_at: float = 0.0
) -> str:
    """MJCF of a square slab with a square hole, of four boxes, its middle at height `height_at` of the part."""
    x, y = hole
    left, right = x - HOLE_HALF, x + HOLE_HALF
    boxes = [
        ((-half, left), (-half, half)),
        ((right, half), (-half, half)),
        ((left, right), (-half, y - HOLE_HALF)),
        ((left, right), (y + HOLE_HALF, half)),
    ]
    return "".join(
        block(
            ((x1 - x0) / 2, (y1 - y0) / 2, height / 2 - (SLACK if x0 == left else 0)),
            mass / 4,
            rgba,
            pos=f"{(x0 + x1) / 2} {(y0 + y1) / 2} {height_at}",
            condim="3",
        )
        for (x0, x1), (y0, y1) in boxes
    )


class Assembly(Tabletop):
    """What the assembly tasks share.

    Args:
        randomness: `low` (starts within 1.5 cm and 5 degrees) or `med` (5 cm, 15 degrees).
        reward: `stage` adds a cost per control step that shrinks with every stage done.
    """

    rewards = ("sparse", "stage")
    # The expert of `one_leg` always succeeds with this, in half of its attempts with twice as much.
    demo_noise = 0.001
    stages: tuple[str, ...]

    def __init__(
        self,
        robot: str | None = None,
        reward: str = "sparse",
        cameras: bool = False,
        randomness: str = "low",
    ):
        if randomness not in RANDOMNESS:
            raise unknown_name(f"randomness of task '{self.name}'", randomness, RANDOMNESS)
        reach, turn = RANDOMNESS[randomness]
        self.starts = {
            body: Start(start.center, (reach, reach, 0), start.yaw, turn)
            for body, start in self.starts.items()
        }
        super().__init__(robot, reward, cameras)

    def stages_done(self, state) -> np.ndarray:
        """(..., stages) bool, in the order of `stages`; a later stage implies the earlier ones."""
        raise NotImplementedError

    def is_success(self, state):
        return self.stages_done(state)[..., -1]

    def costs(self, state):
        done = namespace(state).asarray(self.stages_done(state), dtype=state.dtype)
        return {"stage": done.mean(axis=-1) - 1}

    def demonstrate(self, expert):
        raise NotImplementedError


def in_order(*stages: np.ndarray) -> np.ndarray:
    """Stack stages (...,) bool so that a later one implies the earlier ones, (..., stages)."""
    done = list(stages)
    for i in reversed(range(len(done) - 1)):
        done[i] = done[i] | done[i + 1]
    return namespace(done[0]).stack(done, axis=-1)


def fitted(
    holder: np.ndarray, part: np.ndarray, place: np.ndarray, height: float, beside: float = 0.005
) -> np.ndarray:
    """Whether a part stands upright on its place in the holder, (...,) bool.

    Args:
        holder, part: poses (..., 7).
        place: (3,) m, where the part's origin is when it is seated, in the frame of the holder.
        height: it may be this much higher, m.
        beside: it may be this far off in the plane, m.
    """
    seen = poses.relative(holder, part)
    above = seen[..., 2] - place[2]
    near = distance(seen[..., :2], constant(seen, place[:2])) <= beside
    upright = poses.tilt(seen[..., 3:]) <= 0.12
    return near & upright & (above <= height) & (above >= -0.004)


INSERTED = TRAVEL + 0.003  # m above its seat: the key is in the nut
SEATED = 0.0015  # m


# --- pieces of the scripts ---


def pick(expert, part: str, grip: float, lift: float):
    """Take a standing part `grip` m above its origin and lift it."""
    hand, at = expert.hand, expert.pose(part)
    yaw = poses.nearest_yaw(at)
    yield from hand.release(0)
    yield from hand.move(at[:3] + [0, 0, grip + 0.08], yaw, steps=2)
    yield from hand.move(at[:3] + [0, 0, grip], yaw, steps=3)
    yield from hand.grip()
    yield from hand.move(hand.position + [0, 0, lift])


def screw_in(expert, part: str, grip: float, holder: str, place: np.ndarray, lift: float):
    """Pick a part, put its key into the nut at `place` (3,) of the holder, and turn it home, half a turn at a time.

    The part's origin is its shoulder. The hand starts a quarter turn to the left and ends a quarter turn to the right.
    It turns there only above the place: a part creeps along the finger pads while it is carried sideways to them, and a
    round one leaves them.
    """
    hand = expert.hand
    while not inserted(expert, part, holder, place):
        yield from pick(expert, part, grip, lift)
        seat = poses.compose(expert.pose(holder), poses.pose(place))
        above = seat[:3] + [0, 0, TRAVEL + KEY_LENGTH + 0.008]
        yield from expert.carry(part, above + [0, 0, 0.03], poses.yaw(expert.pose(part)[3:]))
        yield from turn_left(expert)
        facing = poses.yaw(seat[3:])
        turned = poses.yaw(expert.pose(part)[3:]) - facing
        yaw = facing + poses.nearest_multiple(turned, np.pi / 2)
        yield from expert.align(part, above, yaw, tolerance=0.0008)
        yield from expert.carry(part, seat[:3] + [0, 0, TRAVEL], yaw, steps=4, speed=0.2)
        yield from hand.release()
    for attempt in range(6):
        if attempt:
            yield from turn_left(expert)
        at = expert.pose(part)
        yield from hand.move(at[:3] + [0, 0, grip], hand.yaw, steps=2, speed=0.3)
        yield from hand.grip()
        yield from hand.turn(-np.pi, drop=PITCH * np.pi, speed=0.5)
        yield from wait(2)
        yield from hand.release(8)  # fully, or the way back would turn the part back
        seen = poses.relative(expert.pose(holder), expert.pose(part))
        if seen[2] - place[2] < SEATED / 2:
            break
    yield from hand.move(hand.position + [0, 0, lift])


def turn_left(expert):
    """Turn the hand in place to a quarter turn left of straight, the start of a clockwise half turn."""
    yield from expert.hand.turn(np.pi / 2 - expert.hand.yaw)


def inserted(expert, part: str, holder: str, place: np.ndarray) -> bool:
    """Whether the key is in the nut."""
    return bool(fitted(expert.pose(holder), expert.pose(part), place, INSERTED))

"""FurnitureBench-style assembly: the emulated thread, stages, randomness."""

import mujoco
import numpy as np
import pytest

from sim import poses
from sim.errors import SimulationError
from sim.expert import make_expert
from sim.tasks import lamp, make_task, one_leg, round_table
from sim.tasks.assembly import KEY_LENGTH, PITCH, RANDOMNESS, TRAVEL, TURN
from sim.vec_env import VecEnv

NAMES = ("one_leg", "lamp", "round_table")


def place(task, state: np.ndarray, **bodies) -> np.ndarray:
    """The state with bodies at given poses (7,)."""
    state = state.copy()
    for name, pose in bodies.items():
        task.pose(state, name)[:] = pose
    return state


def seated(holder: np.ndarray, seat: np.ndarray, above: float, yaw: float = 0.0) -> np.ndarray:
    """Pose (7,) of a part that stands `above` m over its seat."""
    return poses.compose(holder, poses.pose(seat + [0, 0, above], poses.about_z(yaw)))


class Bench:
    """A leg with its key in the nut of a table top, and hands of our own on it."""

    def __init__(self):
        self.task = task = make_task("one_leg")
        start = task.initial_state(np.random.default_rng(0))
        leg = seated(task.pose(start, "top"), one_leg.CORNER, TRAVEL + 0.0005)
        self.model = task.world.model
        self.data = mujoco.MjData(self.model)
        task.world.write(place(task, start, leg=leg), self.data)
        self.data.ctrl[:] = task.world.initial_command(start)
        self.run(100)

    def run(self, steps: int, force: float = 0.0, torque: float = 0.0) -> list[tuple[float, float]]:
        """Push down (N) and turn clockwise (N m) on the leg; (travel, turn) of the nut after every step."""
        body, seen = self.model.body("leg").id, []
        for _ in range(steps):
            self.data.xfrc_applied[body] = [0, 0, -force, 0, 0, -torque]
            mujoco.mj_step(self.model, self.data)
            seen.append(
                (
                    float(self.data.joint("nut_travel").qpos[0]),
                    float(self.data.joint("nut_turn").qpos[0]),
                )
            )
        return seen

    @property
    def height(self) -> float:
        """Of the leg above its seat, m."""
        pose = {
            b: np.concatenate([self.data.body(b).xpos, self.data.body(b).xquat])
            for b in ("top", "leg")
        }
        return float(poses.relative(pose["top"], pose["leg"])[2] - one_leg.CORNER[2])


def test_a_thread_couples_travel_and_turn_and_takes_the_leg_along():
    bench = Bench()
    assert bench.height == pytest.approx(TRAVEL, abs=3e-4)
    seen = np.array(bench.run(600, force=2.0, torque=0.08))
    assert seen[-1, 1] > 3  # it did turn
    assert np.abs(seen[:, 0] - PITCH * seen[:, 1]).max() < 3e-4
    assert bench.height == pytest.approx(TRAVEL - seen[-1, 0], abs=5e-4)


def test_a_thread_locks_itself_and_lets_go_when_turned_back():
    bench = Bench()
    pushed = bench.run(300, force=10.0)
    assert pushed[-1][0] < 3e-4
    assert pushed[-1][1] < 0.1
    inward = bench.run(600, force=2.0, torque=0.08)[-1]
    back = bench.run(600, torque=-0.08)[-1]
    assert back[0] < inward[0] - 0.002


def test_a_thread_ends_when_the_leg_is_seated():
    bench = Bench()
    travel, turn = bench.run(2500, force=2.0, torque=0.10)[-1]
    assert turn == pytest.approx(TURN, abs=0.1)
    assert travel == pytest.approx(TRAVEL, abs=3e-4)
    assert bench.height == pytest.approx(0, abs=5e-4)


def test_a_key_does_not_enter_askew():
    """At 45 degrees to the socket it stays outside."""
    bench = Bench()
    task, start = bench.task, bench.task.initial_state(np.random.default_rng(0))
    over = seated(task.pose(start, "top"), one_leg.CORNER, TRAVEL + KEY_LENGTH + 0.001, np.pi / 4)
    task.world.write(place(task, start, leg=over), bench.data)
    bench.data.qvel[:] = 0
    bench.run(40)
    assert bench.height > TRAVEL + KEY_LENGTH - 0.002


def test_stages_of_one_leg():
    task = make_task("one_leg", reward="stage")
    start = task.initial_state(np.random.default_rng(0))
    top = task.pose(start, "top")
    turned = poses.compose(poses.pose([0.02, 0.01, 0.0], poses.about_z(0.4)), top)
    for holder in (top, turned):  # stages are relative: where the top lies does not matter
        cases = {
            0: task.pose(start, "leg"),
            1: seated(holder, one_leg.CORNER, 0.08),
            2: seated(holder, one_leg.CORNER, TRAVEL),
            3: seated(holder, one_leg.CORNER, 0.001, yaw=1.0),
        }
        for count, leg in cases.items():
            state = place(task, start, top=holder, leg=leg)
            assert task.stages_done(state).sum() == count
            assert bool(task.is_success(state)) == (count == 3)
            terms = task.reward_terms(None, None, state, np.array(False))
            assert terms["stage"] == pytest.approx(0.02 * (count / 3 - 1))
    wrong_hole = seated(top, one_leg.CORNER * [-1, 1, 1], 0.001)
    assert not task.is_success(place(task, start, leg=wrong_hole))
    leaning = poses.compose(
        seated(top, one_leg.CORNER, 0.0), poses.pose([0, 0, 0], [np.cos(0.1), np.sin(0.1), 0, 0])
    )
    assert not task.is_success(place(task, start, leg=leaning))


def test_a_hood_without_a_screwed_bulb_is_no_lamp():
    task = make_task("lamp")
    start = task.initial_state(np.random.default_rng(0))
    base = task.pose(start, "base")
    hood = seated(base, lamp.SEAT, 0.0)
    in_place = {height: seated(base, lamp.SEAT, height) for height in (TRAVEL, 0.0)}
    assert not task.is_success(place(task, start, hood=hood))
    assert not task.is_success(place(task, start, hood=hood, bulb=in_place[TRAVEL]))
    assert task.is_success(place(task, start, hood=hood, bulb=in_place[0.0]))
    off = seated(base, lamp.SEAT + [0.02, 0, 0], 0.0)
    assert not task.is_success(place(task, start, hood=off, bulb=in_place[0.0]))


def test_a_round_table_needs_both_threads():
    task = make_task("round_table")
    start = task.initial_state(np.random.default_rng(0))
    top = task.pose(start, "top")
    legs = {height: seated(top, round_table.SEAT, height) for height in (TRAVEL, 0.0)}
    for leg_height, foot_height, done in ((0, 0, True), (0, TRAVEL, False), (TRAVEL, 0, False)):
        leg = legs[leg_height]
        foot = seated(leg, round_table.LEG_END, foot_height)
        assert bool(task.is_success(place(task, start, leg=leg, foot=foot))) == done


@pytest.mark.parametrize("name", NAMES)
def test_stages_come_in_order_in_a_demonstration(name):
    task = make_task(name, reward="stage", randomness="med")
    env = VecEnv(task, 1, num_threads=1)
    env.reset([5])
    expert = make_expert(task, env.state[0], np.random.default_rng(0))
    done, ended = [task.stages_done(env.state[0])], False
    while not ended:
        step = env.step(expert.act(env.state[0])[None, None])
        done.append(task.stages_done(step.states[0, 0]))
        ended = bool(step.ended[0])
    env.close()
    assert step.success[0]
    first = np.stack(done).argmax(axis=0)
    assert not done[0].any()
    assert done[-1].all()
    assert (np.diff(first) >= 0).all()
    assert step.reward_terms["stage"][0, 0] == 0


def test_medium_randomness_is_wider():
    for name in NAMES:
        for level, (reach, turn) in RANDOMNESS.items():
            task = make_task(name, randomness=level)
            states = np.stack([task.initial_state(np.random.default_rng(s)) for s in range(100)])
            for body, start in task.starts.items():
                drawn = task.pose(states, body)
                off = np.abs(drawn[:, :2] - start.center[:2]).max()
                assert 0.8 * reach < off <= reach
                assert 0.8 * turn < np.abs(poses.yaw(drawn[:, 3:])).max() <= turn
    with pytest.raises(
        SimulationError, match=r"unknown randomness of task 'lamp' 'high'.*low, med"
    ):
        make_task("lamp", randomness="high")

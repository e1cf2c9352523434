"""What a gripper action is told, without ROS: the goal of a plan, when it goes out, and robot files that name one."""

import numpy as np
import pytest

from flow_policy_rl.errors import InputError
from flow_policy_rl.serving.gripper import LOOKAHEAD_S, RETRY_S, GripperGoals, wanted
from flow_policy_rl.serving.robot import GripperAction, load_robot
from flow_policy_rl.serving.spline import Spline

BAND = 0.002


def plan(*knots: tuple[float, float]) -> Spline:
    """(time, position) of one joint, at rest at each."""
    times, positions = (np.array(part) for part in zip(*knots, strict=True))
    return Spline(times, positions[:, None], np.zeros((len(times), 1)))


CLOSES = plan((0, 0.04), (0.5, 0.04), (0.7, 0.0), (1.0, 0.0), (1.2, 0.03), (1.5, 0.03))


def test_the_goal_is_where_the_plan_is_a_moment_later():
    for t in (0.0, 0.3, 0.47, 0.6, 1.0):
        there = CLOSES.sample(t + LOOKAHEAD_S)[0][0]
        assert wanted(CLOSES, t)[0] == pytest.approx(there, abs=1e-12)
    assert wanted(CLOSES, 9.0)[0] == 0.03


def test_goals_go_out_on_change_and_not_too_often():
    goals = GripperGoals(GripperAction("/g", deadband=BAND, max_rate_hz=5.0))
    send = lambda value, now, **how: goals.next(np.array([value]), now, **how)  # noqa: E731
    assert send(0.04, 0.0) == 0.04
    assert send(0.04 + BAND * 0.99, 10.0) is None
    assert send(0.0, 10.0) == 0.0
    assert send(0.04, 10.19) is None  # too soon, and not forgotten
    assert send(0.04, 10.21) == 0.04
    assert send(0.01, 10.22, at_once=True) == 0.01
    assert send(0.01, 20.0, at_once=True) is None
    goals.forget()
    assert send(0.01, 20.0) == 0.01
    rng = np.random.default_rng(0)
    times = np.arange(0, 10, 0.02)
    sent = [t for t in times if send(rng.uniform(0, 0.04), 30 + t) is not None]
    assert (np.diff(sent) >= 0.2 - 1e-9).all()
    assert len(sent) > 40


def test_a_refused_goal_goes_out_again_while_it_is_wanted():
    goals = GripperGoals(GripperAction("/g", deadband=BAND, max_rate_hz=5.0))
    send = lambda value, now: goals.next(np.array([value]), now)  # noqa: E731
    assert send(0.04, 0.0) == 0.04
    goals.refused()
    assert send(0.04, RETRY_S - 0.01) is None
    assert send(0.04, RETRY_S) == 0.04
    assert send(0.04, 10.0) is None  # nobody refused it this time
    goals.refused()
    assert send(0.0, 10.1) == 0.0  # another one does not wait
    assert send(0.0, 20.0) is None
    times = np.arange(30, 40, 0.05)
    tries = 0
    for t in times:
        if send(0.02, t) is not None:
            tries += 1
            goals.refused()
    assert tries == pytest.approx(10 / RETRY_S, abs=1)


def test_the_hand_follows_a_plan_in_a_few_goals():
    """Asked every 50 ms, as the node does; at rest where the plan rests."""
    goals, sent = GripperGoals(GripperAction("/g")), []
    for now in np.arange(0.0, 2.0, 0.05):
        goal = goals.next(wanted(CLOSES, now), now)
        sent += [] if goal is None else [(now, float(goal[0]))]
    at = lambda t: [goal for now, goal in sent if now <= t][-1]  # noqa: E731
    assert at(0.3) == 0.04
    assert at(0.8) < BAND
    assert at(1.9) == pytest.approx(0.03, abs=BAND)
    assert 3 <= len(sent) <= 6


ROBOT = """
name: toy
arm: {a: {position: [-1, 1], velocity: 1, acceleration: 5, jerk: 500}}
gripper: {f: {position: [0, 0.04], velocity: 0.2, acceleration: 5, jerk: 500}}
topics: {joint_states: /joint_states, command: /arm/joint_trajectory}
gripper_action: {name: /hand/gripper_cmd}
"""


def test_a_robot_file_may_name_a_gripper_action(tmp_path):
    path = tmp_path / "toy.yaml"
    path.write_text(ROBOT)
    assert load_robot(str(path)).gripper_action == GripperAction("/hand/gripper_cmd")
    given = (
        "{name: /g, type: ParallelGripperCommand, max_effort: 20, deadband: 0.01, max_rate_hz: 2}"
    )
    path.write_text(ROBOT.replace("{name: /hand/gripper_cmd}", given))
    assert load_robot(str(path)).gripper_action == GripperAction(
        "/g", "ParallelGripperCommand", 20, 0.01, 2
    )


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("name: /hand/gripper_cmd", "nane: /g", "did you mean 'name'"),
        ("name: /hand/gripper_cmd", "name: a b", "'a b' is not a topic name"),
        ("gripper_cmd}", "gripper_cmd, type: GriperCommand}", "did you mean 'GripperCommand'"),
        ("gripper_cmd}", "gripper_cmd, max_effort: much}", "max_effort: much is not a number"),
        ("gripper_cmd}", "gripper_cmd, deadband: -1}", "deadband: -1 is not a number of at least"),
        ("gripper_cmd}", "gripper_cmd, max_rate_hz: 0}", "no goal would ever go out"),
        ("gripper: {f", "gripper: {}\nhome: {}\n#", "needs exactly one joint in gripper"),
        ("trajectory}", "trajectory, gripper_command: /hand}", "moves the same joints"),
    ],
)
def test_what_is_wrong_with_a_gripper_action_is_named(tmp_path, old, new, says):
    path = tmp_path / "toy.yaml"
    path.write_text(ROBOT.replace(old, new))
    with pytest.raises(InputError, match=says.replace("(", r"\(")):
        load_robot(str(path))

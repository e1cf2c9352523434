"""How fast the robot executes what it is told, without ROS."""

import pytest

from flow_policy_rl.ros import namespaced_topics
from flow_policy_rl.serving.robot import load_robot
from flow_policy_rl.serving.speed_scaling import SpeedScaling

S = 1_000_000_000


class Told:
    """A scaling that hears both clocks as one."""

    def __init__(self):
        self.scaling = SpeedScaling("/speed")

    def hear(self, percent: float, t: float) -> bool:
        return self.scaling.hear(percent, round(t * S), t)

    def problem(self, t: float) -> str:
        return self.scaling.problem(round(t * S), t)


def test_only_full_speed_is_no_problem():
    told = Told()
    for percent in (0.0, 30.0, 98.9, float("nan")):
        told.hear(percent, 1.0)
        assert f"at {percent:.0f} % of its speed (/speed)" in told.problem(1.0)
    for percent in (99.0, 100.0):
        told.hear(percent, 2.0)
        assert told.problem(2.0) == ""


def test_what_was_never_said_or_long_ago_is_not_taken_for_full():
    told = Told()
    assert "nobody says on /speed" in told.problem(0.0)
    told.hear(100.0, 5.0)
    assert told.problem(5.9) == ""
    assert "nobody says on /speed" in told.problem(6.1)


@pytest.mark.parametrize("meanwhile", [[(50.0, 3.9), (20.0, 4.0)], []])
def test_after_slowed_time_the_arm_may_finish_what_it_was_told(meanwhile):
    """A silence may have hidden it."""
    told = Told()
    told.hear(100.0, 0.0)
    told.scaling.told(0.6)
    assert told.problem(0.1) == ""
    for percent, t in meanwhile:
        told.hear(percent, t)
    told.hear(100.0, 5.0)
    told.hear(100.0, 5.5)
    assert "finishes what it was told" in told.problem(5.59)
    assert told.problem(5.61) == ""


@pytest.mark.parametrize("after_s", [0.1, 1.1])
def test_who_slows_the_robot_down_is_told_at_once_and_once(after_s):
    """After a silence as well: nobody may have looked at it yet."""
    told = Told()
    assert not told.hear(100.0, 0.0)
    assert told.hear(50.0, after_s)
    assert not told.hear(20.0, after_s + 0.1)


def test_a_clock_that_goes_back_does_not_wait_for_the_old_time():
    told = Told()
    told.hear(100.0, 100.0)
    told.scaling.told(0.6)
    assert told.scaling.problem(round(3.0 * S), 100.5) == ""


def test_the_ur5e_names_where_its_driver_says_it():
    topic = "/speed_scaling_state_broadcaster/speed_scaling"
    assert load_robot("ur5e").topics.speed_scaling == topic
    assert (topic, f"/left{topic}") in namespaced_topics("ur5e", "left")
    assert load_robot("panda").topics.speed_scaling == ""

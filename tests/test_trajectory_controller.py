"""What a trajectory controller does with what it is sent."""

import numpy as np
import pytest

from flow_policy_rl.serving.trajectory_controller import (
    ForwardController,
    TrajectoryController,
    TrajectoryRejected,
)


def test_controller_passes_its_points_with_their_velocities():
    controller = TrajectoryController(["a", "b"], np.zeros(2))
    times, points = np.array([0.1, 0.2, 0.3]), np.array([[1.0, 2], [2, 1], [3, 0]])
    velocities = np.array([[1.0, 0], [5, -5], [0, 0]])
    controller.accept(["a", "b"], times, points, velocities, now=10.0)
    for time, point, velocity in zip(times, points, velocities, strict=True):
        position, speed, _ = controller.sample(10 + time - 1e-9)
        assert np.allclose(position, point, atol=1e-6)
        assert np.allclose(speed, velocity, atol=1e-5)
    step = 1e-6
    for time in (10.05, 10.17, 10.28):  # the slope is the derivative of the position
        slope = (controller.sample(time + step)[0] - controller.sample(time - step)[0]) / (2 * step)
        assert np.allclose(slope, controller.sample(time)[1], atol=1e-4)
    position, speed, _ = controller.sample(99.0)
    assert np.array_equal(position, points[-1])
    assert np.array_equal(speed, [0, 0])


def test_controller_matches_names_and_replaces_at_once():
    controller = TrajectoryController(["a", "b"], np.array([0.0, 0.0]))
    controller.accept(["b", "a"], np.array([1.0]), np.array([[2.0, 1.0]]), None, now=0.0)
    assert np.allclose(controller.sample(0.5)[0], [0.5, 1.0])
    controller.accept(["a", "b"], np.array([1.0]), np.array([[0.5, 1.0]]), None, now=0.5)
    assert np.allclose(controller.sample(1.2)[0], [0.5, 1.0])  # the old goal is forgotten


@pytest.mark.parametrize(
    ("names", "times", "velocities"),
    [
        (["a"], [0.1, 0.2], None),
        (["a", "c"], [0.1, 0.2], None),
        (["a", "b"], [0.2, 0.2], None),
        (["a", "b"], [0.2, 0.1], None),
        (["a", "b"], [0.1, 0.2], [[0, 0], [0, 1]]),
    ],
)
def test_controller_drops_what_a_real_one_drops(names, times, velocities):
    controller = TrajectoryController(["a", "b"], np.zeros(2))
    points = np.ones((2, len(names)))
    with pytest.raises(TrajectoryRejected):
        controller.accept(
            names,
            np.array(times),
            points,
            None if velocities is None else np.array(velocities),
            0.0,
        )
    assert np.array_equal(controller.sample(1.0)[0], [0, 0])


def test_controller_of_partial_joints_holds_the_others():
    controller = TrajectoryController(["a", "b"], np.array([0.5, 0.7]), allow_partial=True)
    controller.accept(["b"], np.array([1.0]), np.array([[2.0]]), None, now=0.0)
    assert np.allclose(controller.sample(1.0)[0], [0.5, 2.0])


def test_controller_with_a_stamp_in_the_past_jumps_and_drops_what_is_over():
    controller = TrajectoryController(["a"], np.zeros(1))
    times, points = np.arange(1, 11) * 0.1, np.arange(1.0, 11)[:, None]
    controller.accept(["a"], times, points, None, now=10.0, start=9.6)
    assert np.allclose(controller.sample(10.0)[0], [4.0])  # the reference jumps: no blend
    with pytest.raises(TrajectoryRejected, match="ended 1.000 s before"):
        controller.accept(["a"], times, points, None, now=12.0, start=10.0)
    controller.accept(
        ["a"], times, points, None, now=10.0, start=10.8
    )  # future: from now on toward the first point
    assert 4.0 > controller.sample(10.4)[0][0] > 1.0


def test_controller_with_accelerations_follows_quintics():
    controller = TrajectoryController(["a"], np.zeros(1))
    t = np.linspace(0.1, 1.0, 10)
    f = np.polynomial.Polynomial([0, 0, 0, 1, -2, 1])  # t^3 (1 - t)^2: at rest at 1
    p, v, a = f(t)[:, None], f.deriv()(t)[:, None], f.deriv(2)(t)[:, None]
    v[-1] = 0
    controller.accept(["a"], t, p, v, 0.0, accelerations=a)
    moments = np.linspace(0, 0.99, 50)
    followed = np.array([controller.sample(m)[0][0] for m in moments])
    assert np.allclose(followed, f(moments), atol=1e-9)


@pytest.mark.parametrize(
    ("times", "position", "velocity"),
    [([0.1, np.inf], 1.0, 0.0), ([0.1, 0.2], np.inf, 0.0), ([0.1, 0.2], 1.0, np.nan)],
)
def test_controller_drops_what_is_no_number(times, position, velocity):
    controller = TrajectoryController(["a"], np.zeros(1))
    positions, velocities = np.array([[position], [1.0]]), np.array([[velocity], [0.0]])
    with pytest.raises(TrajectoryRejected):
        controller.accept(["a"], np.array(times), positions, velocities, now=0.0)


def test_forward_controller_takes_the_last_command():
    controller = ForwardController(["a", "b"], np.zeros(2))
    controller.accept([1.0, 2.0])
    assert controller.sample(0.0)[0].tolist() == [1.0, 2.0]
    with pytest.raises(TrajectoryRejected, match="1 values for 2 joints"):
        controller.accept([1.0])
    with pytest.raises(TrajectoryRejected, match="not finite"):
        controller.accept([1.0, np.nan])
    assert controller.sample(0.0)[0].tolist() == [1.0, 2.0]

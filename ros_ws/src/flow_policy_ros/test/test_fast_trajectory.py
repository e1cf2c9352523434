"""A trajectory written as bytes is the message that it stands for."""

import numpy as np
import pytest
from flow_policy_ros import fast_trajectory, messages
from flow_policy_ros.fast_trajectory import TrajectoryWriter
from rclpy.serialization import deserialize_message
from trajectory_msgs.msg import JointTrajectory


@pytest.mark.parametrize("seed", range(60))
def test_bytes_read_back_as_the_message(seed):
    """Names of every length, so that every alignment occurs."""
    rng = np.random.default_rng(seed)
    joints = 1 + seed % 9
    names = tuple(f"{'joint' * 3}"[: rng.integers(1, 15)] + str(k) for k in range(joints))
    writer = TrajectoryWriter(names)
    assert writer.as_bytes
    n = int(rng.integers(1, 40))
    times = np.cumsum(rng.uniform(1e-4, 2.0, n))
    positions, velocities = rng.normal(size=(2, n, joints))
    raw = writer.write(times, positions, velocities)
    expected = messages.joint_trajectory(names, times, positions, velocities)
    assert deserialize_message(raw, JointTrajectory) == expected


def test_where_the_middleware_reads_other_bytes_it_gets_the_message(monkeypatch):
    points = np.array([0.1]), np.array([[1.0, 2.0]]), np.zeros((1, 2))
    expected = messages.joint_trajectory(("a", "b"), *points)
    monkeypatch.setattr(fast_trajectory, "HEADER", bytes([0, 7, 0, 0]))  # no CDR that there is
    writer = TrajectoryWriter(("a", "b"))
    assert not writer.as_bytes
    assert writer.write(*points) == expected
    monkeypatch.setattr(fast_trajectory, "deserialize_message", lambda raw, kind: kind())
    assert not TrajectoryWriter(("a", "b")).as_bytes

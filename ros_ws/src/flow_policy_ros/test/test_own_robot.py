"""A robot of one's own: `generic.yaml` copied and filled for an arm of two joints, its kinematics from a URDF, driven
by the real node. Judged by the arm's own trigonometry."""

from pathlib import Path

import numpy as np
import pytest
from flow_policy_ros import messages
from rclpy.qos import QoSProfile
from sensor_msgs.msg import JointState
from trajectory_msgs.msg import JointTrajectory

import robots
from flow_policy_rl.serving.trajectory_controller import TrajectoryController

JOINTS = ("shoulder", "elbow")
LINK = 0.4  # m, each
URDF = """<robot name="planar">
  <link name="base"/><link name="upper"/><link name="fore"/><link name="tip"/>
  <joint name="shoulder" type="revolute"><parent link="base"/><child link="upper"/>
    <origin xyz="0 0 0.1"/><axis xyz="0 0 1"/><limit lower="-2.5" upper="2.5" velocity="0.5" effort="1"/></joint>
  <joint name="elbow" type="revolute"><parent link="upper"/><child link="fore"/>
    <origin xyz="0.4 0 0"/><axis xyz="0 0 1"/><limit lower="-2.0" upper="2.0" velocity="0.5" effort="1"/></joint>
  <joint name="flange" type="fixed"><parent link="fore"/><child link="tip"/><origin xyz="0.4 0 0"/></joint>
</robot>"""
START = np.array([0.3, 0.6])
TARGET = np.array([1.2, 0.4])  # a policy that knows nothing goes to the middle of its action range
BOX = {"low": [0.2, -0.6, 0.0], "high": [0.9, 0.6, 0.5]}


def tip(angles: np.ndarray) -> np.ndarray:
    """(..., 2) to (..., 2): the plane of the arm, m."""
    first, second = angles[..., 0], angles[..., 0] + angles[..., 1]
    return LINK * np.stack([np.cos(first) + np.cos(second), np.sin(first) + np.sin(second)], -1)


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Path:
    """Goes to TARGET."""
    import torch

    from flow_policy_rl.export import export_policy
    from flow_policy_rl.policy import FlowPolicy, NetworkConfig
    from flow_policy_rl.spec import ObservationField, PolicySpec

    torch.manual_seed(0)
    spec = PolicySpec(
        task="swing",
        robot="planar",
        joint_names=JOINTS,
        action_low=tuple(TARGET - 0.01),
        action_high=tuple(TARGET + 0.01),
        observations=(ObservationField("joint_pos", "joint_position", JOINTS, "rad"),),
        control_dt=0.05,
        action_horizon=12,
        execute_horizon=8,
    )
    out = tmp_path_factory.mktemp("own") / "swing.onnx"
    export_policy(FlowPolicy(spec, NetworkConfig(width=16, depth=2)).eval(), out)
    return out


@pytest.fixture
def robot_file(tmp_path) -> Path:
    """The template, as the tutorial has it filled: name, joints, URDF, tool, box."""
    (tmp_path / "planar.urdf").write_text(URDF)
    text = (Path(robots.__file__).parent / "generic.yaml").read_text()
    template = [line for line in text.splitlines() if "position: [" not in line]
    joints = [f"  {name}: {{acceleration: 5.0, jerk: 500.0}}" for name in JOINTS]
    k = template.index("arm:")
    filled = [*template[: k + 1], *joints, *template[k + 1 :]]
    extra = ["urdf: planar.urdf", "tool: tip", f"workspace: {BOX}"]
    path = tmp_path / "planar.yaml"
    path.write_text("\n".join([*filled, *extra]).replace("name: generic", "name: planar"))
    return path


class Arm:
    """Follows trajectories as a controller does; keeps what it was sent to."""

    def __init__(self, peer):
        self._now = lambda: peer.node.get_clock().now().nanoseconds
        self.controller = TrajectoryController(JOINTS, START)
        self.way: list[np.ndarray] = []
        self.fastest = 0.0  # rad/s, in and between the points of a command; a late one is taken up at any speed
        self._pub = peer.node.create_publisher(JointState, "/joint_states", 10)
        topic = "/joint_trajectory_controller/joint_trajectory"
        peer.node.create_subscription(
            JointTrajectory, topic, self._on_command, QoSProfile(depth=10)
        )
        peer.node.create_timer(0.01, self._publish)

    def _on_command(self, msg: JointTrajectory) -> None:
        times = np.array([messages.seconds(p.time_from_start) for p in msg.points])
        positions, velocities = (
            np.array([getattr(p, what) for p in msg.points]) for what in ("positions", "velocities")
        )
        between = np.diff(positions, axis=0) / np.diff(times)[:, None]
        self.fastest = max(self.fastest, *np.abs([*velocities, *between]).ravel())
        self.controller.accept(msg.joint_names, times, positions, velocities, self._now() / 1e9)

    def _publish(self) -> None:
        position, velocity, _ = self.controller.sample(self._now() / 1e9)
        self.way.append(position)
        names, order = list(JOINTS)[::-1], [1, 0]  # another order than the policy's
        msg = messages.joint_state(names, position[order], velocity[order], self._now())
        self._pub.publish(msg)


@pytest.mark.parametrize("workspace", [True, False])
def test_a_filled_template_runs_and_its_tool_stays_in_the_box(
    start, peer, policy, robot_file, workspace
):
    arm = Arm(peer)
    node = {"policy": str(policy), "robot": str(robot_file), "armed": True}
    limits = {"max_start_distance": 2.0, "max_limited_in_a_row": 0, "soft_start_s": 0.0}
    start(policy_node={**node, **limits, "workspace": workspace})
    at = lambda: tip(arm.controller.sample(arm._now() / 1e9)[0])  # noqa: E731
    low, high = np.array(BOX["low"])[:2], np.array(BOX["high"])[:2]
    assert (tip(TARGET) > high)[1], "the target is outside"
    if not workspace:
        there = lambda: np.abs(at() - tip(TARGET)).max() < 0.02  # noqa: E731
        peer.until(there, "the arm reaches the target outside")
        return
    moved = lambda: np.abs(arm.way[-1] - START).max() > 0.05  # noqa: E731
    rests = lambda: np.abs(arm.way[-1] - arm.way[-60]).max() < 1e-6  # noqa: E731
    peer.until(lambda: len(arm.way) > 60 and moved() and rests(), "the arm stops at the edge")
    way = tip(np.array(arm.way))
    assert ((way >= low - 1e-3) & (way <= high + 1e-3)).all()
    assert way[-1, 1] > tip(START)[1] + 0.02  # it went some way
    assert 0.4 < arm.fastest <= 0.5 + 1e-6, "as fast as the URDF allows"

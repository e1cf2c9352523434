"""Two publishers of joint states: of the same joints, or of some each."""

from robot_peer import NAMES, Robot
from sensor_msgs.msg import JointState

from flow_policy_rl.serving import shipped


def publisher(peer, names):
    """Another node that says where joints are, 50 times per second."""
    node = peer.second_node("other")
    out = node.create_publisher(JointState, "/joint_states", 10)

    def publish() -> None:
        msg = JointState(name=names, position=[0.04] * len(names), velocity=[0.0] * len(names))
        msg.header.stamp = node.get_clock().now().to_msg()
        out.publish(msg)

    return node, node.create_timer(0.02, publish), out


def test_a_joint_that_two_publish_is_not_used(start, peer, commands, status):
    """Such as a joint_state_publisher beside the robot: the arm would seem to be in two places."""
    Robot(peer)
    start(
        policy_node={"policy": str(shipped.find("lift")), "armed": True, "max_tracking_error": 0.0}
    )
    peer.until(lambda: len(commands) >= 2, "commands")
    node, timer, out = publisher(peer, NAMES[:1])
    says = "holding: panda_joint1 of /joint_states: more than one of these says where it is: /other, /peer"
    peer.until(lambda: says in status(), "diagnostics name joint and nodes")
    peer.until_quiet(commands, "silence")
    before = len(commands)
    node.destroy_timer(timer)
    node.destroy_publisher(out)
    peer.until(lambda: len(commands) >= before + 2, "commands again")


def test_publishers_with_joints_of_their_own_are_one_robot(start, peer, commands, status):
    robot = Robot(peer)
    robot.parts = (slice(0, 7),)
    publisher(peer, NAMES[7:])
    start(
        policy_node={"policy": str(shipped.find("lift")), "armed": True, "max_tracking_error": 0.0}
    )
    peer.until(lambda: len(commands) >= 20, "commands")
    assert "more than one" not in status()

"""A gripper that takes goals. control_msgs is not on PyPI: without it the node refuses; with it (a ROS installation, or
`scripts/gripper_actions.py`) the real thing runs."""

import importlib.util
from pathlib import Path

import pytest
from robot_peer import NAMES, Robot
from std_msgs.msg import Bool
from trajectory_msgs.msg import JointTrajectory

import robots
from flow_policy_rl.serving import shipped

KINDS = ("GripperCommand", "ParallelGripperCommand")
HAND = "panda_finger_joint1"
BAND = 0.002  # the deadband
installed = importlib.util.find_spec("control_msgs") is not None


@pytest.fixture
def robot_file(tmp_path):
    """The Panda with a gripper action."""

    def write(kind: str) -> str:
        text = (Path(robots.__file__).parent / "panda.yaml").read_text()
        action = f"{{name: /hand/gripper_cmd, type: {kind}, max_effort: 20.0}}"
        path = tmp_path / "panda_goals.yaml"
        path.write_text(f"{text}\ngripper_action: {action}\n")
        return str(path)

    return write


@pytest.mark.skipif(installed, reason="control_msgs is installed here")
def test_without_control_msgs_a_gripper_action_is_refused_in_one_line(start, peer, robot_file):
    parameters = {"policy": str(shipped.find("lift")), "robot": robot_file(KINDS[0])}
    node = start(policy_node=parameters)["policy_node"]
    peer.until(lambda: not node.running, "the end of the node")
    lines = node.log.read_text().splitlines()
    assert node.wait(60.0) == 2
    (line,) = (line for line in lines if line.startswith("error: "))
    assert "gripper_action /hand/gripper_cmd needs control_msgs/action/GripperCommand" in line
    assert "or give topics.gripper_command" in line


@pytest.mark.skipif(not installed, reason="control_msgs is not installed")
@pytest.mark.parametrize("kind", KINDS)
def test_the_gripper_gets_goals_and_the_arm_the_rest(
    start, peer, robot_file, commands, status, kind
):
    """The lift policy goes to the cube and closes the hand: a few goals, not a stream."""
    from control_msgs import action
    from rclpy.action import ActionServer

    robot, goals = Robot(peer), []
    robot.controller.allow_partial = True
    action_type = getattr(action, kind)

    def execute(handle):
        command = handle.request.command
        goals.append(command)
        position = command.position if kind == KINDS[0] else command.position[0]
        robot.broken[7] = robot.broken[8] = position  # the fingers follow at once
        handle.succeed()
        return action_type.Result()

    parameters = {"policy": str(shipped.find("lift")), "robot": robot_file(kind), "armed": True}
    start(policy_node=parameters)
    peer.until(lambda: "no action server at /hand/gripper_cmd" in status(), "diagnostics say so")
    assert commands == []
    server = ActionServer(peer.node, action_type, "/hand/gripper_cmd", execute)
    peer.until(lambda: robot.broken.get(7, 1.0) < 0.03, "the hand closes")
    assert sorted(commands[0].joint_names) == sorted(NAMES[:7])
    if kind == KINDS[0]:
        assert {goal.max_effort for goal in goals} == {20.0}
        positions = [goal.position for goal in goals]
    else:
        assert [(list(g.name), list(g.effort)) for g in goals] == [([HAND], [20.0])] * len(goals)
        positions = [goal.position[0] for goal in goals]
    assert positions[0] == pytest.approx(0.04, abs=0.002)
    assert len(positions) < len(commands)
    server.destroy()


@pytest.mark.skipif(not installed, reason="control_msgs is not installed")
@pytest.mark.parametrize("how", ["refuses", "gives up"])
def test_a_goal_that_did_not_get_through_is_sent_again(start, peer, robot_file, status, how):
    """Until the hand moves: that is what the plan wants. And not once it holds something, which many controllers
    abort for."""
    from control_msgs.action import GripperCommand
    from rclpy.action import ActionServer, GoalResponse

    robot, well, goals = Robot(peer), [False], []
    robot.controller.allow_partial = True

    def judge(request):
        goals.append(request.command.position)
        taken = well[0] or how == "gives up"
        return GoalResponse.ACCEPT if taken else GoalResponse.REJECT

    def execute(handle):
        handle.abort()
        return GripperCommand.Result(stalled=well[0])

    server = ActionServer(
        peer.node, GripperCommand, "/hand/gripper_cmd", execute, goal_callback=judge
    )
    parameters = {"policy": str(shipped.find("lift")), "robot": robot_file(KINDS[0])}
    start(policy_node={**parameters, "armed": True})
    says = f"/hand/gripper_cmd {how} goals"
    peer.until(lambda: says in status(), "diagnostics say so")
    again = lambda: any(abs(a - b) <= BAND for a, b in zip(goals[1:], goals, strict=False))  # noqa: E731
    peer.until(again, "the same goal again")
    well[0] = True
    peer.until(lambda: status() == "active, armed", "all is well")
    server.destroy()


@pytest.mark.parametrize("how", ["topic", *(["action"] if installed else [])])
def test_the_simulated_arm_lifts_with_a_gripper_of_its_own(start, peer, robot_file, how):
    """The simulation node has the gripper's controller as well; a grasp without the hand would fail."""
    path = Path(robot_file(KINDS[0]))
    if how == "topic":
        text = path.read_text().replace(
            "topics:\n", "topics:\n  gripper_command: /hand/joint_trajectory\n", 1
        )
        path.write_text(text[: text.index("gripper_action:")])
    ended = peer.listen(Bool, "/sim_node/success")
    arm = peer.listen(JointTrajectory, "/arm_controller/joint_trajectory")
    start(
        sim_node={"image_rate_hz": 0.0, "robot": str(path), "real_time_factor": 0.4},
        policy_node={
            "policy": str(shipped.find("lift")),
            "robot": str(path),
            "armed": True,
            "use_sim_time": True,
        },
    )
    peer.until(lambda: ended, "the end of the episode")
    assert ended[0].data
    assert HAND not in arm[0].joint_names

"""Launch files, without launch: their names agree with the nodes, and namespaces reach all topics of a robot. They run
for real in `test_launch_files.py` of the ROS package, where launch_ros is installed."""

import ast

import pytest
from toys import ROOT

from flow_policy_rl.errors import InputError
from flow_policy_rl.ros import namespaced_topics

FILES = sorted((ROOT / "launch").glob("*.launch.py"))
NODES = ROOT / "ros_ws" / "src" / "flow_policy_ros" / "flow_policy_ros"
BUILT_IN = {"use_sim_time"}


def constants(node: ast.AST) -> set[str]:
    return {
        n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)
    }


def listed(tree: ast.Module) -> set[str]:
    """Parameters that a launch file passes on from a list of its own."""
    found = set()
    for assign in tree.body:
        name = assign.targets[0].id if isinstance(assign, ast.Assign) else ""
        if name == "OF_NODE":
            found |= constants(assign.value)
        elif name == "OPTIONAL" and isinstance(assign.value, ast.Dict):  # argument: parameter
            for key, value in zip(assign.value.keys, assign.value.values, strict=True):
                found.add(value.elts[0].value if isinstance(value, ast.Tuple) else key.value)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_parameters_are_declared_by_the_node_they_go_to(path):
    tree = ast.parse(path.read_text())
    for call in ast.walk(tree):
        if not (isinstance(call, ast.Call) and getattr(call.func, "id", "") == "Node"):
            continue
        keywords = {k.arg: k.value for k in call.keywords}
        module = next(
            c for c in constants(keywords["arguments"]) if c.startswith("flow_policy_ros.")
        )
        node = ast.parse((NODES / f"{module.rpartition('.')[2]}.py").read_text())
        declared = constants(node)
        for part in ast.walk(
            node
        ):  # `from flow_policy_ros import simulated_task`: its parameters are the node's, too
            if isinstance(part, ast.ImportFrom) and part.module == "flow_policy_ros":
                texts = [(NODES / f"{name.name}.py").read_text() for name in part.names]
                declared |= set().union(*(constants(ast.parse(text)) for text in texts))
        given = {
            k.value
            for d in ast.walk(keywords["parameters"])
            if isinstance(d, ast.Dict)
            for k in d.keys
        }
        assert given
        assert (given | listed(tree)) - BUILT_IN <= declared


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_every_argument_is_documented(path):
    tree = ast.parse(path.read_text())
    calls = [c for c in ast.walk(tree) if isinstance(c, ast.Call)]
    arguments = [c for c in calls if getattr(c.func, "id", "") == "DeclareLaunchArgument"]
    assert arguments
    assert all("description" in {k.arg for k in c.keywords} for c in arguments)
    used = {
        c.args[0].value
        for c in calls
        if getattr(c.func, "id", "") == "LaunchConfiguration"
        and c.args
        and isinstance(c.args[0], ast.Constant)
    }
    assert used <= {c.args[0].value for c in arguments}


def test_a_namespace_moves_every_topic_of_a_robot():
    assert namespaced_topics("panda", "") == namespaced_topics("panda", "/") == []
    moved = dict(namespaced_topics("panda", "/left/"))
    assert moved["/joint_states"] == "/left/joint_states"
    assert moved["/arm_controller/joint_trajectory"] == "/left/arm_controller/joint_trajectory"
    assert moved["/front/camera_info"] == "/left/front/camera_info"
    assert all(new == f"/left{old}" for old, new in moved.items())
    with pytest.raises(InputError, match="did you mean 'panda'"):
        namespaced_topics("pander", "left")


def test_a_namespace_moves_every_part_of_a_gripper_action(tmp_path):
    """Two arms of one robot file: a rule for the action's own name would move nothing of it."""
    file = tmp_path / "panda_goals.yaml"
    text = (ROOT / "robots/panda.yaml").read_text()
    file.write_text(f"{text}\ngripper_action: {{name: /hand/gripper_cmd}}\n")
    moved = dict(namespaced_topics(str(file), "left"))
    for part in ("send_goal", "cancel_goal", "get_result", "feedback", "status"):
        name = f"/hand/gripper_cmd/_action/{part}"
        assert moved[name] == f"/left{name}"

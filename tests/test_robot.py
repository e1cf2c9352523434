"""Robot files: limits, topics, kinematics."""

import numpy as np
import pytest

from flow_policy_rl.errors import InputError
from flow_policy_rl.serving.robot import load_robot, robot_names


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("arm:", "arms:"), "did you mean 'arm'"),
        (
            ("velocity: 2.175, acceleration: 15.0", "speed: 2.175, acceleration: 15.0"),
            "unknown key",
        ),
        (("position: [0.0, 0.04]", "position: [0.04, 0.0]"), "low < high"),
        (("position: [0.0, 0.04]", "position: 3"), "position a pair"),
        (("name: panda", "name: [panda"), "not YAML"),
        (
            ("  joint_states: /joint_states", "  jointstates: /joint_states"),
            "did you mean 'joint_states'",
        ),
    ],
)
def test_bad_robot_files_name_the_key(tmp_path, root, change, says):
    text = (root / "robots" / "panda.yaml").read_text()
    assert change[0] in text
    (tmp_path / "r.yaml").write_text(text.replace(*change, 1))
    with pytest.raises(InputError) as error:
        load_robot(str(tmp_path / "r.yaml"))
    assert says in str(error.value)
    assert "\n" not in str(error.value)


URDF = """<robot name="r"><link name="base"/>
<joint name="j1" type="revolute"><parent link="base"/><child link="l1"/><origin xyz="0 0 0.5"/><axis xyz="0 0 1"/>
  <limit lower="-1.5" upper="2.5" velocity="1.25" effort="9"/></joint>
<joint name="j2" type="prismatic"><parent link="l1"/><child link="l2"/><origin xyz="0.2 0 0" rpy="0
1.5707963267948966 0"/>
  <axis xyz="0 0 1"/><limit lower="0" upper="0.3" velocity="0.1" effort="9"/></joint>
<joint name="flange" type="fixed"><parent link="l2"/><child link="tool"/><origin xyz="0 0 0.1"/></joint></robot>"""
ROBOT = """name: mine
urdf: r.urdf
tool: tool
arm:
  j1: {acceleration: 2.0, jerk: 100.0}
  j2: {acceleration: 1.0, jerk: 50.0, velocity: 0.05}
gripper: {}
workspace: {low: [-1, -1, 0], high: [1, 1, 1]}
topics: {joint_states: /joint_states, command: /arm/joint_trajectory}
"""


def test_limits_and_kinematics_come_from_a_urdf(tmp_path):
    (tmp_path / "r.urdf").write_text(URDF)
    (tmp_path / "r.yaml").write_text(ROBOT)
    robot = load_robot(str(tmp_path / "r.yaml"))
    assert robot.arm["j1"].position == (-1.5, 2.5)
    assert robot.arm["j1"].velocity == 1.25
    assert robot.arm["j2"].velocity == 0.05  # the robot file has the last word
    tool = robot.chain.tool_position(("j1", "j2"), np.array([[0.0, 0.0], [np.pi / 2, 0.3]]))
    assert np.allclose(tool, [[0.3, 0, 0.5], [0, 0.6, 0.5]])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("r.urdf", "s.urdf"), "cannot be read"),
        (("tool: tool", "tool: tol"), "did you mean 'tool'"),
        (("j1: {acceleration: 2.0, ", "j1: {"), "key 'acceleration' is missing"),
        (("j1:", "j9:"), "key 'position' is missing"),
        (("low: [-1, -1, 0]", "low: [-1, -1]"), "list of 3 finite numbers"),
        (("low: [-1, -1, 0]", "low: [-1, -1, .nan]"), "list of 3 finite numbers"),
        (("low:", "lo:"), "did you mean 'low'"),
        (("tool: tool\n", ""), "workspace needs chain"),
        (("/joint_states", "joint states"), "not a topic name"),
    ],
)
def test_bad_robot_files_with_a_urdf_name_the_key(tmp_path, change, says):
    assert change[0] in ROBOT
    (tmp_path / "r.urdf").write_text(URDF)
    (tmp_path / "r.yaml").write_text(ROBOT.replace(*change, 1))
    with pytest.raises(InputError) as error:
        load_robot(str(tmp_path / "r.yaml"))
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (('<axis xyz="0 0 1"/>\n', '<axis xyz="0 0 0"/>\n'), "joint 'j1' has"),
        (('xyz="0.2 0 0"', 'xyz="nan 0 0"'), "joint 'j2' has"),
        (('<parent link="base"/>', '<parent link="l2"/>'), "hangs from itself"),
    ],
)
def test_a_urdf_whose_tool_has_no_place_is_refused(tmp_path, change, says):
    assert change[0] in URDF
    (tmp_path / "r.urdf").write_text(URDF.replace(*change, 1))
    (tmp_path / "r.yaml").write_text(ROBOT)
    with pytest.raises(InputError, match=says):
        load_robot(str(tmp_path / "r.yaml"))


def test_a_fixed_joint_needs_no_axis(tmp_path):
    given = URDF.replace('xyz="0 0 0.1"/>', 'xyz="0 0 0.1"/><axis xyz="0 0 0"/>')
    assert given != URDF
    (tmp_path / "r.urdf").write_text(given)
    (tmp_path / "r.yaml").write_text(ROBOT)
    tool = load_robot(str(tmp_path / "r.yaml")).chain.tool_position(("j1",), np.zeros((1, 1)))
    assert np.allclose(tool, [[0.3, 0, 0.5]])


HAND = """name: mine
arm:
  j1: {position: [-3, 3], velocity: 1.0, acceleration: 2.0, jerk: 100.0}
gripper: {}
chain: [{joint: j1, axis: AXIS, slides: SLIDES}, {xyz: [0.5, 0, 0]}]
topics: {joint_states: /joint_states, command: /arm/joint_trajectory}
"""


@pytest.mark.parametrize("slides", ["true", "false"])
def test_the_length_of_an_axis_moves_no_tool(tmp_path, slides):
    positions, tools = np.array([[1.2]]), []
    for axis in ("[0, 0, 1]", "[0, 0, 10]", "[0, 0, 1.0e-3]"):
        text = HAND.replace("AXIS", axis).replace("SLIDES", slides)
        (tmp_path / "r.yaml").write_text(text)
        tools.append(load_robot(str(tmp_path / "r.yaml")).chain.tool_position(("j1",), positions))
    assert np.allclose(tools, tools[0])


def test_an_axis_of_zero_is_refused(tmp_path):
    text = HAND.replace("AXIS", "[0, 0, 0]").replace("SLIDES", "false")
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(InputError, match=r"chain\[0\].axis: an axis must be finite and not zero"):
        load_robot(str(tmp_path / "r.yaml"))


@pytest.mark.parametrize("name", robot_names())
def test_robots_that_ship_can_be_loaded(name):
    assert load_robot(name).name == name


def test_unknown_robot_names_the_nearest():
    with pytest.raises(InputError, match="did you mean 'panda'"):
        load_robot("pnada")

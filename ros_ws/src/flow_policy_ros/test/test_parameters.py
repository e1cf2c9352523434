"""What is given to a node at the start is checked as what is set later is: a limit that is misspelt does not limit."""

import subprocess
from collections.abc import Callable, Iterator

import pytest
import rclpy
from flow_policy_ros import parameters
from flow_policy_ros.policy_parameters import PARAMETERS
from rclpy.context import Context
from rclpy.node import Node

from flow_policy_rl.errors import InputError
from flow_policy_rl.ros import node_command


@pytest.fixture
def declared(ros_environment) -> Iterator[Callable[..., Node]]:
    """A node with the parameters of the policy node, started with `-p` of these."""
    context, nodes = Context(), []

    def start(*given: str) -> Node:
        args = ["--ros-args", *(word for text in given for word in ("-p", text))]
        rclpy.init(args=args, context=context)
        node = rclpy.create_node("policy_node", context=context)
        nodes.append(node)
        parameters.declare(node, PARAMETERS)
        return node

    yield start
    for node in nodes:
        node.destroy_node()
    rclpy.shutdown(context=context)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("max_traking_error:=0.01", r"policy_node 'max_traking_error' \(did you mean 'max_track"),
        ("other.max_tracking_error:=0.01", "unknown parameter of policy_node .*valid: armed, "),
        ("max_input_age_s:=99.0", "max_input_age_s must be a number from 0.001 to 10, not 99.0"),
        ("max_input_age_s:=.nan", "max_input_age_s must be a number from 0.001 to 10, not nan"),
        ("soft_start_s:=slow", "soft_start_s must be a number from 0 to 60, not 'slow'"),
        ("seed:=1.5", "seed must be a whole number from 0 to 2147483647, not 1.5"),
        ("seed:=-1", "seed must be a whole number from 0 to 2147483647, not -1"),
        ("armed:=1", "armed must be true or false, not 1"),
        ("robot:=[a, b]", "robot must be a text, not"),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(declared, given, says):
    with pytest.raises(InputError, match=says):
        declared(given)


def test_a_whole_number_is_a_number_and_parameters_of_rclpy_are_known(declared):
    node = declared(
        "soft_start_s:=1",
        "max_sigma:=5.0",
        "seed:=3",
        "use_sim_time:=true",
        "qos_overrides./clock.subscription.depth:=3",
    )
    found = {p.name: node.get_parameter(p.name).value for p in PARAMETERS}
    given = {"soft_start_s": 1.0, "max_sigma": 5.0, "seed": 3}
    assert found == {p.name: p.default for p in PARAMETERS} | given
    assert all(type(found[p.name]) is type(p.default) for p in PARAMETERS)


NODES = (
    "policy_node",
    "sim_node",
    "trainer_node",
    "recorder",
    "player",
    "demonstrator",
    "episode_runner",
    "bench_peer",
)


@pytest.mark.parametrize("node", NODES)
def test_a_misspelt_limit_in_a_file_ends_the_node_in_one_line(ros_environment, tmp_path, node):
    file = tmp_path / "parameters.yaml"
    file.write_text("/**: {ros__parameters: {fault_drip: 0.01}}\n")
    command = [*node_command(node, {}), "--params-file", str(file)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    lines = ended.stderr.splitlines()
    assert ended.returncode == 2
    assert len([line for line in lines if line.startswith("error: unknown parameter")]) == 1
    assert not any("Traceback" in line for line in lines)


def test_a_file_that_is_no_parameter_file_ends_the_node_in_one_line(ros_environment, tmp_path):
    file = tmp_path / "parameters.yaml"
    file.write_text("soft_start_s: 1.0\n")
    command = [*node_command("policy_node", {}), "--params-file", str(file)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].startswith("error: ROS arguments: ")
    assert str(file) in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("node", "given", "says"),
    [
        ("recorder", {"bag": 7}, "parameter bag must be a text, not 7"),
        ("player", {"rate": 0.0}, "parameter rate must be a number from 0.001 to 1000, not 0.0"),
        ("sim_node", {"task_options": "randomness"}, "task_options must be names and values, as"),
        ("sim_node", {"task_options": "reward shy"}, "valid: dense, sparse"),
        ("demonstrator", {"task_options": "reward shy"}, "valid: dense, sparse"),
        ("demonstrator", {"task": "hopper"}, "task 'hopper' has no scripted expert"),
        ("demonstrator", {"episodes": 0}, "episodes must be a whole number from 1 to 1000000, not"),
        (
            "episode_runner",
            {"episode_timeout_s": "long"},
            "must be a number from 0.1 to 86400, not",
        ),
    ],
)
def test_a_wrong_value_ends_the_node_in_one_line(ros_environment, node, given, says):
    command = node_command(node, given)
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    (line,) = (line for line in ended.stderr.splitlines() if line.startswith("error: "))
    assert ended.returncode == 2
    assert says in line
    assert "Traceback" not in ended.stderr

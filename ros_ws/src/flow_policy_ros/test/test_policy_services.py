"""The policy node's services, refusals and diagnostics, against a peer that plays the robot."""

import dataclasses
import json
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from flow_policy_ros.policy_node import PolicyNode
from flow_policy_ros.reports import Order
from rcl_interfaces.msg import Parameter, ParameterType, ParameterValue
from rcl_interfaces.srv import DescribeParameters, SetParameters
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from robot_peer import NAMES, Robot, change_state, is_hold, trigger
from std_msgs.msg import Bool, Float64MultiArray
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory

from flow_policy_rl.serving.decode import debug_record
from flow_policy_rl.serving.model_file import SEAL_KEY, seal
from flow_policy_rl.serving.onnx_policy import OnnxPolicy
from flow_policy_rl.serving.safety import KINDS
from flow_policy_rl.serving.streams import MEASURED, Snapshot
from flow_policy_rl.spec import METADATA_KEY


@pytest.fixture
def facts(peer):
    """Name, hardware and values of the policy node's newest diagnostics."""
    received = peer.listen(DiagnosticArray, "/diagnostics")

    def newest() -> dict[str, str]:
        found = [s for msg in received for s in msg.status]
        if not found:
            return {}
        values = {p.key: p.value for p in found[-1].values}
        return {"name": found[-1].name, "hardware": found[-1].hardware_id, **values}

    return newest


def set_parameter(peer, name: str, value):
    kinds = {
        float: (ParameterType.PARAMETER_DOUBLE, "double_value"),
        str: (ParameterType.PARAMETER_STRING, "string_value"),
        bool: (ParameterType.PARAMETER_BOOL, "bool_value"),
    }
    number, key = kinds[type(value)]
    request = SetParameters.Request(
        parameters=[Parameter(name=name, value=ParameterValue(type=number, **{key: value}))]
    )
    return peer.call(SetParameters, "/policy_node/set_parameters", request).results[0]


@pytest.fixture
def active_node(policy_file):
    """A policy node that is active, in this process."""
    rclpy.init(args=["--ros-args", "-p", f"policy:={policy_file}"])
    node = PolicyNode()
    try:
        node.trigger_configure()
        node.trigger_activate()
        yield node
    finally:
        node.close()
        node.destroy_node()
        rclpy.shutdown()


def test_an_inference_begun_before_a_run_does_not_command_it(active_node, policy_file):
    """A slow inference may end after the node was deactivated and activated again, with the arm elsewhere."""
    node, policy = active_node, OnnxPolicy(policy_file)
    obs = {f.name: np.zeros(f.shape, np.float32) for f in policy.spec.observations}
    noise = np.zeros((1, *policy.chunk_shape), np.float32)
    obs[MEASURED] = policy.infer({k: v[None] for k, v in obs.items()}, noise)[0, 0]
    order = Order(Snapshot(obs, node._now(), {}), node._run, 0, 0, 0)
    node.trigger_deactivate()
    node.trigger_activate()
    node._infer(order)
    assert node._served.commander.plan is None
    again = dataclasses.replace(order, run=node._run)
    node._infer(again)
    assert node._served.commander.plan is not None
    node._refuse("something is wrong")  # nor does it end a hold
    node._infer(again)
    assert node._holding
    node._infer(dataclasses.replace(order, run=node._run))
    assert not node._holding


def test_a_node_that_is_deactivated_while_it_begins_to_hold_says_inactive(active_node, monkeypatch):
    """The inference thread refuses while the executor deactivates: when the lock is free, before the log is written."""
    log = SimpleNamespace(warning=lambda text: active_node.trigger_deactivate())
    with monkeypatch.context() as patched:
        patched.setattr(active_node, "get_logger", lambda: log)
        active_node._refuse("something is wrong")
    assert active_node._status.state[1] == "inactive"


def test_emergency_stop_is_latched_by_service_and_by_topic(
    start, peer, robot, policy_file, commands, status
):
    start(policy_node={"policy": str(policy_file), "armed": True})
    peer.until(lambda: len(commands) >= 2, "commands")
    assert trigger(peer, "emergency_stop").success
    peer.until(lambda: "emergency stop: requested by service" in status(), "diagnostics say so")
    peer.until_quiet(commands, "an arm that is stopped")
    assert is_hold(commands[-1])
    held = len(commands)
    assert trigger(peer, "reset_emergency_stop").success
    peer.until(lambda: len(commands) > held, "commands again")

    button = peer.node.create_publisher(Bool, "/emergency_stop", 1)
    peer.until(lambda: button.get_subscription_count() > 0, "the node listens")
    button.publish(Bool(data=True))
    peer.until(lambda: "emergency stop: /emergency_stop" in status(), "diagnostics say so")
    refused = trigger(peer, "reset_emergency_stop")
    assert not refused.success
    assert "still says stop" in refused.message
    button.publish(Bool(data=False))  # releasing the button alone does not start the arm
    peer.until_quiet(commands, "an arm that is stopped")
    held = len(commands)
    assert trigger(peer, "reset_emergency_stop").success
    peer.until(lambda: len(commands) > held, "commands again")


def says_stop(peer, topic: str = "/emergency_stop", **qos):
    """A button that is pressed."""
    button = peer.node.create_publisher(Bool, topic, QoSProfile(depth=1, **qos))
    button.publish(Bool(data=True))
    return button


def test_an_emergency_stop_of_best_effort_is_heard(
    start, peer, robot, policy_file, commands, status
):
    """micro-ROS, or a driver that uses the profile of sensors."""
    start(policy_node={"policy": str(policy_file), "armed": True})
    peer.until(lambda: len(commands) >= 2, "commands")
    button = says_stop(peer, reliability=ReliabilityPolicy.BEST_EFFORT)
    again = peer.node.create_timer(0.1, lambda: button.publish(Bool(data=True)))
    peer.until(lambda: "emergency stop: /emergency_stop says so" in status(), "diagnostics say so")
    peer.until_quiet(commands, "an arm that is stopped")
    peer.node.destroy_timer(again)


def test_an_emergency_stop_that_was_latched_before_the_node_began_is_heard(
    start, peer, robot, policy_file, commands, status
):
    says_stop(peer, durability=DurabilityPolicy.TRANSIENT_LOCAL)
    start(policy_node={"policy": str(policy_file), "armed": True})
    peer.until(lambda: "emergency stop: /emergency_stop says so" in status(), "diagnostics say so")
    peer.until_quiet(commands, "an arm that is stopped")
    assert "still says stop" in trigger(peer, "reset_emergency_stop").message


def test_an_emergency_stop_is_heard_in_every_state_on_the_topic_that_is_set(
    start, peer, robot, policy_file, commands, status
):
    start(policy_node={"policy": str(policy_file), "armed": True, "autostart": False})
    refused = set_parameter(peer, "emergency_stop_topic", "/cell/stop")
    assert refused.successful, refused.reason
    assert change_state(peer, "configure")
    button = says_stop(peer, "/cell/stop")
    peer.until(lambda: button.get_subscription_count() > 0, "the node listens there")
    assert peer.node.count_subscribers("/emergency_stop") == 0
    button.publish(Bool(data=True))  # inactive
    peer.until(
        lambda: "still says stop" in trigger(peer, "reset_emergency_stop").message, "it is heard"
    )
    assert change_state(peer, "activate")
    peer.until(lambda: "emergency stop: /cell/stop says so" in status(), "diagnostics say so")
    assert commands == []


def test_a_topic_that_cannot_be_is_refused_in_one_line(start, peer, policy_file):
    parameters = {"policy": str(policy_file), "emergency_stop_topic": "/not a topic"}
    node = start(policy_node=parameters)["policy_node"]
    peer.until(lambda: not node.running, "the end of the node")
    lines = node.log.read_text().splitlines()
    assert node.wait(60.0) == 2
    assert "Traceback (most recent call last):" not in lines
    assert any(line.startswith("error: emergency_stop_topic '/not a topic'") for line in lines)


def test_a_rival_on_the_command_topic_stops_it(start, peer, robot, policy_file, commands, status):
    start(policy_node={"policy": str(policy_file), "armed": True})
    peer.until(lambda: len(commands) >= 2, "commands")
    rival = peer.node.create_publisher(JointTrajectory, "/arm_controller/joint_trajectory", 1)
    peer.until(
        lambda: "another publisher is on /arm_controller/joint_trajectory: /peer" in status(),
        "diagnostics name the rival",
    )
    peer.until_quiet(commands, "silence beside the rival")
    held = len(commands)
    peer.node.destroy_publisher(rival)
    peer.until(lambda: len(commands) > held, "commands again")


def test_beside_a_rival_that_was_there_before_it_commands_nothing(
    start, peer, policy_file, commands, status
):
    """Not even until it looks around for the first time."""
    topic = "/arm_controller/joint_trajectory"
    rival = peer.node.create_publisher(JointTrajectory, topic, 1)
    Robot(peer)
    start(policy_node={"policy": str(policy_file), "armed": True})
    peer.until(lambda: f"another publisher is on {topic}: /peer" in status(), "its name")
    assert commands == []
    peer.node.destroy_publisher(rival)
    peer.until(lambda: commands, "commands")


@pytest.mark.parametrize(
    ("joints", "says"),
    [(NAMES[:7], "it has no panda_finger_joint1"), (NAMES, "it also needs panda_finger_joint2")],
)
def test_a_controller_of_other_joints_is_refused(
    start, peer, robot, policy_file, commands, status, joints, says
):
    peer.second_node("arm_controller").declare_parameter("joints", joints)
    start(policy_node={"policy": str(policy_file), "armed": True})
    peer.until(lambda: says in status(), "diagnostics name the joint")
    peer.until_quiet(commands, "silence")


def test_parameters_have_ranges_and_bad_changes_are_refused(start, peer, robot, policy_file):
    start(policy_node={"policy": str(policy_file)})
    names = ["soft_start_s", "joining", "armed"]
    described = peer.call(
        DescribeParameters,
        "/policy_node/describe_parameters",
        DescribeParameters.Request(names=names),
    ).descriptors
    assert all(d.description for d in described)
    assert described[0].floating_point_range[0].to_value == 60.0
    assert described[2].read_only
    for name, value, says in (
        ("soft_start_s", 61.0, "range"),
        ("noise", "randm", "did you mean 'random'"),
        ("joining", "crossfade", "only change while the node is unconfigured"),
        ("armed", True, "read-only"),
    ):
        result = set_parameter(peer, name, value)
        assert not result.successful
        assert says in result.reason.replace("read only", "read-only"), result.reason
    assert set_parameter(peer, "soft_start_s", 2.0).successful
    assert change_state(peer, "deactivate")
    assert change_state(peer, "cleanup")
    assert set_parameter(peer, "joining", "crossfade").successful
    assert change_state(peer, "configure")
    assert change_state(peer, "activate")


def test_a_recorded_inference_can_be_redone_exactly(start, peer, robot, policy_file):
    records = peer.listen(Float64MultiArray, "/policy_node/debug_inference")
    start(policy_node={"policy": str(policy_file), "debug": True, "noise": "random", "seed": 3})
    peer.until(lambda: len(records) >= 3, "three records")
    policy = OnnxPolicy(policy_file)
    for msg in records[:3]:
        stamp, arrays = debug_record(msg)
        chunk, noise = arrays.pop("action_chunk"), arrays.pop("noise")
        assert stamp > 1e18
        assert noise.std() > 0.5
        assert np.array_equal(policy.infer(arrays, noise), chunk)


def edited(source: Path, target: Path, **changes) -> None:
    """A copy of a policy whose spec says something else."""
    model = onnx.load(source)
    kept = [p for p in model.metadata_props if p.key != SEAL_KEY]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    for prop in model.metadata_props:
        if prop.key == METADATA_KEY:
            prop.value = json.dumps(json.loads(prop.value) | changes)
    target.write_bytes(seal(model.SerializeToString()))


def test_a_policy_file_is_replaced_while_the_node_runs(
    start, peer, robot, policy_file, commands, tmp_path
):
    served = tmp_path / "served.onnx"
    shutil.copy(policy_file, served)
    start(policy_node={"policy": str(served), "armed": True})
    peer.until(lambda: len(commands) >= 2, "commands")
    served.write_bytes(b"half a file")
    refused = trigger(peer, "reload")
    assert not refused.success
    assert "the old policy stays" in refused.message
    before = len(commands)
    peer.until(lambda: len(commands) > before, "commands of the old policy")
    edited(policy_file, served, control_dt=0.1)
    assert "control_dt is 0.1 in the new file" in trigger(peer, "reload").message
    edited(policy_file, served, algorithm="other")
    assert trigger(peer, "reload").success
    before = len(commands)
    peer.until(lambda: len(commands) >= before + 2, "commands of the new policy")


def test_the_node_serves_while_another_policy_is_loaded(
    start, peer, robot, policy_file, commands, tmp_path, monkeypatch
):
    """A file that this machine never saw is tried in a child process first: that takes a second or more."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    served = tmp_path / "served.onnx"
    shutil.copy(policy_file, served)
    start(policy_node={"policy": str(served), "armed": True, "joining": "ensemble"})
    client = peer.node.create_client(Trigger, "/policy_node/reload")
    peer.until(lambda: len(commands) >= 2 and client.service_is_ready(), "commands")
    edited(policy_file, served, algorithm="other")
    answer = client.call_async(Trigger.Request())
    second = client.call_async(Trigger.Request())
    peer.until(second.done, "the second answer")
    assert "under way already" in second.result().message
    assert not answer.done()  # the first one's would be there, if loading blocked the node
    peer.until(answer.done, "the answer")
    assert answer.result().success, answer.result().message
    before = len(commands)
    peer.until(lambda: len(commands) >= before + 2, "commands of the new policy")


def test_diagnostics_count_messages_and_limits(start, peer, robot, policy_file, facts):
    """Messages received, lost and used; chunks that go beyond a limit, by kind, as each inference says it."""
    planned = peer.listen(JointTrajectory, "/policy_node/planned_chunk")
    records = peer.listen(DiagnosticArray, "/policy_node/inference")
    start(policy_node={"policy": str(policy_file)})
    peer.until(lambda: int(facts().get("used of /joint_states", 0)) >= 3, "three used")
    told = facts()
    for topic in ("/joint_states", "/cube/pose"):
        assert int(told[f"received of {topic}"]) > int(told[f"used of {topic}"])
        assert told[f"lost of {topic}"].isdigit()
    peer.until(lambda: len(planned) >= int(told["used of /joint_states"]), "a chunk for each")
    assert {f"chunks beyond {kind}" for kind in KINDS} <= set(told)
    beyond = [next(p.value for p in m.status[0].values if p.key == "beyond") for m in records]
    assert "velocity" in beyond[0]  # of a soft start with a policy that learned next to nothing
    assert int(told["chunks beyond velocity"]) >= 1


def test_two_arms_are_told_apart_in_diagnostics(peer, policy_file, facts):
    rclpy.init(args=["--ros-args", "-p", f"policy:={policy_file}", "-r", "__ns:=/left"])
    node = PolicyNode()
    try:
        node.trigger_configure()

        def told() -> dict[str, str]:
            node._publish_status()  # nobody spins it
            return facts()

        peer.until(lambda: told().get("hardware") == "/left/panda", "its hardware")
        assert facts()["name"] == "/left/policy_node"
    finally:
        node.close()
        node.destroy_node()
        rclpy.shutdown()


def test_an_injected_delay_is_felt_and_warned_of(start, peer, robot, policy_file, status):
    records = peer.listen(DiagnosticArray, "/policy_node/inference")
    start(policy_node={"policy": str(policy_file), "inject_delay_s": 0.3})
    says = "every inference is delayed by 0.3 s on purpose"
    peer.until(lambda: len(records) >= 2 and says in status(), "a warning")
    took = lambda msg: float({p.key: p.value for p in msg.status[0].values}["inference_ms"])  # noqa: E731
    assert all(took(msg) >= 300 for msg in records)
    assert set_parameter(peer, "inject_delay_s", 0.0).successful
    before = len(records)
    peer.until(lambda: any(took(msg) < 300 for msg in records[before:]), "one without delay")
    peer.until(lambda: status() == "active, dry run", "no warning any more")


def test_best_effort_and_reliable_publishers_are_both_heard(start, peer, policy_file, status):
    best_effort = QoSProfile(depth=5, reliability=ReliabilityPolicy.BEST_EFFORT)
    Robot(peer, qos=best_effort)
    start(policy_node={"policy": str(policy_file)})
    peer.until(lambda: status().startswith("active"), "active")


def test_a_topic_of_another_type_is_named(start, peer, policy_file, status):
    peer.node.create_publisher(Bool, "/joint_states", 1)
    start(policy_node={"policy": str(policy_file)})
    peer.until(
        lambda: "/joint_states is published as std_msgs/msg/Bool" in status(), "diagnostics say so"
    )


def test_a_rivals_trajectory_is_not_cut_off(start, peer, robot, policy_file, commands, status):
    """Nor by the last words of the node."""
    node = start(policy_node={"policy": str(policy_file), "armed": True})["policy_node"]
    peer.until(lambda: len(commands) >= 2, "commands")
    rival = peer.node.create_publisher(JointTrajectory, "/arm_controller/joint_trajectory", 1)
    peer.until(lambda: "another publisher is on" in status(), "diagnostics name the rival")
    peer.spin(0.2)  # what was on its way
    mine = JointTrajectory(joint_names=commands[-1].joint_names, points=commands[-1].points[-1:])
    mine.points[0].positions[0] += 0.2
    mine.points[0].time_from_start.sec = 2
    before = len(commands)
    rival.publish(mine)
    peer.until(lambda: len(commands) > before, "the rival's command")
    node.signal(signal.SIGINT)
    peer.until(lambda: not node.running, "the end")
    peer.spin(0.3)
    assert len(commands) == before + 1

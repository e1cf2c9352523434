"""Faults between real processes: the simulation node injects them, the policy node must hold, say why, and come back.
After each: nothing outside the limits was sent."""

import signal
from array import array

import numpy as np
import pytest
from flow_policy_ros.reports import Reasons
from rcl_interfaces.msg import Parameter, ParameterType, ParameterValue
from rcl_interfaces.srv import SetParameters
from robot_peer import change_state
from sensor_msgs.msg import CameraInfo, Image, JointState

from flow_policy_rl.serving.robot import load_robot

PANDA = load_robot("panda")
JOINTS = tuple(PANDA.limits)
SIM = {"image_rate_hz": 0.0}


@pytest.fixture
def reference(peer):
    """What the simulated controller follows."""
    return peer.listen(JointState, "/arm_controller/reference", depth=2000)


@pytest.fixture(autouse=True)
def within_limits(commands):
    """Judges everything that was sent, when the test is over."""
    yield
    for msg in commands:
        names = tuple(msg.joint_names)
        speed = PANDA.limit_array(names, "velocity") * 1.001
        low, high = PANDA.limit_array(names, "position").T
        for point in msg.points:
            assert (np.abs(point.velocities) <= speed).all() if point.velocities else True
            assert (np.asarray(point.positions) >= low - 2e-3).all()
            assert (np.asarray(point.positions) <= high + 2e-3).all()
        assert not np.any(msg.points[-1].velocities)


def inject(peer, **values) -> None:
    """Change parameters of the simulation node."""
    kinds = {
        float: (ParameterType.PARAMETER_DOUBLE, "double_value"),
        str: (ParameterType.PARAMETER_STRING, "string_value"),
        bool: (ParameterType.PARAMETER_BOOL, "bool_value"),
    }
    parameters = []
    for name, value in values.items():
        number, key = kinds[type(value)]
        parameters.append(Parameter(name=name, value=ParameterValue(type=number, **{key: value})))
    request = SetParameters.Request(parameters=parameters)
    results = peer.call(SetParameters, "/sim_node/set_parameters", request).results
    assert all(r.successful for r in results), results


@pytest.fixture
def running(start, peer, policy_file, commands, status, reference):
    """Simulated arm and policy, under way."""
    nodes = start(
        sim_node=SIM,
        policy_node={
            "policy": str(policy_file),
            "armed": True,
            "use_sim_time": True,
            "max_limited_in_a_row": 0,  # it hardly learned: most of its plans are limited
        },
    )
    peer.until(lambda: len(commands) >= 2 and len(reference) >= 2, "an arm under way", 40.0)
    return nodes


FAULTS = {
    "publisher dies and returns": (
        {"fault_silent": True},
        {"fault_silent": False},
        "newest message is",
    ),
    "nan joint": (
        {"fault_nan_joint": "panda_joint3"},
        {"fault_nan_joint": ""},
        "not a finite number in panda_joint3",
    ),
    "joint renamed": (
        {"fault_renamed_joint": "panda_joint3"},
        {"fault_renamed_joint": ""},
        "lacks panda_joint3",
    ),
    "messages late": ({"fault_delay_s": 0.5}, {"fault_delay_s": 0.0}, "newest message is"),
    "messages lost": ({"fault_drop": 1.0}, {"fault_drop": 0.0}, "newest message is"),
}


@pytest.mark.parametrize(
    "fault",
    [
        "publisher dies and returns",
        *(pytest.param(f, marks=pytest.mark.slow) for f in list(FAULTS)[1:]),
    ],
)
def test_a_fault_means_hold_with_a_reason_then_recovery(running, peer, commands, status, fault):
    begin, end, says = FAULTS[fault]
    inject(peer, **begin)
    peer.until(lambda: "holding" in status() and says in status(), f"holding: {says}")
    inject(peer, **end)
    count = len(commands)
    peer.until(lambda: len(commands) >= count + 2, "commands again")
    peer.until(lambda: status().startswith("active"), "active")


@pytest.mark.slow
def test_loss_jitter_and_reordering_are_ridden_out(running, peer, commands, status):
    inject(peer, fault_drop=0.3, fault_jitter_s=0.05, fault_command_drop=0.2, fault_noise=0.002)
    count = len(commands)
    peer.until(lambda: len(commands) >= count + 6, "commands in spite of it")


@pytest.mark.slow
def test_a_frozen_camera_is_noticed(start, peer, commands, status, reference, tmp_path):
    from flow_policy_rl.bench.ros import fresh_policy
    from sim.tasks import make_task

    policy = fresh_policy(tmp_path / "image.onnx", images=True)
    infos, images = (
        peer.listen(CameraInfo, "/front/camera_info"),
        peer.listen(Image, "/front/image_raw"),
    )
    free = {"max_start_distance": 10.0, "max_limited_in_a_row": 0, "max_tracking_error": 0.0}
    start(
        sim_node={"image_rate_hz": 20.0},
        policy_node={"policy": str(policy), "armed": True, "use_sim_time": True, **free},
    )
    peer.until(lambda: len(commands) >= 3, "commands of a policy that sees", 40.0)
    peer.until(lambda: infos and images, "what it sees")
    assert infos[-1].height == images[-1].height == 96
    fovy = np.radians(make_task("lift", cameras=True).world.model.camera("front").fovy[0])
    assert infos[-1].k[4] == pytest.approx(48 / np.tan(fovy / 2))
    inject(peer, fault_frozen_camera=True)
    peer.until(
        lambda: "/front/image_raw: newest message is" in status(), "diagnostics name the camera"
    )
    inject(peer, fault_frozen_camera=False)
    count = len(commands)
    peer.until(lambda: len(commands) > count, "commands again")


@pytest.mark.slow
def test_a_killed_policy_leaves_an_arm_that_comes_to_rest(running, peer, reference):
    running["policy_node"].kill()
    peer.spin(1.5)
    assert not np.any(reference[-1].velocity)
    assert reference[-1].position == reference[-2].position


@pytest.mark.slow
def test_two_policies_at_once_both_stop_and_name_each_other(
    running, start, peer, policy_file, commands, status
):
    other = start(policy_node={"policy": str(policy_file), "armed": True, "use_sim_time": True})
    peer.until(lambda: "another publisher is on" in status(), "diagnostics say so", 40.0)
    peer.until_quiet(commands, "silence of both")
    count = len(commands)
    other["policy_node"].kill()
    peer.until(lambda: len(commands) > count, "the first goes on", 60.0)


@pytest.mark.slow
def test_a_flood_of_joint_states_changes_nothing(
    start, peer, policy_file, commands, status, reference
):
    start(
        sim_node={**SIM, "state_rate_hz": 1000.0},
        policy_node={"policy": str(policy_file), "armed": True, "use_sim_time": True},
    )
    peer.until(lambda: len(commands) >= 6, "commands", 60.0)
    assert "holding" not in status()


@pytest.mark.slow
def test_a_simulation_that_restarts_is_survived(running, start, peer, commands, status):
    """Controller, clock and robot go away together, and come back at time zero with the arm elsewhere."""
    running["sim_node"].kill()
    peer.until(lambda: "holding" in status(), "holding")
    start(sim_node=SIM)
    said = "from where it was commanded to be"
    peer.until(
        lambda: said in status() or status().startswith("active"), "recovered, or said why", 40.0
    )
    if said in status():
        assert change_state(peer, "deactivate")
        assert change_state(peer, "activate")
    count = len(commands)
    peer.until(lambda: len(commands) > count, "commands again")


def test_the_log_says_why_it_holds_now_and_that_it_goes_on(start, peer, policy_file, status):
    """Where deploy was started: what it said at first, before there was a robot, is not what keeps it later."""
    parameters = {"policy": str(policy_file), "use_sim_time": True}
    log = start(policy_node=parameters)["policy_node"].log
    peer.until(lambda: "holding: no message on any input" in log.read_text(), "no robot")
    start(sim_node=SIM | {"fault_renamed_joint": "panda_joint3"})
    peer.until(lambda: "holding: /joint_states: joint state lacks" in log.read_text(), "its reason")
    inject(peer, fault_renamed_joint="")
    peer.until(lambda: "holding no longer" in log.read_text(), "the end")
    assert log.read_text().count("holding: ") < 8


def test_a_reason_is_news_once_whatever_its_numbers():
    reasons = Reasons()
    silent, lacks = "no message for {:.1f} s", "/joint_states lacks joint{}"
    assert reasons.news(silent.format(1), 0.0, begins=True)
    assert not reasons.news(silent.format(2.5), 2.5, begins=False)
    assert reasons.news(lacks.format(3), 3.0, begins=False)
    assert not reasons.news(silent.format(0.1), 3.5, begins=False)  # to and fro
    assert reasons.news(lacks.format(4), 4.5, begins=False)  # another joint
    assert reasons.news(lacks.format(4), 4.6, begins=True)


@pytest.mark.parametrize(
    ("parameters", "until"),
    [
        ({"autostart": False}, None),
        pytest.param({}, "holding", marks=pytest.mark.slow),
        pytest.param({}, "at once", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_it_in_any_state(start, peer, policy_file, status, parameters, until, number):
    """Unconfigured, holding for lack of input, and while it starts."""
    nodes = start(policy_node={"policy": str(policy_file), "armed": True, **parameters})
    if until == "at once":
        peer.spin(1.0)
    else:
        peer.until(lambda: (until or "not configured") in status(), "its state")
    nodes["policy_node"].signal(number)
    peer.until(lambda: not nodes["policy_node"].running, "the end of the node")
    assert nodes["policy_node"].wait(60.0) in ((0, 1, 130, -number) if until == "at once" else (0,))
    if until != "at once":  # before its handlers are there, Python itself ends it
        assert "Traceback" not in nodes["policy_node"].log.read_text()


@pytest.mark.slow
def test_past_stamps_partial_joints_and_bad_trajectories_at_the_simulated_controller(
    start, peer, reference, commands
):
    """As joint_trajectory_controller: what is illegal is dropped whole, and the arm stays."""
    from builtin_interfaces.msg import Duration
    from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

    nodes = start(sim_node=SIM)
    publisher = peer.node.create_publisher(JointTrajectory, "/arm_controller/joint_trajectory", 5)
    peer.until(lambda: publisher.get_subscription_count() and len(reference) > 5, "the controller")
    home = list(reference[-1].position)

    def send(names, positions, second=1):
        point = JointTrajectoryPoint(time_from_start=Duration(sec=second))
        point.positions = array("d", positions)
        publisher.publish(JointTrajectory(joint_names=list(names), points=[point]))

    send(JOINTS[:3], home[:3])
    send((*JOINTS[:7], "thumb"), home)
    peer.until(
        lambda: nodes["sim_node"].log.read_text().count("trajectory rejected") == 2, "both dropped"
    )
    assert list(reference[-1].position) == home
    send(
        reversed(JOINTS),
        [
            home[0] + 0.1 if n == JOINTS[0] else h
            for n, h in zip(reversed(JOINTS), reversed(home), strict=True)
        ],
    )
    peer.until(lambda: abs(reference[-1].position[0] - home[0] - 0.1) < 1e-6, "the move")
    commands.clear()  # these were the test's own

"""Simulated arm, policy, recorder and episode runner as separate processes; the bag must tell the truth."""

import json
import re
import signal
import subprocess
from importlib import resources

import numpy as np
import pytest
from builtin_interfaces.msg import Duration
from geometry_msgs.msg import PoseStamped
from rcl_interfaces.srv import GetParameters
from robot_peer import HOME, NAMES, Robot
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import Image
from std_msgs.msg import Bool
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from flow_policy_rl import replay
from flow_policy_rl.data.bags import deserialize, read_bag
from flow_policy_rl.ros import node_command, task_options
from flow_policy_rl.serving.decode import decode, stamp_ns
from flow_policy_rl.serving.onnx_policy import OnnxPolicy
from sim.tasks import make_task
from sim.vec_env import VecEnv

COMMAND = "/arm_controller/joint_trajectory"


@pytest.fixture
def run(start, policy_file, tmp_path):
    """Two short episodes over ROS; returns the runner's file and the bag."""
    nodes = start(
        recorder={"bag": str(tmp_path / "bag")},
        sim_node={
            "real_time_factor": 4.0,
            "state_rate_hz": 20.0,
            "image_rate_hz": 2.0,
            "first_seed": 77,
        },
        policy_node={"policy": str(policy_file), "armed": True, "use_sim_time": True},
        episode_runner={"episodes": 2, "out": str(tmp_path / "episodes.json")},
    )
    assert nodes["episode_runner"].wait(300.0) == 0, nodes["episode_runner"].log.read_text()
    for name in ("recorder", "sim_node", "policy_node"):
        nodes[name].signal(2)
    for name in ("recorder", "sim_node", "policy_node"):
        assert nodes[name].wait(60.0) == 0, nodes[name].log.read_text()
    assert "waiting for commands on /" in nodes["sim_node"].log.read_text()
    assert re.search(r"recorded [1-9]\d+ messages", nodes["recorder"].log.read_text())
    assert re.search(r"\d of 2 succeeded: .*episodes.json", nodes["episode_runner"].log.read_text())
    return json.loads((tmp_path / "episodes.json").read_text()), tmp_path / "bag"


def test_chain_over_ros(run, policy_file, tmp_path):
    result, bag = run
    assert [e["seed"] for e in result["episodes"]] == [77, 78]
    assert len(result["end_to_end_s"]) > 3
    assert min(result["end_to_end_s"]) > 0

    messages = list(read_bag(bag))
    topics = {m.topic for m in messages}
    assert {
        "/joint_states",
        "/cube/pose",
        "/clock",
        "/front/image_raw",
        "/sim_node/success",
    } <= topics

    # What the node planned is what the policy computes from the recorded observations, bit for bit in float32.
    policy = OnnxPolicy(policy_file)
    by_stamp: dict[str, dict[int, object]] = {}
    for m in messages:
        if m.topic in ("/joint_states", "/cube/pose"):
            msg = deserialize(m)
            by_stamp.setdefault(m.topic, {})[stamp_ns(msg)] = msg
    compared = 0
    for m in messages:
        if m.topic != "/policy_node/planned_chunk":
            continue
        planned = deserialize(m)
        at = stamp_ns(planned)
        if at not in by_stamp["/joint_states"] or at not in by_stamp["/cube/pose"]:
            continue
        obs = {
            f.name: decode(f, by_stamp["/cube/pose" if f.kind == "pose" else "/joint_states"][at])[
                None
            ]
            for f in policy.spec.observations
        }
        chunk = policy.infer(obs, np.zeros((1, *policy.chunk_shape), np.float32))[0]
        assert np.allclose([p.positions for p in planned.points], chunk, atol=1e-6)
        compared += 1
    assert compared > 3

    # The images show the scene.
    images = [deserialize(m) for m in messages if m.topic == "/front/image_raw"]
    assert images[0].height == 96
    assert np.asarray(images[0].data).std() > 10

    # Trajectories are legal for a joint_trajectory_controller.
    for m in messages:
        if m.topic == "/arm_controller/joint_trajectory":
            trajectory = deserialize(m)
            times = [
                p.time_from_start.sec + p.time_from_start.nanosec * 1e-9 for p in trajectory.points
            ]
            assert times[0] > 0
            assert (np.diff(times) > 0).all()
            assert trajectory.header.stamp.sec == trajectory.header.stamp.nanosec == 0
            assert not np.any(trajectory.points[-1].velocities)

    replayed = replay.main(replay.Config(bag=bag, policy=policy_file, out=tmp_path / "replay"))
    assert replayed["compared_chunks"] > 3
    assert 0 < replayed["mae"] < 0.5
    assert (tmp_path / "replay" / "report.html").stat().st_size > 1e6


SILENT = {"image_rate_hz": 0.0}
SLOW_SIM = {"real_time_factor": 2.0, "first_seed": 77, **SILENT}


def test_a_stop_of_its_own_costs_the_episode_and_not_the_run(
    start, policy_file, weak_robot, tmp_path
):
    """A robot that hardly moves: every plan has to be limited."""
    out = tmp_path / "episodes.json"
    nodes = start(
        sim_node=SLOW_SIM,
        policy_node={
            "policy": str(policy_file),
            "armed": True,
            "use_sim_time": True,
            "robot": str(weak_robot),
            "max_limited_in_a_row": 2,
        },
        episode_runner={"episodes": 2, "out": str(out)},
    )
    assert nodes["episode_runner"].wait(300.0) == 0, nodes["episode_runner"].log.read_text()
    episodes = json.loads(out.read_text())["episodes"]
    assert [e["emergency_stop"] for e in episodes] == ["2 plans in a row had to be limited"] * 2
    assert not any(e["success"] for e in episodes)


def test_a_stop_that_somebody_asked_for_ends_the_run_and_stays(
    start, peer, commands, policy_file, status, tmp_path
):
    """What is finished is kept."""
    out = tmp_path / "episodes.json"
    nodes = start(
        sim_node=SLOW_SIM,
        policy_node={"policy": str(policy_file), "armed": True, "use_sim_time": True},
        episode_runner={"episodes": 500, "out": str(out)},
    )
    finished = out.with_suffix(".partial")
    peer.until(finished.exists, "the first episode")
    assert peer.call(Trigger, "/policy_node/emergency_stop", Trigger.Request()).success
    assert nodes["episode_runner"].wait(60.0) == 1
    log = nodes["episode_runner"].log.read_text()
    assert "requested by service; call /policy_node/reset_emergency_stop" in log
    assert "Traceback" not in log
    assert json.loads(finished.read_text())["episodes"][0]["seed"] == 77
    assert not out.exists()
    peer.until_quiet(commands, "an arm that is stopped")
    assert "emergency stop: requested by service" in status()


def test_no_episode_begins_before_the_policy_node_has_found_the_robot(
    start, peer, policy_file, status, tmp_path
):
    resets = []

    def reset(request, response):
        resets.append(request)
        response.success, response.message = True, json.dumps({"episode": 0, "seed": 77})
        return response

    robot = Robot(peer, listens=False)
    peer.node.create_service(Trigger, "/sim_node/reset", reset)
    start(
        policy_node={"policy": str(policy_file), "armed": True},
        episode_runner={"episodes": 1, "out": str(tmp_path / "episodes.json")},
    )
    peer.until(lambda: "nobody listens" in status(), "its obstacle")
    peer.spin(3.0)
    assert not resets
    robot.listen()
    peer.until(lambda: resets, "the first episode")


@pytest.mark.parametrize("options", [{}, {"randomness": "med"}])
def test_the_simulation_starts_as_the_batched_one_with_the_task_s_options(start, peer, options):
    seen = peer.listen(PoseStamped, "/leg/pose")
    start(sim_node={"task": "one_leg", "first_seed": 77, **SILENT, **task_options(options)})
    peer.until(lambda: seen, "the pose of the leg")
    there = VecEnv(make_task("one_leg", **options), 1).reset([77])["leg_pose"][0, :2]
    here = seen[0].pose.position
    assert [here.x, here.y] == pytest.approx(there.tolist(), abs=1e-3)


def test_rates_that_do_not_divide_change_neither_the_time_limit_nor_whether_there_are_images(
    start, peer
):
    clock = peer.listen(Clock, "/clock", depth=1)
    images = peer.listen(Image, "/front/image_raw")
    ended = peer.listen(Bool, "/sim_node/success")
    rates = {"state_rate_hz": 12.5, "image_rate_hz": 50.0, "image_size": 16}
    start(sim_node={"task": "lift", "real_time_factor": 4.0, **rates})
    commands = peer.node.create_publisher(JointTrajectory, COMMAND, 1)
    peer.until(lambda: clock and commands.get_subscription_count() and images, "images")
    point = JointTrajectoryPoint(positions=HOME[:7], time_from_start=Duration(sec=1))
    commands.publish(JointTrajectory(joint_names=NAMES[:7], points=[point]))
    begun = stamp(clock)
    peer.until(lambda: ended, "the time limit")
    task = make_task("lift")
    limit = task.episode_steps * task.control_dt
    assert not ended[0].data
    assert abs(stamp(clock) - begun - limit) < 0.1 * limit


def stamp(clock: list[Clock]) -> float:
    """The newest simulated second."""
    return clock[-1].clock.sec + clock[-1].clock.nanosec * 1e-9


def test_the_demonstrator_plays_the_task_on_the_robot_that_is_simulated(start):
    task = {"task": "reach", "robot": "ur5e", "task_options": "reward dense"}
    start(sim_node={**task, **SILENT, "real_time_factor": 4.0})
    demonstrator = start(demonstrator={**task, "episodes": 2})["demonstrator"]
    assert demonstrator.wait(120.0) == 0
    said = demonstrator.log.read_text().splitlines()
    assert said == ["episode 1/2 success", "episode 2/2 success"]
    other = start(demonstrator={"task": "reach", "robot": "ur5e"})["demonstrator"]
    assert other.wait(60.0) == 2
    assert other.log.read_text().splitlines() == [
        "error: sim_node has task 'reach' on ur5e with reward dense, "
        "this node task 'reach' on ur5e with its defaults: give both the same"
    ]


def test_a_demonstrator_that_is_not_heard_says_so(start, tmp_path):
    elsewhere = tmp_path / "ur5e.yaml"
    text = (resources.files("robots") / "ur5e.yaml").read_text()
    elsewhere.write_text(text.replace("  command: /", "  command: /elsewhere/"))
    start(sim_node={"task": "reach", "robot": "ur5e", **SILENT, "real_time_factor": 10.0})
    deaf = start(demonstrator={"task": "reach", "robot": str(elsewhere)})["demonstrator"]
    assert deaf.wait(120.0) == 1
    (line,) = deaf.log.read_text().splitlines()
    assert line.startswith("error: episode 1 should end after")
    assert "does sim_node hear commands on /elsewhere/" in line


def test_names_given_to_the_process_do_not_rename_the_controller(peer, tmp_path):
    """`ros2 launch` names the node and its namespace for the whole process, and the controller is in it."""
    command = [*node_command("sim_node", {"image_rate_hz": 0.0}), "-r", "__node:=robot"]
    command += ["-r", "__ns:=/left", "-r", f"{COMMAND}:=/left{COMMAND}"]
    with (tmp_path / "sim.log").open("wb") as log:
        child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        request = GetParameters.Request(names=["joints"])
        answer = peer.call(GetParameters, "/left/arm_controller/get_parameters", request)
        assert len(answer.values[0].string_array_value) == 8
        peer.until(lambda: peer.node.count_subscribers(f"/left{COMMAND}") == 1, "the controller")
        assert peer.node.count_subscribers(COMMAND) == 0
    finally:
        child.send_signal(signal.SIGINT)
        assert child.wait(60.0) == 0

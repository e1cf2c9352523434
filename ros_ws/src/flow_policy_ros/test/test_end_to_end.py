"""Simulated arm, policy, recorder and episode runner as separate processes; the bag must tell the truth."""

import json

import numpy as np
import pytest

from flow_policy_rl import replay
from flow_policy_rl.data.bags import deserialize, read_bag
from flow_policy_rl.serving.decode import decode, stamp_ns
from flow_policy_rl.serving.onnx_policy import OnnxPolicy


@pytest.fixture
def run(start, policy_file, tmp_path):
    """Two short episodes over ROS; returns the runner's file and the bag."""
    nodes = start(
        recorder={"bag": str(tmp_path / "bag")},
        sim_node={
            "real_time_factor": 8.0,
            "state_rate_hz": 20.0,
            "image_rate_hz": 2.0,
            "first_seed": 77,
        },
        policy_node={"policy": str(policy_file), "armed": True, "use_sim_time": True},
        episode_runner={"episodes": 2, "out": str(tmp_path / "episodes.json")},
    )
    assert nodes["episode_runner"].wait(90.0) == 0, nodes["episode_runner"].log.read_text()
    for name in ("recorder", "sim_node", "policy_node"):
        nodes[name].signal(2)
    for name in ("recorder", "sim_node", "policy_node"):
        assert nodes[name].wait(10.0) == 0, nodes[name].log.read_text()
    return json.loads((tmp_path / "episodes.json").read_text()), tmp_path / "bag"


def test_chain_over_ros(run, policy_file, tmp_path):
    result, bag = run
    assert [e["seed"] for e in result["episodes"]] == [77, 78]
    # A policy that is hardly trained trips the latched stop; that costs the episode and not the run.
    assert all("in a row had to be limited" in e["emergency_stop"] for e in result["episodes"])
    assert not any(e["success"] for e in result["episodes"])
    assert len(result["end_to_end_s"]) > 10
    assert 0 < np.median(result["end_to_end_s"]) < 0.5

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
    assert compared > 10

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
    assert replayed["compared_chunks"] > 5
    assert 0 < replayed["mae"] < 0.5
    assert (tmp_path / "replay" / "report.html").stat().st_size > 1e6

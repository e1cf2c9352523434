"""A bag played into the real node: it plans what the replay without ROS predicts."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[4] / "tests"))
from bag_toys import ROBOT, recorded, write
from onnx_toys import holding_policy
from toys import small_spec

from flow_policy_rl import replay
from flow_policy_rl.data.bags import BagWriter


def test_the_node_plans_what_the_replay_predicts(tmp_path):
    (tmp_path / "robot.yaml").write_text(ROBOT)
    fields = small_spec().observations
    fields = [replace(f, mean=(0.0,) * f.size, std=(1.0,) * f.size) for f in fields]
    spec = small_spec(robot="toy", observations=tuple(fields))
    policy = holding_policy(tmp_path / "policy.onnx", spec)
    write(tmp_path / "bag", recorded(4.0))
    config = replay.Config(
        bag=tmp_path / "bag",
        policy=policy,
        out=tmp_path / "out",
        robot=str(tmp_path / "robot.yaml"),
        mode="graph",
    )
    judged = replay.judge(config, policy)
    assert len(judged.chunks) > 4
    error = np.abs(judged.chunks - judged.recording.measured[:, None]).max(axis=(1, 2))
    assert np.median(error) < 1e-6
    assert np.quantile(error, 0.75) < 0.05
    # Streams that overtake one another on a busy machine: an older state, of the last half second at most.
    apart = np.abs(judged.chunks[:, None] - judged.recording.measured[:, None]).max(axis=(2, 3))
    rows = np.arange(len(apart))  # 12 a second
    age = rows[:, None] - rows
    assert np.where((age >= 0) & (age <= 6), apart, np.inf).min(axis=1).max() < 0.05
    assert (
        judged.numbers["graph"]["compared_with_the_bag"] >= 0.8 * judged.numbers["graph"]["planned"]
    )
    assert judged.numbers["stages_ms"]["inference"]["p50"] > 0
    assert judged.numbers["mae"] is not None


def test_wrong_parameters_of_the_player_say_so(start, tmp_path):
    writer = BagWriter(tmp_path / "bag")
    writer.add_topic("/numbers", "std_msgs/msg/Float64")
    writer.write("/numbers", 1, b"\x00\x01\x00\x00" + bytes(8))
    writer.close()
    for parameters, says in {
        (("bag", str(tmp_path / "none")), ("topics", "/a=/a")): "does not exist",
        (("bag", str(tmp_path / "bag")), ("topics", "/a=/a")): "is not in the bag",
        (("bag", str(tmp_path / "bag")), ("topics", "/a")): "must be BAG_TOPIC=TOPIC pairs",
    }.items():
        nodes = start(player=dict(parameters))
        assert nodes["player"].wait(60.0) == 2
        assert says in nodes["player"].log.read_text()

"""From a recorded robot to a policy: teleoperation-like episodes over ROS, converted, learned, replayed."""

import signal

import pytest

from flow_policy_rl import checkpoint, convert, export, replay, train, train_config
from flow_policy_rl.algorithms.bc import BCConfig
from flow_policy_rl.policy import NetworkConfig


@pytest.mark.slow
@pytest.mark.parametrize("output", ["demos.hdf5", "lerobot"])
def test_record_convert_train_replay(start, peer, tmp_path, output):
    """The policy that learned from the recording predicts it better than holding still or repeating does."""
    nodes = start(
        recorder={"bag": str(tmp_path / "bag")},
        sim_node={"task": "lift", "first_seed": 300, "image_rate_hz": 0.0, "real_time_factor": 2.0},
    )
    listens = lambda: peer.node.count_subscribers("/joint_states")  # noqa: E731
    peer.until(listens, "a recorder that has found the arm")
    demonstrator = start(demonstrator={"task": "lift", "episodes": 12})["demonstrator"]
    assert demonstrator.wait(300.0) == 0, demonstrator.log.read_text()
    nodes["recorder"].signal(signal.SIGINT)
    assert nodes["recorder"].wait(60.0) == 0

    ends = convert.Splitting(end_topic="/sim_node/success", only_success=True)
    made = convert.main(
        convert.Config(tmp_path / "bag", tmp_path / output, task="lift", splitting=ends)
    )
    assert made["episodes"] >= 9
    assert made["problems"] == []

    config = train_config.TrainBC(
        task="lift",
        demos=tmp_path / output,
        run_dir=tmp_path / "run",
        network=NetworkConfig(width=128, depth=2),
        bc=BCConfig(num_steps=1200),
    )
    policy = checkpoint.load(train.main(config)["checkpoint"])
    export.export_policy(policy, tmp_path / "policy.onnx")
    result = replay.main(
        replay.Config(
            bag=tmp_path / "bag", policy=tmp_path / "policy.onnx", out=tmp_path / "replay"
        )
    )
    assert result["beats_baselines"]
    assert result["wiring_errors"] == 0
    assert result["mae"] < 0.5 * min(result["mae_hold"], result["mae_copy_last"])

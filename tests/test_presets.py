"""Presets: what their settings are for."""

import pytest

from flow_policy_rl import cli


@pytest.mark.parametrize("task", ["lift", "insert", "hopper"])
def test_the_control_explores_as_score_flow_does_from_a_checkpoint(task):
    """A Gaussian with other noise than its flow compares the noise."""
    flags = ["--task", task, "--checkpoint", "policy.safetensors"]
    _, control = cli.parse_train(["gaussian_ppo", *flags], None)
    _, flow = cli.parse_train(["score_flow", *flags], None)
    assert control.ppo == flow.ppo
    for bound in ("sigma_min", "sigma_max"):
        assert getattr(control.gaussian, bound) == getattr(flow.score_flow, bound)


def test_a_walker_that_learns_from_nothing_explores_widely(tmp_path):
    _, pretrained = cli.parse_train(
        ["gaussian_ppo", "--task", "hopper", "--checkpoint", "policy.safetensors"], None
    )
    _, scratch = cli.parse_train(["gaussian_ppo", "--task", "hopper"], None)
    assert scratch.gaussian.sigma_min >= 2 * pretrained.gaussian.sigma_min
    assert scratch.gaussian.sigma_max >= 2 * pretrained.gaussian.sigma_max
    settings = tmp_path / "settings.yaml"  # a file decides as flags do
    settings.write_text("task: hopper\ncheckpoint: policy.safetensors\n")
    assert cli.parse_train(["gaussian_ppo"], settings)[1] == pretrained

"""`flow-policy bench sim` measures what it says, on a batch small enough for a test."""

import json

import pytest

from flow_policy_rl import cli

KEYS = {
    "task", "num_envs", "num_threads", "env_steps_per_s", "raw_rollout_env_steps_per_s",
    "gymnasium_sync_env_steps_per_s", "gymnasium_async_env_steps_per_s", "ratio_to_raw",
    "ratio_to_gymnasium", "peak_memory_mb",
}  # fmt: skip


def run(capsys, *flags: str) -> dict:
    assert cli.main(["bench", "sim", "--num-envs", "4", "--repeats", "2", "--json", *flags]) == 0
    return json.loads(capsys.readouterr().out)


def test_manipulation_with_cameras(capsys):
    result = run(capsys, "--task", "lift", "--cameras")
    assert set(result) >= KEYS | {"frames_per_s"}
    assert result["ratio_to_gymnasium"] is None
    assert result["env_steps_per_s"] > 0
    assert result["frames_per_s"] > 0


@pytest.mark.slow
def test_locomotion_against_gymnasium_and_growth(capsys, tmp_path):
    page = tmp_path / "growth.html"
    result = run(capsys, "--task", "hopper", "--growth", "--out", str(page))
    assert result["ratio_to_gymnasium"] > 0
    assert {row["num_envs"] for row in result["growth"]} == {1, 4, 16, 64, 256, 1024, 4096}
    assert "raw mujoco.rollout" in page.read_text()


def test_bad_input(capsys):
    assert cli.main(["bench", "sim", "--num-envs", "0"]) == 2
    assert "--num-envs" in capsys.readouterr().err
    assert cli.main(["bench", "sim", "--task", "hopper", "--robosuite", "--no-gymnasium"]) == 2
    assert "task lift" in capsys.readouterr().err

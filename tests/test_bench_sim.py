"""`flow-policy bench sim` measures what it says, on a batch small enough for a test."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from toys import documented

from flow_policy_rl import cli
from flow_policy_rl.bench import sim

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
    assert set(result) == documented("bench sim", "--cameras") >= KEYS | {"frames_per_s"}
    assert result["ratio_to_gymnasium"] is None
    assert result["env_steps_per_s"] > 0
    assert result["frames_per_s"] > 0


@pytest.mark.slow
def test_locomotion_against_gymnasium_and_growth(capsys, tmp_path):
    page = tmp_path / "growth.html"
    result = run(capsys, "--task", "hopper", "--growth", "--out", str(page))
    assert all(Path(svg).is_file() for svg in result["svg"])
    assert 0 < result["ratio_to_gymnasium"] < result["raw_ratio_to_gymnasium"] * 1.5
    assert {row["num_envs"] for row in result["growth"]} == {1, 4, 16, 64, 256, 1024, 4096}
    assert page.is_file()


def test_randomised_worlds_are_compared_with_the_nominal_one(capsys):
    result = run(capsys, "--task", "reach", "--randomize", "mild")
    assert set(result) == documented("bench sim", "--randomize")
    assert set(result) >= KEYS | {"nominal_env_steps_per_cpu_s", "ratio_to_nominal_per_cpu_s"}
    assert "nominal_env_steps_per_s" not in run(capsys, "--task", "reach")


def test_growth_is_drawn(tmp_path):
    rates = [who + key for who in ("", "raw_rollout_") for key in sim.GROWTH]
    rows = [
        {"num_envs": n, "num_threads": t} | dict.fromkeys(rates, 100.0 * n * t)
        for t in (1, 2)
        for n in (1, 64, 4096)
    ]
    page = tmp_path / "deep" / "growth.html"
    drawn = sim.plot(page, "hopper", rows)
    assert "raw mujoco.rollout" in page.read_text()
    for svg, of_what in zip(drawn, ("by the clock", "of CPU time"), strict=True):
        words = [e.text for e in ElementTree.parse(svg).iter() if e.text and e.text.strip()]
        assert {"1", "64", "4,096", "ours, 1 thread", "raw, 2 threads"} <= set(words)
        assert any(of_what in word and "load" in word for word in words)


def test_bad_input(capsys):
    assert cli.main(["bench", "sim", "--num-envs", "0"]) == 2
    assert "--num-envs" in capsys.readouterr().err
    assert cli.main(["bench", "sim", "--num-threads", "-1"]) == 2
    assert "--num-threads must be at least 0, not -1" in capsys.readouterr().err
    assert cli.main(["bench", "sim", "--task", "hopper", "--robosuite", "--no-gymnasium"]) == 2
    assert "task lift" in capsys.readouterr().err

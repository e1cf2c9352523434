"""Several processes: they do what one does, and say who is missing."""

import os
import socket
import subprocess
import sys

import pytest
import torch
from toys import ROOT
from training_toys import untrained, weights

from flow_policy_rl.logger import read_metrics


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def launch(arguments: list[str], rank: int, processes: int, port: int) -> subprocess.Popen:
    """What torchrun does for one process."""
    environment = os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    return subprocess.Popen(
        [sys.executable, "-m", "flow_policy_rl.cli", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


COMMON = "--task hopper --time-limit 60 --eval-every 9 --eval-episodes 3 --device cpu --json"
SCRATCH_FLAGS = "--scratch.num-flow-steps 2 --scratch.network.width 16 --scratch.network.depth 2"
SEVERAL = {
    # 90 minibatches of 96 chunks: of most of them a process has no row
    "fpo": (
        f"{SCRATCH_FLAGS} --ppo.num-iterations 2 --ppo.num-envs 4 --ppo.num-steps 24 --ppo.num-epochs 1 "
        "--ppo.num-minibatches 90 --ppo.critic-warmup 0 --ppo.value-width 16 --ppo.value-depth 2 "
        "--ppo.actor-learning-rate 1e-5 --ppo.critic-learning-rate 1e-4",
        ("rollout/return", "train/value_loss", "train/approx_kl"),
    ),
    "fpo_plus_plus": (
        f"{SCRATCH_FLAGS} --ppo.num-iterations 3 --ppo.num-envs 4 --ppo.num-steps 24 --ppo.num-epochs 2 "
        "--ppo.num-minibatches 3 --ppo.critic-warmup 0 --ppo.scale-rewards --ppo.value-width 16 --ppo.value-depth 2",
        ("rollout/return", "train/policy_loss", "train/value_loss", "train/approx_kl"),
    ),
    "rldt": (
        "--rldt.num-iterations 3 --rldt.num-envs 4 --rldt.num-steps 24 --rldt.num-blocks 3 "
        "--rldt.segments-per-block 8 --rldt.critic-steps 2 --rldt.actor-share 0.5 --rldt.critic-warmup 1 "
        "--rldt.critic.width 16 --rldt.critic.depth 2 --rldt.actor-learning-rate 0.01 --rldt.actor-warmup-steps 1",
        ("rollout/return", "train/critic_loss", "train/transport_loss", "train/q_bias"),
    ),
}


@pytest.mark.parametrize("algorithm", SEVERAL)
def test_two_processes_do_what_one_does_with_as_many_environments(algorithm, tmp_path):
    """Gradients, advantages, normalisers, replay and batches are those of all environments, up to rounding."""
    settings, watched = SEVERAL[algorithm]
    flags = ["train", algorithm, *COMMON.split(), *settings.split()]
    if algorithm == "rldt":
        flags += ["--checkpoint", str(untrained(tmp_path))]
    port = free_port()
    runs = [launch([*flags, "--run-dir", str(tmp_path / "two")], r, 2, port) for r in range(2)]
    one = launch([*flags, "--run-dir", str(tmp_path / "one")], 0, 1, port)
    for run in [*runs, one]:
        _, err = run.communicate(timeout=300)
        assert run.returncode == 0, err
    a, b = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, value in a.items():
        assert torch.allclose(value, b[name], atol=2e-4), name
    one_row, two_row = (read_metrics(tmp_path / run / "metrics.csv")[-1] for run in ("one", "two"))
    for name in ("rollout/env_steps", "rollout/episodes"):
        assert one_row[name] == two_row[name]
    for name in ("eval/return", *watched):
        assert one_row[name] == pytest.approx(two_row[name], rel=0.02, abs=1e-4), name
    assert (tmp_path / "two" / "state-1.safetensors").is_file()


def test_an_unreachable_peer_is_one_clear_line():
    flags = ["train", "fpo", "--task", "hopper", "--peer-timeout-s", "2", "--json"]
    run = launch(flags, 1, 2, free_port())
    _, err = run.communicate(timeout=120)
    assert run.returncode == 2
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "process 1 of 2 cannot reach the others at 127.0.0.1:" in lines[0]
    assert "Traceback" not in err

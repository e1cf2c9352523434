"""`flow-policy collect`: who demonstrates, what is kept, what is written down."""

import dataclasses
import json
import shlex
import signal
from pathlib import Path

import numpy as np
import pytest
import tyro
from toys import small_policy

from flow_policy_rl import (
    checkpoint,
    cli,
    collect,
    demo_stages,
    evaluate,
    evaluation_report,
    export_command,
    train,
    train_config,
)
from flow_policy_rl.algorithms.bc import BCConfig
from flow_policy_rl.bench import delay
from flow_policy_rl.collect import PolicyChunks, ScriptedExperts, collect_batch
from flow_policy_rl.data import demonstrations
from flow_policy_rl.data.robomimic import RobomimicWriter
from flow_policy_rl.errors import InputError
from flow_policy_rl.evaluate import task_of
from flow_policy_rl.policy import NetworkConfig
from sim.errors import SimulationError
from sim.randomize import Randomizer, preset
from sim.tasks import make_task
from sim.vec_env import VecEnv


def test_noise_is_executed_but_not_recorded():
    """The expert of reach does not look while it moves, so its intention is the same with and without noise."""
    runs = []
    for noise in (0.0, 0.02):
        env = VecEnv(make_task("reach"), 4)
        runs.append(collect_batch(env, ScriptedExperts(), noise, np.random.default_rng(0)))
        env.close()
    assert runs[1]
    for noisy in runs[1]:
        start = noisy.states[0]
        (clean,) = (e for e in runs[0] if np.array_equal(e.states[0], start))
        both = min(len(clean.actions), len(noisy.actions))
        assert np.array_equal(clean.actions[:both], noisy.actions[:both])
        moved = np.abs(clean.obs["joint_pos"][:both] - noisy.obs["joint_pos"][:both])
        assert 0.005 < moved.max() < 0.2
        grip = np.abs(clean.obs["gripper_pos"][:both] - noisy.obs["gripper_pos"][:both])
        assert grip.max() < 1e-3


def test_a_simulation_that_broke_down_is_no_demonstration():
    """Also of a walker, whose task knows no success and whose episodes are all kept else."""
    env = VecEnv(make_task("hopper"), 3, dump_dir=None)

    class Stands:
        def begin(self, env, rng):
            self.starts = env.state.copy()

        def act(self, env, obs, running):
            actions = np.zeros((3, 3))
            actions[1] = np.nan if env.elapsed[1] == 4 else 0.0
            return actions

    who = Stands()
    episodes = collect_batch(env, who, 0.0, np.random.default_rng(0))
    env.close()
    assert [e.states[0].tolist() for e in episodes] == who.starts[[0, 2]].tolist()


def test_the_second_arm_is_written_down(tmp_path):
    collect.main(collect.Config("reach", tmp_path / "d.hdf5", episodes=3, robot="ur5e"))
    demos = demonstrations.load(tmp_path / "d.hdf5")
    assert demos.layout.robot == "ur5e"
    assert demos.layout.joint_names[0] == "shoulder_pan_joint"
    assert demos.provenance["expert"] == "scripted"
    config = train_config.TrainBC("reach", tmp_path / "d.hdf5", tmp_path / "run", bc=BCConfig(2, 8))
    assert checkpoint.load(train.main(config)["checkpoint"]).spec.robot == "ur5e"


def test_a_policy_executes_its_horizon_and_plans_again():
    env = VecEnv(make_task("reach"), 2)
    plans = []

    def act(obs, noise):
        plans.append(obs)
        return np.full(noise.shape, len(plans)) + np.arange(noise.shape[1])[:, None] / 10

    spec = small_policy(action_horizon=6, execute_horizon=3).spec
    actor = PolicyChunks(spec, act)
    actor.begin(env, None)
    taken = [actor.act(env, {}, None)[0, 0] for _ in range(7)]
    env.close()
    assert taken == pytest.approx([1.0, 1.1, 1.2, 2.0, 2.1, 2.2, 3.0])


def test_successes_of_a_policy_file_are_kept(tmp_path):
    first = tmp_path / "first.hdf5"
    collect.main(collect.Config("reach", first, episodes=40))
    run = train_config.TrainBC(
        "reach",
        first,
        tmp_path / "run",
        network=NetworkConfig(width=64, depth=2),
        bc=BCConfig(num_steps=600, batch_size=128, ema_decay=0.98),
    )
    policy = Path(train.main(run)["checkpoint"])
    out = tmp_path / "second.hdf5"
    result = collect.main(
        collect.Config("reach", out, episodes=5, policy=policy, noise=0.0, seed=9)
    )
    again = demonstrations.load(out)
    assert result["episodes"] == len(again.episodes) == 5
    assert result["attempts"] >= 5
    for episode in again.episodes:
        assert episode.rewards.sum() == 1  # a success, and nothing after it
        assert episode.rewards[-1] == 1
    assert len(again.provenance["policy_sha256"]) == 64
    third = tmp_path / "third.hdf5"
    with pytest.raises(InputError, match="policy .* is for robot 'panda', not 'ur5e'"):
        collect.main(collect.Config("reach", third, policy=policy, robot="ur5e"))
    with pytest.raises(InputError, match="does not fit task 'push'"):
        collect.main(collect.Config("push", third, policy=policy))


def test_what_an_episode_drew_is_in_the_file_and_in_the_world(tmp_path):
    """The draw is found again from the start state, and the episode played again in that world is the same."""
    out = tmp_path / "d.hdf5"
    config = collect.Config("reach", out, episodes=4, num_envs=2, randomize="hard", seed=3)
    collect.main(config)
    demos = demonstrations.load(out)
    assert demos.provenance["randomize"] == "hard"
    task = make_task("reach")
    randomizer = Randomizer(task, preset("hard", task))
    expected = {}
    for env in range(2):
        for episode in range(50):
            rng = np.random.default_rng((3, env, episode))
            start = task.initial_state(rng)
            expected[start.tobytes()] = randomizer.draw(rng)
    draws = [expected[e.states[0].tobytes()] for e in demos.episodes]
    for episode, draw in zip(demos.episodes, draws, strict=True):
        assert episode.randomization.keys() == draw.keys()
        assert all(np.array_equal(episode.randomization[k], draw[k]) for k in draw)
        offset = episode.obs["joint_pos"][0] - task.observe(episode.states[0])["joint_pos"]
        assert np.abs(offset - draw["joint_offset"][:7]).max() < 5 * draw["observation_noise"]
    assert len({float(d["friction"]) for d in draws}) == len(draws)


def test_returns_below_the_least_are_not_kept():
    env = VecEnv(make_task("reach"), 3)
    rng = np.random.default_rng(0)
    assert len(collect_batch(env, ScriptedExperts(), 0.0, rng, min_return=1.0)) == 3
    assert collect_batch(env, ScriptedExperts(), 0.0, rng, min_return=1.1) == []
    env.close()


def test_collecting_gives_up_when_nothing_can_be_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(collect, "collect_batch", lambda *args: [])
    with pytest.raises(InputError, match=r"no episode to keep in 224 attempts.*--min-return"):
        collect.main(collect.Config("reach", tmp_path / "d.hdf5", min_return=2.0))


def test_collecting_says_once_when_few_attempts_can_be_kept(tmp_path, monkeypatch, caplog):
    env = VecEnv(make_task("reach"), 1)
    (episode,) = collect_batch(env, ScriptedExperts(), 0.0, np.random.default_rng(0))
    env.close()
    kept = iter([[episode], *[[]] * 6, *[[episode]] * 32])
    monkeypatch.setattr(collect, "collect_batch", lambda *args: next(kept))
    collect.main(collect.Config("reach", tmp_path / "d.hdf5", episodes=32))
    (record,) = caplog.records
    assert (
        "1 of 224 attempts at task 'reach' kept: 32 episodes will take some 7168" in record.message
    )


@pytest.mark.parametrize(
    ("name", "stands"), [("reach", 0.02), ("insert", 0.003), ("one_leg", 0.001)]
)
def test_noise_is_what_the_expert_stands_unless_it_is_given(name, stands, tmp_path, monkeypatch):
    given = []

    def nothing(env, demonstrator, noise, *rest):
        given.append(noise)
        return []

    monkeypatch.setattr(collect, "collect_batch", nothing)
    for noise in (None, 0.0, 0.05):
        with pytest.raises(InputError, match="no episode"):
            collect.main(collect.Config(name, tmp_path / "d.hdf5", noise=noise))
    assert sorted(set(given)) == sorted({stands, 0.0, 0.05})


def test_options_of_a_task_pass_through_collect_eval_and_train(tmp_path):
    config = tyro.cli(
        collect.Config,
        args=[
            "--task",
            "push",
            "--out",
            str(tmp_path / "d.hdf5"),
            "--task-options",
            "reward",
            "dense",
        ],
    )
    collect.main(dataclasses.replace(config, episodes=2, num_envs=2))
    demos = demonstrations.load(tmp_path / "d.hdf5")
    assert demos.provenance["task_options"] == {"reward": "dense"}
    assert (demos.episodes[0].rewards[:-1] < 0).all()
    assert task_of(demos.layout, None, {"reward": "dense"}).reward == "dense"
    started = train.starting_point(train_config.TrainScoreFlow("push", {"reward": "dense"}))
    assert started[0].reward == "dense"
    config = dataclasses.replace(config, out=tmp_path / "again.hdf5")
    with pytest.raises(SimulationError, match="unknown option of task 'push' 'rewards'"):
        collect.main(dataclasses.replace(config, task_options={"rewards": "dense"}))
    with pytest.raises(SimulationError, match="cameras of task 'push' is true or false"):
        collect.main(dataclasses.replace(config, task_options={"cameras": "yes"}))


def test_the_command_that_repeats_an_evaluation_is_one_for_the_shell():
    names = ("policy", "task", "episodes", "seed", "noise", "inference_delay", "backend")
    result = dict.fromkeys(names, "1") | {"policy": "my runs/a policy.onnx", "task_options": {}}
    words = shlex.split(evaluation_report.command(result))
    assert words[words.index("--policy") + 1] == "my runs/a policy.onnx"


def test_options_travel_with_demonstrations_policy_and_results(tmp_path, capsys, monkeypatch):
    demos, run = tmp_path / "d.hdf5", tmp_path / "bc"
    dense, sparse = {"reward": "dense"}, {"reward": "sparse"}
    collect.main(collect.Config("push", demos, task_options=dense, episodes=2, num_envs=2))
    bc, small = BCConfig(num_steps=1, batch_size=8), NetworkConfig(width=8, depth=1)
    train.main(train_config.TrainBC("push", demos, run, bc=bc, network=small))
    policy = run / train.POLICY_FILE
    assert checkpoint.load(policy).spec.task_options == dense
    task, _ = train.starting_point(train_config.TrainScoreFlow("push", checkpoint=policy))
    assert task.options == dense
    capsys.readouterr()
    same = evaluate.main(evaluate.Config(policy, episodes=1, out=tmp_path / "eval"))
    assert "note" not in capsys.readouterr().err
    assert same["task_options"] == dense
    assert same["return_mean"] < 0
    assert json.loads((tmp_path / "eval/evaluation.json").read_text())["task_options"] == dense
    assert "--task-options reward dense" in (tmp_path / "eval/report.html").read_text()
    assert "push (reward dense)" in evaluate.text(same)
    other = evaluate.main(evaluate.Config(policy, episodes=1, task_options=sparse))
    said = capsys.readouterr().err.splitlines()
    assert sum("with reward sparse; policy" in line for line in said) == 1
    assert other["task_options"] == sparse
    assert other["return_mean"] == 0
    assert evaluation_report.command(other).endswith("--task-options reward sparse")
    exported, nodes = tmp_path / "policy.onnx", {}
    export_command.main(export_command.ExportConfig(policy, exported))
    row = {"end_to_end_s": np.zeros(0)}
    monkeypatch.setattr(delay, "run_episodes", lambda these, *_: nodes.update(these) or dict(row))
    delay.main(delay.Config(exported, delays_ms=(0,)))
    assert nodes["sim_node"]["task_options"] == "reward dense"


def test_demonstrations_that_are_there_are_not_overwritten_but_a_stage_starts_again(tmp_path):
    config = collect.Config("reach", tmp_path / "d.hdf5", episodes=1)
    config.out.write_bytes(b"mine")
    with pytest.raises(InputError, match="output '.*d.hdf5' exists already"):
        collect.main(config)
    assert config.out.read_bytes() == b"mine"
    demo_stages.collect_afresh(config)  # of a demo whose collect ended and was not written down
    assert len(demonstrations.load(config.out).episodes) == 1


def test_ctrl_c_keeps_whole_episodes_and_says_how_many(tmp_path, monkeypatch, capsys):
    whole, part = tmp_path / "whole.hdf5", tmp_path / "part.hdf5"
    args = ["collect", "--task", "reach", "--num-envs", "2", "--noise", "0", "--out"]
    assert cli.main([*args, str(whole), "--episodes", "4"]) == 0
    plain = RobomimicWriter.episode

    def interrupted_while_it_writes(writer, episode):
        if writer.num_episodes == 2:
            signal.raise_signal(signal.SIGINT)
        plain(writer, episode)

    monkeypatch.setattr(RobomimicWriter, "episode", interrupted_while_it_writes)
    assert cli.main([*args, str(part), "--episodes", "9"]) == 130
    assert f"interrupted after 4 of 9 episodes, which are in '{part}'" in capsys.readouterr().err
    kept = demonstrations.load(part)
    assert kept.provenance["attempts"] == 4
    for episode, same in zip(kept.episodes, demonstrations.load(whole).episodes, strict=True):
        assert np.array_equal(episode.actions, same.actions)
        assert np.array_equal(episode.states, same.states)


def test_ctrl_c_before_the_first_episode_leaves_nothing(tmp_path, monkeypatch, capsys):
    out = tmp_path / "new/d.hdf5"
    monkeypatch.setattr(collect, "collect_batch", lambda *_: signal.raise_signal(signal.SIGINT))
    assert cli.main(["collect", "--task", "reach", "--out", str(out)]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted"
    assert list(out.parent.iterdir()) == []


def test_a_policy_that_ships_demonstrates_by_its_name(tmp_path):
    out = tmp_path / "d.hdf5"
    collect.main(collect.Config("lift", out, policy=Path("lift"), episodes=1, noise=0.0))
    made_by = demonstrations.load(out).provenance
    assert made_by["policy"] == "lift.onnx"
    assert len(made_by["policy_sha256"]) == 64


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"num_envs": 0}, "--num-envs must be at least 1, not 0"),
        ({"num_envs": -1}, "--num-envs must be at least 1, not -1"),
        ({"noise": float("nan")}, "--noise must be at least 0, not nan"),
        ({"noise": float("inf")}, "--noise must be at least 0 and finite, not inf"),
        ({"task": "hopper"}, "task 'hopper' has no scripted expert; give --policy"),
    ],
)
def test_bad_input_is_refused(tmp_path, wrong, says):
    with pytest.raises(InputError, match=says):
        collect.main(collect.Config(**{"task": "reach", "out": tmp_path / "d.hdf5"} | wrong))

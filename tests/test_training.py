"""Runs: exact resumption, what happens when one goes wrong, and running statistics."""

import copy
import csv
import dataclasses
import json
import os
import shlex
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from toys import documented, gradient_step
from training_toys import SCRATCH, untrained, weights

from flow_policy_rl import checkpoint, cli, distributed, gradients, tensor_file, train
from flow_policy_rl.algorithms import ppo
from flow_policy_rl.algorithms.ppo import PPOConfig
from flow_policy_rl.algorithms.rldt import RLDTConfig
from flow_policy_rl.algorithms.rldt_critic import CriticConfig
from flow_policy_rl.errors import InputError, PeerLost, RunFailed
from flow_policy_rl.logger import RunLogger, read_metrics
from flow_policy_rl.run_folder import BEST_POLICY_FILE, POLICY_FILE, RAW_POLICY_FILE
from flow_policy_rl.statistics import RunningStatistics
from flow_policy_rl.train_config import TrainOnPolicy, default_config

TINY = PPOConfig(
    num_iterations=2,
    num_envs=4,
    num_steps=6,
    num_epochs=2,
    num_minibatches=2,
    micro_batch=5,
    critic_warmup=0,
    value_width=16,
    value_depth=2,
    scale_rewards=True,
)


def tiny(algorithm: str, folder, task: str = "hopper", **changes) -> TrainOnPolicy:
    """A run from scratch of a few seconds."""
    ppo_changes = changes.pop("ppo", {})
    return dataclasses.replace(
        default_config(algorithm, task),
        run_dir=folder,
        ppo=dataclasses.replace(TINY, **ppo_changes),
        **{"scratch": SCRATCH, "eval_every": 0} | changes,
    )


@pytest.mark.parametrize(
    ("algorithm", "randomize"),
    [
        ("fpo_plus_plus", "nominal"),
        ("score_flow", "nominal"),
        ("gaussian_ppo", "nominal"),
        ("gaussian_ppo", "hard"),
    ],
)
def test_two_and_two_iterations_are_four_bit_for_bit(algorithm, randomize, tmp_path):
    """Weights, optimisers, random numbers, normalisers and environments all go on where they were."""
    extra = {"ema_decay": 0.9} if algorithm == "fpo_plus_plus" else {}
    more = {"ppo": {"num_iterations": 4, **extra}, "randomize": randomize}
    train.main(tiny(algorithm, tmp_path / "four", **copy.deepcopy(more)))
    train.main(tiny(algorithm, tmp_path / "two", ppo=extra, randomize=randomize))
    half = weights(tmp_path / "two")
    train.main(tiny(algorithm, tmp_path / "two", resume=True, **more))
    names = [POLICY_FILE, "state.safetensors"]
    for name in names + ([RAW_POLICY_FILE] if extra else []):
        four, two = (weights(tmp_path / run, name) for run in ("four", "two"))
        assert four.keys() == two.keys()
        assert [k for k in four if not torch.equal(four[k], two[k])] == []
    assert any(not torch.equal(half[k], v) for k, v in weights(tmp_path / "two").items())
    rows = [
        [str({k: v for k, v in r.items() if not k.startswith("time/")}) for r in read_metrics(f)]
        for f in (tmp_path / "four/metrics.csv", tmp_path / "two/metrics.csv")
    ]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 4
    seconds = [row["time/wall_s"] for row in read_metrics(tmp_path / "two/metrics.csv")]
    assert seconds == sorted(seconds)  # the second half took as long as the first, on top of it


def test_two_environments_go_on_bit_for_bit_too(tmp_path):
    """Products with two rows depend on where the numbers lie in memory."""
    base = untrained(tmp_path)
    run = lambda folder, n, resume=False: train.main(  # noqa: E731
        tiny(
            "score_flow",
            tmp_path / folder,
            ppo={"num_envs": 2, "num_iterations": n},
            checkpoint=base,
            resume=resume,
        )
    )
    run("six", 6)
    run("three", 3)
    run("three", 6, resume=True)
    six, three = (weights(tmp_path / folder, "state.safetensors") for folder in ("six", "three"))
    assert [k for k in six if not torch.equal(six[k], three[k])] == []


def test_what_is_read_lies_where_torch_puts_its_own(tmp_path):
    tensors = {str(n): torch.zeros(n, dtype=torch.uint8) for n in range(1, 40)}
    tensor_file.write(tmp_path / "file", tensors, "any")
    read, _ = tensor_file.read(tmp_path / "file", "file", "any")
    assert {value.data_ptr() % 64 for value in read.values()} == {0}


def test_average_and_raw_weights_are_kept_apart(tmp_path):
    train.main(tiny("fpo", tmp_path, ppo={"ema_decay": 0.9}))
    average, raw = weights(tmp_path), weights(tmp_path, RAW_POLICY_FILE)
    assert not torch.equal(average["velocity_field.head.weight"], raw["velocity_field.head.weight"])
    assert torch.equal(average["normalizer.mean"], raw["normalizer.mean"])
    assert checkpoint.load(tmp_path / POLICY_FILE).spec.algorithm == "fpo"


def test_only_the_same_run_can_be_resumed(tmp_path):
    with pytest.raises(InputError, match="nothing to resume"):
        train.main(tiny("fpo", tmp_path / "none", resume=True))
    train.main(tiny("fpo", tmp_path / "run"))
    both = r"other settings: ppo\.clip_range 0\.2 there, 0\.3 here; seed 0 there, 1 here$"
    with pytest.raises(InputError, match=both):
        train.main(tiny("fpo", tmp_path / "run", resume=True, seed=1, ppo={"clip_range": 0.3}))
    with pytest.raises(InputError, match="other settings: algorithm fpo there, score_flow here$"):
        train.main(tiny("score_flow", tmp_path / "run", resume=True))


def test_a_run_goes_on_from_the_same_checkpoint_however_it_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = untrained(tmp_path).name
    config = tiny("fpo", tmp_path / "run", checkpoint=Path(name), ppo={"num_iterations": 1})
    train.main(config)
    train.main(dataclasses.replace(config, checkpoint=tmp_path / name, resume=True))


def test_a_resumed_run_is_repeated_by_its_config_and_never_goes_back(tmp_path):
    train.main(tiny("fpo", tmp_path))
    train.main(tiny("fpo", tmp_path, resume=True))  # a study may ask again for what is complete
    config = (tmp_path / "config.json").read_text()
    assert json.loads(config)["resume"] is False
    with pytest.raises(
        InputError, match=r"left: 2 iterations are done, --ppo\.num-iterations is 1"
    ):
        train.main(tiny("fpo", tmp_path, resume=True, ppo={"num_iterations": 1}))
    assert (tmp_path / "config.json").read_text() == config


def test_ctrl_c_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    """In the first iteration; then in the third, when the second is saved. What it says goes on to the end."""
    config = tiny("fpo", tmp_path / "a run", ppo={"num_iterations": 4}, save_every=2)
    log = train.RunLogger.log

    def at(iteration):
        def stop(self, step, metrics):
            if step == iteration:
                os.kill(os.getpid(), signal.SIGINT)
            log(self, step, metrics)

        monkeypatch.setattr(train.RunLogger, "log", stop)

    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(config), default=str))
    line = ["train", "fpo", "--config", str(tmp_path / "config.json")]
    at(1)
    assert cli.main(line) == 130
    assert capsys.readouterr().err == "interrupted after iteration 1; nothing is saved yet\n"
    at(3)
    assert cli.main(line) == 130
    said, _, command = capsys.readouterr().err.strip().partition("; go on with: flow-policy ")
    assert said == "interrupted after iteration 3 (state of iteration 2 is saved)"
    monkeypatch.setattr(train.RunLogger, "log", log)
    assert cli.main(shlex.split(command)) == 0
    assert len(read_metrics(tmp_path / "a run/metrics.csv")) == 4


def test_a_time_limit_ends_episodes_of_training(tmp_path):
    """Rollouts of 4 environments x 6 chunks of 4 actions, in episodes of 8 control steps: three end in each."""
    train.main(tiny("score_flow", tmp_path, task="lift", time_limit=8))
    ended = [row["rollout/episodes"] for row in read_metrics(tmp_path / "metrics.csv")]
    assert ended == [12, 12]


def test_what_a_run_says_is_what_is_documented(tmp_path):
    done = train.main(tiny("fpo", tmp_path, ppo={"num_iterations": 1}))
    assert set(done) == documented("train", "RL")


def test_how_often_a_run_is_looked_at_may_change_and_changes_nothing_else(tmp_path):
    """Four iterations without a look, and two with one and two with three episodes at each, end bit for bit alike."""
    train.main(tiny("fpo", tmp_path / "unseen", ppo={"num_iterations": 4}))
    train.main(tiny("fpo", tmp_path / "seen", eval_every=2, eval_episodes=1, save_every=1))
    more = {"eval_every": 1, "eval_episodes": 3, "stop_at": 1e6, "ppo": {"num_iterations": 4}}
    train.main(tiny("fpo", tmp_path / "seen", resume=True, **more))
    unseen, seen = (weights(tmp_path / run, "state.safetensors") for run in ("unseen", "seen"))
    assert [k for k in unseen if not torch.equal(unseen[k], seen[k])] == []
    looks = ["eval/return" in row for row in read_metrics(tmp_path / "seen/metrics.csv")]
    assert looks == [False, True, True, True]


def test_what_did_best_is_kept_also_by_a_run_that_goes_on(tmp_path, monkeypatch):
    """Of two that did as well the later one, and what is kept is what was looked at: the moving average."""
    returns = [1.0, 3.0, 2.0, 3.0, 2.0, 1.0]
    look = lambda config, learner, watch: {"eval/return": returns[learner.iteration - 1]}  # noqa: E731
    monkeypatch.setattr(train, "look", look)
    more = {"eval_every": 1, "eval_episodes": 1}
    part = lambda folder, n, **goes_on: train.main(  # noqa: E731
        tiny("fpo", tmp_path / folder, ppo={"num_iterations": n, "ema_decay": 0.9}, **goes_on)
    )
    part("four", 4)
    part("run", 5, **more)
    done = part("run", 6, resume=True, **more)
    rows = read_metrics(tmp_path / "run/metrics.csv")
    assert [row["eval/return"] for row in rows] == returns
    assert done["best"] == {"env_steps": rows[3]["time/env_steps"], "watched": 3.0}
    four, best = weights(tmp_path / "four"), weights(tmp_path / "run", BEST_POLICY_FILE)
    assert four.keys() == best.keys()
    assert [k for k in four if not torch.equal(four[k], best[k])] == []
    made = checkpoint.load(tmp_path / "run" / BEST_POLICY_FILE).spec.provenance["fine_tuning"]
    assert made["env_steps"] == done["best"]["env_steps"]
    assert BEST_POLICY_FILE in train.text(done)


@pytest.mark.parametrize("term", ["policy loss", "value loss"])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(
    term, tmp_path, monkeypatch
):
    train.main(tiny("fpo", tmp_path))
    good = weights(tmp_path)
    require = gradients.require_sound

    def poisoned(value, name):
        require(float("nan") if name == term else value, name)

    monkeypatch.setattr(gradients, "require_sound", poisoned)
    config = tiny("fpo", tmp_path, resume=True, ppo={"num_iterations": 4})
    with pytest.raises(RunFailed, match=f"iteration 3: {term} is nan") as error:
        train.main(config)
    assert "failed-0.safetensors" in str(error.value)
    assert (tmp_path / "failed-0.safetensors").is_file()
    assert all(torch.equal(good[k], v) for k, v in weights(tmp_path).items())


def test_an_exploding_loss_changes_no_weight():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([weight], lr=1.0)
    for factor in (float("nan"), float("inf"), 1e12):
        with pytest.raises(RunFailed, match="loss is"):
            gradient_step(optimizer, (factor * weight).sum(), 1.0)
    assert torch.equal(weight, torch.ones(3))


def test_running_statistics_are_those_of_all_rows_at_once(generator):
    """T9: merged batches equal numpy over their concatenation, and a stationary spread stays what it is."""
    statistics = RunningStatistics(3)
    batches = [5 + (1 + i) * torch.randn(7 + 31 * i, 3, generator=generator) for i in range(4)]
    for batch in batches:
        statistics.add(batch)
    everything = torch.cat(batches).double().numpy()
    assert np.allclose(statistics.mean, everything.mean(0))
    assert np.allclose(statistics.std, everything.std(0))
    steady = RunningStatistics(1)
    for _ in range(100):
        steady.add(2 * torch.randn(500, 1, generator=generator))
    assert steady.std.item() == pytest.approx(2.0, rel=0.02)


def test_the_normaliser_is_frozen_from_rollout_to_the_end_of_the_update(tmp_path, monkeypatch):
    """So the ratio is one before the first step, although the normaliser learns from every rollout."""
    means, ratios = [], []
    update, evaluate = ppo.PPO.update, train.FPO.evaluate

    def watched_update(self, rollout):
        before = self.policy.normalizer.mean.clone()
        metrics = update(self, rollout)
        assert torch.equal(before, self.policy.normalizer.mean)
        means.append(before)
        return metrics

    def watched_evaluate(self, obs, trace):
        log_ratio, entropy = evaluate(self, obs, trace)
        ratios.append(log_ratio.abs().max().item())
        return log_ratio, entropy

    monkeypatch.setattr(ppo.PPO, "update", watched_update)
    monkeypatch.setattr(train.FPO, "evaluate", watched_evaluate)
    train.main(tiny("fpo", tmp_path, ppo={"num_minibatches": 1, "micro_batch": 100}))
    assert not torch.equal(means[0], means[1])
    assert means[0].abs().sum() > 0  # a first rollout was only looked at
    first = [ratios[0], ratios[2]]  # two epochs per iteration
    assert max(first) < 1e-5
    assert min(ratios[1], ratios[3]) > max(first)


def test_micro_batches_change_nothing_but_rounding(tmp_path):
    train.main(tiny("score_flow", tmp_path / "a", ppo={"micro_batch": 1000}))
    train.main(tiny("score_flow", tmp_path / "b", ppo={"micro_batch": 3}))
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.allclose(a[k], b[k], atol=1e-4) for k in a)


def test_learning_rates_follow_their_schedule():
    config = PPOConfig(
        num_iterations=40, learning_rate_floor=0.4, learning_rate_cycle=20, learning_rate_warmup=5
    )
    factors = [ppo.learning_rate_factor(config, i) for i in range(40)]
    assert factors[:6] == pytest.approx([0.52, 0.64, 0.76, 0.88, 1.0, 1.0])
    assert factors[:20] == factors[20:]
    assert factors[19] == pytest.approx(0.4, abs=0.02)
    assert set(ppo.learning_rate_factor(PPOConfig(), i) for i in range(40)) == {1.0}


# --- what RLDT's targets are held to ---


@pytest.mark.parametrize(
    ("task", "reward", "flags", "refused"),
    [
        ("insert", "dense", (), True),
        ("insert", "dense", ("--rldt.critic.value-low=-inf",), False),
        ("insert", "dense", ("--rldt.critic.value-low=-5",), False),
        ("insert", "sparse", (), False),
        ("push", "dense", (), False),
        ("push", "dense", ("--rldt.critic.value-low", "0"), True),
        ("hopper", "dense", (), False),
        ("hopper", "dense", ("--rldt.critic.value-low", "0"), True),
    ],
)
def test_a_reward_with_costs_is_not_held_above_them(task, reward, flags, refused, tmp_path):
    options = [] if task == "hopper" else ["--task-options", "reward", reward]
    base = untrained(tmp_path, task, **dict([options[1:]] if options else []))
    command = ["rldt", "--task", task, "--checkpoint", str(base), *options, *flags]
    config = cli.parse_train([*command, "--rldt.num-envs", "4"], None)[1]
    made, base = train.starting_point(config)
    env, generator = train.own_environments(made, config), torch.Generator()
    if refused:
        with pytest.raises(
            InputError, match=f"value_low is 0, and reward 'dense' of task '{task}'"
        ):
            train.build_learner(config, base, env, generator)
    else:
        assert train.build_learner(config, base, env, generator).config == config.rldt


# --- where tensors live ---


@pytest.mark.parametrize("algorithm", ["fpo", "score_flow", "gaussian_ppo", "rldt"])
def test_every_tensor_is_made_where_the_policy_is(algorithm, tmp_path):
    """Whoever forgets the device gets one without data here, and on a GPU one in the wrong place."""
    if algorithm == "rldt":
        config = dataclasses.replace(
            default_config("rldt", "hopper"),
            checkpoint=untrained(tmp_path),
            rldt=RLDTConfig(
                num_envs=4,
                num_steps=6,
                num_blocks=2,
                critic_steps=2,
                critic_warmup=0,
                start_noise=(0.0, 1.0),
                balanced_replay=True,
                critic=CriticConfig(width=16, normalize_reward=True, stage_input=True),
            ),
        )
    else:
        config = tiny(algorithm, tmp_path)
    generator = torch.Generator().manual_seed(0)
    task, base = train.starting_point(config)
    env = train.own_environments(task, config)
    learner = train.build_learner(config, base, env, generator)
    with torch.device("meta"):
        for _ in range(2):
            learner.iterate()


NO_STEPS = dataclasses.replace(SCRATCH, num_flow_steps=0)


def test_a_run_ends_at_the_first_evaluation_that_is_good_enough(tmp_path):
    for enough, iterations in ((-1e9, 2), (1e9, 4)):
        folder = tmp_path / str(iterations)
        watch = {"eval_every": 2, "eval_episodes": 2, "stop_at": enough}
        train.main(
            dataclasses.replace(
                tiny("gaussian_ppo", folder, ppo={"num_iterations": 4}), save_every=9, **watch
            )
        )
        rows = read_metrics(folder / "metrics.csv")
        assert len(rows) == iterations
        assert (folder / POLICY_FILE).is_file()
    with pytest.raises(InputError, match="--stop-at needs evaluations"):
        train.main(tiny("gaussian_ppo", tmp_path, stop_at=1.0))


def test_a_run_that_was_good_enough_is_over_also_when_it_was_killed_at_its_end(
    tmp_path, monkeypatch
):
    """Killed between its state and its policy: what goes on writes the policy of that state and learns no more."""
    watch = {"eval_every": 1, "eval_episodes": 1, "ppo": {"num_iterations": 3}}
    monkeypatch.setattr(
        train, "look", lambda config, learner, watch: {"eval/return": learner.iteration}
    )
    with monkeypatch.context() as kill:
        kill.setattr(train, "save_fine_tuned", lambda *_: (_ for _ in ()).throw(KeyError))
        with pytest.raises(KeyError):
            train.main(tiny("fpo", tmp_path / "cut", stop_at=1.0, **copy.deepcopy(watch)))
    assert not (tmp_path / "cut" / POLICY_FILE).exists()
    over = lambda folder, **flags: train.main(  # noqa: E731
        tiny("fpo", tmp_path / folder, **copy.deepcopy(watch), **flags)
    )
    whole = over("whole", stop_at=1.0)
    for _ in range(2):
        again = over("cut", stop_at=1.0, resume=True)
        assert again["env_steps"] == whole["env_steps"]
        cut = weights(tmp_path / "cut")
        assert all(torch.equal(cut[k], v) for k, v in weights(tmp_path / "whole").items())
    for enough, iterations in ((2.0, 2), (None, 3)):
        over("cut", stop_at=enough, resume=True)
        assert len(read_metrics(tmp_path / "cut" / "metrics.csv")) == iterations


def test_processes_go_on_from_one_iteration_or_not_at_all(tmp_path, monkeypatch):
    """One that dies while states are written leaves the older ones of all others; what differs is refused."""
    config = tiny("fpo", tmp_path, save_every=1)
    wait, calls = distributed.wait_for_all, []

    def gone():
        calls.append(1)
        if len(calls) == 2:
            raise PeerLost("another process is gone")
        wait()

    monkeypatch.setattr(distributed, "wait_for_all", gone)
    with pytest.raises(PeerLost):
        train.main(config)
    assert sorted(path.name for path in tmp_path.glob("state*")) == ["state.safetensors"]
    done = train.main(dataclasses.replace(config, resume=True))
    assert len(read_metrics(tmp_path / "metrics.csv")) == 2
    assert done["env_steps"] == read_metrics(tmp_path / "metrics.csv")[-1]["time/env_steps"]
    gather = lambda values, dim: torch.cat([values, values - 1], dim)  # noqa: E731
    monkeypatch.setattr(distributed, "gather", gather)
    with pytest.raises(InputError, match=r"are of iterations 1 and 2: .* ended while it wrote"):
        train.main(dataclasses.replace(config, resume=True))


def test_no_number_is_logged_twice_nor_lost(tmp_path, monkeypatch):
    """By runs that were killed after step 3 and go on from step 2, at last from the beginning; one in a rewrite."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    def steps():
        found = events.EventAccumulator(str(tmp_path / "tensorboard"))
        found.Reload()
        assert [row["step"] for row in read_metrics(tmp_path / "metrics.csv")] == [
            event.step for event in found.Scalars("train/value_loss")
        ]
        return [event.step for event in found.Scalars("train/value_loss")]

    for begin, known in ((0, [1, 2, 3]), (2, [1, 2, 3]), (0, [1])):
        logger = RunLogger(tmp_path, begin)
        for step in range(begin + 1, len(known) + 1):
            logger.log(step, {"train/value_loss": step})
        logger.close()
        assert steps() == known
    monkeypatch.setattr(csv.DictWriter, "writerows", lambda *_: (_ for _ in ()).throw(KeyError))
    with pytest.raises(KeyError):
        logger.log(2, {"eval/return": 1.0})
    assert len(read_metrics(tmp_path / "metrics.csv")) == 1


def test_processes_share_the_episodes_of_a_look(tmp_path, monkeypatch):
    """However many they are, together they play each once; also where there are more processes than episodes."""
    config = tiny("fpo", tmp_path, eval_every=1, eval_episodes=3)
    task, base = train.starting_point(config)
    learner = train.build_learner(
        config, base, train.own_environments(task, config), torch.Generator()
    )
    played = {}
    for processes in (1, 2, 5):
        monkeypatch.setattr(distributed, "world_size", lambda n=processes: n)
        parts = []
        monkeypatch.setattr(
            distributed, "sums", lambda mine, seen=parts: seen.append(mine) or [1.0, 0.0, 0.0]
        )
        for rank in range(processes):
            monkeypatch.setattr(distributed, "rank", lambda r=rank: r)
            seeds = train.watched_seeds(config)
            watch = train.VecEnv(task, len(seeds)) if seeds else None
            assert train.look(config, learner, watch).keys() == {"eval/return"}
        played[processes] = np.sum(parts, axis=0)
    assert played[1][0] == 3
    assert np.allclose(played[2], played[1])
    assert np.allclose(played[5], played[1])


BAD = {
    "no envs": ({"ppo": {"num_envs": 0}}, "num_envs must be at least 1"),
    "no flow steps": ({"run": {"scratch": NO_STEPS}}, "num_flow_steps must be at least 1"),
    "batches": ({"ppo": {"num_minibatches": 1000}}, "is more than the 24 chunks of a rollout"),
}


@pytest.mark.parametrize("case", BAD)
def test_settings_that_cannot_work_are_refused(case, tmp_path):
    changes, says = BAD[case]
    with pytest.raises(InputError, match=says):
        train.main(tiny("fpo", tmp_path, ppo=changes.get("ppo", {}), **changes.get("run", {})))


def test_a_device_that_is_not_there_is_refused(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(InputError, match="finds no CUDA device"):
        train.main(tiny("fpo", tmp_path, device="cuda"))


def test_a_checkpoint_of_another_task_names_both(tmp_path):
    train.main(tiny("fpo", tmp_path, ppo={"num_iterations": 1}))
    config = dataclasses.replace(
        tiny("fpo", tmp_path / "b", task="lift"), checkpoint=tmp_path / POLICY_FILE
    )
    with pytest.raises(InputError, match=r"task 'hopper'.*does not fit task 'lift'"):
        train.main(config)


def test_an_off_policy_run_goes_on_exactly_too(tmp_path):
    """RLDT: replay, targets and references as well."""
    base = untrained(tmp_path)

    def run(folder, iterations, resume=False):
        config = default_config("rldt", "hopper")
        rldt = dataclasses.replace(
            config.rldt,
            num_iterations=iterations,
            num_envs=4,
            num_steps=4,
            num_blocks=2,
            segments_per_block=2,
            critic_steps=2,
            critic_warmup=0,
        )
        train.main(
            dataclasses.replace(
                config,
                run_dir=folder,
                checkpoint=base,
                eval_every=0,
                rldt=rldt,
                resume=resume,
            )
        )

    run(tmp_path / "four", 4)
    run(tmp_path / "two", 2)
    run(tmp_path / "two", 4, resume=True)
    for name in (POLICY_FILE, "state.safetensors"):
        four, two = (weights(tmp_path / folder, name) for folder in ("four", "two"))
        assert [k for k in four if not torch.equal(four[k], two[k])] == []


def test_rldt_needs_a_policy_to_hold_on_to(tmp_path):
    config = dataclasses.replace(default_config("rldt", "hopper"), run_dir=tmp_path / "run")
    with pytest.raises(InputError, match="train rldt needs --checkpoint.*fpo"):
        train.main(config)

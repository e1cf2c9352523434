"""Imitation: which demonstrations it takes, and exact resumption."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from training_toys import weights

from flow_policy_rl import collect, distributed, train, train_bc
from flow_policy_rl.algorithms.bc import BCConfig
from flow_policy_rl.data import robomimic
from flow_policy_rl.data.demonstrations import DemoLayout, Demonstrations, Episode
from flow_policy_rl.errors import InputError
from flow_policy_rl.policy import NetworkConfig
from flow_policy_rl.run_folder import POLICY_FILE, RAW_POLICY_FILE
from flow_policy_rl.train_config import default_config
from sim.tasks import make_task

FIELDS = DemoLayout.of_task(make_task("lift")).observations
STRANGE = {
    "joints": ({"joint_names": ("a", "b")}, r"have joints \('a', 'b'\); task 'lift' has \('panda"),
    "rate": ({"control_dt": 0.1}, "have control_dt 0.1; task 'lift' has 0.05"),
    "task": ({"task": "hopper"}, "have task hopper; task 'lift' has lift"),
    "observations": ({"observations": ()}, r"have observations \(\); task 'lift' has"),
    "joints within": (
        {
            "observations": (
                dataclasses.replace(FIELDS[0], elements=FIELDS[0].elements[::-1]),
                *FIELDS[1:],
            )
        },
        r"have observation 'joint_pos' with elements \('panda_joint7', .*; task 'lift' has \('panda_joint1'",
    ),
    "degrees": (
        {"observations": (dataclasses.replace(FIELDS[0], unit="deg"), *FIELDS[1:])},
        "have observation 'joint_pos' with unit deg; task 'lift' has rad",
    ),
    "too few": ({}, "is larger than the 7 steps"),
}


@pytest.mark.parametrize("case", STRANGE)
def test_demonstrations_that_do_not_fit_are_refused(case):
    """Other joints, rate, task, senses, units or orders within them, fewer steps than a batch: the line says both."""
    changes, says = STRANGE[case]
    task = make_task("lift")
    layout = DemoLayout.of_task(task)
    episode = Episode({}, np.zeros((7, 8)), np.zeros(7), np.zeros((7, 0)))
    demos = Demonstrations(dataclasses.replace(layout, **changes), [episode], {})
    with pytest.raises(InputError, match=says):
        train_bc.check_demos(demos, task, default_config("bc", "lift"))


def test_demonstrations_of_failure_are_refused(tmp_path):
    """Said of every episode, through the file; one success, or nobody's word on one, is enough to go on."""
    task = make_task("lift")
    layout = DemoLayout.of_task(task)
    obs = {f.name: np.zeros((300, f.size)) for f in layout.observations}
    for successes, refused in (((False, False), True), ((False, True), False), ((None,), False)):
        episodes = [
            Episode(obs, np.zeros((300, 8)), np.zeros(300), np.zeros((300, 0)), success)
            for success in successes
        ]
        path = tmp_path / f"{len(successes)}{refused}.hdf5"
        robomimic.save(path, Demonstrations(layout, episodes, {}))
        demos = robomimic.load(path)
        assert [e.success for e in demos.episodes] == list(successes)
        config = default_config("bc", "lift")
        if refused:
            with pytest.raises(InputError, match="none of the 2 demonstrations"):
                train_bc.check_demos(demos, task, config)
        else:
            train_bc.check_demos(demos, task, config)


def test_imitation_runs_in_one_process(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    config = dataclasses.replace(default_config("bc", "lift"), run_dir=tmp_path)
    with pytest.raises(InputError, match="^bc runs in one process"):
        train.run_training(config)


def test_imitation_goes_on_exactly(tmp_path):
    """Interrupted after the state of step 500 was written: raw and averaged weights, Adam and batches go on."""
    demos = str(tmp_path / "demos.hdf5")
    collect.main(collect.Config("reach", Path(demos), episodes=4))
    small = dataclasses.replace(
        default_config("bc", "reach"),
        demos=Path(demos),
        network=NetworkConfig(width=16, depth=2),
        bc=BCConfig(num_steps=700, batch_size=16),
    )
    train.main(dataclasses.replace(small, run_dir=tmp_path / "whole"))
    broken = dataclasses.replace(small, run_dir=tmp_path / "broken")

    class Stop(Exception):
        pass

    def stop(self, step, metrics):
        if step == 600:
            raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_bc.RunLogger, "log", stop)
        with pytest.raises(Stop):
            train.main(broken)
    train.main(dataclasses.replace(broken, resume=True))
    for name in (POLICY_FILE, RAW_POLICY_FILE, "state.safetensors"):
        whole, resumed = (weights(tmp_path / run, name) for run in ("whole", "broken"))
        assert [k for k in whole if not torch.equal(whole[k], resumed[k])] == []
    average, raw = weights(tmp_path / "whole"), weights(tmp_path / "whole", RAW_POLICY_FILE)
    assert not torch.equal(average["velocity_field.head.weight"], raw["velocity_field.head.weight"])

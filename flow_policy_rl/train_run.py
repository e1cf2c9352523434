"""What every training does, whatever it learns by: write down what runs, say how to go on, keep the policy."""

import contextlib
import dataclasses
import json
import math
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

from flow_policy_rl import checkpoint, distributed, provenance
from flow_policy_rl.algorithms.bc import Imitation
from flow_policy_rl.algorithms.ppo import PPO
from flow_policy_rl.algorithms.rldt import RLDT
from flow_policy_rl.errors import RunFailed
from flow_policy_rl.policy import FlowPolicy
from flow_policy_rl.run_folder import POLICY_FILE, RAW_POLICY_FILE
from flow_policy_rl.spec import ObservationField, PolicySpec
from flow_policy_rl.train_config import TrainBC, TrainRL


def begin_run(config) -> None:
    """Write down what is about to run, so that `--config` repeats it from the beginning."""
    settings = dataclasses.asdict(config) | {"resume": False}
    resolved = json.dumps(settings, indent=2, default=str)
    (config.run_dir / "config.json").write_text(resolved + "\n")
    (config.run_dir / "environment.json").write_text(
        json.dumps(provenance.environment(), indent=2) + "\n"
    )


@contextlib.contextmanager
def interruptible(
    config: TrainBC | TrainRL, unit: str, done: Callable[[], int]
) -> Iterator[Callable[[], None]]:
    """Ctrl-C says how to go on, behind the `interrupted` of cli.py. Yields what to call when the state was saved."""
    saved = done()

    def save() -> None:
        nonlocal saved
        saved = done()

    try:
        yield save
    except KeyboardInterrupt:
        what = f"after {unit} {done()}"
        if not saved:
            raise KeyboardInterrupt(f"{what}; nothing is saved yet") from None
        command = "torchrun ... -m flow_policy_rl.cli"
        if distributed.world_size() == 1:
            command = "flow-policy"
        file = shlex.quote(str(config.run_dir / "config.json"))
        raise KeyboardInterrupt(
            f"{what} (state of {unit} {saved} is saved); go on with: "
            f"{command} train {getattr(config, 'algorithm', 'bc')} --config {file} --resume"
        ) from None


def policy_spec(task, observations: tuple[ObservationField, ...], horizons) -> PolicySpec:
    """What a new policy for a task sees and commands; action_horizon, execute_horizon, num_flow_steps of `horizons`."""
    return PolicySpec(
        task=task.name,
        robot=task.robot,
        task_options=dict(task.options),
        joint_names=task.world.joint_names,
        action_kind=task.world.interface,
        action_low=tuple(task.world.target_low.tolist()),
        action_high=tuple(task.world.target_high.tolist()),
        observations=observations,
        control_dt=task.control_dt,
        action_horizon=horizons.action_horizon,
        execute_horizon=horizons.execute_horizon,
        num_flow_steps=horizons.num_flow_steps,
        prefix_horizon=horizons.prefix_horizon,
    )


def save_policy(run_dir: Path, learner: Imitation | PPO | RLDT, spec: PolicySpec) -> None:
    """`policy.safetensors`, and beside it the raw weights where that one is their moving average."""
    policies = {RAW_POLICY_FILE: learner.policy, POLICY_FILE: learner.average}
    if learner.average is learner.policy:
        del policies[RAW_POLICY_FILE]
    for name, policy in policies.items():
        save_one(run_dir / name, policy, spec)


def save_one(path: Path, policy: FlowPolicy, spec: PolicySpec) -> None:
    """A policy, with what it has seen in its spec."""
    policy.spec = with_statistics(spec, policy)
    checkpoint.save(path, policy)


def with_statistics(spec: PolicySpec, policy: FlowPolicy) -> PolicySpec:
    """The spec with mean and spread of each observation as the policy's normaliser has them."""
    names, sizes = list(policy.normalizer.fields), list(policy.normalizer.fields.values())
    means = dict(zip(names, policy.normalizer.mean.split(sizes), strict=True))
    stds = dict(zip(names, policy.normalizer.std.split(sizes), strict=True))
    fields = [
        dataclasses.replace(f, mean=tuple(means[f.name].tolist()), std=tuple(stds[f.name].tolist()))
        if f.name in means
        else f
        for f in spec.observations
    ]
    return spec.replace(observations=tuple(fields))


def require_finite(metrics: dict[str, float]) -> None:
    """Stop at the first number that is not finite.

    Raises:
        RunFailed: names the term.
    """
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise RunFailed(f"{name} is {value}")

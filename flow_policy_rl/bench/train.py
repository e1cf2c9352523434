"""`flow-policy bench train`: how fast an on-policy algorithm trains, and how far that is from what it must cost.

The floor of an iteration is the multiply-adds that its linear layers do, at the rate a plain matrix product of their
size reaches here, plus the physics of its control steps at the rate the backend reaches alone. All else is overhead:
activations, optimisers, copies, rewards, Python. Where other programs run too, look at the ratio of CPU seconds.
"""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import nn

from flow_policy_rl import train
from flow_policy_rl.algorithms.ppo import PPO
from flow_policy_rl.errors import InputError
from flow_policy_rl.policy import NetworkConfig
from flow_policy_rl.presets import Preset
from flow_policy_rl.provenance import machine, versions
from flow_policy_rl.train_config import ScratchConfig, default_config


@dataclass(frozen=True)
class Config:
    """Training speed, and its floor. The defaults are the published ScoRe-Flow iteration on Hopper.

    Example: flow-policy bench train --algorithm score_flow --task hopper

    Attributes:
        algorithm: an on-policy algorithm.
        task: name of the task.
        preset: whose shape of rollout and update.
        num_envs: environments of a rollout (None: the preset's).
        num_steps: chunks of each environment in a rollout (None: the preset's).
        width: hidden units per layer of the velocity field.
        depth: its hidden layers.
        num_flow_steps: K.
        action_horizon: H; all of it is executed.
        num_iterations: that are timed, after one that is not.
        device: as in training.
        json: print one JSON object.
    """

    algorithm: Literal["fpo", "fpo_plus_plus", "score_flow", "reinflow", "gaussian_ppo"] = (
        "score_flow"
    )
    task: str = "hopper"
    preset: Preset = "paper"
    num_envs: int | None = None
    num_steps: int | None = None
    width: int = 512
    depth: int = 3
    num_flow_steps: int = 4
    action_horizon: int = 4
    num_iterations: int = 2
    device: Literal["auto", "cpu", "cuda"] = "auto"
    json: bool = False


def main(config: Config) -> dict:
    """Time iterations of a policy from scratch."""
    if config.num_iterations < 1:
        raise InputError(f"--num-iterations must be at least 1, not {config.num_iterations}")
    learner = build(config)
    device = learner.generator.device
    env, estimator = learner.collector.env, learner.estimator
    learner.iterate()
    physics, policy = Stopwatch(device), Stopwatch(device)
    env.backend.step = physics.around(env.backend.step)
    estimator.sample = policy.around(estimator.sample)
    counted = MultiplyAdds()
    rows, cpu_s = [], 0.0
    with counted:
        for _ in range(config.num_iterations):
            start, cpu_start = time.perf_counter(), time.process_time()
            metrics = learner.iterate()
            if device.type == "cuda":
                torch.cuda.synchronize()
            rows.append((time.perf_counter() - start, metrics["time/update_s"]))
            cpu_s += time.process_time() - cpu_start
            env_steps = metrics["rollout/env_steps"]
    per_iteration = 1 / config.num_iterations
    seconds = sum(s for s, _ in rows) * per_iteration
    update = sum(u for _, u in rows) * per_iteration
    physics_s, policy_s = physics.seconds * per_iteration, policy.seconds * per_iteration
    shape = (learner.config.micro_batch * config.num_flow_steps, config.width)
    product_s, product_cpu_s = best_of(matmul(*shape, device), repeats=20)
    rate = shape[0] * shape[1] ** 2 / product_s
    matmul_s = counted.total * per_iteration / rate
    raw_s, raw_cpu_s = raw_physics_s(learner)
    floor = matmul_s + raw_s
    cpu_floor = matmul_s * product_cpu_s / product_s + raw_cpu_s
    env.close()
    return {
        "algorithm": config.algorithm,
        "task": config.task,
        "env_steps_per_s": env_steps / seconds,
        "seconds_per_iteration": seconds,
        "share": {
            "rollout_physics": physics_s / seconds,
            "rollout_policy": policy_s / seconds,
            "update": update / seconds,
            "other": 1 - (physics_s + policy_s + update) / seconds,
        },
        "floor_seconds_per_iteration": floor,
        "ratio_to_floor": floor / seconds,
        "cpu_ratio_to_floor": cpu_floor / (cpu_s * per_iteration),
        "floor": {
            "multiply_adds": counted.total * per_iteration,
            "multiply_adds_per_s": rate,
            "matmul_s": matmul_s,
            "physics_s": floor - matmul_s,
        },
        "update_ratio_to_floor": counted.update * per_iteration / rate / update,
        "num_threads": torch.get_num_threads(),
        "machine": machine(),
        "versions": versions(),
    }


def build(config: Config) -> PPO:
    """The learner that training would build."""
    chosen = default_config(config.algorithm, config.task, config.preset, True)
    changes = {"num_envs": config.num_envs, "num_steps": config.num_steps, "critic_warmup": 0}
    changes = {name: value for name, value in changes.items() if value is not None}
    chosen = dataclasses.replace(
        chosen,
        device=config.device,
        ppo=dataclasses.replace(chosen.ppo, **changes),
        scratch=ScratchConfig(
            config.action_horizon,
            config.action_horizon,
            config.num_flow_steps,
            network=NetworkConfig(width=config.width, depth=config.depth),
        ),
    )
    device = train.choose_device(chosen)
    torch.manual_seed(0)
    task, base = train.starting_point(chosen)
    env = train.own_environments(task, chosen)
    return train.build_learner(chosen, base, env, torch.Generator(device).manual_seed(0))


class Stopwatch:
    """Adds up the time of calls."""

    def __init__(self, device: torch.device):
        self.seconds, self._device = 0.0, device

    def around(self, call: Callable) -> Callable:
        """The same function, timed."""

        def timed(*args, **kwargs):
            start = time.perf_counter()
            result = call(*args, **kwargs)
            if self._device.type == "cuda":
                torch.cuda.synchronize()
            self.seconds += time.perf_counter() - start
            return result

        return timed


class MultiplyAdds:
    """Counts those of linear layers, forward and backward, while it is entered."""

    def __init__(self):
        self.total = self.update = 0

    def __enter__(self) -> "MultiplyAdds":
        self._hook = nn.modules.module.register_module_forward_hook(self._count)
        return self

    def __exit__(self, *exc) -> None:
        self._hook.remove()

    def _count(self, module: nn.Module, given: tuple, out: torch.Tensor) -> None:
        if not isinstance(module, nn.Linear):
            return
        forward = out.numel() * module.in_features
        trained = torch.is_grad_enabled() and module.weight.requires_grad
        backward = trained * forward + out.requires_grad * given[0].requires_grad * forward
        self.total += forward + backward
        self.update += trained * forward + backward


def matmul(rows: int, width: int, device: torch.device) -> Callable[[], None]:
    """A call that multiplies (rows, width) by (width, width) in float32."""
    a, b = torch.randn(rows, width, device=device), torch.randn(width, width, device=device)
    out = torch.empty_like(a)

    def run() -> None:
        torch.mm(a, b, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return run


def raw_physics_s(learner: PPO) -> tuple[float, float]:
    """Seconds and CPU seconds of physics alone for one rollout: the backend on the states of now."""
    env, spec = learner.collector.env, learner.policy.spec
    actions = learner.policy.action_center.cpu().numpy()[None, None]
    actions = actions.repeat(env.num_envs, 0).repeat(spec.execute_horizon, 1)
    controls, _ = env.world.controls(env.command, actions)
    out = np.empty((env.num_envs, spec.execute_horizon, env.world.state_size))
    best = best_of(lambda: env.backend.step(env.state, controls, out), repeats=20)
    return tuple(s * learner.config.num_steps for s in best)


def best_of(call: Callable, repeats: int) -> tuple[float, float]:
    """Least seconds and CPU seconds of a call."""
    times = []
    for _ in range(repeats):
        start, cpu_start = time.perf_counter(), time.process_time()
        call()
        times.append((time.perf_counter() - start, time.process_time() - cpu_start))
    return min(s for s, _ in times), min(cpu for _, cpu in times)


def text(result: dict) -> str:
    """For people."""
    share = result["share"]
    return (
        f"{result['algorithm']} on {result['task']}: {result['env_steps_per_s']:,.0f} control steps/s, "
        f"{result['seconds_per_iteration']:.1f} s per iteration (physics {share['rollout_physics']:.0%}, "
        f"policy {share['rollout_policy']:.0%}, update {share['update']:.0%}, other {share['other']:.0%})\n"
        f"floor {result['floor_seconds_per_iteration']:.1f} s: {result['floor']['matmul_s']:.1f} s of matrix products "
        f"at {result['floor']['multiply_adds_per_s'] / 1e9:.1f} G multiply-adds/s, "
        f"{result['floor']['physics_s']:.1f} s of physics; reached {result['ratio_to_floor']:.0%} of it "
        f"({result['cpu_ratio_to_floor']:.0%} in CPU seconds)"
    )

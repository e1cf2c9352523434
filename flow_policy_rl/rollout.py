"""On-policy data: T chunks in N environments. The one place that says what a chunk is worth to a critic."""

import json
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flow_policy_rl import distributed
from flow_policy_rl.policy import to_tensors
from flow_policy_rl.spec import under_way
from sim.vec_env import ChunkStep, VecEnv

TensorDict = dict[str, Tensor]
ActFn = Callable[[TensorDict], tuple[Tensor, TensorDict]]  # obs -> (action chunk (N, H, A), trace)


@dataclass
class Rollout:
    """Everything one update needs, (T, N, ...) each.

    Attributes:
        obs, final_obs: before the chunk; at its last valid step.
        trace: what the algorithm wants to remember of its sampling.
        reward: sum over the executed steps, discounted inside the chunk.
        discount: gamma to the number of executed steps.
        return_before, return_after: undiscounted sum of the episode's rewards before and after the chunk.
        terminated, truncated: how the episode ended within the chunk, if it did.
        executed: (T, N, H), the actions of the chunk that ran.
        num_env_steps: valid control steps in all.
        outcomes: (M, 3), success, undiscounted return and control steps of the whole episodes whose time was up by the
            end of this rollout, and not of one before.
    """

    obs: TensorDict
    final_obs: TensorDict
    trace: TensorDict
    reward: Tensor
    discount: Tensor
    return_before: Tensor
    return_after: Tensor
    terminated: Tensor
    truncated: Tensor
    executed: Tensor
    num_env_steps: int
    outcomes: np.ndarray

    def metrics(self, steps_before: int = 0) -> dict[str, float]:
        """Counts over all processes, and means if an episode counts.

        Args:
            steps_before: control steps made before, only to look around.
        """
        steps = steps_before + self.num_env_steps
        counts = (steps, len(self.outcomes), *self.outcomes.sum(axis=0))
        steps, episodes, successes, return_sum, length_sum = distributed.sums(counts)
        counts = {"rollout/episodes": episodes, "rollout/env_steps": steps}
        if not episodes:
            return counts
        means = {
            "rollout/success_rate": successes / episodes,
            "rollout/return": return_sum / episodes,
            "rollout/episode_steps": length_sum / episodes,
        }
        return means | counts


def chunk_return(step: ChunkStep, gamma: float) -> tuple[np.ndarray, np.ndarray]:
    """Reward (N,) discounted inside the chunk, and the discount (N,) across it."""
    powers = gamma ** np.arange(step.reward.shape[1])
    return step.reward @ powers, gamma ** step.valid.sum(axis=1)


def executed_actions(
    step: ChunkStep, action_horizon: int, device: torch.device | None = None
) -> Tensor:
    """Which actions of a chunk ran before its episode ended, (N, H) bool; those beyond the executed horizon did not."""
    executed = torch.zeros(len(step.valid), action_horizon, dtype=torch.bool, device=device)
    executed[:, : step.valid.shape[1]] = torch.as_tensor(step.valid, device=device)
    return executed


class Collector:
    """Keeps environments going from one rollout to the next.

    Time limits are moved apart (`VecEnv.stagger`), so that a rollout sees all parts of an episode. What it shortens,
    the first episode of each environment, is learned from as any other that ran out of time, but not counted. Others
    count when their time is up, however early they ended: counted as they end, the first were all successes, which
    are quick, and no failure.

    With a prefix horizon P the robot of the rollouts is one whose inference takes time: each chunk after an episode's
    first one starts with d ~ U{0..P} actions of the chunk before it, which are in the observation (see `policy.Obs`).

    Args:
        encode: applied once to every observation before it is acted on and kept, e.g. by an encoder that is not
            being trained.
        device: of everything that a rollout keeps.
    """

    def __init__(
        self,
        env: VecEnv,
        execute_horizon: int,
        gamma: float,
        encode: Callable[[TensorDict], TensorDict] = lambda obs: obs,
        prefix_horizon: int = 0,
        device: torch.device | None = None,
    ):
        self.env = env
        self._device = device
        self.execute_horizon = execute_horizon
        self.gamma = gamma
        self._encode = encode
        self._prefix_horizon = prefix_horizon
        self._delays = np.random.default_rng((env.seed, 3, env.first_env))
        with torch.no_grad():
            self._obs = encode(to_tensors(env.reset(), device))
        env.stagger()
        self._clock = 0  # control steps since then
        self._begun = np.full(env.num_envs, -1)  # clock when the episode began; -1: it is shortened
        # Of each whole episode that ended: when its time is up, success, return, control steps.
        self._outcomes = np.zeros((0, 4))
        if prefix_horizon:
            shape = (env.num_envs, prefix_horizon, len(env.world.joint_names))
            self._obs |= {
                "prefix": torch.zeros(shape, device=device),
                "inference_delay": torch.zeros(env.num_envs, dtype=torch.int64, device=device),
            }
        self._return = np.zeros(env.num_envs)

    @torch.no_grad()
    def collect(self, act: ActFn, num_steps: int) -> Rollout:
        """Run `num_steps` chunks everywhere, executing the first `execute_horizon` actions of each."""
        rows, num_env_steps = [], 0
        for _ in range(num_steps):
            action_chunk, trace = act(self._obs)
            elapsed = self.env.elapsed
            step = self.env.step(action_chunk[:, : self.execute_horizon].cpu().numpy())
            reward, discount = chunk_return(step, self.gamma)
            final_obs = self._encode(to_tensors(step.final_obs, self._device))
            return_before = self._return.copy()
            self._return += step.reward.sum(axis=1)
            rows.append(
                {
                    "obs": self._obs,
                    "final_obs": final_obs,
                    "trace": trace,
                    "executed": executed_actions(step, action_chunk.shape[1], self._device),
                    **to_tensors(
                        {
                            "reward": reward,
                            "discount": discount,
                            "return_before": return_before,
                            "return_after": self._return.copy(),
                            "terminated": step.terminated,
                            "truncated": step.truncated,
                        },
                        self._device,
                    ),
                }
            )
            valid = step.valid.sum(axis=1)
            num_env_steps += int(valid.sum())
            due = self._begun + self.env.time_limit
            outcomes = (due, step.success, self._return, elapsed + valid)
            whole = step.ended & (self._begun >= 0)
            self._outcomes = np.concatenate([self._outcomes, np.stack(outcomes, axis=1)[whole]])
            self._clock += self.execute_horizon
            self._begun[step.ended] = self._clock
            self._return[step.ended] = 0.0
            self._obs = self._next_obs(step, final_obs)
            if self._prefix_horizon:
                self._obs = self._obs | self._under_way(step, action_chunk)
        return Rollout(
            **stack(rows),
            num_env_steps=num_env_steps,
            outcomes=self._outcomes_due(),
        )

    def state(self) -> dict[str, np.ndarray]:
        """Everything that the next rollout depends on, as arrays; delays are drawn from a generator of its own."""
        obs = {f"obs.{name}": values.cpu().numpy() for name, values in self._obs.items()}
        delays = json.dumps(self._delays.bit_generator.state).encode()
        return obs | {
            "return": self._return,
            "clock": np.array(self._clock),
            "begun": self._begun,
            "outcomes": self._outcomes,
            "delays": np.frombuffer(delays, np.uint8),
            **{f"env.{name}": values for name, values in self.env.snapshot().items()},
        }

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Go on from there."""
        self._obs = {
            name: torch.as_tensor(state[f"obs.{name}"], device=self._device) for name in self._obs
        }
        self._return, self._begun = state["return"].copy(), state["begun"].copy()
        self._clock, self._outcomes = int(state["clock"]), state["outcomes"]
        self._delays.bit_generator.state = json.loads(state["delays"].tobytes())
        self.env.restore(
            {name[4:]: values for name, values in state.items() if name.startswith("env.")}
        )

    def _outcomes_due(self) -> np.ndarray:
        """Outcomes (M, 3) of the episodes whose time is up now; they are forgotten."""
        due = self._outcomes[:, 0] <= self._clock
        counted, self._outcomes = self._outcomes[due, 1:], self._outcomes[~due]
        return counted

    def _next_obs(self, step: ChunkStep, final_obs: TensorDict) -> TensorDict:
        """The observation after a chunk, encoded; it differs from the final one only where an episode ended."""
        ended = np.flatnonzero(step.ended)
        if len(ended) == 0:
            return final_obs
        begun = self._encode(
            to_tensors({name: v[ended] for name, v in step.obs.items()}, self._device)
        )
        obs = {name: values.clone() for name, values in final_obs.items()}
        for name, values in begun.items():
            obs[name][ended] = values
        return obs

    def _under_way(self, step: ChunkStep, action_chunk: Tensor) -> TensorDict:
        """What of the last chunk will still be executed while the next one is computed."""
        delay = self._delays.integers(self._prefix_horizon + 1, size=self.env.num_envs)
        return {
            "prefix": under_way(action_chunk, self.execute_horizon, self._prefix_horizon),
            "inference_delay": torch.as_tensor(np.where(step.ended, 0, delay), device=self._device),
        }


def stack(rows: list[dict]) -> dict:
    """A list of nested dicts of tensors to one nested dict, with a new first axis."""
    first = rows[0]
    return {
        key: stack([row[key] for row in rows])
        if isinstance(first[key], dict)
        else torch.stack([row[key] for row in rows])
        for key in first
    }


def flatten(tensors: TensorDict) -> TensorDict:
    """(T, N, ...) -> (T * N, ...) for each."""
    return {name: values.flatten(0, 1) for name, values in tensors.items()}


def select(tensors: TensorDict, rows: Tensor) -> TensorDict:
    """Some rows of each."""
    return {name: values[rows] for name, values in tensors.items()}

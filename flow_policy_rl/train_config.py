"""What `flow-policy train ALGO` is told: a config per algorithm, and its defaults by task and preset."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from flow_policy_rl import presets
from flow_policy_rl.algorithms.bc import BCConfig
from flow_policy_rl.algorithms.fpo import FPOConfig
from flow_policy_rl.algorithms.gaussian import GaussianConfig
from flow_policy_rl.algorithms.ppo import PPOConfig
from flow_policy_rl.algorithms.rldt import RLDTConfig
from flow_policy_rl.algorithms.score_flow import ScoreFlowConfig
from flow_policy_rl.logger import Tracker
from flow_policy_rl.policy import NetworkConfig
from flow_policy_rl.presets import Preset
from sim.backends import BackendName
from sim.randomize import PresetName


@dataclass(frozen=True)
class ScratchConfig:
    """A policy without pre-training: feedback at every step, which exploration without a plan needs.

    Attributes:
        action_horizon: H, actions per chunk.
        execute_horizon: actions executed before the next chunk.
        num_flow_steps: K, integration steps.
        prefix_horizon: P, most actions of a previous chunk that the policy learns to continue.
        network: size of the velocity field.
    """

    action_horizon: int = 1
    execute_horizon: int = 1
    num_flow_steps: int = 4
    prefix_horizon: int = 0
    network: NetworkConfig = field(default_factory=NetworkConfig)


@dataclass(frozen=True)
class TrainBC:
    """Flow-matching imitation of demonstrations.

    Example: flow-policy train bc --task lift --demos demos.hdf5 --run-dir runs/bc

    Attributes:
        task: name of the task; `recorded` for data of a robot or task that has no simulation here.
        demos: robomimic HDF5, LeRobot v3 folder, Minari folder or D4RL file.
        run_dir: folder to write.
        seed: of initial weights and batches.
        resume: go on from the last state of the run folder, exactly.
        action_horizon: H, actions per chunk.
        execute_horizon: actions executed before the next chunk.
        num_flow_steps: K, integration steps.
        prefix_horizon: P, most actions of a previous chunk that the policy learns to continue (real-time chunking);
            0 is none.
        network: size of the velocity field.
        bc: optimisation.
        track: send metrics to these as well: wandb, trackio.
        json: print one JSON object.
    """

    task: str
    demos: Path
    run_dir: Path = Path("runs/bc")
    seed: int = 0
    resume: bool = False
    action_horizon: int = 12
    execute_horizon: int = 8
    num_flow_steps: int = 4
    prefix_horizon: int = 0
    network: NetworkConfig = field(default_factory=lambda: NetworkConfig(predicts="chunk"))
    bc: BCConfig = field(default_factory=BCConfig)
    track: tuple[Tracker, ...] = ()
    json: bool = False


@dataclass(frozen=True)
class TrainRL:
    """What every RL algorithm takes.

    Attributes:
        task: name of the task.
        task_options: names and values of the task's own options, e.g. `reward dense`.
        checkpoint: pre-trained policy to start from (None: from scratch).
        run_dir: folder to write.
        algorithm: name of the algorithm, as in the run folder and the policy's spec.
        preset: `clean` (ours) or `paper` (published settings): the defaults of all that follows. Some differ between
            training from a checkpoint and from scratch.
        seed: of environments, exploration and batches.
        eval_every: iterations between evaluations at zero noise (0: never).
        eval_episodes: episodes of each.
        stop_at: end at the first evaluation that reaches this success rate, or return where a task has no success; for
            a policy of a chosen skill.
        save_every: iterations between checkpoints; each overwrites the one before.
        resume: go on from the last checkpoint of the run folder, exactly.
        device: where networks and rollouts live; `auto` is CUDA where there is some.
        backend: what computes the physics: cpu, warp (MuJoCo Warp on an NVIDIA GPU), or warp-cpu (the same on the CPU);
            with -pixels it draws the pictures too (docs/simulation.md).
        randomize: each episode of training in a world, senses and links that differ: nominal, mild or hard. Evaluations
            stay nominal.
        time_limit: control steps after which an episode of training is cut off (None: the task's, which evaluations
            always have). Where success comes early, what follows a failure teaches little and takes long.
        peer_timeout_s: how long the processes of torchrun wait for one another.
        scratch: the policy, where there is no checkpoint.
        track: send metrics to these as well: wandb, trackio.
        json: print one JSON object.
    """

    task: str
    task_options: dict[str, str] = field(default_factory=dict)
    checkpoint: Path | None = None
    run_dir: Path = Path("runs/rl")
    algorithm: str = ""
    preset: Preset = "clean"
    seed: int = 0
    eval_every: int = 5
    eval_episodes: int = 100
    stop_at: float | None = None
    save_every: int = 5
    resume: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    backend: BackendName = "cpu"
    randomize: PresetName = "nominal"
    time_limit: int | None = None
    peer_timeout_s: float = 60.0
    scratch: ScratchConfig = field(default_factory=ScratchConfig)
    track: tuple[Tracker, ...] = ()
    json: bool = False


@dataclass(frozen=True)
class TrainOnPolicy(TrainRL):
    """What every on-policy algorithm takes.

    Attributes:
        ppo: the on-policy loop.
    """

    ppo: PPOConfig = field(default_factory=PPOConfig)

    @property
    def loop(self) -> PPOConfig:
        """num_iterations and num_envs."""
        return self.ppo


@dataclass(frozen=True)
class TrainScoreFlow(TrainOnPolicy):
    """ScoRe-Flow, and ReinFlow as its case without drift: PPO on the flow's chain of transitions.

    Example: flow-policy train score_flow --task lift --checkpoint runs/bc/policy.safetensors --run-dir runs/rl

    Attributes:
        score_flow: the transition kernel.
    """

    score_flow: ScoreFlowConfig = field(default_factory=ScoreFlowConfig)


@dataclass(frozen=True)
class TrainFPO(TrainOnPolicy):
    """FPO and FPO++: PPO with a ratio from flow-matching losses.

    Example: flow-policy train fpo_plus_plus --task lift --checkpoint runs/bc/policy.safetensors --run-dir runs/rl

    Attributes:
        fpo: the ratio.
    """

    fpo: FPOConfig = field(default_factory=FPOConfig)


@dataclass(frozen=True)
class TrainGaussian(TrainOnPolicy):
    """Gaussian PPO, the control: the same loop and network, with Gaussian noise on the zero-noise chunk.

    Example: flow-policy train gaussian_ppo --task lift --checkpoint runs/bc/policy.safetensors --run-dir runs/rl

    Attributes:
        gaussian: its standard deviation.
    """

    gaussian: GaussianConfig = field(default_factory=GaussianConfig)


@dataclass(frozen=True)
class TrainRLDT(TrainRL):
    """RLDT: samples of the flow move along the field of a learned critic, off policy.

    Example: flow-policy train rldt --task lift --checkpoint runs/bc/policy.safetensors --run-dir runs/rl

    Attributes:
        rldt: density transport, its critic and its field.
    """

    rldt: RLDTConfig = field(default_factory=RLDTConfig)

    @property
    def loop(self) -> RLDTConfig:
        """num_iterations and num_envs."""
        return self.rldt


ALGORITHMS = {
    "bc": TrainBC,
    "fpo": TrainFPO,
    "fpo_plus_plus": TrainFPO,
    "score_flow": TrainScoreFlow,
    "reinflow": TrainScoreFlow,
    "rldt": TrainRLDT,
    "gaussian_ppo": TrainGaussian,
}


def default_config(algorithm: str, task: str, preset: Preset = "clean", from_scratch: bool = False):
    """The preset of a task, from a checkpoint or from scratch, as a config whose paths are still to be given."""
    settings = presets.PRESETS[algorithm](task, preset, from_scratch)
    if algorithm == "bc":
        return TrainBC(task=task, demos=Path("demos.hdf5"), bc=settings)
    return ALGORITHMS[algorithm](
        task=task,
        run_dir=Path("runs") / algorithm,
        algorithm=algorithm,
        preset=preset,
        **settings,
    )

"""`flow-policy demo`: the whole product on real input, and one page that shows what happened.

    collect -> pretrain -> fine_tune -> evaluate -> export -> deploy (ROS 2) -> replay -> report

Each stage leaves its files in the run folder and an entry in `stages.json`; `--resume` goes on after
the last one that finished.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flow_policy_rl import ros
from flow_policy_rl.errors import InputError, RunFailed, refuse_below
from flow_policy_rl.run_folder import claimed, end_like_ctrl_c


@dataclass(frozen=True)
class Config:
    """Demonstrations, imitation, RL fine-tuning, policy.onnx, a ROS 2 arm, a rosbag and a report, in a few minutes.

    Example: flow-policy demo --run-dir runs/demo

    Attributes:
        algorithm: how the policy is fine-tuned.
        task: what it learns.
        cameras: the policy sees the object through a camera instead of being told where it is.
        run_dir: folder for everything; emptied first unless --resume.
        seed: of the whole run.
        episodes: evaluation episodes of base and fine-tuned policy.
        ros_episodes: closed-loop episodes over ROS.
        real_time_factor: simulated seconds per second while over ROS.
        resume: go on after the last finished stage of the run folder.
        json: print one JSON object.
    """

    algorithm: Literal["score_flow", "reinflow", "fpo", "fpo_plus_plus", "rldt", "gaussian_ppo"] = (
        "score_flow"
    )
    task: str = "lift"
    cameras: bool = False
    run_dir: Path = Path("runs/demo")
    seed: int = 0
    episodes: int = 200
    ros_episodes: int = 100
    real_time_factor: float = 5.0
    resume: bool = False
    json: bool = False


def main(config: Config) -> dict:
    """Run the demo. SIGTERM ends it like Ctrl-C."""
    check(config)
    end_like_ctrl_c()
    for package in ("rclpy", "flow_policy_ros"):
        if package not in sys.modules:
            ros.node_command("sim_node", {})  # fail now, not after minutes of training
    from flow_policy_rl.demo_stages import Demo

    try:
        with claimed(config.run_dir):
            return Demo(config).run()
    except KeyboardInterrupt:
        print(
            f"\ninterrupted; go on with: flow-policy demo --run-dir {config.run_dir} --resume",
            file=sys.stderr,
        )
        raise
    except RunFailed as error:
        raise RunFailed(f"{error}; go on with --resume") from None


def check(config: Config) -> None:
    """Refuse what can be refused before anything runs.

    Raises:
        InputError, SimulationError: a number out of range; a task that is unknown, or has no robot or no expert.
    """
    from sim.expert import has_expert
    from sim.tasks import make_task

    refuse_below(config, episodes=1, ros_episodes=1)
    if not 0.01 <= config.real_time_factor <= 1000:  # the range of the parameter of sim_node
        raise InputError(
            f"--real-time-factor must be between 0.01 and 1000, not {config.real_time_factor:g}"
        )
    task = make_task(config.task, cameras=config.cameras or None)
    ros.robot_of(task)
    if not has_expert(task):
        raise InputError(f"task '{task.name}' has no scripted expert, from whom the demo learns")


def text(result: dict) -> str:
    """For people."""
    from flow_policy_rl import demo_page

    rows = result["table"]
    widths = {key: max(len(key), *(len(row[key]) for row in rows)) for key in rows[0]}
    lines = ["  ".join(key.ljust(widths[key]) for key in rows[0])]
    lines += ["  ".join(row[key].ljust(widths[key]) for key in row) for row in rows]
    if stops := result["ros"]["emergency_stops"]:
        lines += [f"{stops} episodes over ROS ended in an emergency stop of the policy node"]
    return "\n".join(
        [
            "",
            *lines,
            "",
            f"latency over ROS: {demo_page.latency(result['latency_ms']['end_to_end'])}; "
            f"policy.onnx differs from torch by {result['parity_max_abs_error']:.1e} rad at most; "
            f"{result['seconds']['total']:.0f} s in all",
            f"policy: {result['policy']}",
            f"bag:    {result['bag']}",
            f"report: {result['report']}",
        ]
    )

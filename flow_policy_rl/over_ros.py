"""Closed-loop episodes over ROS 2: a simulated arm, a policy node and the runner of episodes, each a process."""

import json
import re
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from flow_policy_rl import ros
from flow_policy_rl.evaluate import wilson_interval
from flow_policy_rl.progress import Progress

EPISODE_TIMEOUT_S = 60.0
POLL_S = 0.2

Nodes = Mapping[str, Mapping[str, object]]


def run_episodes(nodes: Nodes, episodes: int, folder: Path, title: str = "over ROS") -> dict:
    """Run `sim_node` and `policy_node` (with their parameters, and whatever else is given) through episodes.

    Returns success rate and interval, number of episodes and of emergency stops, and the times (s) from publishing a
    state to receiving the command that it triggered, in the simulation's process.

    Raises:
        RunFailed: a node ended; see its log in the folder.
    """
    out = folder / "episodes.json"
    runner_values = {
        "episodes": episodes,
        "out": str(out.absolute()),
        "episode_timeout_s": EPISODE_TIMEOUT_S,
    }
    with (
        ros.processes({**nodes, "episode_runner": runner_values}, folder / "ros") as running,
        Progress(title, episodes, "episode") as progress,
    ):
        runner = running["episode_runner"]
        while runner.running:
            for process in running.values():
                process.check()
            log = runner.log.read_text(errors="replace")
            done = re.findall(r"^episode (\d+)/", log, re.MULTILINE)
            progress.reach(int(done[-1]) if done else 0)
            time.sleep(POLL_S)
        runner.check()
    data = json.loads(out.read_text())
    successes = sum(e["success"] for e in data["episodes"])
    return {
        "success_rate": successes / episodes,
        "success_ci95": list(wilson_interval(successes, episodes)),
        "episodes": episodes,
        "emergency_stops": sum(bool(e["emergency_stop"]) for e in data["episodes"]),
        "end_to_end_s": np.array(data["end_to_end_s"]),
    }

"""Replay through the real node: the bag is played into `policy_node` over ROS 2, what it plans is recorded and read.

Processes are started, nothing of ROS is imported: player, policy node (in dry run) and recorder, on a domain of their
own.
"""

import shutil
import signal
import time
from pathlib import Path

import numpy as np

from flow_policy_rl.data.bags import Bag
from flow_policy_rl.errors import InputError, RunFailed
from flow_policy_rl.offline.durations import Durations, read_stages
from flow_policy_rl.offline.recording import INFERENCE_TOPIC
from flow_policy_rl.ros import processes
from flow_policy_rl.serving import shipped
from flow_policy_rl.serving.decode import stamp_ns
from flow_policy_rl.serving.robot import Robot
from flow_policy_rl.serving.streams import topics_of
from flow_policy_rl.spec import PolicySpec

PLANNED_TOPIC = "/policy_node/planned_chunk"
INSIDE = ("wait_ms", "inference_ms", "publish_ms")
END_S = 10.0


def play(
    bag: Path,
    policy: Path,
    robot_file: str,
    robot: Robot,
    played: Robot,
    spec: PolicySpec,
    out: Path,
) -> dict[int, np.ndarray]:
    """Chunks (H, A) that the node planned, by stamp of their observation (ns). The recording stays in `out`/graph.

    Args:
        robot: topics as the bag has them.
        played: topics as the node expects them (the robot file's own).

    Raises:
        RunFailed: a node ended with an error, or planned nothing.
    """
    folder = out / "graph"
    if folder.exists():
        shutil.rmtree(folder)
    pairs = {
        recorded: topic
        for recorded, topic in zip(_inputs(spec, robot), _inputs(spec, played), strict=True)
    }
    listening = {
        "recorder": {"bag": str(folder)},
        "policy_node": {
            "policy": str(shipped.find(policy).absolute()),
            "robot": robot_file,
            "use_sim_time": True,
            "armed": False,
        },
    }
    topics = ",".join(f"{recorded}={topic}" for recorded, topic in pairs.items())
    nodes = listening | {"player": {"bag": str(bag.absolute()), "topics": topics}}
    with processes(nodes, out / "ros") as started:
        while started["player"].running:
            for process in started.values():
                process.check()
            time.sleep(0.1)
        for process in started.values():
            process.check()
        started["policy_node"].signal(signal.SIGINT)
        started["policy_node"].wait(END_S)
        started["recorder"].signal(signal.SIGINT)
        started["recorder"].wait(END_S)
    return planned(folder, spec)


def _inputs(spec: PolicySpec, robot: Robot) -> list[str]:
    topics = list(topics_of(spec, robot.topics))
    joints = robot.topics.joint_states
    return topics if joints in topics else [*topics, joints]


def planned(folder: Path, spec: PolicySpec) -> dict[int, np.ndarray]:
    """What was planned, from the recording of a node.

    Raises:
        RunFailed: nothing.
    """
    bag, found = Bag(folder), {}
    for message in bag.messages([PLANNED_TOPIC]):
        msg = bag.deserialize(message)
        order = [list(msg.joint_names).index(name) for name in spec.joint_names]
        found[stamp_ns(msg)] = np.array([p.positions for p in msg.points])[:, order]
    if not found:
        logs = sorted(str(p) for p in (folder.parent / "ros").glob("*.log"))
        raise RunFailed(f"the node planned nothing; see {', '.join(logs) or folder}")
    return found


def stages(folder: Path) -> tuple[dict[str, Durations], np.ndarray]:
    """Latencies by stage that the node recorded, and the sum of those inside the node, (n,) s."""
    bag, found, sums = Bag(folder), {}, []
    for message in bag.messages([INFERENCE_TOPIC]):
        read_stages(msg := bag.deserialize(message), found)
        values = {pair.key: pair.value for status in msg.status for pair in status.values}
        inside = [float(values[key]) for key in INSIDE if key in values]
        sums.append(sum(inside) / 1e3)
    return found, np.array(sums)


def require_ros() -> None:
    """Refuse early where ROS is missing.

    Raises:
        InputError: what is missing, and how to get it.
    """
    from flow_policy_rl.ros import node_command

    try:
        node_command("player", {})
    except InputError as error:
        raise InputError(f"--mode graph needs ROS 2: {error}") from None

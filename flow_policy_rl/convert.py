"""`flow-policy convert`: recorded robots to data sets. Reads a rosbag2, LeRobot v3, robomimic HDF5, Minari or D4RL;
writes robomimic HDF5 (a name that ends in .hdf5) or LeRobot v3 (a folder).

A bag is read in one pass with the decoders of the live node; see `data/frames.py` for alignment and splitting. Beside
the output come `<output>.health.html` and `<output>.health.json`: statistics, findings, and what was left out and why.
"""

import json
import logging
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np

from flow_policy_rl import __version__, report
from flow_policy_rl.data import sources
from flow_policy_rl.data.bags import Bag
from flow_policy_rl.data.frames import End, FrameReader, Splitting, layout_from_robot
from flow_policy_rl.data.health import Health, of_demonstrations
from flow_policy_rl.data.robomimic import HDF5, DemoLayout, RobomimicWriter
from flow_policy_rl.errors import (
    InputError,
    near_match,
    output_file,
    refuse_below,
    refuse_unread,
)
from flow_policy_rl.offline.truth import refuse_unfollowed
from flow_policy_rl.replay import mapped
from flow_policy_rl.serving.robot import Robot, load_robot, robot_names
from flow_policy_rl.spec import LARGEST_SIDE

LOG = logging.getLogger(__name__)
# Settings that say how a bag is read.
FOR_BAGS = (
    "task_options",
    "topics",
    "cameras",
    "rate",
    "resolution",
    "actions",
    "truth_topic",
    "max_age",
    "splitting",
)


@dataclass(frozen=True)
class Config:
    """Make a data set of a bag, or of another data set.

    Example: flow-policy convert --input bag --output demos.hdf5 --task lift --splitting.end-topic /sim_node/success

    Attributes:
        input: rosbag2, LeRobot v3 folder, robomimic HDF5, Minari folder or D4RL file.
        output: file ending in .hdf5 (robomimic layout), or a new folder (LeRobot v3).
        task: name of the task. For a bag, one that `flow-policy list tasks` knows gives the layout its policies expect;
            a data set gets the name in place of its own.
        task_options: for a bag of a known task: names and values of the task's own options, which the data set keeps.
        robot: name of a robot, or path of a robot file (None: that of the task); for a data set, whose limits the
            health page takes.
        topics: NAME=TOPIC pairs that override the robot file; NAME is joint_states, command, an object or a camera.
        cameras: with a known task: its layout with cameras.
        rate: frames per second (None: that of the task, else 20).
        resolution: height and width of pictures (None: that of the task, else as recorded).
        actions: what the actions are: command topic, controller reference, or next measured state.
        truth_topic: topic of the command or of the controller state (empty: that of the robot file).
        max_age: s; an older sample of a stream ends the episode.
        splitting: where episodes begin and end.
        json: print one JSON object.
    """

    input: Path
    output: Path
    task: str = "unknown"
    task_options: dict[str, str] = field(default_factory=dict)
    robot: str | None = None
    topics: tuple[str, ...] = ()
    cameras: bool = False
    rate: float | None = None
    resolution: tuple[int, int] | None = None
    actions: Literal["command", "controller", "state"] = "command"
    truth_topic: str = ""
    max_age: float = 0.2
    splitting: Splitting = field(default_factory=Splitting)
    json: bool = False


def main(config: Config) -> dict:
    """Convert, write the health page."""
    start = time.monotonic()
    kind = sources.kind_of(config.input)
    if config.output.exists():
        raise InputError(f"output '{config.output}' exists already")
    if config.output.suffix not in ("", *HDF5):
        raise InputError(
            f"output '{config.output}': a name that ends in {' or '.join(HDF5)} is a robomimic file, "
            "one without an ending a LeRobot folder"
        )
    if config.rate is not None and not 0 < config.rate <= 1000:
        raise InputError(
            f"--rate must be between 0 and 1000 frames per second, not {config.rate:g}"
        )
    if config.resolution and not all(1 <= side <= LARGEST_SIDE for side in config.resolution):
        height, width = config.resolution
        raise InputError(
            f"--resolution must be from 1 to {LARGEST_SIDE} pixels each way, not {height} {width}"
        )
    refuse_below(config, max_age=0)
    refuse_below(config.splitting, min_steps=0)
    page, numbers = (
        output_file(config.output.with_name(f"{config.output.name}.health.{ending}"))
        for ending in ("html", "json")
    )
    converted = from_bag(config) if kind == "bag" else from_dataset(config, kind)
    if near := near_task(config.task):
        print(f"note: --task '{config.task}' is no task here{near}", file=sys.stderr)
    health, provenance, tables = converted
    summary = health.summary()
    health.write_page(page, "Data set", f"{config.output}, from {config.input}", tables)
    result = {
        "schema_version": 1,
        "input": str(config.input),
        "output": str(config.output),
        "format": "robomimic" if config.output.suffix in HDF5 else "lerobot",
        **provenance,
        **{k: summary[k] for k in ("episodes", "steps", "successes", "coverage", "findings")},
        "seconds": time.monotonic() - start,
        "health": str(page),
    }
    numbers.write_text(json.dumps(result | {"statistics": summary["statistics"]}, indent=2) + "\n")
    return result


def from_bag(config: Config) -> tuple[Health, dict, list]:
    """One pass over a bag."""
    bag = Bag(config.input)
    layout, robot = bag_layout(config, bag)
    reader = FrameReader(
        bag, layout, robot, config.splitting, config.actions, config.truth_topic, config.max_age
    )
    health = Health(layout, robot)
    with sources.writer_for(config.output, layout) as writer:
        first = True
        for item in reader.read():
            if isinstance(item, End):
                writer.end(item.keep, item.success)
                health.end(item.keep, item.success)
                continue
            if first:
                check_pictures(layout, item.obs)
                first = False
            writer.frame(item.obs, item.action)
            health.frame(item.obs, item.action)
        refuse_unfollowed(reader.truth, bag, reader.truth_topics, "--actions")
        if not writer.num_episodes:
            raise no_episode(config.input, reader)
        provenance = provenance_of(config, reader)
        writer.close(provenance)
    return health, provenance, tables_of(provenance)


def provenance_of(config: Config, reader: FrameReader) -> dict:
    """Where the data come from, and what was left out."""
    facts = reader.facts
    return {
        "source": str(config.input),
        "version": __version__,
        "task_options": config.task_options,
        "actions": {"kind": config.actions, "topic": reader.truth_topics[0]},
        "rate_hz": 1 / reader.layout.control_dt,
        "frames_without_action": facts.without_action,
        "stale": dict(facts.stale),
        "repeated_pictures": dict(facts.repeated),
        "pictures": {t: {"recorded": facts.messages[t], "used": facts.used[t]} for t in facts.used},
        "ended_by": dict(facts.ends),
        "discarded_episodes": dict(facts.discarded),
        "problems": reader.problems.rows(),
    }


def no_episode(bag: Path, reader: FrameReader) -> InputError:
    """Why there is none."""
    facts, problems = reader.facts, reader.problems
    reasons = [f"{k} ({v}x)" for k, v in facts.discarded.items()]
    reasons += [f"{facts.without_action} frames without an action"] * bool(facts.without_action)
    reasons += [str(problems)] * bool(len(problems))
    return InputError(f"bag '{bag}' gives no episode: {'; '.join(reasons) or 'no complete frame'}")


def bag_layout(config: Config, bag: Bag) -> tuple[DemoLayout, Robot]:
    """What a frame holds: as the named task has it, or all that robot file and bag offer."""
    from sim.tasks import make_task, task_names

    if config.task in task_names():
        given = {"robot": config.robot, "cameras": config.cameras or None}
        task = make_task(config.task, **given | config.task_options)
        layout = DemoLayout.of_task(task)
        if config.rate is not None and abs(config.rate * layout.control_dt - 1) > 1e-6:
            raise InputError(
                f"--rate {config.rate:g}: task '{config.task}' acts at {1 / layout.control_dt:g} Hz"
            )
        robot = load_robot(config.robot or layout.robot)
        return layout, mapped(robot, config.topics)
    if config.task_options:
        raise InputError(
            f"--task-options: '{config.task}' is no task here{near_task(config.task)}; "
            "flow-policy list tasks says which there are"
        )
    if config.robot is None:
        raise InputError(
            f"--robot is needed for task '{config.task}'{near_task(config.task)}; "
            f"valid: {', '.join(robot_names())}, or a robot file"
        )
    robot = mapped(load_robot(config.robot), config.topics)
    dt = 1 / (config.rate or 20.0)
    return layout_from_robot(bag, robot, config.task, dt, config.resolution), robot


def near_task(name: str) -> str:
    """The task that may have been meant; a recorded one may have any name, so empty where none is near."""
    from sim.tasks import task_names

    return "" if name in task_names() else near_match(name, task_names())


def check_pictures(layout: DemoLayout, obs: dict) -> None:
    """Refuse a frame that is not what the layout says."""
    for f in layout.observations:
        if obs[f.name].shape != f.shape:
            raise InputError(f"field '{f.name}' has shape {obs[f.name].shape}, not {f.shape}")


def from_dataset(config: Config, kind: str) -> tuple[Health, dict, list]:
    """From one format to the other."""
    unread = (
        f"is for bags; '{config.input}' is a data set ({kind}), whose frames are taken as they are"
    )
    refuse_unread(config, unread, *FOR_BAGS)
    demos = sources.load(config.input)
    if config.task != Config.task:
        demos = replace(demos, layout=replace(demos.layout, task=config.task))
    provenance = {"source": str(config.input), "source_format": kind, "version": __version__}
    dense = any(not np.isin(e.rewards, (0, 1)).all() for e in demos.episodes)
    if dense and config.output.suffix not in HDF5:
        LOG.warning(
            "rewards are left out: a LeRobot folder of ours has success alone; a .hdf5 file keeps them"
        )
    with sources.writer_for(config.output, demos.layout) as writer:
        for episode in demos.episodes:
            if isinstance(writer, RobomimicWriter):
                writer.episode(episode)
                continue
            for t in range(len(episode.actions)):
                writer.frame({k: v[t] for k, v in episode.obs.items()}, episode.actions[t])
            writer.end(success=episode.succeeded)
        writer.close(demos.provenance | provenance)
    known = config.robot or (demos.layout.robot if demos.layout.robot in robot_names() else None)
    return of_demonstrations(demos, load_robot(known) if known else None), provenance, []


def tables_of(provenance: dict) -> list[report.Table]:
    """What was left out, for the page."""
    rows = [["frames without a known action", str(provenance["frames_without_action"])]]
    rows += [[f"stale {topic}: episode ended", str(n)] for topic, n in provenance["stale"].items()]
    for topic, counts in provenance["pictures"].items():
        repeated = provenance["repeated_pictures"].get(topic, 0)
        text = (
            f"{counts['recorded']} recorded, {counts['used']} used, {repeated} shown twice or more"
        )
        rows.append([f"pictures of {topic}", text])
    rows += [[f"episode ended by: {why}", str(n)] for why, n in provenance["ended_by"].items()]
    rows += [
        [f"episode left out: {why}", str(n)] for why, n in provenance["discarded_episodes"].items()
    ]
    tables = [report.Table("Frames and episodes", ["", ""], rows)]
    if provenance["problems"]:
        lost = [
            [p["topic"], p["reason"], str(p["count"]), p["first"]] for p in provenance["problems"]
        ]
        tables.append(report.Table("Not used", ["where", "reason", "count", "first"], lost))
    return tables


def text(result: dict) -> str:
    """For people."""
    lines = [
        f"{result['episodes']} episodes, {result['steps']} steps in {result['seconds']:.1f} s: {result['output']} "
        f"({result['format']})"
    ]
    for finding in result["findings"]:
        if finding["level"] != "ok":
            lines.append(f"{finding['level']}: {finding['name']}: {finding['detail']}")
    for problem in result.get("problems", [])[:8]:
        lines.append(f"not used: {problem['topic']}: {problem['reason']} ({problem['count']}x)")
    for why, count in result.get("discarded_episodes", {}).items():
        lines.append(f"left out: {count} episodes: {why}")
    return "\n".join([*lines, f"health: {result['health']}"])

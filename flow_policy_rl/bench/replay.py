"""`flow-policy bench replay`: replay and conversion against real time, and their memory against the length of a bag.

Bags are made on the fly: a Panda at 100 Hz, a pose at 50 Hz, commands at 2.5 Hz, and for the camera bag two cameras of
640 x 480 at 30 Hz, not compressed (55 MB per second). Policies are freshly initialised, with the networks that our
tasks train; the one for the camera bag looks through both cameras. Replays are timed in this process (reading,
decoding, inference, numbers, without the pages); memory is that of whole commands in processes of their own, for a bag
and for one of a quarter of its size.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import yaml

from flow_policy_rl import provenance
from flow_policy_rl.data.bags import TYPESTORE, BagWriter
from flow_policy_rl.errors import InputError, RunFailed
from flow_policy_rl.progress import Progress
from flow_policy_rl.serving.decode import POSE_ELEMENTS
from flow_policy_rl.serving.robot import load_robot
from flow_policy_rl.spec import ObservationField, PolicySpec

HEIGHT, WIDTH, CAMERAS, CAMERA_HZ = 480, 640, ("front", "wrist"), 30
STATE_HZ, POSE_HZ, COMMAND_HZ = 100, 50, 2.5
BYTES_PER_SECOND = HEIGHT * WIDTH * 3 * len(CAMERAS) * CAMERA_HZ
PICTURES = 30  # different ones
STATE_SECONDS = 120.0


@dataclass(frozen=True)
class Config:
    """Speed and memory of replay and conversion.

    Example: flow-policy bench replay --gb 2

    Attributes:
        gb: size of the camera bag, 1e9 bytes.
        repeats: timed replays; medians are reported.
        folder: where to put bags (None: a temporary folder, removed at the end).
        json: print one JSON object.
    """

    gb: float = 0.5
    repeats: int = 3
    folder: Path | None = None
    json: bool = False


def main(config: Config) -> dict:
    """Make bags, replay and convert them."""
    if not 0.05 <= config.gb <= 100 or config.repeats < 1:
        raise InputError("--gb must be between 0.05 and 100, --repeats at least 1")
    with tempfile.TemporaryDirectory(prefix="bench-replay-", dir=config.folder) as folder:
        return measure(config, Path(folder))


def measure(config: Config, folder: Path) -> dict:
    """All figures."""
    from flow_policy_rl import replay

    robot = bench_robot(folder / "robot.yaml")
    policies = {name: make_policy(folder, name, name == "cameras") for name in ("state", "cameras")}
    seconds = config.gb * 1e9 / BYTES_PER_SECOND
    bags = {
        "state": make_bag(folder / "state", STATE_SECONDS, cameras=False),
        "cameras": make_bag(folder / "cameras", seconds, cameras=True),
        "quarter": make_bag(folder / "quarter", seconds / 4, cameras=True),
    }
    lengths = {"state": STATE_SECONDS, "cameras": seconds}
    speeds, per_cpu = {}, {}
    for name, length in lengths.items():
        times, cpu = [], []
        for _ in range(config.repeats):
            start, start_cpu = time.perf_counter(), time.process_time()
            judged = replay.judge(
                replay.Config(bags[name], policies[name], robot=str(robot)), policies[name]
            )
            times.append(time.perf_counter() - start)
            cpu.append(time.process_time() - start_cpu)
        speeds[name] = length / statistics.median(times)
        per_cpu[name] = length / statistics.median(cpu)
        expected = length / (judged.spec.execute_horizon * judged.spec.control_dt)
        if len(judged.chunks) < 0.9 * expected:
            raise RunFailed(
                f"only {len(judged.chunks)} of {expected:.0f} inferences: {judged.recording.problems}"
            )
    size = folder_bytes(bags["cameras"]) / 1e9
    command = ["replay", "--policy", str(policies["cameras"]), "--robot", str(robot)]
    replayed, small = (
        run([*command, "--bag", str(bags[name]), "--out", str(folder / f"out_{name}")])
        for name in ("cameras", "quarter")
    )
    command = ["convert", "--robot", str(robot), "--task", "bench", "--max-age", "1.0"]
    converted, small_converted = (
        run([*command, "--input", str(bags[name]), "--output", str(folder / f"set_{name}")])
        for name in ("cameras", "quarter")
    )
    return {
        "bag_gb": size,
        "bag_seconds": seconds,
        "speed_vs_real_time": speeds["cameras"],
        "state_only_speed_vs_real_time": speeds["state"],
        "seconds_per_cpu_second": per_cpu["cameras"],
        "state_only_seconds_per_cpu_second": per_cpu["state"],
        "command_speed_vs_real_time": seconds / replayed["seconds"],
        "peak_memory_mb": replayed["memory_mb"],
        "peak_memory_quarter_mb": small["memory_mb"],
        "convert_s_per_gb": converted["seconds"] / size,
        "convert_cpu_s_per_gb": converted["cpu_s"] / size,
        "convert_peak_memory_mb": converted["memory_mb"],
        "convert_peak_memory_quarter_mb": small_converted["memory_mb"],
        "converted_frames": converted["result"]["steps"],
        "repeats": config.repeats,
        "environment": provenance.environment(),
    }


# The peak that wait4 reports is at least that of the process that started the child; this one is the child's own.
RUN_AND_TELL = """
import sys
from flow_policy_rl import cli
code = cli.main(sys.argv[2:])
lines = open("/proc/self/status").read().splitlines()
peak = next(line.split()[1] for line in lines if line.startswith("VmHWM"))
open(sys.argv[1], "w").write(peak)
sys.exit(code)
"""


def run(arguments: list[str]) -> dict:
    """A command in a process of its own: its result, seconds, CPU-seconds, and largest memory (MB)."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        peak, out = Path(folder) / "peak", Path(folder) / "out"
        line = [sys.executable, "-c", RUN_AND_TELL, str(peak), *arguments, "--json"]
        with out.open("wb") as file:
            child = subprocess.Popen(line, stdout=file)
            _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            raise RunFailed(f"flow-policy {arguments[0]} ended with exit code {child.returncode}")
        return {
            "result": json.loads(out.read_text()),
            "seconds": time.perf_counter() - start,
            "cpu_s": usage.ru_utime + usage.ru_stime,
            "memory_mb": int(peak.read_text()) / 1024,
        }


def folder_bytes(folder: Path) -> int:
    """Size of its files."""
    return sum(p.stat().st_size for p in folder.iterdir())


def bench_robot(path: Path) -> Path:
    """The Panda with a second camera."""
    raw = yaml.safe_load((resources.files("robots") / "panda.yaml").read_text())
    raw["topics"]["images"] = {c: f"/{c}/image_raw" for c in CAMERAS}
    path.write_text(yaml.safe_dump(raw))
    return path


def make_policy(folder: Path, name: str, cameras: bool) -> Path:
    """A freshly initialised policy of the size that our tasks train."""
    import torch

    from flow_policy_rl import export
    from flow_policy_rl.policy import FlowPolicy, NetworkConfig

    robot = load_robot("panda")
    arm, gripper = tuple(robot.arm), tuple(robot.gripper)
    low, high = robot.limit_array((*arm, *gripper), "position").T

    def known(
        name: str, kind: str, elements: tuple[str, ...], unit: str, source: str = ""
    ) -> ObservationField:
        return ObservationField(
            name, kind, elements, unit, source, (0.0,) * len(elements), (1.0,) * len(elements)
        )

    fields = [
        known("joint_pos", "joint_position", arm, "rad"),
        known("joint_vel", "joint_velocity", arm, "rad/s"),
        known("gripper_pos", "joint_position", gripper, "m"),
    ]
    if cameras:
        fields += [
            ObservationField(f"{c}_image", "image", (), "", c, resolution=(96, 96)) for c in CAMERAS
        ]
    else:
        fields.append(known("cube_pose", "pose", POSE_ELEMENTS, "m", "cube"))
    spec = PolicySpec(
        task="bench",
        robot="panda",
        joint_names=(*arm, *gripper),
        action_low=tuple(low.tolist()),
        action_high=tuple(high.tolist()),
        observations=tuple(fields),
        control_dt=0.05,
        action_horizon=12,
        execute_horizon=8,
    )
    torch.manual_seed(0)
    policy = FlowPolicy(spec, NetworkConfig()).eval()
    path = folder / f"{name}.onnx"
    export.write(export.build(export.trace_policy(policy, spec), spec), spec, path)
    return path


def make_bag(folder: Path, seconds: float, cameras: bool) -> Path:
    """The recorded robot."""
    types, robot = TYPESTORE.types, load_robot("panda")
    names = [*robot.arm, *robot.gripper]
    low, high = robot.limit_array(tuple(names), "position").T
    kinds = {
        "/joint_states": "sensor_msgs/msg/JointState",
        "/cube/pose": "geometry_msgs/msg/PoseStamped",
        "/arm_controller/joint_trajectory": "trajectory_msgs/msg/JointTrajectory",
        **({f"/{c}/image_raw": "sensor_msgs/msg/Image" for c in CAMERAS} if cameras else {}),
    }
    writer = BagWriter(folder, compressed=False)
    for topic, kind in kinds.items():
        writer.add_topic(topic, kind)
    joints, pose, command, *images = kinds

    def place(t: float) -> np.ndarray:
        phase = 0.5 * t + np.arange(len(names))
        return (low + high) / 2 + 0.3 * (high - low) * np.sin(phase) * 0.5

    def header(t: float):
        ns = start + round(t * 1e9)
        stamp = types["builtin_interfaces/msg/Time"](ns // 1_000_000_000, ns % 1_000_000_000)
        return types["std_msgs/msg/Header"](stamp, "")

    def put(topic: str, t: float, msg) -> None:
        data = bytes(TYPESTORE.serialize_cdr(msg, kinds[topic]))
        writer.write(topic, start + round((t + 0.001) * 1e9), data)

    start, none = 1_700_000_000_000_000_000, np.zeros(0)
    pictures = make_pictures() if cameras else []
    with Progress(f"bag of {seconds:.0f} s", round(seconds), "s") as progress:
        for tick in range(round(seconds * STATE_HZ)):
            t = tick / STATE_HZ
            put(joints, t, types[kinds[joints]](header(t), names, place(t), 0 * place(t), none))
            if tick % (STATE_HZ // POSE_HZ) == 0:
                point = types["geometry_msgs/msg/Point"](0.5, 0.1, 0.02)
                turn = types["geometry_msgs/msg/Quaternion"](0.0, 0.0, 0.0, 1.0)
                inner = types["geometry_msgs/msg/Pose"](point, turn)
                put(pose, t, types[kinds[pose]](header(t), inner))
            if tick % round(STATE_HZ / COMMAND_HZ) == 0:
                put(command, t, trajectory(types, header(t), names, place, t))
            if int(t * CAMERA_HZ) != int((t - 1 / STATE_HZ) * CAMERA_HZ):
                for k, topic in enumerate(images):
                    pixels = pictures[(int(t * CAMERA_HZ) + 7 * k) % PICTURES]
                    msg = types[kinds[topic]](
                        header(t), HEIGHT, WIDTH, "rgb8", 0, WIDTH * 3, pixels
                    )
                    put(topic, t, msg)
            if tick % STATE_HZ == 0:
                progress.reach(int(t))
    writer.close()
    return folder


def trajectory(types: dict, header, names: list[str], place, t: float):
    """Where the robot will be in the next 16 control steps."""
    points, none = [], np.zeros(0)
    header.stamp.sec = header.stamp.nanosec = 0
    for k in range(1, 17):
        ns = k * 50_000_000
        due = types["builtin_interfaces/msg/Duration"](ns // 1_000_000_000, ns % 1_000_000_000)
        point = types["trajectory_msgs/msg/JointTrajectoryPoint"]
        points.append(point(place(t + k * 0.05), none, none, none, due))
    return types["trajectory_msgs/msg/JointTrajectory"](header, names, points)


def make_pictures() -> list[np.ndarray]:
    """A bright square that moves over a gradient, with the noise of a sensor."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    base = np.stack([x / WIDTH, y / HEIGHT, (x + y) / (WIDTH + HEIGHT)], axis=2) * 160 + 30
    pictures = []
    for k in range(PICTURES):
        frame = base + rng.normal(0, 3, base.shape)
        left = 40 + 16 * k
        frame[180:300, left : left + 100] = (230, 60, 40)
        pictures.append(np.clip(frame, 0, 255).astype(np.uint8).ravel())
    return pictures


def text(result: dict) -> str:
    """For people."""
    return (
        f"bag of {result['bag_gb']:.2f} GB, {result['bag_seconds']:.0f} s\n"
        f"replay: {result['speed_vs_real_time']:.1f} x real time with two cameras, "
        f"{result['state_only_speed_vs_real_time']:.0f} x state only (per CPU-second: "
        f"{result['seconds_per_cpu_second']:.1f} and {result['state_only_seconds_per_cpu_second']:.0f} s of the bag); "
        f"whole command "
        f"{result['command_speed_vs_real_time']:.1f} x; at most {result['peak_memory_mb']:.0f} MB "
        f"({result['peak_memory_quarter_mb']:.0f} MB for a quarter of the bag)\n"
        f"convert: {result['convert_s_per_gb']:.0f} s per GB ({result['convert_cpu_s_per_gb']:.0f} CPU-seconds), "
        f"at most {result['convert_peak_memory_mb']:.0f} MB "
        f"({result['convert_peak_memory_quarter_mb']:.0f} MB for a quarter)"
    )

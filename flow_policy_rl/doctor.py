"""`flow-policy doctor`: what works on this machine, and how to mend what does not."""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from flow_policy_rl import plugins
from flow_policy_rl.errors import InputError

CHILD_S = 60
NEEDED_GB = 4
SEGMENT_BYTES = 4_000_000  # four raw 640x480 images
RENDER = (
    "from sim.tasks import make_task; from sim.render import Renderer; import numpy as np\n"
    "task = make_task('lift')\n"
    "with Renderer(task.world, 64, 64) as renderer:\n"
    "    frame = renderer.render(task.initial_state(np.random.default_rng(0)), 'front')\n"
    "print('draws frames' if frame.std() > 1 else 'draws blank frames')"
)
TORCH = (
    "import torch; gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]\n"
    "if gpus: torch.ones(8, device='cuda').sum().item()\n"
    "print(torch.__version__ + ', CUDA ' + (', '.join(gpus) or 'no'))"
)
WARP = (
    "import warp as wp; wp.config.log_level = wp.LOG_ERROR; import mujoco_warp\n"
    "names = [f'{d.name} ({d})' for d in wp.get_cuda_devices()]\n"
    "print(f'MuJoCo Warp {mujoco_warp.__version__}, Warp {wp.__version__}, ' + (', '.join(names) or 'no GPU'))"
)
ROS_CALL = (
    "import rclpy; from sensor_msgs.msg import JointState; from trajectory_msgs.msg import JointTrajectory\n"
    "rclpy.init(); node = rclpy.create_node('doctor'); node.destroy_node(); rclpy.shutdown()\n"
    "print('a node starts and ends')"
)


@dataclass(frozen=True)
class Config:
    """Check Python, packages, CUDA, MuJoCo, rendering, onnxruntime, plug-ins, ROS 2 and disk.

    Example: flow-policy doctor --purpose serve

    Attributes:
        purpose: check only what this needs: train (with simulation), serve (policy.onnx in Python), deploy (ROS 2).
        json: print one JSON object.
    """

    purpose: Literal["all", "train", "serve", "deploy"] = "all"
    json: bool = False


@dataclass(frozen=True)
class Check:
    """One line of the result; `mend` says what to do where it is not ok."""

    name: str
    ok: bool
    detail: str
    mend: str = ""


def main(config: Config) -> dict:
    """Run every check; one that fails does not stop the others."""
    wanted = lambda purposes: config.purpose == "all" or config.purpose in purposes.split()  # noqa: E731
    found = [check() for check, purposes in CHECKS if wanted(purposes)]
    checks = list({check.name: check for check in reversed(found)}.values())[::-1]
    rows = [asdict(c) | {"mend": "" if c.ok else c.mend} for c in checks]
    return {"checks": rows, "ok": all(c.ok for c in checks)}


def python() -> Check:
    """3.11 or newer trains; 3.10 serves."""
    version = f"{platform.python_version()} at {sys.executable}"
    mend = "python3.11 -m venv .venv (3.10 is enough to serve and deploy: flow-policy doctor --purpose deploy)"
    return Check("python", sys.version_info >= (3, 11), version, mend)


def serving_python() -> Check:
    """3.10, as Humble has it."""
    version = f"{platform.python_version()} at {sys.executable}"
    return Check("python", sys.version_info >= (3, 10), version, "python3.10 -m venv .venv")


def package(name: str, distribution: str, purpose: str, extra: str) -> Callable[[], Check]:
    """A check that a package is installed."""

    def check() -> Check:
        mend = f"make setup, or pip install 'flow_policy_rl[{extra}]'"
        if importlib.util.find_spec(name) is None:
            return Check(name, False, f"not installed; needed for {purpose}", mend)
        return Check(name, True, metadata.version(distribution))

    return check


def torch() -> Check:
    """PyTorch, and what it can compute on; in a child, for a broken CUDA may end it or take long."""
    mend = "make setup, or pip install 'flow_policy_rl[train]' (CUDA: https://pytorch.org/get-started/locally)"
    if importlib.util.find_spec("torch") is None:
        return Check("torch", False, "not installed; needed for training", mend)
    ok, detail = in_child(TORCH)
    if ok and "CUDA no" in detail and shutil.which("nvidia-smi"):
        mend = "this PyTorch sees no GPU though nvidia-smi is here: install its CUDA build, check the driver"
        return Check("torch", False, detail, mend)
    return Check("torch", ok, detail, mend)


def warp() -> Check:
    """Physics on a GPU, which nothing else needs."""
    if importlib.util.find_spec("mujoco_warp") is None or importlib.util.find_spec("warp") is None:
        return Check(
            "warp",
            True,
            "not installed; only --backend warp needs it: pip install 'flow_policy_rl[warp]'",
        )
    ok, detail = in_child(WARP)
    if ok and detail.endswith("no GPU"):
        if shutil.which("nvidia-smi"):
            mend = "Warp sees no GPU though nvidia-smi is here: check the driver (12.4 or newer)"
            return Check("warp", False, detail, mend)
        detail += ": --backend warp-cpu only, for tests"
    mend = "pip install --force-reinstall 'flow_policy_rl[warp]'"
    return Check("warp", ok, detail, mend)


def rendering() -> Check:
    """Draw a frame in a child process: a broken GL driver may end it."""
    mend = (
        "apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri, and unset MUJOCO_GL or set it to egl"
    )
    ok, detail = in_child(RENDER)
    return Check("rendering", ok and "draws frames" in detail, detail, mend)


def onnxruntime_providers() -> Check:
    """What policies can run on."""
    try:
        import onnxruntime
    except ImportError as error:
        mend = "make setup, or pip install 'flow_policy_rl[serve]'"
        return Check("onnxruntime", False, str(error), mend)
    names = [p.removesuffix("ExecutionProvider") for p in onnxruntime.get_available_providers()]
    detail = f"{onnxruntime.__version__}, providers {', '.join(names)}"
    mend = "pip install --force-reinstall onnxruntime"
    both = [d for d in ("onnxruntime", "onnxruntime-gpu") if installed(d)]
    if len(both) > 1:
        mend = "pip uninstall onnxruntime onnxruntime-gpu, then install one: they share their files"
        return Check(
            "onnxruntime", False, f"{detail}; {' and '.join(both)} are both installed", mend
        )
    return Check("onnxruntime", "CPU" in names, detail, mend)


def installed(distribution: str) -> bool:
    """Whether pip knows it."""
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def plug_ins() -> Check:
    """Every task, robot, algorithm and encoder that other packages register can be imported."""
    found, problems = [], []
    for group in plugins.GROUPS:
        for entry in metadata.entry_points(group=group):
            found.append(f"{entry.name} ({plugins.package(entry)})")
            try:
                plugins.load(entry)
            except InputError as error:
                problems.append(str(error))
    detail = "; ".join(problems) or ", ".join(found) or "none"
    return Check("plug-ins", not problems, detail, "pip uninstall or mend that package")


def ros() -> Check:
    """A node in a child process."""
    mend = "source a ROS 2 installation, or install the wheels: make setup"
    if importlib.util.find_spec("rclpy") is None:
        return Check("ros", False, "rclpy is not installed", mend)
    ok, detail = in_child(ROS_CALL)
    where = importlib.util.find_spec("rclpy").origin or ""
    kind = (
        "wheels"
        if Path(sys.prefix) in Path(where).parents
        else f"installation at {Path(where).parent}"
    )
    return Check("ros", ok, f"{kind}: {detail}", mend)


def ros_nodes() -> Check:
    """The node package of this project."""
    found = importlib.util.find_spec("flow_policy_ros") is not None
    mend = "pip install ros_ws/src/flow_policy_ros, or build it with colcon"
    return Check("flow_policy_ros", found, "installed" if found else "not installed", mend)


def ros_environment() -> Check:
    """Settings that often explain silence between nodes."""
    names = (
        "ROS_DOMAIN_ID",
        "ROS_AUTOMATIC_DISCOVERY_RANGE",
        "RMW_IMPLEMENTATION",
        "ROS_LOCALHOST_ONLY",
    )
    given = ", ".join(f"{n}={os.environ[n]}" for n in names if n in os.environ) or "defaults"
    profile = os.environ.get("FASTRTPS_DEFAULT_PROFILES_FILE")
    missing = profile is not None and not Path(profile).is_file()
    if os.environ.get("ROS_AUTOMATIC_DISCOVERY_RANGE", "").upper() == "OFF":
        return Check(
            "ros environment",
            False,
            given,
            "ROS_AUTOMATIC_DISCOVERY_RANGE=OFF hides even local nodes",
        )
    if missing:
        return Check(
            "ros environment", False, f"no file {profile}", "unset FASTRTPS_DEFAULT_PROFILES_FILE"
        )
    return Check("ros environment", True, given)


def camera_transport() -> Check:
    """Room in shared memory for raw camera images; the nodes of this project bring their own profile."""
    name = "camera transport"
    profile = os.environ.get("FASTRTPS_DEFAULT_PROFILES_FILE")
    if os.environ.get("RMW_IMPLEMENTATION", "rmw_fastrtps_cpp") != "rmw_fastrtps_cpp":
        return Check(name, True, "not Fast DDS: nothing to check")
    if profile is None:
        return Check(
            name,
            True,
            "our nodes use their own Fast DDS profile; other publishers of images need it too",
        )
    try:
        sizes = re.findall(r"<segment_size>\s*(\d+)", Path(profile).read_text(errors="replace"))
    except OSError:
        sizes = []
    largest = max((int(s) for s in sizes), default=0)
    shipped = (
        Path(__file__).parent.parent
        / "ros_ws/src/flow_policy_ros/flow_policy_ros/config/fastdds.xml"
    )
    mend = f"unset FASTRTPS_DEFAULT_PROFILES_FILE, or take the segment_size of {shipped.name} ({shipped.parent})"
    return Check(
        name,
        largest >= SEGMENT_BYTES,
        f"shared-memory segment of {largest:,} bytes in {profile}"
        if sizes
        else f"no segment_size in {profile}",
        mend,
    )


def optional_messages() -> Check:
    """Packages that exist only on a ROS installation; nothing here needs them."""
    uses = {
        "control_msgs": "gripper_action of a robot file, controller_state",
        "tf2_msgs": "/tf of the simulation node",
        "launch_ros": "launch files",
    }
    absent = [f"{name} ({use})" for name, use in uses.items() if not importlib.util.find_spec(name)]
    detail = f"absent: {', '.join(absent)}: only on a ROS installation" if absent else "all there"
    return Check("optional ROS packages", True, detail)


def disk() -> Check:
    """Room for runs."""
    free = shutil.disk_usage(Path.cwd()).free / 1e9
    detail = f"{free:.0f} GB free in {Path.cwd()}"
    if not os.access(Path.cwd(), os.W_OK):
        return Check("disk", False, f"{Path.cwd()} cannot be written", "cd to a folder of your own")
    mend = f"free at least {NEEDED_GB} GB, or give --run-dir on another disk"
    return Check("disk", free >= NEEDED_GB, detail, mend)


def in_child(code: str) -> tuple[bool, str]:
    """Run code in a new interpreter: whether it ended well, and the last line it printed."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=CHILD_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False, f"no answer within {CHILD_S} s"
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    return done.returncode == 0, lines[-1] if lines else f"exit code {done.returncode}"


# Each check, and the purposes that need it.
CHECKS = (
    (python, "train"),
    (serving_python, "serve deploy"),
    (torch, "train"),
    (package("mujoco", "mujoco", "simulation", "sim"), "train"),
    (warp, "train"),
    (package("mink", "mink", "scripted demonstrations", "train"), "train"),
    (package("rosbags", "rosbags", "replay", "bags"), "train"),
    (rendering, "train"),
    (onnxruntime_providers, "train serve deploy"),
    (plug_ins, "train serve deploy"),
    (ros, "deploy"),
    (ros_nodes, "deploy"),
    (ros_environment, "deploy"),
    (camera_transport, "deploy"),
    (optional_messages, "deploy"),
    (disk, "train deploy"),
)


def text(result: dict) -> str:
    """For people."""
    lines = []
    for check in result["checks"]:
        mark = "ok  " if check["ok"] else "BAD "
        lines.append(f"{mark} {check['name']:<22} {check['detail']}")
        if check["mend"]:
            lines.append(f"     {'':<22} mend: {check['mend']}")
    return "\n".join([*lines, "", "all well" if result["ok"] else "something needs mending"])

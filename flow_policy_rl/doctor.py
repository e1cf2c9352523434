"""`flow-policy doctor`: what works on this machine, and how to mend what does not."""

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

CHILD_S = 60
NEEDED_GB = 4
RENDER = (
    "from sim.tasks import make_task; from sim.render import Renderer; import numpy as np\n"
    "task = make_task('lift')\n"
    "with Renderer(task.world, 64, 64) as renderer:\n"
    "    frame = renderer.render(task.initial_state(np.random.default_rng(0)), 'front')\n"
    "print('draws frames' if frame.std() > 1 else 'draws blank frames')"
)
ROS_CALL = (
    "import rclpy; from sensor_msgs.msg import JointState; from trajectory_msgs.msg import JointTrajectory\n"
    "rclpy.init(); node = rclpy.create_node('doctor'); node.destroy_node(); rclpy.shutdown()\n"
    "print('a node starts and ends')"
)


@dataclass(frozen=True)
class Config:
    """Check Python, packages, MuJoCo, rendering, onnxruntime, ROS 2 and disk.

    Example: flow-policy doctor

    Attributes:
        json: print one JSON object.
    """

    json: bool = False


@dataclass(frozen=True)
class Check:
    """One line of the result; `mend` is empty where nothing needs mending."""

    name: str
    ok: bool
    detail: str
    mend: str = ""


def main(config: Config) -> dict:
    """Run every check; one that fails does not stop the others."""
    checks = [check() for check in CHECKS]
    return {"checks": [asdict(c) for c in checks], "ok": all(c.ok for c in checks)}


def python() -> Check:
    """3.11 or newer trains; 3.10 serves."""
    version = ".".join(str(v) for v in sys.version_info[:3])
    return Check("python", sys.version_info >= (3, 11), version, "install Python 3.11 or newer")


def package(name: str, distribution: str, purpose: str) -> Callable[[], Check]:
    """A check that a package is installed."""

    def check() -> Check:
        if importlib.util.find_spec(name) is None:
            return Check(name, False, f"not installed; needed for {purpose}", "make setup")
        return Check(name, True, metadata.version(distribution))

    return check


def rendering() -> Check:
    """Draw a frame in a child process: a broken GL driver may end it."""
    mend = (
        "apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri, and unset MUJOCO_GL or set it to egl"
    )
    ok, detail = in_child(RENDER)
    return Check("rendering", ok and "draws frames" in detail, detail, "" if ok else mend)


def onnxruntime_providers() -> Check:
    """What policies can run on."""
    try:
        import onnxruntime
    except ImportError as error:
        return Check("onnxruntime", False, str(error), "make setup")
    names = [p.removesuffix("ExecutionProvider") for p in onnxruntime.get_available_providers()]
    return Check(
        "onnxruntime", "CPU" in names, f"{onnxruntime.__version__}, providers {', '.join(names)}"
    )


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
    return Check("ros", ok, f"{kind}: {detail}", "" if ok else mend)


def ros_nodes() -> Check:
    """The node package of this project."""
    found = importlib.util.find_spec("flow_policy_ros") is not None
    mend = "pip install ros_ws/src/flow_policy_ros, or build it with colcon"
    return Check(
        "flow_policy_ros", found, "installed" if found else "not installed", "" if found else mend
    )


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


def optional_messages() -> Check:
    """Packages that exist only on a ROS installation; nothing here needs them."""
    names = ("control_msgs", "tf2_msgs", "launch_ros")
    absent = [name for name in names if importlib.util.find_spec(name) is None]
    detail = (
        f"absent: {', '.join(absent)} (only on a ROS installation; optional)"
        if absent
        else "all there"
    )
    return Check("optional ROS packages", True, detail)


def disk() -> Check:
    """Room for runs."""
    free = shutil.disk_usage(Path.cwd()).free / 1e9
    return Check("disk", free >= NEEDED_GB, f"{free:.0f} GB free", f"free at least {NEEDED_GB} GB")


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


CHECKS = (
    python,
    package("torch", "torch", "training"),
    package("mujoco", "mujoco", "simulation"),
    package("mink", "mink", "scripted demonstrations"),
    package("rosbags", "rosbags", "replay"),
    rendering,
    onnxruntime_providers,
    ros,
    ros_nodes,
    ros_environment,
    optional_messages,
    disk,
)


def text(result: dict) -> str:
    """For people."""
    lines = []
    for check in result["checks"]:
        mark = "ok  " if check["ok"] else "BAD "
        lines.append(f"{mark} {check['name']:<22} {check['detail']}")
        if not check["ok"] and check["mend"]:
            lines.append(f"     {'':<22} mend: {check['mend']}")
    return "\n".join([*lines, "", "all well" if result["ok"] else "something needs mending"])

"""Who may import whom. sim knows nobody; serving knows only the spec and the graph; ROS knows both;
nobody knows ROS."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from toys import ROOT

ROS = {
    "rclpy",
    "launch",
    "launch_ros",
    "flow_policy_ros",
    "sensor_msgs",
    "trajectory_msgs",
    "geometry_msgs",
    "std_msgs",
}
TRAINING = {"torch", "safetensors", "h5py"}
TRAIN = {f"flow_policy_rl.train{part}" for part in ("", "_bc", "_config", "_run")}

# folder or file -> top-level or dotted names that must not be imported below it
FORBIDDEN = {
    "sim": ROS | TRAINING | {"onnx", "onnxruntime", "flow_policy_rl", "robots"},
    "flow_policy_rl": ROS,
    "flow_policy_rl/spec.py": TRAINING | {"sim", "mujoco", "onnx", "onnxruntime", "numpy"},
    "flow_policy_rl/flow.py": {"sim", "mujoco", "onnx", "onnxruntime"},
    "flow_policy_rl/networks.py": {"sim", "mujoco", "onnx", "onnxruntime"},
    "flow_policy_rl/policy.py": {"sim", "mujoco", "onnx", "onnxruntime", "flow_policy_rl.serving"},
    "flow_policy_rl/algorithms": {"mujoco", "onnx", "onnxruntime", "flow_policy_rl.serving"},
    "flow_policy_rl/offline": TRAINING | {"sim", "mujoco", "onnx", "flow_policy_rl.policy"},
    "flow_policy_rl/data/bags.py": TRAINING | {"sim", "mujoco"},
    "flow_policy_rl/serving": TRAINING
    | {
        "sim",
        "mujoco",
        "onnx",
        "flow_policy_rl.policy",
        "flow_policy_rl.networks",
        "flow_policy_rl.data",
    },
    "ros_ws/src/flow_policy_ros/flow_policy_ros": TRAINING
    | TRAIN
    | {"mujoco", "flow_policy_rl.policy"},
    "ros_ws/src/flow_policy_ros/flow_policy_ros/policy_node.py": {"sim"},
    "launch": TRAINING
    | TRAIN
    | {
        "flow_policy_ros",
        "sim",
        "mujoco",
        "rclpy",
        "flow_policy_rl.policy",
    },
}

# file -> what it may import nevertheless
ALLOWED = {"sim/backends/warp.py": {"torch"}}


def imports(path: Path) -> set[str]:
    """Every dotted name a file imports, and every prefix of one."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            found |= {".".join(parts[: i + 1]) for i in range(len(parts))}
    return found


@pytest.mark.parametrize("place", FORBIDDEN)
def test_layer(place):
    path = ROOT / place
    files = [path] if path.suffix == ".py" else sorted(path.rglob("*.py"))
    assert files, f"{place} has no Python files"
    names = {str(f.relative_to(ROOT)): imports(f) & FORBIDDEN[place] for f in files}
    broken = {file: sorted(found - ALLOWED.get(file, set())) for file, found in names.items()}
    assert {file: found for file, found in broken.items() if found} == {}


def test_serving_loads_neither_torch_nor_mujoco():
    code = (
        "import sys, flow_policy_rl.serving.onnx_policy, flow_policy_rl.serving.safety, flow_policy_rl.serving.streams;"
        "print(sorted({'torch', 'mujoco', 'rclpy', 'sim'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_launch_has_no_init():
    assert not (ROOT / "launch" / "__init__.py").exists()

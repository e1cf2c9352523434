"""All package metadata lives here: colcon reads setup.py only, and fails on metadata in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

NAME = "flow_policy_rl"
HERE = Path(__file__).resolve().parent  # colcon --symlink-install runs a link to this file
VERSION = re.search(r'__version__ = "(.+)"', (HERE / NAME / "__init__.py").read_text()).group(1)

SIM = [
    "mujoco",
    "gymnasium",
    "imageio",
]  # locomotion models are gymnasium's, its renderer wants imageio
KITCHEN = [
    "gymnasium-robotics",
    "pettingzoo",
]  # model of task kitchen; pettingzoo only for its tests
SERVE = ["onnxruntime"]
BAGS = ["rosbags", "mcap", "zstandard", "lz4"]
DATA = [*BAGS, "h5py", "pyarrow", "av", "opencv-python-headless"]
REPORT = ["jinja2", "plotly", "matplotlib", "av", "opencv-python-headless"]
TRAIN = [*SIM, "torch", "h5py", "safetensors", "mink", "daqp", "onnx", "onnxscript", "tensorboard"]
ROS = [*SERVE, *BAGS, "opencv-python-headless"]  # what the nodes need beside ROS itself
WARP = ["mujoco-warp", "warp-lang"]  # physics on a GPU
GPU = [
    "onnxruntime-gpu"
]  # in place of `serve`: the two share their files. PyTorch brings its own CUDA
DOCS = ["mkdocs-material", "mkdocstrings-python"]


setup(
    name=NAME,
    version=VERSION,
    description="RL fine-tuning of flow-matching robot policies: MuJoCo to one ONNX file to ROS 2",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    author="The flow_policy_rl authors",
    maintainer="The flow_policy_rl authors",
    maintainer_email="maintainers@flow-policy-rl.example.com",
    url="https://example.com/flow_policy_rl",
    packages=find_packages(
        include=["flow_policy_rl", "flow_policy_rl.*", "sim", "sim.*", "robots"]
    ),
    package_data={
        "flow_policy_rl": ["templates/*", "policies/*"],
        "sim": ["assets/*.xml"],
        "robots": ["*.yaml"],
    },
    data_files=[
        ("share/ament_index/resource_index/packages", [f"resource/{NAME}"]),
        (f"share/{NAME}", ["package.xml"]),
        (
            f"share/{NAME}/launch",
            [f"launch/{p.name}" for p in sorted((HERE / "launch").glob("*.launch.py"))],
        ),
    ],
    python_requires=">=3.10",
    install_requires=["numpy", "pyyaml", "tyro", "rich"],
    extras_require={
        "sim": SIM,
        "kitchen": KITCHEN,
        "serve": SERVE,
        "bags": BAGS,
        "data": DATA,
        "report": REPORT,
        "train": TRAIN,
        "ros": ROS,
        "warp": WARP,
        "gpu": GPU,
        "wandb": ["wandb"],
        "trackio": ["trackio"],
        "rerun": ["rerun-sdk", "opencv-python-headless"],
        "docs": DOCS,
        "all": sorted({*SIM, *KITCHEN, *SERVE, *DATA, *REPORT, *TRAIN}),
        "test": ["pytest", "pytest-xdist", "hypothesis"],
        "dev": ["ruff", "mypy", "types-PyYAML"],
    },
    entry_points={"console_scripts": ["flow-policy = flow_policy_rl.cli:main"]},
    zip_safe=False,
)

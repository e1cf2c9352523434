"""ament_python package; installs with pip too. ROS itself is never a pip requirement: see the extra `wheels`."""

from setuptools import find_packages, setup

NAME = "flow_policy_ros"

setup(
    name=NAME,
    version="0.1.0",
    description="ROS 2 nodes of flow_policy_rl",
    license="Apache-2.0",
    author="The flow_policy_rl authors",
    maintainer="The flow_policy_rl authors",
    maintainer_email="maintainers@flow-policy-rl.example.com",
    packages=find_packages(include=[NAME]),
    package_data={NAME: ["config/*"]},
    data_files=[
        ("share/ament_index/resource_index/packages", [f"resource/{NAME}"]),
        (f"share/{NAME}", ["package.xml"]),
    ],
    python_requires=">=3.10",
    install_requires=["setuptools"],
    extras_require={
        # Real rclpy from PyPI, for machines without a ROS 2 installation. Never beside a sourced one.
        "wheels": [
            f"ros-jazzy-{name}; sys_platform == 'linux' and platform_machine == 'x86_64'"
            for name in (
                "rclpy[fastrtps]",
                "diagnostic-msgs",
                "geometry-msgs",
                "lifecycle-msgs",
                "rosgraph-msgs",
                "sensor-msgs",
                "std-msgs",
                "std-srvs",
                "trajectory-msgs",
            )
        ],
    },
    entry_points={
        "console_scripts": [
            f"policy_node = {NAME}.policy_node:main",
            f"sim_node = {NAME}.sim_node:main",
            f"recorder = {NAME}.recorder:main",
            f"player = {NAME}.player:main",
            f"demonstrator = {NAME}.demonstrator:main",
            f"bench_peer = {NAME}.bench_peer:main",
            f"trainer_node = {NAME}.trainer_node:main",
            f"episode_runner = {NAME}.episode_runner:main",
        ]
    },
    zip_safe=False,
)

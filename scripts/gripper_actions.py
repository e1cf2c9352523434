"""Builds what the nodes use of control_msgs (the two gripper actions, the state of joint_trajectory_controller) against
the rclpy wheels, for tests: control_msgs is not on PyPI.

    git clone https://github.com/ros-controls/control_msgs
    .venv/bin/pip install catkin_pkg
    .venv/bin/python scripts/gripper_actions.py control_msgs/control_msgs /tmp/actions
    PYTHONPATH=/tmp/actions .venv/bin/python -m pytest ros_ws/src/flow_policy_ros/test/test_gripper_action.py
    PYTHONPATH=/tmp/actions .venv/bin/python -m pytest ros_ws/src/flow_policy_ros/test/test_inactive_controller.py

Needs gcc and Python's headers. On a robot install the package of its distribution instead.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

PACKAGE = "control_msgs"
FILES = (
    "msg/GripperCommand.msg",
    "action/GripperCommand.action",
    "action/ParallelGripperCommand.action",
    "msg/JointTrajectoryControllerState.msg",
)
USES = (
    "action_msgs",
    "builtin_interfaces",
    "geometry_msgs",
    "sensor_msgs",
    "service_msgs",
    "std_msgs",
    "trajectory_msgs",
    "unique_identifier_msgs",
)
FAST, INTROSPECTION = "rosidl_typesupport_fastrtps_c", "rosidl_typesupport_introspection_c"


def generate(source: Path, work: Path) -> None:
    """C and Python code in one folder of `work` per generator."""
    prefix = Path(sys.prefix)
    os.environ["AMENT_PREFIX_PATH"] = str(prefix)
    os.chdir(source)
    from rosidl_cli.command.translate.api import translate
    from rosidl_generator_c import cli as c
    from rosidl_generator_py.cli import GeneratePython
    from rosidl_typesupport_c import cli as dispatch
    from rosidl_typesupport_fastrtps_c import cli as fast
    from rosidl_typesupport_introspection_c import cli as introspection

    for module in (c, dispatch, fast, introspection):
        if hasattr(module, "build_type_description_tuples"):
            module.build_type_description_tuples = descriptions
    share = [str(prefix / "share")]
    idl = translate(
        package_name=PACKAGE,
        interface_files=list(FILES),
        include_paths=share,
        output_format="idl",
        output_path=work / "idl",
    )
    generators = {
        "c": c.GenerateC("c"),
        "fast": fast.GenerateFastRTPSCTypesupport("fastrtps_c"),
        "introspection": introspection.GenerateIntrospectionCTypesupport("introspection_c"),
        "dispatch": dispatch.GenerateCTypesupport(
            "c", typesupport_implementations=[FAST, INTROSPECTION]
        ),
        "py": GeneratePython("py", typesupport_implementations=["rosidl_typesupport_c", FAST]),
    }
    for folder, generator in generators.items():
        (work / folder / PACKAGE).mkdir(parents=True)
        generator.generate(PACKAGE, [str(f) for f in idl], share, work / folder / PACKAGE)


def descriptions(idl_files: list[str], description_files: list) -> list[str]:
    """Which type description belongs to which file; the original confuses a message with an action of its name."""
    by_name = {tuple(Path(d).with_suffix("").parts[-2:]): d for d in description_files}
    paths = [Path(f.rpartition(":")[2]) for f in idl_files]
    return [f"{path}:{by_name[path.with_suffix('').parts[-2:]]}" for path in paths]


def build(work: Path, out: Path) -> None:
    """Compile into a Python package."""
    import numpy

    prefix, suffix = Path(sys.prefix), sysconfig.get_config_var("EXT_SUFFIX")
    folders = [work / name for name in ("c", "fast", "introspection", "dispatch")]
    folders += [sysconfig.get_path("include"), numpy.get_include()]
    folders += [prefix / "include", *(f for f in (prefix / "include").iterdir() if f.is_dir())]

    def library(target: str, sources: str, *libraries: str) -> None:
        files = sorted(map(str, work.glob(sources)))
        compiler = "g++" if files[0].endswith(".cpp") else "gcc"
        line = [compiler, "-shared", "-fPIC", "-w", f"-Wl,-soname,{target}", "-Wl,--no-as-needed"]
        line += ["-o", str(out / target), *files, *(f"-I{f}" for f in folders)]
        for folder, run_time in ((out, "$ORIGIN"), (prefix / "lib", prefix / "lib")):
            line += [f"-L{folder}", f"-Wl,-rpath,{run_time}"]
        subprocess.run([*line, *(f"-l{name}" for name in libraries)], check=True)

    def own(kind: str) -> str:
        return f"{PACKAGE}__{kind}"

    def uses(kind: str) -> list[str]:
        return [f"{package}__{kind}" for package in USES]

    c, dispatch, py = "rosidl_generator_c", "rosidl_typesupport_c", "rosidl_generator_py"
    library(f"lib{own(c)}.so", f"c/{PACKAGE}/**/*.c", "rosidl_runtime_c", dispatch, *uses(c))
    cpp = "rosidl_typesupport_fastrtps_cpp"
    common = (own(c), *uses(c))
    library(
        f"lib{own(FAST)}.so", "fast/**/*.cpp", *common, "fastcdr", "rmw", FAST, cpp, *uses(FAST)
    )
    library(
        f"lib{own(INTROSPECTION)}.so",
        "introspection/**/*.c",
        *(*common, INTROSPECTION, *uses(INTROSPECTION)),
    )
    both = own(FAST), own(INTROSPECTION)
    library(f"lib{own(dispatch)}.so", "dispatch/**/*.cpp", *both, own(c), dispatch, *uses(dispatch))
    library(f"lib{own(py)}.so", "py/**/_*_s.c", own(c), own(dispatch), *uses(py))
    for kind in (dispatch, FAST):
        entry = f"py/**/_{PACKAGE}_s.ep.{kind}.c"
        library(f"{PACKAGE}_s__{kind}{suffix}", entry, own(py), own(kind), "rosidl_runtime_c")
    for file in (work / "py" / PACKAGE).glob("**/*.py"):
        copy = out / file.relative_to(work / "py" / PACKAGE)
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(file, copy)
    (out / "__init__.py").touch()


def main() -> None:
    """Source folder of the package, folder for `PYTHONPATH`."""
    source, target = (Path(a).absolute() for a in sys.argv[1:3])
    (target / PACKAGE).mkdir(parents=True)
    generate(source, target / "build")
    build(target / "build", target / PACKAGE)


if __name__ == "__main__":
    main()

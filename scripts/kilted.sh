#!/usr/bin/env bash
# The ROS tests on the Kilted wheels, in a second environment: `make test-kilted`. It holds only the ROS packages (one
# distribution per environment) and borrows everything else from .venv, behind its own.
set -euo pipefail
cd "$(dirname "$0")/.."
home=.venv-kilted
base=${BASE_PYTHON:-.venv/bin/python}
if [ ! -e "$home/.installed" ]; then
    "$base" -m venv "$home"
    packages=()
    for name in 'rclpy[fastrtps]' diagnostic-msgs geometry-msgs lifecycle-msgs rosgraph-msgs sensor-msgs std-msgs std-srvs \
        trajectory-msgs; do
        packages+=("ros-kilted-$name")
    done
    "$home/bin/python" -m pip install --quiet --disable-pip-version-check "${packages[@]}"
    "$base" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
        > "$("$home/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/zz_borrowed.pth"
    touch "$home/.installed"
fi
# Both environments set library paths once per process tree: start from neither.
unset _ROS_WHEELS_BOOTSTRAP_COMPLETE LD_LIBRARY_PATH
export PYTHONPATH="$PWD:$PWD/ros_ws/src/flow_policy_ros${PYTHONPATH:+:$PYTHONPATH}"
exec "$home/bin/python" -m pytest ros_ws/src/flow_policy_ros/test "$@"

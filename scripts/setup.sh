#!/usr/bin/env bash
# Everything `make demo` and `make test` need, into .venv. Run again, it does nothing twice (the Makefile keeps the stamp).
# PYTHON=python3.12 make setup   another interpreter;   PIP_ARGS="--index-url ..." make setup   another package index
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
say() { printf '[setup] %s\n' "$*"; }

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  say "$("$python" --version 2>&1) is too old: Python 3.11 or newer is needed (PYTHON=/path/to/python3.11 make setup)"
  exit 2
}
"$python" -c 'import venv, ensurepip' 2>/dev/null || {
  say "python3-venv is missing (Debian and Ubuntu: apt-get install python3-venv)"
  exit 2
}
[ -x .venv/bin/python ] || "$python" -m venv .venv

constraints=constraints.txt
ros='[wheels]'
# A sourced ROS 2: found, not imported, for its rclpy needs yaml, which a new environment does not have.
found=''
if [ -n "${AMENT_PREFIX_PATH:-}" ]; then
  found=$(.venv/bin/python -c 'from importlib.util import find_spec; print(getattr(find_spec("rclpy"), "origin", ""))')
fi
if [ -n "$found" ]; then
  theirs=$(sed -nE 's|.*/python(3\.[0-9]+)/.*|\1|p' <<<"$found")
  ours=$(.venv/bin/python -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  if [ -n "$theirs" ] && [ "$theirs" != "$ours" ]; then
    say "the sourced ROS 2 is for Python $theirs, .venv has $ours: take a shell without it, or rm -r .venv and PYTHON=python$theirs make setup"
    exit 2
  fi
  say "using the sourced ROS 2 (${ROS_DISTRO:-unknown distribution})"
  ros=''
  # Its messages of Humble, Jazzy and Kilted are compiled against the numpy 1 of their Ubuntu.
  if ! "$python" -c 'import numpy, sys; sys.exit(numpy.__version__ < "2")' 2>/dev/null; then
    constraints=.venv/constraints.txt
    grep -v -E '^(numpy|opencv-python-headless|pyarrow|scipy|ros-)' constraints.txt >"$constraints"
    printf 'numpy<2\nopencv-python-headless<5\npyarrow<26\n' >>"$constraints" # the first that want numpy 2
  fi
fi

pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }
say "installing torch"
pip install -q ${PIP_ARGS:-} -c "$constraints" torch
say "installing the rest"
pip install -q ${PIP_ARGS:-} -c "$constraints" -e '.[all,warp,test,dev]' -e "ros_ws/src/flow_policy_ros$ros"

# Off-screen rendering, for films and camera images: EGL through Mesa.
needed="libegl1 libegl-mesa0 libgl1-mesa-dri"
if ! .venv/bin/python -c 'import ctypes; ctypes.CDLL("libEGL.so.1")' 2>/dev/null; then
  as_root=''
  [ "$(id -u)" = 0 ] || as_root='sudo -n'
  if command -v apt-get >/dev/null && { [ -z "$as_root" ] || $as_root true 2>/dev/null; }; then
    say "installing $needed"
    { $as_root apt-get install -y -qq $needed || { $as_root apt-get update -qq && $as_root apt-get install -y -qq $needed; }; } \
      >/dev/null 2>&1 || say "no rendering: apt-get could not install $needed"
  else
    say "no rendering until these are installed: $needed"
  fi
fi
say "done: .venv/bin/flow-policy --help"

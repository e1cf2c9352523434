"""A recorded robot whose motion is known in closed form, as a bag."""

from pathlib import Path

import numpy as np

from flow_policy_rl.data.bags import TYPESTORE, BagWriter

TYPES = TYPESTORE.types
JOINTS, POSE, IMAGE = (
    "sensor_msgs/msg/JointState",
    "geometry_msgs/msg/PoseStamped",
    "sensor_msgs/msg/Image",
)
TRAJECTORY, ARRAY = "trajectory_msgs/msg/JointTrajectory", "std_msgs/msg/Float64MultiArray"
ROBOT = """
name: toy
arm:
  a: {position: [-1, 1], velocity: 2.0, acceleration: 50.0, jerk: 5000.0}
gripper:
  b: {position: [-2, 2], velocity: 2.0, acceleration: 50.0, jerk: 5000.0}
topics:
  joint_states: /js
  command: /command
  poses: {cube: /cube}
  images: {front: /front}
chain:
  - {joint: a}
  - {xyz: [1.0, 0, 0]}
"""


def header(ns: int):
    stamp = TYPES["builtin_interfaces/msg/Time"](ns // 1_000_000_000, ns % 1_000_000_000)
    return TYPES["std_msgs/msg/Header"](stamp, "world")


def joint_state(ns, values, names=("c", "b", "a")):
    position = np.array(values, float)
    return TYPES[JOINTS](header(ns), list(names), position, position * 0.1, np.zeros(0))


def pose(ns, x):
    point = TYPES["geometry_msgs/msg/Point"](x, 0.0, 0.0)
    turn = TYPES["geometry_msgs/msg/Quaternion"](0.0, 0.0, 0.0, 1.0)
    return TYPES[POSE](header(ns), TYPES["geometry_msgs/msg/Pose"](point, turn))


def picture(ns, height, width, value=0, encoding="rgb8"):
    channels = 1 if encoding == "mono8" else 3
    data = np.full(height * width * channels, value, np.uint8)
    return TYPES[IMAGE](header(ns), height, width, encoding, 0, width * channels, data)


def trajectory(names, times, positions, velocities=None):
    points = [
        TYPES["trajectory_msgs/msg/JointTrajectoryPoint"](
            np.array(p, float),
            np.zeros(0) if velocities is None else np.array(velocities[k], float),
            np.zeros(0),
            np.zeros(0),
            TYPES["builtin_interfaces/msg/Duration"](int(t), round(t % 1 * 1e9)),
        )
        for k, (t, p) in enumerate(zip(times, positions, strict=True))
    ]
    return TYPES[TRAJECTORY](header(0), list(names), points)


def write(folder, messages) -> Path:
    """A bag of (topic, type, log time, message or bytes)."""
    writer = BagWriter(folder)
    for topic, kind, log_time, msg in messages:
        writer.add_topic(topic, kind)
        data = msg if isinstance(msg, bytes) else bytes(TYPESTORE.serialize_cdr(msg, kind))
        writer.write(topic, log_time, data)
    writer.close()
    return folder


def motion(t: float) -> tuple[float, float]:
    """Joints a and b of the recorded robot."""
    return 0.5 * np.sin(t), 0.3 * t


MS = 1_000_000


def late(messages, topic, by_ns):
    """The same messages; those of one topic arrive later."""
    moved = [(t, k, log + by_ns * (t == topic), m) for t, k, log, m in messages]
    return sorted(moved, key=lambda m: m[2])


TOLD = {  # how the truth of a robot is known: kind, topic
    "trajectory": ("command", ""),
    "point": ("command", ""),
    "array": ("command", ""),
    "joint state": ("command", ""),
    "controller": ("controller", "/reference"),
    "state": ("state", ""),
}


def told(how, seconds=4.0):
    """The recorded robot, told where it is at every joint state, or with trajectories of what it will do."""
    messages = []
    for topic, kind, log, msg in recorded(seconds, command=how == "trajectory"):
        messages.append((topic, kind, log, msg))
        if topic != "/js":
            continue
        if how == "array":
            values = TYPES[ARRAY](
                TYPES["std_msgs/msg/MultiArrayLayout"]([], 0), msg.position[[2, 1]]
            )
            messages.append(("/command", ARRAY, log, values))
        elif how == "point":
            point = trajectory("ba", [0.01], [msg.position[1:]])
            messages.append(("/command", TRAJECTORY, log, point))
        elif how in ("joint state", "controller"):
            same = joint_state(log - MS, msg.position[1:], ("b", "a"))
            messages.append(
                ("/command" if how == "joint state" else "/reference", JOINTS, log, same)
            )
    return messages


def recorded(seconds=6.0, command=True, rate=0.01):
    """A robot that moves as `motion`, with a pose stream at another rate and commands that say where it will be."""
    messages = []
    for k in range(int(seconds / rate)):
        ns = 1_000_000_000 + round(k * rate * 1e9)
        t = k * rate
        if k % 2 == 0:
            messages.append(("/cube", POSE, ns + 2 * MS, pose(ns - 3 * MS, t)))
        a, b = motion(t)
        messages.append(("/js", JOINTS, ns + 1 * MS, joint_state(ns, [9.0, b, a])))
        if command and k % 20 == 0:
            ahead = np.arange(1, 41) * 0.01
            positions = [motion(t + d)[::-1] for d in ahead]
            messages.append(
                ("/command", TRAJECTORY, ns + 4 * MS, trajectory("ba", ahead, positions))
            )
    return messages


def apart(messages: list) -> list:
    """The same robot with a driver for each of two groups of joints, beside something else on their topic."""
    result = []
    for topic, kind, log, msg in messages:
        if topic != "/js":
            result.append((topic, kind, log, msg))
            continue
        ns = msg.header.stamp.sec * 1_000_000_000 + msg.header.stamp.nanosec
        values = dict(zip(msg.name, msg.position, strict=True))
        for names in (("a", "c"), ("wheel",), ("b",)):
            part = joint_state(ns, [values.get(n, np.nan) for n in names], names)
            result.append((topic, kind, log, part))
    return result

"""Plain objects shaped like messages."""

from types import SimpleNamespace as Msg

MS = 1_000_000


def header(ns: int) -> Msg:
    return Msg(stamp=Msg(sec=ns // 1_000_000_000, nanosec=ns % 1_000_000_000))


def joint_state(names, positions, velocities=(), ns=0) -> Msg:
    return Msg(
        header=header(ns), name=list(names), position=list(positions), velocity=list(velocities)
    )


def pose(values, ns=0) -> Msg:
    x, y, z, qx, qy, qz, qw = values
    inner = Msg(position=Msg(x=x, y=y, z=z), orientation=Msg(x=qx, y=qy, z=qz, w=qw))
    return Msg(header=header(ns), pose=inner)

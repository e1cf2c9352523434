"""Physics for N environments at once, by name."""

from typing import Literal

from sim.backends.base import Backend
from sim.backends.rollout import RolloutBackend
from sim.backends.threads import ThreadsBackend
from sim.errors import unknown_name
from sim.world import World

BackendName = Literal["cpu", "warp", "warp-cpu"]
NAMES: tuple[BackendName, ...] = ("cpu", "warp", "warp-cpu")


def make_backend(
    world: World, num_threads: int | None = None, name: BackendName = "cpu"
) -> Backend:
    """The backend that serves a world.

    Args:
        num_threads: on the CPU; None: one per core.
        name: `cpu` is `mujoco.rollout` where a world's plain states are enough, threads elsewhere; `warp` is MuJoCo
            Warp on an NVIDIA GPU, `warp-cpu` the same on the CPU.

    Raises:
        SimulationError: unknown name, no GPU, or a model that MuJoCo Warp cannot run.
        ModuleNotFoundError: MuJoCo Warp is not installed.
    """
    if name == "cpu":
        cpu = RolloutBackend if RolloutBackend.serves(world) else ThreadsBackend
        return cpu(world, num_threads)
    if name not in NAMES:
        raise unknown_name("backend", name, NAMES)
    from sim.backends.warp import WarpBackend

    return WarpBackend(world, "cuda" if name == "warp" else "cpu")

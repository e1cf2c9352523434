"""Physics for N environments at once, by name."""

from typing import Literal, get_args

from sim.backends.base import Backend
from sim.backends.rollout import RolloutBackend
from sim.backends.threads import ThreadsBackend
from sim.errors import unknown_name
from sim.render import Renderer
from sim.world import World

BackendName = Literal["cpu", "warp", "warp-pixels", "warp-cpu", "warp-cpu-pixels"]
NAMES: tuple[BackendName, ...] = get_args(BackendName)
PIXELS = "-pixels"


def make_backend(
    world: World, num_threads: int | None = None, name: BackendName = "cpu"
) -> Backend:
    """The backend that serves a world.

    Args:
        num_threads: on the CPU; None: one per core.
        name: `cpu` is `mujoco.rollout` where a world's plain states are enough, threads elsewhere; `warp` is MuJoCo
            Warp on an NVIDIA GPU, `warp-cpu` the same on the CPU. The physics of `warp-pixels` is that of `warp`.

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

    return WarpBackend(world, warp_device(name))


def warp_device(name: BackendName) -> str:
    """`cuda` or `cpu`."""
    return "cpu" if name.startswith("warp-cpu") else "cuda"


def make_renderer(world: World, height: int, width: int, name: BackendName = "cpu"):
    """What draws the policy's pictures: MuJoCo's renderer, or that of MuJoCo Warp for the names that end in `-pixels`.

    Raises:
        SimulationError: no GL library, or no GPU.
        ModuleNotFoundError: MuJoCo Warp is not installed.
    """
    if not name.endswith(PIXELS):
        return Renderer(world, height, width)
    from sim.backends.warp import WarpRenderer

    return WarpRenderer(world, height, width, warp_device(name))

"""MuJoCo's own viewer, in a window, for episodes that have been played."""

import os
import sys
import time

import numpy as np

from sim.errors import SimulationError
from sim.world import World


def show(world: World, episodes: np.ndarray) -> None:
    """Play episodes (n, T, state_size), nan after the end of each, one after the other until the window is closed.

    Raises:
        SimulationError: there is no display to open a window on.
    """
    if sys.platform.startswith("linux") and not {"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ):
        raise SimulationError("no display to open a window on: eval --out draws films without one")
    import mujoco.viewer

    data = mujoco.MjData(world.model)
    with mujoco.viewer.launch_passive(world.model, data) as viewer:
        while viewer.is_running():
            for episode in episodes:
                for state in episode[np.isfinite(episode).all(axis=1)]:
                    if not viewer.is_running():
                        return
                    with viewer.lock():
                        world.write(state, data)
                        mujoco.mj_forward(world.model, data)
                    viewer.sync()
                    time.sleep(world.control_dt)

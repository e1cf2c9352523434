"""Pictures of simulation states, without a screen where EGL is installed."""

import os

import mujoco
import numpy as np

from sim.errors import SimulationError, unknown_name
from sim.world import World


class Renderer:
    """Draws states of one world from its named cameras.

    Raises:
        SimulationError: no GL library (the message says which package to install), or no such camera.
    """

    def __init__(self, world: World, height: int, width: int):
        if os.environ.get("MUJOCO_GL") == "disable":
            raise SimulationError(
                "rendering needs EGL: install libegl1, libegl-mesa0 and libgl1-mesa-dri "
                "(Debian and Ubuntu: apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri)"
            )
        self._world = world
        self._data = mujoco.MjData(world.model)
        self._cameras = [world.model.camera(i).name for i in range(world.model.ncam)]
        self._renderer = mujoco.Renderer(world.model, height, width)

    def render(self, state: np.ndarray, camera: str) -> np.ndarray:
        """(state_size,) -> (height, width, 3) uint8, RGB."""
        if camera not in self._cameras:
            raise unknown_name("camera", camera, self._cameras)
        self._world.write(state, self._data)
        mujoco.mj_kinematics(self._world.model, self._data)
        mujoco.mj_camlight(self._world.model, self._data)
        self._renderer.update_scene(self._data, camera)
        return self._renderer.render()

    def close(self) -> None:
        """Free the GL context, which must not be left to the interpreter's end."""
        self._renderer.close()

    def __enter__(self) -> "Renderer":
        return self

    def __exit__(self, *exc) -> None:
        self.close()

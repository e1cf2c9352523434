"""Pictures of simulation states, without a screen where EGL is installed."""

import os
from collections.abc import Sequence

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
        self._view = mujoco.MjvCamera()
        self._view.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self._option = mujoco.MjvOption()
        self._renderer = mujoco.Renderer(world.model, height, width)

    def render(
        self, state: np.ndarray, camera: str, model: mujoco.MjModel | None = None
    ) -> np.ndarray:
        """(state_size,) -> (height, width, 3) uint8, RGB. With a model that looks different, as it looks there; only
        meshes and textures stay the world's."""
        if camera not in self._cameras:
            raise unknown_name("camera", camera, self._cameras)
        model = model or self._world.model
        self._view.fixedcamid = self._cameras.index(camera)
        self._world.write(state, self._data)
        mujoco.mj_kinematics(model, self._data)
        # Cameras that follow a walker follow its centre of mass.
        mujoco.mj_comPos(model, self._data)
        mujoco.mj_camlight(model, self._data)
        everything = mujoco.mjtCatBit.mjCAT_ALL.value
        mujoco.mjv_updateScene(
            model, self._data, self._option, None, self._view, everything, self._renderer.scene
        )
        return self._renderer.render()

    def batch(
        self,
        states: np.ndarray,
        camera: str,
        models: Sequence[mujoco.MjModel] | None = None,
    ) -> np.ndarray:
        """(n, state_size) -> (n, height, width, 3) uint8, RGB; with a model for each, as it looks there."""
        models = [None] * len(states) if models is None else models
        drawn = [
            self.render(*given)
            for given in zip(states, [camera] * len(states), models, strict=True)
        ]
        return np.stack(drawn)

    def close(self) -> None:
        """Free the GL context, which must not be left to the interpreter's end."""
        self._renderer.close()

    def __enter__(self) -> "Renderer":
        return self

    def __exit__(self, *exc) -> None:
        self.close()

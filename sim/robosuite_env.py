"""Stock robosuite environments for evaluation, as Gymnasium environments. Importing this module registers them.

    import gymnasium, sim.robosuite_env
    env = gymnasium.make("flow_policy/RobosuiteLift-v0")

Optional: pip install --no-deps robosuite==1.5.2 numba==0.68.1 llvmlite==0.50.0 termcolor==3.3.0. Observations are
robosuite's low-dimensional ones under robomimic's names, actions robosuite's (operational space, between -1 and 1) at
20 Hz, success robosuite's own. They are slow (about 150 control steps per second and core): to judge a policy, not to
train one.
"""

import logging
from importlib.util import find_spec
from typing import Any, ClassVar

import gymnasium
import numpy as np
from gymnasium import spaces

from sim.errors import SimulationError, unknown_name

CONTROL_HZ = 20
# Ours -> robosuite's name, its robots, control steps of an episode (robomimic's).
STOCK: dict[str, tuple[str, list[str], int]] = {
    "Lift": ("Lift", ["Panda"], 400),
    "Can": ("PickPlaceCan", ["Panda"], 400),
    "Square": ("NutAssemblySquare", ["Panda"], 400),
    "Transport": ("TwoArmTransport", ["Panda", "Panda"], 700),
}


class RobosuiteEnv(gymnasium.Env):
    """One stock environment. An episode ends at its first success, or after its time.

    Args:
        name: key of `STOCK`.

    Raises:
        SimulationError: unknown name, or robosuite is not installed.
    """

    metadata: ClassVar[dict] = {"render_modes": [], "render_fps": CONTROL_HZ}
    dt = 1 / CONTROL_HZ  # s, of a control step

    def __init__(self, name: str, render_mode: None = None):
        if name not in STOCK:
            raise unknown_name("robosuite environment", name, STOCK)
        if find_spec("robosuite") is None:
            raise SimulationError(
                f"'{name}' needs robosuite: pip install --no-deps robosuite==1.5.2 numba==0.68.1 llvmlite==0.50.0 "
                "termcolor==3.3.0"
            )
        import robosuite

        logging.getLogger("robosuite_logs").setLevel(
            logging.ERROR
        )  # which files it reads, for each
        stock, robots, self._horizon = STOCK[name]
        self.render_mode = render_mode
        self._env = robosuite.make(
            stock,
            robots=robots,
            has_renderer=False,
            has_offscreen_renderer=False,
            use_camera_obs=False,
            control_freq=CONTROL_HZ,
            hard_reset=True,  # slower, but nothing of the last episode remains
            ignore_done=True,
        )
        low, high = self._env.action_spec
        self.action_space = spaces.Box(low.astype(np.float32), high.astype(np.float32))
        self.observation_space = spaces.Dict(
            {
                name: spaces.Box(-np.inf, np.inf, values.shape, np.float64)
                for name, values in self._pick(self._env.reset()).items()
            }
        )

    def _pick(self, obs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All vectors that robosuite gives but its own collections of them; `object-state` is robomimic's `object`."""
        whole = obs | {"object": obs["object-state"]}
        return {
            name: np.asarray(values, dtype=np.float64)
            for name, values in whole.items()
            if np.ndim(values) == 1 and not name.endswith("-state")
        }

    def reset(
        self, *, seed: int | None = None, options: dict | None = None
    ) -> tuple[dict[str, np.ndarray], dict]:
        """Start an episode; the same seed starts the same one."""
        super().reset(seed=seed)
        generator = np.random.default_rng(self.np_random.integers(2**63))
        self._env.rng = generator
        sampler = getattr(self._env, "placement_initializer", None)  # outlives a reset
        for part in [sampler, *getattr(sampler, "samplers", {}).values()]:
            if part is not None:
                part.rng = generator
        self._steps = 0
        return self._pick(self._env.reset()), {}

    def step(
        self, action: np.ndarray
    ) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """One control step."""
        obs, reward, _, _ = self._env.step(np.asarray(action, dtype=np.float64))
        self._steps += 1
        success = bool(self._env._check_success())
        late = self._steps >= self._horizon and not success
        return self._pick(obs), float(reward), success, late, {"success": success}

    def close(self) -> None:
        """Free robosuite's simulation."""
        self._env.close()


for _name in STOCK:
    if f"flow_policy/Robosuite{_name}-v0" not in gymnasium.registry:
        gymnasium.register(
            f"flow_policy/Robosuite{_name}-v0",
            entry_point="sim.robosuite_env:RobosuiteEnv",
            kwargs={"name": _name},
        )

"""Demonstrations of robosuite's own Lift by a script, in robomimic's HDF5 layout.

    python examples/robosuite_lift.py --episodes 100 --out robosuite_lift.hdf5
    flow-policy train bc --task recorded --demos robosuite_lift.hdf5 --run-dir runs/robosuite_lift
    flow-policy eval --policy runs/robosuite_lift/policy.safetensors --task robosuite_lift --episodes 50

Noise is executed but not recorded, so that the data hold the way back. Needs robosuite (docs/simulation.md).
"""

import argparse
from pathlib import Path

import gymnasium
import numpy as np

import sim.robosuite_env  # noqa: F401  (registers the environments)
from flow_policy_rl.data.demonstrations import DemoLayout, Demonstrations, Episode, save
from flow_policy_rl.spec import ObservationField

FIELDS = {"object": 10, "robot0_eef_pos": 3, "robot0_eef_quat": 4, "robot0_gripper_qpos": 2}
STEP = 0.05  # m that an action of 1 asks for
OPEN, CLOSED = -1.0, 1.0
CLOSING = 8  # control steps


class Script:
    """Above the cube, down, close, up."""

    def __init__(self):
        self.closing = 0

    def act(self, obs: dict[str, np.ndarray]) -> np.ndarray:
        """Action (7,): move and turn of the hand, and the gripper."""
        cube, hand = obs["object"][:3], obs["robot0_eef_pos"]
        missing = cube - hand
        beside = np.linalg.norm(missing[:2]) > 0.015
        if self.closing >= CLOSING:
            missing = np.array([0.0, 0.0, 0.1])
        elif self.closing or (not beside and missing[2] > -0.01):
            self.closing += 1
        elif beside:
            missing = missing + [0, 0, 0.08]
        gripper = CLOSED if self.closing else OPEN
        return np.array([*np.clip(missing / STEP, -1, 1), 0, 0, 0, gripper])


def record(env: gymnasium.Env, seed: int, noise: float) -> Episode | None:
    """One episode, if it succeeds."""
    rng, script = np.random.default_rng((seed, 1)), Script()
    obs, _ = env.reset(seed=seed)
    rows, done = [], False
    while not done:
        wanted = script.act(obs)
        disturbed = wanted + noise * np.array([1, 1, 1, 0.3, 0.3, 0.3, 0]) * rng.standard_normal(7)
        seen = obs
        obs, reward, won, late, _ = env.step(np.clip(disturbed, -1, 1))
        rows.append((seen, wanted, reward))
        done = won or late
    if not won:
        return None
    seen, actions, rewards = zip(*rows, strict=True)
    fields = {name: np.stack([s[name] for s in seen]) for name in FIELDS}
    states = np.zeros((len(rows), 0))
    return Episode(fields, np.stack(actions), np.array(rewards), states, success=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--noise", type=float, default=0.3)
    parser.add_argument("--out", type=Path, default=Path("robosuite_lift.hdf5"))
    arguments = parser.parse_args()
    env = gymnasium.make("flow_policy/RobosuiteLift-v0")
    found = [record(env, seed, arguments.noise) for seed in range(arguments.episodes)]
    kept = [episode for episode in found if episode]
    fields = tuple(
        ObservationField(name, "state", tuple(f"{name}_{k}" for k in range(size)), "m, 1")
        for name, size in FIELDS.items()
    )
    actions = ("x", "y", "z", "rx", "ry", "rz", "gripper")
    layout = DemoLayout("robosuite_lift", "robosuite_panda", actions, env.unwrapped.dt, fields)
    save(arguments.out, Demonstrations(layout, kept, {"by": "script", "noise": arguments.noise}))
    print(f"{len(kept)} of {len(found)} episodes succeeded: {arguments.out}")


if __name__ == "__main__":
    main()

"""Films of episodes: their states drawn by the task's first camera, four to a picture."""

from collections.abc import Callable, Sequence

import numpy as np

from sim.backends import BackendName
from sim.render import Renderer
from sim.vec_env import VecEnv

SIZE = (240, 320)  # height and width of each of the four pictures

# Runs episodes of these seeds in an environment, and reports states (N, h, state_size) with their validity (N, h).
Play = Callable[[VecEnv, Sequence[int], Callable[[np.ndarray, np.ndarray], None]], object]


def record(task, seeds: Sequence[int], play: Play, backend: BackendName = "cpu") -> np.ndarray:
    """States (len(seeds), T, state_size) of whole episodes, nan after the end of each."""
    env = VecEnv(task, len(seeds), backend=backend)
    states: list[np.ndarray] = []
    play(
        env,
        seeds,
        lambda chunk, valid: states.append(np.where(valid[..., None], chunk, np.nan)),
    )
    env.close()
    return np.concatenate(states, axis=1)


def draw(
    renderer: Renderer, states: np.ndarray, camera: str, size: tuple[int, ...] = SIZE
) -> list[np.ndarray]:
    """Up to four episodes (n, T, state_size) as frames of two by two pictures of the renderer's size; one that is over
    stays as it ended."""
    height, width = size
    frame = np.zeros((2 * height, 2 * width, 3), np.uint8)
    frames = []
    for step in range(states.shape[1]):
        for i, episode in enumerate(states):
            if np.isfinite(episode[step]).all():
                top, left = i // 2 * height, i % 2 * width
                frame[top : top + height, left : left + width] = renderer.render(
                    episode[step], camera
                )
        frames.append(frame.copy())
    return frames

"""Draw every task's start for docs/simulation.md: python scripts/task_pictures.py [folder]."""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from sim.render import Renderer
from sim.tasks import TASKS, make_task

SIZE = (240, 320)


def main(folder: Path) -> None:
    """One PNG per task."""
    for name in TASKS:
        task = make_task(name)
        state = task.initial_state(np.random.default_rng(0))
        with Renderer(task.world, *SIZE) as renderer:
            Image.fromarray(renderer.render(state, task.cameras[0])).quantize(128).save(
                folder / f"task_{name}.png", optimize=True
            )


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/pictures"))

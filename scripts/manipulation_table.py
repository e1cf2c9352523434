"""The table and the pictures of docs/manipulation.md, measured and drawn.

    python scripts/manipulation_table.py                     # every manipulation task: Markdown rows
    python scripts/manipulation_table.py --tasks lamp --pictures docs/pictures

Success is that of the scripted expert at zero noise, one episode per seed. Speed is physics alone (mujoco.rollout, one
thread): the experts' own commands again, 32 environments, chunks of 8 control steps, per second of CPU time.
"""

import argparse
import time
from pathlib import Path

import cv2
import numpy as np

from sim.expert import make_expert
from sim.render import Renderer
from sim.tasks import MANIPULATION, make_task
from sim.tasks.assembly import RANDOMNESS, Assembly
from sim.vec_env import VecEnv

FIRST_SEED = 1000
PICTURE_SHARES = (0.0, 0.35, 0.65, 1.0)  # of the episode
PICTURE_SIZE = (240, 320)


def variants(names):
    """(name, options) of every row."""
    for name in names:
        task = MANIPULATION[name]
        if issubclass(task, Assembly):
            yield from ((name, {"randomness": level}) for level in RANDOMNESS)
        else:
            yield from ((name, {"robot": robot}) for robot in task.robots)


def run(task, episodes: int) -> dict:
    """All episodes of the expert side by side."""
    env = VecEnv(task, episodes, num_threads=1)
    env.reset(list(range(FIRST_SEED, FIRST_SEED + episodes)))
    start = env.state.copy()
    rng = np.random.default_rng(0)
    experts = [make_expert(task, state, rng) for state in start]
    running, won = np.ones(episodes, bool), np.zeros(episodes, bool)
    length = np.zeros(episodes, int)
    commands, first_states = [], []
    while running.any():
        actions = [
            e.act(s) if on else c
            for e, s, c, on in zip(experts, env.state, env.command, running, strict=True)
        ]
        first_states.append(env.state[0].copy())
        step = env.step(np.stack(actions)[:, None])
        commands.append(step.commands[:, 0])
        length += running
        won |= running & step.success
        running &= ~step.ended
    env.close()
    return {
        "start": start,
        "won": won,
        "length": length,
        "commands": np.stack(commands, axis=1),
        "film": first_states[: length[0]],
    }


def speed(task, start: np.ndarray, commands: np.ndarray) -> float:
    """Physics steps per CPU-second of 32 environments, the median of three."""
    start, commands = start[:32], commands[:32]
    env = VecEnv(task, len(start), num_threads=1)
    rates = []
    for _ in range(3):
        state, command = start, task.world.initial_command(start)
        used = steps = 0
        for at in range(0, commands.shape[1] - 7, 8):
            controls, done = task.world.controls(command, commands[:, at : at + 8])
            states = np.empty((len(start), 8, task.world.state_size))
            begun = time.process_time()
            env.backend.step(state, controls, states)
            used += time.process_time() - begun
            steps += len(start) * 8 * task.world.decimation
            state, command = states[:, -1], done[:, -1]
        rates.append(steps / used)
    env.close()
    return float(np.median(rates))


def draw(task, film: list[np.ndarray], path: Path) -> None:
    """Some moments of one episode side by side."""
    rows = [film[round(share * (len(film) - 1))] for share in PICTURE_SHARES]
    with Renderer(task.world, *PICTURE_SIZE) as renderer:
        images = [renderer.render(row, task.cameras[0]).copy() for row in rows]
    cv2.imwrite(str(path), np.concatenate(images, axis=1)[..., ::-1])


def main() -> None:
    """Print one row per task and variant."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", default=list(MANIPULATION), choices=MANIPULATION)
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--pictures", type=Path, help="folder to write <task>.png to")
    options = parser.parse_args()
    print(
        "| task | variant | success | median steps | physics steps per CPU-s | control steps per CPU-s |"
    )
    print("|---|---|---|---|---|---|")
    drawn = set()
    for name, choice in variants(options.tasks):
        task = make_task(name, **choice)
        result = run(task, options.episodes)
        rate = speed(task, result["start"], result["commands"])
        won, length = result["won"], result["length"]
        median = int(np.median(length[won])) if won.any() else "-"
        print(
            f"| {name} | {next(iter(choice.values()))} | {won.sum()}/{len(won)} | {median} | {rate:,.0f} "
            f"| {rate / task.world.decimation:,.0f} |",
            flush=True,
        )
        if options.pictures and name not in drawn:
            draw(task, result["film"], options.pictures / f"{name}.png")
            drawn.add(name)


if __name__ == "__main__":
    main()

"""`flow-policy bench sim`: how fast the simulation is, against raw `mujoco.rollout`, Gymnasium and robosuite.

What is counted: valid control steps only (none after an episode's end inside a chunk). All sides get the same model
and random commands, and one thread per core; ours also computes observations, rewards and resets. Raw rollouts start
from our states, with our warm starts. All take turns in one process, so that a busy machine slows all of them alike:
figures are medians, ratios medians of the ratios turn by turn. Where other programs run too, look at the figures per
CPU-second.
"""

import importlib.util
import os
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from flow_policy_rl import provenance
from flow_policy_rl.bench import curves
from flow_policy_rl.errors import InputError, output_file, refuse_below
from sim import backends
from sim.backends import BackendName, make_renderer
from sim.randomize import PresetName, make_env
from sim.tasks import make_task
from sim.tasks.layout import IMAGE_RESOLUTION
from sim.vec_env import VecEnv
from sim.world import STATE, WARM_START

SETTLE_CHUNKS = 4  # so that environments are spread over their episodes
GYMNASIUM_SECONDS = 0.5
BATCHES = {name: (1, 4, 16, 64, 256, 1024, 4096) for name in backends.NAMES}
for gpu in ("warp", "warp-pixels"):
    BATCHES[gpu] += (16384, 65536)
SYNC_ENVS, ASYNC_ENVS_PER_CORE = 32, 4
ROBOSUITE_STEPS = 200


@dataclass(frozen=True)
class Config:
    """Environment steps per second of one task, and how they compare.

    Example: flow-policy bench sim --task hopper

    Attributes:
        task: name of the task.
        task_options: names and values of the task's own options, e.g. `randomness med`.
        num_envs: environments side by side.
        chunk: control steps per call.
        num_threads: physics threads (0: one per core).
        backend: what computes our physics: cpu, warp (MuJoCo Warp on an NVIDIA GPU), or warp-cpu (the same on the CPU);
            with -pixels it draws the pictures too (docs/simulation.md).
        repeats: timed chunks; medians are reported.
        gymnasium: also run Gymnasium's SyncVectorEnv and AsyncVectorEnv (locomotion tasks).
        robosuite: also run robosuite's Lift, and both per CPU-second (needs robosuite; task lift).
        cameras: also render, 96 x 96, from the task's first camera.
        randomize: ours in randomised worlds (mild, hard), and in turns with the nominal one, for what that costs.
        growth: also measure batches of 1 to 4,096 (65,536 on a GPU), and threads from 1 to one per core.
        out: HTML page with the plots of --growth; beside it each as SVG.
        seed: of states and commands.
        json: print one JSON object.
    """

    task: str = "hopper"
    task_options: dict[str, str] = field(default_factory=dict)
    num_envs: int = 1024
    chunk: int = 4
    num_threads: int = 0
    backend: BackendName = "cpu"
    repeats: int = 9
    gymnasium: bool = True
    robosuite: bool = False
    cameras: bool = False
    randomize: PresetName = "nominal"
    growth: bool = False
    out: Path = Path("runs/bench_sim.html")
    seed: int = 0
    json: bool = False


def main(config: Config) -> dict:
    """Measure."""
    refuse_below(config, num_envs=1, chunk=1, repeats=1, num_threads=0)
    task = make_task(config.task, **config.task_options)
    if config.robosuite:
        require_robosuite(task)
    if config.growth:
        output_file(config.out, ".html")
    threads = config.num_threads or len(os.sched_getaffinity(0))
    rivals = []
    if config.gymnasium and hasattr(task, "gymnasium_id"):
        rivals = [
            GymnasiumRate(task.gymnasium_id, "sync", SYNC_ENVS, config.seed),
            GymnasiumRate(task.gymnasium_id, "async", ASYNC_ENVS_PER_CORE * threads, config.seed),
        ]
    result = {
        "task": task.name,
        "task_options": dict(task.options),
        "num_envs": config.num_envs,
        "num_threads": threads,
        "chunk": config.chunk,
        "backend": config.backend,
        "randomize": config.randomize,
        "gymnasium_sync_env_steps_per_s": None,
        "gymnasium_async_env_steps_per_s": None,
        "ratio_to_gymnasium": None,
        "raw_ratio_to_gymnasium": None,
    } | compare(
        task,
        config.num_envs,
        config.chunk,
        threads,
        config.repeats,
        config.seed,
        rivals,
        config.backend,
        config.randomize,
    )
    for rival in rivals:
        rival.envs.close()
    if config.cameras:
        result |= frames(task, config.repeats, config.seed, config.backend)
    if config.robosuite:
        result |= against_robosuite(task, config)
    if config.growth:
        result["growth"] = grow(task, config, threads)
        result["svg"] = [str(f) for f in plot(config.out, task.name, result["growth"])]
        result["plot"] = str(config.out)
    return result | {"environment": provenance.environment(), "load": os.getloadavg()[0]}


def draw_actions(env: VecEnv, chunk: int, rng: np.random.Generator) -> np.ndarray:
    """Random commands over the whole range, (N, chunk, A)."""
    world = env.world
    shape = (env.num_envs, chunk, len(world.joint_names))
    return rng.uniform(world.target_low, world.target_high, shape)


def compare(
    task,
    num_envs: int,
    chunk: int,
    threads: int,
    repeats: int,
    seed: int,
    rivals: Sequence["GymnasiumRate"] = (),
    backend: BackendName = "cpu",
    randomize: PresetName = "nominal",
) -> dict[str, float]:
    """Ours, `mujoco.rollout` and rivals in turns: steps per second and per CPU-second of this process."""
    import mujoco
    from mujoco import rollout

    options = {"seed": seed, "num_threads": threads, "backend": backend}
    env = make_env(task, num_envs, randomize, **options)
    plain_env = env if randomize == "nominal" else VecEnv(task, num_envs, **options)
    world = task.world
    rng = np.random.default_rng(seed)
    for one in {env, plain_env}:
        one.reset()
        for _ in range(SETTLE_CHUNKS):
            one.step(draw_actions(one, chunk, rng))
    pool = rollout.Rollout(nthread=threads if threads > 1 else 0)
    data = [mujoco.MjData(world.model) for _ in range(threads)]
    plain = mujoco.mj_stateSize(world.model, STATE)

    def chunk_of_ours() -> int:
        return int(env.step(actions).valid.sum())

    def chunk_of_nominal() -> int:
        return int(plain_env.step(actions).valid.sum())

    def chunk_of_raw() -> int:
        pool.rollout(world.model, data, state, controls, initial_warmstart=warm_start)
        return num_envs * chunk

    rates: dict[str, list[float]] = {}
    for _ in range(repeats):
        actions = draw_actions(env, chunk, rng)
        controls, _ = world.controls(env.command, actions)
        controls = np.repeat(controls, world.steps_per_control, axis=1)
        state = np.ascontiguousarray(env.state[:, :plain])
        warm = world.state_spec & int(WARM_START)
        warm_start = np.ascontiguousarray(world.part(env.state, WARM_START)) if warm else None
        for name, work in (
            ("raw_rollout_", chunk_of_raw),
            ("", chunk_of_ours),
            *([("nominal_", chunk_of_nominal)] if plain_env is not env else []),
            *((f"gymnasium_{rival.kind}_", rival.run) for rival in rivals),
        ):
            steps, wall, cpu = timed(work)
            rates.setdefault(f"{name}env_steps_per_s", []).append(steps / wall)
            rates.setdefault(f"{name}env_steps_per_cpu_s", []).append(steps / cpu)
    pool.close()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    env.close()
    plain_env.close()

    def ratio(name: str, ours: str = "env_steps_per_s") -> float:
        return statistics.median(a / b for a, b in zip(rates[ours], rates[name], strict=True))

    result = {name: statistics.median(values) for name, values in rates.items()}
    # What asynchronous environments burn is burnt in other processes.
    result.pop("gymnasium_async_env_steps_per_cpu_s", None)
    result["ratio_to_raw"] = ratio("raw_rollout_env_steps_per_s")
    if plain_env is not env:
        cost = ratio("nominal_env_steps_per_cpu_s", "env_steps_per_cpu_s")
        result["ratio_to_nominal_per_cpu_s"] = cost
    if rivals:
        theirs = [f"gymnasium_{rival.kind}_env_steps_per_s" for rival in rivals]
        result["ratio_to_gymnasium"] = min(map(ratio, theirs))
        # Nobody who runs the same physics on the same cores gets further than this.
        result["raw_ratio_to_gymnasium"] = min(
            ratio(name, "raw_rollout_env_steps_per_s") for name in theirs
        )
    return result | {"peak_memory_mb": peak}


class GymnasiumRate:
    """One of Gymnasium's vector environments under random actions, for a moment at a time."""

    def __init__(self, gymnasium_id: str, kind: str, num_envs: int, seed: int):
        import gymnasium

        vector = {"sync": "SyncVectorEnv", "async": "AsyncVectorEnv"}[kind]
        makers = [lambda: gymnasium.make(gymnasium_id)] * num_envs
        self.kind = kind
        self.envs = getattr(gymnasium.vector, vector)(makers)
        self.envs.reset(seed=seed)
        self.envs.action_space.seed(seed)

    def run(self) -> int:
        """Steps made in `GYMNASIUM_SECONDS`."""
        steps, start = 0, time.perf_counter()
        while time.perf_counter() - start < GYMNASIUM_SECONDS:
            self.envs.step(self.envs.action_space.sample())
            steps += self.envs.num_envs
        return steps


def timed(work: Callable[[], int]) -> tuple[int, float, float]:
    """Steps made, seconds by the clock, and of processor time in this process."""
    wall, cpu = time.perf_counter(), time.process_time()
    steps = work()
    return steps, time.perf_counter() - wall, time.process_time() - cpu


def frames(task, repeats: int, seed: int, backend: BackendName) -> dict[str, float]:
    """Pictures per second and per CPU-second, from different states."""
    states = np.stack([task.initial_state(np.random.default_rng((seed, i))) for i in range(64)])
    renderer = make_renderer(task.world, *IMAGE_RESOLUTION, backend)

    def draw() -> int:
        return len(renderer.batch(states, task.cameras[0]))

    draw()
    counts, wall, cpu = zip(*(timed(draw) for _ in range(repeats)), strict=True)
    renderer.close()
    return {
        "frames_per_s": counts[0] / statistics.median(wall),
        "frames_per_cpu_s": counts[0] / statistics.median(cpu),
        "frame_size": list(IMAGE_RESOLUTION),
    }


def require_robosuite(task) -> None:
    """Fail early.

    Raises:
        InputError: robosuite is not installed, or the task is another one.
    """
    if task.name != "lift":
        raise InputError(f"--robosuite compares task lift, not '{task.name}'")
    if importlib.util.find_spec("robosuite") is None:
        raise InputError(
            "--robosuite needs robosuite: pip install --no-deps robosuite==1.5.2 (see docs/simulation.md)"
        )


def against_robosuite(task, config: Config) -> dict[str, float]:
    """Ours and robosuite's Lift, state only at 20 Hz, per CPU-second and in turns."""
    import robosuite

    env = VecEnv(task, config.num_envs, seed=config.seed, num_threads=config.num_threads or None)
    stock = robosuite.make(
        "Lift", robots="Panda", has_renderer=False, has_offscreen_renderer=False,
        use_camera_obs=False, control_freq=20, ignore_done=True,
    )  # fmt: skip
    stock.reset()
    env.reset()
    rng = np.random.default_rng(config.seed)
    low, high = stock.action_spec
    ours, theirs = [], []
    for _ in range(config.repeats):
        actions = draw_actions(env, config.chunk, rng)
        steps, _, cpu = timed(lambda a=actions: int(env.step(a).valid.sum()))
        ours.append(steps / cpu)
        wanted = rng.uniform(low, high, (ROBOSUITE_STEPS, len(low)))
        _, _, cpu = timed(lambda w=wanted: sum(stock.step(action)[2] for action in w))
        theirs.append(ROBOSUITE_STEPS / cpu)
    env.close()
    return {
        "beside_robosuite_env_steps_per_cpu_s": statistics.median(ours),
        "robosuite_env_steps_per_cpu_s": statistics.median(theirs),
        "ratio_to_robosuite": statistics.median(o / t for o, t in zip(ours, theirs, strict=True)),
    }


def grow(task, config: Config, threads: int) -> list[dict[str, float]]:
    """The same with other batches and numbers of threads."""
    rows = []
    for count in sorted({1, *range(2, threads, 2), threads}):
        for num_envs in BATCHES[config.backend]:
            repeats = max(3, min(config.repeats, 4096 // num_envs))
            rates = compare(
                task,
                num_envs,
                config.chunk,
                count,
                repeats,
                config.seed,
                backend=config.backend,
            )
            rows.append({"num_envs": num_envs, "num_threads": count, **rates})
    return rows


GROWTH = {"env_steps_per_s": "by the clock", "env_steps_per_cpu_s": "of CPU time"}


def plot(out: Path, task: str, rows: list[dict[str, float]]) -> list[Path]:
    """A page with a line for us and for raw rollouts per number of threads, and the same as SVG; returns the SVGs."""
    import plotly.graph_objects as go

    from flow_policy_rl import report

    figures, drawn = [], []
    load = f"load {os.getloadavg()[0]:.1f}"
    for key, of_what in GROWTH.items():
        figure, lines = go.Figure(), []
        for threads in sorted({row["num_threads"] for row in rows}):
            mine = [row for row in rows if row["num_threads"] == threads]
            batches = np.array([row["num_envs"] for row in mine])
            for prefix, who, dash in (("", "ours", "solid"), ("raw_rollout_", "raw", "dot")):
                rates = np.array([row[prefix + key] for row in mine])
                label = f"{who}, {threads} thread{'s' if threads > 1 else ''}"
                figure.add_scatter(
                    x=batches, y=rates, name=label, mode="lines+markers", line={"dash": dash}
                )
                once = np.ones(len(batches))
                lines.append(
                    curves.Curve(
                        task, label, "num_envs", np.log2(batches), rates, rates, rates, once
                    )
                )
        what = f"control steps per second {of_what} ({load})"
        report.layout(figure, "environments", what).update_xaxes(type="log")
        figure.update_yaxes(rangemode="tozero")
        figures.append(report.Figure(f"Growth with the batch, {of_what}", figure))
        drawn.append(out.with_name(f"{out.stem}_{key}.svg"))
        ticks = {float(np.log2(n)): f"{n:,}" for n in batches}
        drawn[-1].parent.mkdir(parents=True, exist_ok=True)
        drawn[-1].write_text(curves.draw(lines, task, "environments", what, ticks))
    report.write(
        out,
        f"Simulation of {task}",
        "Dotted: raw mujoco.rollout, the same physics without a task.",
        figures,
    )
    return drawn


def text(result: dict) -> str:
    """For people."""
    lines = [
        f"{result['task']}, {result['num_envs']} environments, chunk {result['chunk']}, "
        f"{result['num_threads']} threads, backend {result['backend']} (load {result['load']:.1f})",
        f"  ours                    {result['env_steps_per_s']:>10,.0f} control steps/s, "
        f"{result['peak_memory_mb']:.0f} MB",
        f"  raw mujoco.rollout      {result['raw_rollout_env_steps_per_s']:>10,.0f}   "
        f"(ours is {result['ratio_to_raw']:.2f} of it)",
    ]
    if "ratio_to_nominal_per_cpu_s" in result:
        lines.append(
            f"  per CPU-second          {result['env_steps_per_cpu_s']:>10,.0f}, not randomised "
            f"{result['nominal_env_steps_per_cpu_s']:,.0f} (ours is {result['ratio_to_nominal_per_cpu_s']:.2f} of it)"
        )
    if result["ratio_to_gymnasium"]:
        lines += [
            f"  Gymnasium Sync          {result['gymnasium_sync_env_steps_per_s']:>10,.0f}",
            f"  Gymnasium Async         {result['gymnasium_async_env_steps_per_s']:>10,.0f}   "
            f"(ours is {result['ratio_to_gymnasium']:.1f} times the better, raw physics "
            f"{result['raw_ratio_to_gymnasium']:.1f})",
        ]
    if "frames_per_s" in result:
        lines.append(
            f"  camera 96 x 96          {result['frames_per_s']:>10,.0f} frames/s, "
            f"{result['frames_per_cpu_s']:,.0f} per CPU-second"
        )
    if "ratio_to_robosuite" in result:
        lines.append(
            f"  per CPU-second          {result['beside_robosuite_env_steps_per_cpu_s']:>10,.0f}, robosuite "
            f"{result['robosuite_env_steps_per_cpu_s']:,.0f} (ours is {result['ratio_to_robosuite']:.1f} times that)"
        )
    for row in result.get("growth", []):
        lines.append(
            f"  {row['num_envs']:>5} environments, {row['num_threads']} threads "
            f"{row['env_steps_per_s']:>10,.0f} control steps/s, {row['ratio_to_raw']:.2f} of raw"
        )
    if "plot" in result:
        lines.append(f"plot: {result['plot']}")
    return "\n".join(lines)

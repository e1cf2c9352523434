"""`--rerun FILE`: a replay or an evaluation for the Rerun viewer (extra `rerun`), every series and picture at its time.

    replay  bag_time: joints/NAME/{measured,truth,planned,beyond}, camera/FIELD, error, latency_ms/{inference,recorded};
            a second policy plans in joints/NAME/{planned_2,beyond_2}, with error_2
    eval    episode_time: OUTCOME/seed_N/{film,joints/NAME}

`planned` are the actions of a chunk that are executed, `beyond` those that the next one replaces, each when it is due.
"""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from flow_policy_rl.errors import InputError, RunFailed, output_file

if TYPE_CHECKING:  # a replay needs no simulation
    from flow_policy_rl.film import Play
    from flow_policy_rl.offline.recording import Inference
    from flow_policy_rl.replay import Judged
    from sim.backends import BackendName

APPLICATION = "flow_policy_rl"
JPEG_QUALITY = 90


class RerunLog:
    """A file that is being written, with one time axis.

    Args:
        path: of the file, which ends in .rrd.
        clock: name of the time axis.
        stamps: times are seconds since 1970; else since the beginning of something.

    Raises:
        InputError: rerun-sdk is not installed, or another ending.
    """

    def __init__(self, path: Path, clock: str, stamps: bool):
        if path.suffix != ".rrd":
            raise InputError(f"--rerun {path}: the name must end in .rrd")
        try:
            import rerun
        except ModuleNotFoundError:
            raise InputError(
                f"--rerun {path}: rerun-sdk is not installed; pip install 'flow_policy_rl[rerun]'"
            ) from None
        self._rerun, self._clock = rerun, clock
        self._kind, self._type = (
            ("timestamp", "datetime64[ns]") if stamps else ("duration", "timedelta64[ns]")
        )
        output_file(path)
        self._stream = rerun.RecordingStream(APPLICATION)
        self._stream.save(path)
        self._path = path

    def close(self) -> None:
        """All of it is in the file.

        Raises:
            RunFailed: it is not.
        """
        try:
            self._stream.flush()
        except RuntimeError as error:
            raise RunFailed(f"--rerun {self._path}: {error}") from None
        self._stream.disconnect()

    def _send(self, entity: str, times_s: np.ndarray, columns) -> None:
        times = np.rint(times_s * 1e9).astype(self._type)
        index = self._rerun.TimeColumn(self._clock, **{self._kind: times})
        self._stream.send_columns(entity, [index], columns)

    def series(
        self, entity: str, times_s: np.ndarray, values: np.ndarray, dots: bool = False
    ) -> None:
        """Numbers (n,) at times (n,), as a line or as dots; what is not finite is left out."""
        known = np.isfinite(values) & np.isfinite(times_s)
        if not known.any():
            return
        if dots:
            self._stream.log(entity, self._rerun.SeriesPoints(), static=True)
        self._send(entity, times_s[known], self._rerun.Scalars.columns(scalars=values[known]))

    def picture(self, entity: str, time_s: float, pixels: np.ndarray) -> None:
        """RGB (height, width, 3) uint8, as JPEG."""
        import cv2

        _, jpeg = cv2.imencode(".jpg", pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
        columns = self._rerun.EncodedImage.columns(blob=[jpeg.tobytes()], media_type=["image/jpeg"])
        self._send(entity, np.array([time_s]), columns)

    def look(self, plots: Mapping[str, str], pictures: Sequence[str]) -> None:
        """What the viewer shows at first: pictures, and beside them a tab for each of the entities of `plots`."""
        from rerun import blueprint as show

        tabs = show.Tabs(*(show.TimeSeriesView(origin=o, name=n) for n, o in plots.items()))
        seen = [show.Spatial2DView(origin=entity, name=entity) for entity in pictures]
        layout = show.Horizontal(show.Grid(*seen), tabs) if seen else tabs
        self._stream.send_blueprint(show.Blueprint(layout))


def observation(log: RerunLog, inference: "Inference") -> None:
    """The pictures that the policy sees at one inference, as it sees them."""
    for name, values in inference.obs.items():
        if values.ndim == 3:
            log.picture(f"camera/{name}", inference.stamp / 1e9, values)


def replay(log: RerunLog, judged: "Sequence[Judged]") -> None:
    """The numbers of one policy, or of two on the same bag."""
    spec, recording = judged[0].spec, judged[0].recording
    log.series("latency_ms/recorded", recording.latency_times, recording.latencies_s * 1e3)
    for joint, name in enumerate(spec.joint_names):
        log.series(f"joints/{name}/measured", recording.times, recording.measured[:, joint])
        truth = recording.truth[:, : spec.execute_horizon, joint]
        log.series(f"joints/{name}/truth", _due(judged[0], truth), truth.ravel())
    for one, suffix in zip(judged, ("", "_2"), strict=False):
        executed = one.spec.execute_horizon
        for joint, name in enumerate(one.spec.joint_names):
            planned, beyond = np.split(one.chunks[:, :, joint], [executed], axis=1)
            due, later = _due(one, planned), _due(one, beyond, executed)
            log.series(f"joints/{name}/planned{suffix}", due, planned.ravel(), dots=True)
            log.series(f"joints/{name}/beyond{suffix}", later, beyond.ravel(), dots=True)
        error = np.abs(one.chunks - one.recording.truth)[:, :executed].mean(axis=(1, 2))
        log.series(f"error{suffix}", one.recording.times, error)
        timed = one.inference_s * 1e3
        log.series(f"latency_ms/inference{suffix}", one.recording.times[: len(timed)], timed)
    plots = {name: f"joints/{name}" for name in spec.joint_names}
    cameras = [f"camera/{f.name}" for f in spec.observations if f.kind == "image"]
    log.look(plots | {"latency": "latency_ms", "error": "error"}, cameras)


def _due(one: "Judged", actions: np.ndarray, first: int = 0) -> np.ndarray:
    """When actions (n, h) of the chunks are due, flat; `first` is the number of the first in its chunk."""
    ahead = (first + np.arange(actions.shape[1]) + 1) * one.spec.control_dt
    return (one.recording.times[:, None] + ahead).ravel()


def episodes(
    log: RerunLog,
    task,
    chosen: Mapping[str, Sequence[int]],
    play: "Play",
    backend: "BackendName" = "cpu",
) -> None:
    """Films and joints of episodes: seeds by outcome, as in the page of an evaluation.

    Raises:
        SimulationError: nothing to render with on this machine.
    """
    from flow_policy_rl import film
    from sim.render import Renderer

    world, names = task.world, []
    address = world.qpos_address(world.joint_names)
    with contextlib.ExitStack() as stack:
        renderer = task.cameras and stack.enter_context(Renderer(world, *film.SIZE))
        for outcome, seeds in chosen.items():
            for seed, states in zip(seeds, film.record(task, seeds, play, backend), strict=True):
                name = f"{outcome.lower()}/seed_{seed}"
                times = np.arange(len(states)) * world.control_dt
                for joint, values in zip(
                    world.joint_names, world.qpos(states)[:, address].T, strict=True
                ):
                    log.series(f"{name}/joints/{joint}", times, values)
                for time, state in zip(times, states, strict=True):
                    if renderer and np.isfinite(state).all():
                        frame = renderer.render(state, task.cameras[0])
                        log.picture(f"{name}/film", time, frame)
                names.append(name)
    films = [f"{name}/film" for name in names] if task.cameras else []
    log.look({name: f"{name}/joints" for name in names}, films)

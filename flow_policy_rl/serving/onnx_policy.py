"""Run a `policy.onnx`: numpy and onnxruntime, nothing else. All there is to know is in the file.

policy = OnnxPolicy("policy.onnx")
chunk = policy.infer({"joint_pos": q[None], ...}, policy.zero_noise())[0]  # (H, A), SI units
"""

import contextlib
import io
import logging
import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime as ort

from flow_policy_rl.errors import ObservationError, PolicyFileError, ProviderError, unknown_name
from flow_policy_rl.serving import model_file, trial

PROVIDERS = {  # best first
    "tensorrt": "TensorrtExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "cpu": "CPUExecutionProvider",
}
ON_CUDA = ("tensorrt", "cuda")
OUTPUT = "action_chunk"
PREFIX_INPUTS = ("prefix", "inference_delay")
_DTYPES = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(uint8)": np.dtype(np.uint8),
    "tensor(int64)": np.dtype(np.int64),
}

log = logging.getLogger(__name__)


class OnnxPolicy:
    """An exported policy, loaded. One inference at a time: calls from several threads wait for each other.

    Args:
        path: the file.
        provider: `tensorrt`, `cuda` or `cpu`; `auto` takes the first of these that really works here.
        allow_fallback: go on with the CPU where the provider that was asked for cannot run; otherwise an error.
        num_threads: of one inference. Small networks are fastest with one.
        spinning: let idle threads of the pool poll for work: microseconds here, and a core taken from everybody else.
        first_load_in_child: try a file that this machine has not seen in a child process first (see `trial`).

    Attributes:
        spec: the contract in the file.
        provider: what runs it, a key of `PROVIDERS`.
        batch: number of rows the graph takes, or None for any.

    Raises:
        InputError: no such file.
        PolicyFileError: not a policy of ours, damaged, or a graph that does not fit its spec.
        ProviderError: unknown provider, or one that does not run here.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        provider: str = "cpu",
        allow_fallback: bool = False,
        num_threads: int = 1,
        spinning: bool = False,
        first_load_in_child: bool = True,
    ):
        if provider != "auto" and provider not in PROVIDERS:
            raise unknown_provider(provider)
        file = model_file.read(path)
        self.path, self.spec, self.sha256 = file.path, file.spec, file.sha256
        if first_load_in_child and not trial.is_known(file.sha256):
            with trial.Trial() as child:
                child.load(file.path, file.sha256)
        options = session_options(num_threads, spinning)
        self._session, self.provider = self._open(file.data, provider, options, allow_fallback)
        try:
            self.batch = self._check_graph()
        except UnicodeDecodeError:
            raise PolicyFileError(
                f"policy '{self.path}': the graph has names that are not text"
            ) from None
        trial.remember(file.sha256)
        self._lock = threading.Lock()
        self._buffers: _Buffers | None = None

    def _open(self, data, provider, options, allow_fallback) -> tuple[ort.InferenceSession, str]:
        there = [name for name, full in PROVIDERS.items() if full in ort.get_available_providers()]
        wanted = there if provider == "auto" else [provider]
        problem = ""
        for name in wanted:
            if name not in there:
                problem = "this onnxruntime was built without it (onnxruntime-gpu has it)"
                continue
            missing = load_cuda_libraries() if name in ON_CUDA else ""
            try:
                # Without onnxruntime's own fall-back, which prints to standard output and goes on with the CPU.
                session = ort.InferenceSession(
                    data, options, providers=[PROVIDERS[name]], enable_fallback=0
                )
            except (
                Exception
            ) as error:  # onnxruntime has a class of its own for every kind of bad file
                problem = trial.first_line(error)
                if name == "cpu":
                    raise PolicyFileError(
                        f"policy '{self.path}' cannot be loaded: {problem}"
                    ) from None
                continue
            # A provider whose libraries are missing is replaced by the CPU, with no more than a log line.
            if session.get_providers()[0] == PROVIDERS[name]:
                return session, name
            problem = missing or "its libraries cannot be loaded, or there is no device"
        if not allow_fallback:
            raise ProviderError(
                f"provider '{wanted[0]}' does not run here: {problem}; available: {', '.join(there)}"
            )
        log.warning("provider '%s' does not run here (%s): using the CPU", wanted[0], problem)
        return self._open(data, "cpu", options, False)

    def _check_graph(self) -> int | None:
        """Names, types and shapes of graph and spec agree; returns the fixed batch size, if it is fixed."""
        wanted = graph_inputs(self.spec)
        inputs = {i.name: i for i in self._session.get_inputs()}
        found = {name: (tuple(i.shape[1:]), _DTYPES.get(i.type)) for name, i in inputs.items()}
        if found != wanted:
            raise PolicyFileError(
                f"policy '{self.path}': the graph takes {_describe(found)}; its spec says {_describe(wanted)}"
            )
        outputs = {o.name: (tuple(o.shape[1:]), o.type) for o in self._session.get_outputs()}
        if outputs != {OUTPUT: (self.chunk_shape, "tensor(float)")}:
            raise PolicyFileError(
                f"policy '{self.path}': the graph gives {outputs}; its spec says '{OUTPUT}' {self.chunk_shape}"
            )
        batches = {i.shape[0] for i in inputs.values()}
        fixed = {b for b in batches if isinstance(b, int)}
        if len(batches) != 1 or any(b < 1 for b in fixed):
            raise PolicyFileError(f"policy '{self.path}': its inputs have batch sizes {batches}")
        return next(iter(fixed), None)

    @property
    def chunk_shape(self) -> tuple[int, int]:
        """(H, A)."""
        return self.spec.action_horizon, self.spec.num_joints

    @property
    def field_names(self) -> list[str]:
        """Names of the observation fields."""
        return [f.name for f in self.spec.observations]

    def zero_noise(self, batch: int = 1) -> np.ndarray:
        """Where deployment starts unless told otherwise, (B, H, A)."""
        return np.zeros((batch, *self.chunk_shape), np.float32)

    def infer(self, obs: Mapping[str, np.ndarray], noise: np.ndarray) -> np.ndarray:
        """Action chunk (B, H, A), float32, SI units, from observation fields (B, ...) and noise (B, H, A).

        A policy with a prefix horizon takes `prefix` (B, P, A) and `inference_delay` (B,) among the observations.

        Raises:
            ObservationError: a field is missing, of the wrong shape or type, or not finite.
        """
        batch = len(noise) if np.ndim(noise) else 0
        if batch < 1 or self.batch not in (None, batch):
            sizes = self.batch or "at least 1"
            raise ObservationError(f"'noise' has a batch of {batch}; this policy takes {sizes}")
        with self._lock:
            if self._buffers is None or self._buffers.batch != batch:
                self._buffers = _Buffers(self._session, self.spec, batch)
            buffers = self._buffers
            buffers.fill(obs, noise)
            self._session.run_with_iobinding(buffers.binding)
            return buffers.output.copy()

    def warm_up(self, num_calls: int = 20) -> None:
        """First calls are slow (buffers, caches, engines): make them before anybody waits for one."""
        batch = self.batch or 1
        obs = {
            name: np.zeros((batch, *shape), dtype)
            for name, (shape, dtype) in graph_inputs(self.spec).items()
        }
        noise = obs.pop("noise")
        for _ in range(num_calls):
            self.infer(obs, noise)

    def deviations(self, obs: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Largest distance of each field from its training data, in training standard deviations.

        Fields without statistics are left out. Beyond about 5 the policy is asked about what it has not seen.
        """
        found = {}
        for f in self.spec.observations:
            if f.std:
                distance = np.abs(np.asarray(obs[f.name], np.float64) - f.mean) / f.std
                found[f.name] = float(distance.max())
        return found


class _Buffers:
    """Inputs and output of one batch size, allocated once and bound to the session."""

    def __init__(self, session: ort.InferenceSession, spec, batch: int):
        self.batch = batch
        self.binding = session.io_binding()
        shapes = graph_inputs(spec)
        floats = {n: (batch, *s) for n, (s, dtype) in shapes.items() if dtype == np.float32}
        # One block for all floating-point inputs: one call decides whether every number is finite.
        self._block = np.zeros(sum(int(np.prod(s)) for s in floats.values()), np.float32)
        self._finite = np.empty(self._block.shape, bool)
        self._inputs: dict[str, np.ndarray] = {}
        at = 0
        for name, (shape, dtype) in shapes.items():
            if name in floats:
                size = int(np.prod(floats[name]))
                array = self._block[at : at + size].reshape(floats[name])
                at += size
            else:
                array = np.zeros((batch, *shape), dtype)
            self._inputs[name] = array
            self.binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        self.output = np.zeros((batch, *chunk_shape(spec)), np.float32)
        self.binding.bind_ortvalue_output(OUTPUT, ort.OrtValue.ortvalue_from_numpy(self.output))

    def fill(self, obs: Mapping[str, np.ndarray], noise: np.ndarray) -> None:
        """Copy in and check. A chunk without `prefix` and `inference_delay` starts freely (a delay of 0)."""
        free = not any(name in obs for name in PREFIX_INPUTS)
        if not free and PREFIX_INPUTS[0] not in self._inputs:
            raise ObservationError(
                "a prefix was given; this policy was not trained to continue one"
            )
        for name, buffer in self._inputs.items():
            if free and name in PREFIX_INPUTS:
                buffer[...] = 0
                continue
            values = noise if name == "noise" else obs.get(name)
            if values is None:
                needed = ", ".join(n for n in self._inputs if n != "noise")
                raise ObservationError(
                    f"observation '{name}' is missing; the policy needs {needed}"
                )
            _copy(name, np.asarray(values), buffer)
        if not np.isfinite(self._block, out=self._finite).all():
            bad = next(n for n, b in self._inputs.items() if not np.isfinite(b).all())
            raise ObservationError(f"observation '{bad}' has numbers that are not finite")
        if not free:
            delay, most = self._inputs["inference_delay"], self._inputs["prefix"].shape[1]
            if delay.min() < 0 or delay.max() > most:
                raise ObservationError(
                    f"inference_delay is {delay.tolist()}; it must be 0 to {most}"
                )


def _copy(name: str, values: np.ndarray, buffer: np.ndarray) -> None:
    if values.shape != buffer.shape:
        raise ObservationError(f"observation '{name}' has shape {values.shape}, not {buffer.shape}")
    if values.dtype != buffer.dtype:
        # Any number becomes float32, and any integer int64; a picture is uint8 or refused.
        accepted = {"f": "fiu", "i": "iu", "u": ""}[buffer.dtype.kind]
        if values.dtype.kind not in accepted:
            raise ObservationError(
                f"observation '{name}' has type {values.dtype}, not {buffer.dtype}"
            )
    with np.errstate(over="ignore"):  # too large becomes infinite, which is found later
        buffer[...] = values


def graph_inputs(spec) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """What the graph of a spec takes: {name: (shape without batch, type)}."""
    real, picture = np.dtype(np.float32), np.dtype(np.uint8)
    inputs: dict[str, tuple[tuple[int, ...], np.dtype]]
    inputs = {f.name: (f.shape, picture if f.kind == "image" else real) for f in spec.observations}
    if spec.prefix_horizon:
        shapes = ((spec.prefix_horizon, spec.num_joints), ())
        inputs |= zip(
            PREFIX_INPUTS, zip(shapes, (real, np.dtype(np.int64)), strict=True), strict=True
        )
    return inputs | {"noise": (chunk_shape(spec), real)}


def chunk_shape(spec) -> tuple[int, int]:
    """(H, A)."""
    return spec.action_horizon, spec.num_joints


def load_cuda_libraries() -> str:
    """Load CUDA and cuDNN out of their pip wheels, where onnxruntime does not look by itself (1.21 and newer can).

    Returns the first thing that it cannot load, in its words (which it prints), or nothing.
    """
    if not hasattr(ort, "preload_dlls"):
        return ""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            ort.preload_dlls()
    except (OSError, RuntimeError) as error:
        return trial.first_line(error)
    return next(iter(said.getvalue().splitlines()), "")


def session_options(num_threads: int = 1, spinning: bool = False) -> ort.SessionOptions:
    """How every session of ours runs."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    flag = "1" if spinning else "0"
    options.add_session_config_entry("session.intra_op.allow_spinning", flag)
    options.add_session_config_entry("session.inter_op.allow_spinning", flag)
    options.log_severity_level = 4
    return options


def unknown_provider(name: str) -> ProviderError:
    """An error that names the valid ones."""
    return ProviderError(str(unknown_name("provider", name, [*PROVIDERS, "auto"])))


def _describe(inputs: Mapping) -> str:
    return ", ".join(f"{name} {dtype}{list(shape)}" for name, (shape, dtype) in inputs.items())

"""Run a `policy.onnx`: numpy and onnxruntime, nothing else. All there is to know is in the file."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime as ort

from flow_policy_rl.errors import InputError, existing_file
from flow_policy_rl.spec import METADATA_KEY, PolicySpec


class OnnxPolicy:
    """An exported policy.

    Raises:
        InputError: no such file, not ONNX, no spec inside, or a graph that does not fit its spec.
    """

    def __init__(self, path: str | Path, num_threads: int = 1):
        self.path = existing_file(path, "policy")
        options = ort.SessionOptions()
        options.intra_op_num_threads = num_threads
        options.inter_op_num_threads = 1
        # Spinning saves microseconds here and costs everybody else a core.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        try:
            self._session = ort.InferenceSession(
                self.path.read_bytes(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime has a class of its own for every kind of bad file
            raise InputError(
                f"policy '{path}' cannot be loaded: {str(error).splitlines()[0]}"
            ) from None
        text = self._session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
        if text is None:
            raise InputError(
                f"policy '{path}' has no '{METADATA_KEY}' in its metadata: it was not made by flow-policy export"
            )
        self.spec = PolicySpec.from_json(text)
        self._check_graph()

    def _check_graph(self) -> None:
        spec = self.spec
        wanted = {f.name: (f.size,) for f in spec.observations}
        wanted["noise"] = (spec.action_horizon, spec.num_joints)
        found = {i.name: tuple(i.shape[1:]) for i in self._session.get_inputs()}
        if found != wanted:
            raise InputError(
                f"policy '{self.path}': the graph takes {found}, its spec says {wanted}"
            )

    @property
    def chunk_shape(self) -> tuple[int, int]:
        """(H, A)."""
        return self.spec.action_horizon, self.spec.num_joints

    def infer(self, obs: Mapping[str, np.ndarray], noise: np.ndarray) -> np.ndarray:
        """Action chunk (B, H, A) from observation fields (B, size) and noise (B, H, A), float32.

        Raises:
            InputError: a field is missing, of the wrong shape, or not finite.
        """
        feed = {"noise": np.asarray(noise, np.float32)}
        for f in self.spec.observations:
            if f.name not in obs:
                raise InputError(
                    f"observation '{f.name}' is missing; the policy needs {self.field_names}"
                )
            feed[f.name] = np.asarray(obs[f.name], np.float32)
        batch = len(feed["noise"])
        for name, values in feed.items():
            size = self.chunk_shape if name == "noise" else (self._size(name),)
            if values.shape != (batch, *size):
                raise InputError(
                    f"observation '{name}' has shape {values.shape}, not {(batch, *size)}"
                )
            if not np.isfinite(values).all():
                raise InputError(f"observation '{name}' has numbers that are not finite")
        return self._session.run(["action_chunk"], feed)[0]

    @property
    def field_names(self) -> list[str]:
        """Names of the observation fields."""
        return [f.name for f in self.spec.observations]

    def _size(self, name: str) -> int:
        return next(f.size for f in self.spec.observations if f.name == name)

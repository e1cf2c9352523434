"""`flow-policy export` and `verify`: FlowPolicy -> one `policy.onnx`, and proof that it computes the same.

Graph: the observation fields by name and `noise` (B, H, A) -> `action_chunk` (B, H, A), all raw SI
units. Normalisation, K steps of the integrator and the score drift are inside; the spec is a JSON
string in the file's metadata.
"""

import contextlib
import io
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from flow_policy_rl import checkpoint
from flow_policy_rl.errors import InputError, RunFailed
from flow_policy_rl.evaluate import task_of, torch_policy
from flow_policy_rl.policy import FlowPolicy
from flow_policy_rl.serving import model_file
from flow_policy_rl.serving.onnx_policy import OnnxPolicy
from flow_policy_rl.spec import INTEGRATORS, METADATA_KEY
from sim.vec_env import VecEnv

TOLERANCE = 1e-5  # largest error allowed, as a share of the action range


@dataclass(frozen=True)
class ExportConfig:
    """One self-describing ONNX file from a checkpoint, checked against torch before it is kept.

    Example: flow-policy export --checkpoint runs/rl/policy.safetensors --out policy.onnx

    Attributes:
        checkpoint: trained policy.
        out: file to write.
        integrator: euler, midpoint, heun or rk4 (default: as trained).
        num_flow_steps: K (default: as trained).
        json: print one JSON object.
    """

    checkpoint: Path
    out: Path = Path("policy.onnx")
    integrator: str | None = None
    num_flow_steps: int | None = None
    json: bool = False


@dataclass(frozen=True)
class VerifyConfig:
    """Compare an exported policy with its checkpoint on observations from simulation and on extremes.

    Example: flow-policy verify --policy policy.onnx --checkpoint runs/rl/policy.safetensors

    Attributes:
        policy: exported file.
        checkpoint: what it was exported from.
        json: print one JSON object.
    """

    policy: Path
    checkpoint: Path
    json: bool = False


class Graph(nn.Module):
    """A FlowPolicy with positional inputs, as the exporter wants them."""

    def __init__(self, policy: FlowPolicy):
        super().__init__()
        self.policy = policy

    def forward(self, *inputs: Tensor) -> Tensor:
        *fields, noise = inputs
        names = [f.name for f in self.policy.spec.observations]
        return self.policy.sample(dict(zip(names, fields, strict=True)), noise)


def export_policy(policy: FlowPolicy, out: Path) -> dict:
    """Write `out` and return the parity report.

    Raises:
        RunFailed: the file does not compute what torch computes; it is removed.
    """
    spec = policy.spec
    names = [f.name for f in spec.observations]
    # Two rows: the exporter specialises a batch of one.
    example = [torch.zeros(2, f.size) for f in spec.observations]
    example.append(torch.zeros(2, *policy.chunk_shape))
    batch = torch.export.Dim("batch")
    with quiet_exporter():
        program = torch.onnx.export(
            Graph(policy).eval(),
            tuple(example),
            input_names=[*names, "noise"],
            output_names=["action_chunk"],
            dynamo=True,
            dynamic_shapes=(tuple({0: batch} for _ in example),),
            optimize=True,
            verbose=False,
        )
    model = program.model_proto
    onnx.helper.set_model_props(model, {METADATA_KEY: spec.to_json()})
    onnx.checker.check_model(model, full_check=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_suffix(".partial")
    partial.write_bytes(model_file.seal(model.SerializeToString()))
    report = parity(policy, OnnxPolicy(partial, first_load_in_child=False))
    if not report["passed"]:
        partial.unlink()
        raise RunFailed(
            f"export of '{out}' failed its parity gate: error {report['max_error_in_action_range']:.2e} of the action "
            f"range, allowed {TOLERANCE:.0e}"
        )
    partial.rename(out)
    return report


@contextlib.contextmanager
def quiet_exporter():
    """The exporter prints progress to standard output and warns about its own internals."""
    level = logging.getLogger("torch.onnx").level
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.getLogger("torch.onnx").setLevel(level)


def parity(policy: FlowPolicy, exported: OnnxPolicy, seed: int = 0) -> dict:
    """Largest difference between torch and the exported file over several batch sizes."""
    spec = policy.spec
    act = torch_policy(policy)
    span = np.asarray(spec.action_high) - np.asarray(spec.action_low)
    rng = np.random.default_rng(seed)
    largest, relative, cases = 0.0, 0.0, 0
    for obs in observations_to_check(policy, rng):
        for rows in (1, 3, len(next(iter(obs.values())))):
            part = {name: values[:rows].astype(np.float32) for name, values in obs.items()}
            noise = rng.standard_normal((rows, *policy.chunk_shape), dtype=np.float32)
            difference = np.abs(act(part, noise) - exported.infer(part, noise))
            largest = max(largest, float(difference.max()))
            relative = max(relative, float((difference / span).max()))
            cases += rows
    return {
        "passed": relative <= TOLERANCE,
        "max_abs_error": largest,
        "max_error_in_action_range": relative,
        "cases": cases,
    }


def observations_to_check(
    policy: FlowPolicy, rng: np.random.Generator
) -> list[dict[str, np.ndarray]]:
    """What the policy meets in simulation, and observations far outside of it."""
    env = VecEnv(task_of(policy.spec), 32, seed=int(rng.integers(2**31)))
    obs, seen = env.reset(), []
    act = torch_policy(policy)
    for _ in range(4):
        seen.append(obs)
        noise = rng.standard_normal((env.num_envs, *policy.chunk_shape), dtype=np.float32)
        obs = env.step(act(obs, noise)[:, : policy.spec.execute_horizon]).obs
    env.close()
    extremes = {
        f.name: np.asarray(f.mean) + 10 * np.asarray(f.std) * rng.choice([-1, 0, 1], (32, f.size))
        for f in policy.spec.observations
    }
    return [*seen, extremes]


def main(config: ExportConfig) -> dict:
    """Export."""
    policy = checkpoint.load(config.checkpoint)
    changes = {"integrator": config.integrator, "num_flow_steps": config.num_flow_steps}
    if config.integrator is not None and config.integrator not in INTEGRATORS:
        raise InputError(
            f"--integrator must be one of {', '.join(INTEGRATORS)}, not '{config.integrator}'"
        )
    policy.spec = policy.spec.replace(**{k: v for k, v in changes.items() if v is not None})
    return {"policy": str(config.out), **export_policy(policy, config.out)}


def verify(config: VerifyConfig) -> dict:
    """Compare."""
    policy, exported = checkpoint.load(config.checkpoint), OnnxPolicy(config.policy)
    mine, theirs = policy.spec, exported.spec
    policy.spec = mine.replace(integrator=theirs.integrator, num_flow_steps=theirs.num_flow_steps)
    for name in ("task", "joint_names", "action_horizon"):
        if getattr(mine, name) != getattr(theirs, name):
            raise InputError(
                f"'{config.policy}' has {name} {getattr(theirs, name)}, '{config.checkpoint}' has {getattr(mine, name)}"
            )
    return {"policy": str(config.policy), **parity(policy, exported)}


def text(result: dict) -> str:
    """For people."""
    verdict = "same as torch" if result["passed"] else "DIFFERS from torch"
    return (
        f"{result['policy']}: {verdict}; largest error {result['max_abs_error']:.1e} rad "
        f"({result['max_error_in_action_range']:.1e} of the action range) in {result['cases']} cases"
    )

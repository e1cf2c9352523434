"""Physics on MuJoCo Warp: thousands of environments on an NVIDIA GPU, or on the CPU to test what would run there.

Numbers are 32 bits wide. A chunk's controls go to the device in one copy and its states come back in one; where state
and controls are tensors of the device already, nothing is copied. In between Warp's arrays are used in place, as
tensors that share their memory.
"""

import contextlib
import copy
import ctypes
import logging
import os
from collections.abc import Iterator, Sequence

import mujoco
import numpy as np
import torch
import warp as wp

from sim.backends.base import StopFn
from sim.errors import SimulationError, unknown_name
from sim.world import EQUALITIES, STATE, WARM_START, World, one_line

wp.config.log_level = wp.LOG_ERROR  # no banner, no list of what is compiled
import mujoco_warp as mjw  # noqa: E402

LOG = logging.getLogger(__name__)
MOST_ROWS = (
    8192  # of contacts or constraints in one environment; beyond it something has broken down
)
LOOKED_AT = 8  # start states from which the first size of the buffers is taken

# What a row can carry, but the time, which is counted here: component of the state -> array of mujoco_warp.Data.
CARRIED = {
    int(mujoco.mjtState.mjSTATE_QPOS): "qpos",
    int(mujoco.mjtState.mjSTATE_QVEL): "qvel",
    int(mujoco.mjtState.mjSTATE_ACT): "act",
    int(WARM_START): "qacc_warmstart",
    int(EQUALITIES): "eq_active",
}
# What may differ between models of one layout: all that domain randomisation changes of the physics, and what follows.
VARIED = (
    "body_mass", "body_inertia", "body_ipos", "body_subtreemass", "body_invweight0", "dof_damping", "dof_invweight0",
    "geom_friction", "geom_size", "geom_pos", "geom_aabb", "geom_rbound",
    "actuator_gainprm", "actuator_biasprm", "actuator_acc0", "tendon_invweight0",
)  # fmt: skip


class WarpBackend:
    """For every world whose model MuJoCo Warp takes; `adapted` says what is changed so that it does.

    Buffers of contacts and constraints grow when a chunk needs more: it is then computed again, and a warning says so.

    Args:
        device: `cuda` or `cpu`.

    Raises:
        SimulationError: no CUDA, or a feature of the model that MuJoCo Warp lacks, by name.
    """

    any_number = False

    def __init__(self, world: World, device: str = "cuda"):
        require_device(device)
        self.world = world
        if device == "cuda":
            device = f"cuda:{torch.cuda.current_device()}"
        self.device = torch.device(device)
        model = adapted(world.model)
        unknown = world.state_spec & ~sum(CARRIED) & ~int(STATE)
        if unknown:
            raise SimulationError(f"backend 'warp' carries no state component {unknown:#x}")
        for name in world.outputs:
            if name not in mjw.Data.__dataclass_fields__:
                raise SimulationError(f"backend 'warp' has no output '{name}'")
        try:
            with wp.ScopedDevice(device):
                self._model = mjw.put_model(model)
        except (NotImplementedError, ValueError) as error:
            raise SimulationError(
                f"backend 'warp' cannot run model '{one_line_name(model)}': {one_line(error)}"
            ) from None
        self._host = model
        self._data: mjw.Data | None = None
        self._varied = False
        self._records = self.device.type == "cuda" and wp.is_mempool_enabled(device)

    def step(
        self,
        state: np.ndarray | torch.Tensor,
        controls: np.ndarray | torch.Tensor,
        out: np.ndarray | torch.Tensor,
        stop: StopFn | None = None,
        models: Sequence[mujoco.MjModel] | None = None,
        steps_per_row: int | None = None,
    ) -> None:
        """As in `Backend`, without taking the hint; also for tensors on the device.

        Raises:
            SimulationError: an environment touches in more places than any buffer holds.
        """
        num_envs, horizon = out.shape[:2]
        start, sent = self._here(state), self._here(controls)
        sent = sent.reshape(num_envs, horizon, -1, sent.shape[-1])
        every = steps_per_row or self.world.decimation
        with wp.ScopedDevice(str(self.device)), kernels_print_to_stderr():
            if self._data is None or self._data.nworld != num_envs:
                self._varied = False
                self._allocate(num_envs, *self._first_sizes(start))
            if models is not None or self._varied:
                self._vary(models or [self._host] * num_envs)
            rows = self._run(start, sent, every)
            while self._grown():
                rows = self._run(start, sent, every)
        written = rows.shape[-1]
        out[..., :written] = rows if isinstance(out, torch.Tensor) else rows.cpu().numpy()
        since = self.world.physics_dt * every * np.arange(1, horizon + 1)
        out[..., 0] = state[:, :1] + (self._here(since) if isinstance(out, torch.Tensor) else since)

    def _here(self, values) -> torch.Tensor:
        return torch.as_tensor(values, dtype=torch.float32, device=self.device)

    def _first_sizes(self, state: torch.Tensor) -> tuple[int, int]:
        """Contacts and constraints per environment to make room for: twice what some start states need."""
        data, most = mujoco.MjData(self._host), np.array([16, 32])
        qpos = self.world.part(state[:LOOKED_AT], mujoco.mjtState.mjSTATE_QPOS)
        for row in qpos.cpu().numpy():
            data.qpos[:] = row
            mujoco.mj_forward(self._host, data)
            most = np.maximum(most, [data.ncon, data.nefc])
        return tuple(power_of_two(2 * n) for n in most)

    def _allocate(self, num_envs: int, contacts: int, constraints: int) -> None:
        """Make room, and forget what was there."""
        self._data = data = mjw.make_data(
            self._host,
            nworld=num_envs,
            nconmax=contacts,
            njmax=constraints,
            njmax_nnz=constraints * self._host.nv,
        )
        parts = self.world.parts.items()
        self._carried = [
            (where, wp.to_torch(getattr(data, CARRIED[k]))) for k, where in parts if k in CARRIED
        ]
        self._outputs = [
            (where, wp.to_torch(getattr(data, name)).reshape(num_envs, -1))
            for name, (where, _) in self.world.outputs.items()
        ]
        self._ctrl, self._warm_start = wp.to_torch(data.ctrl), wp.to_torch(data.qacc_warmstart)
        self._counts = tuple(wp.to_torch(a) for a in (data.nacon, data.ncollision, data.nefc))
        self._most = torch.zeros(3, dtype=torch.int32, device=self.device)
        self._graph = None

    def _run(self, start: torch.Tensor, controls: torch.Tensor, every: int) -> torch.Tensor:
        """Rows (N, R, width), `every` physics steps each, from states (N, state_size) and controls (N, R, k, A)."""
        world = self.world
        num_envs, horizon, changes = controls.shape[:3]
        width = world.physics_size + sum(where.stop - where.start for where, _ in self._outputs)
        states = torch.zeros((num_envs, horizon, width), device=self.device)
        self._most.zero_()
        if not world.state_spec & int(WARM_START):
            self._warm_start.zero_()
        for where, values in self._carried:
            values.copy_(start[:, where])
        for h in range(horizon):
            for change in range(changes):
                self._ctrl.copy_(controls[:, h, change])
                for _ in range(every // changes):
                    self._advance()
            if world.needs_contact_forces:
                mjw.rne_postconstraint(self._model, self._data)
            for where, values in (*self._carried, *self._outputs):
                states[:, h, where] = values.to(states.dtype)
        return states

    def _advance(self) -> None:
        """One physics step. On a GPU its kernels are recorded once and then launched together."""
        if self._records:
            self._graph = self._graph or self._record()
            wp.capture_launch(self._graph)
        else:
            mjw.step(self._model, self._data)
        now = torch.stack([values.max() for values in self._counts])
        torch.maximum(self._most, now, out=self._most)

    def _record(self) -> wp.Graph:
        """Kernels must be compiled and loaded before, so one step runs first and is undone."""
        carried = [*(values for _, values in self._carried), self._warm_start]
        before = [values.clone() for values in carried]
        mjw.step(self._model, self._data)
        for values, old in zip(carried, before, strict=True):
            values.copy_(old)
        with wp.ScopedCapture() as capture:
            mjw.step(self._model, self._data)
        return capture.graph

    def _grown(self) -> bool:
        """Make more room if the last run needed it, and say so.

        MuJoCo Warp counts on beyond the end of a full buffer but leaves out what does not fit, so the run is void.
        """
        data = self._data
        touching, near, rows = self._most.tolist()
        contacts = data.naconmax // data.nworld
        needed = -(-max(touching, near) // data.nworld)
        if needed <= contacts and rows <= data.njmax:
            return False
        if max(needed, rows) > MOST_ROWS:
            raise SimulationError(
                f"backend 'warp': {needed} contacts and {rows} constraints in one environment are too many"
            )
        sizes = power_of_two(max(needed, contacts)), power_of_two(max(rows, data.njmax))
        LOG.warning(
            "backend 'warp': %d contacts or %d constraints per environment do not fit into %d and %d; "
            "computing the chunk again with %d and %d",
            needed, rows, contacts, data.njmax, *sizes,
        )  # fmt: skip
        self._allocate(data.nworld, *sizes)
        return True

    def _vary(self, models: Sequence[mujoco.MjModel]) -> None:
        """Give every environment the numbers of its own model."""
        for name in VARIED:
            field = getattr(self._model, name)
            values = np.stack([getattr(m, name) for m in models]).astype(np.float32)
            values = values.reshape(
                len(models), *field.shape[1:], *getattr(field.dtype, "_shape_", ())
            )
            if self._varied:
                field.assign(values)
            else:
                setattr(self._model, name, wp.array(values, dtype=field.dtype))
        if not self._varied:
            self._graph, self._varied = None, True  # it was recorded with other arrays

    def close(self) -> None:
        """Free the memory of the device."""
        self._data = self._graph = None


class WarpRenderer:
    """Draws many states in one call, by tracing rays: a `Renderer` for pictures that only a policy sees.

    Its light is not MuJoCo's: it knows neither colour nor strength of a lamp, and shades otherwise. Policies that
    learnt from one renderer's pictures are not for the other's.

    Raises:
        SimulationError: no CUDA.
    """

    def __init__(self, world: World, height: int, width: int, device: str = "cuda"):
        require_device(device)
        self._world, self._size = world, (height, width)
        self._cameras = [world.model.camera(i).name for i in range(world.model.ncam)]
        self._host, self._device = adapted(world.model), wp.get_device(device)
        self._contexts: dict[tuple[int, str], tuple] = {}

    def batch(
        self,
        states: np.ndarray,
        camera: str,
        models: Sequence[mujoco.MjModel] | None = None,
    ) -> np.ndarray:
        """(n, state_size) -> (n, height, width, 3) uint8, RGB.

        Raises:
            SimulationError: no such camera, or worlds that look different.
        """
        if camera not in self._cameras:
            raise unknown_name("camera", camera, self._cameras)
        if models is not None:
            raise SimulationError(
                "MuJoCo Warp's renderer draws no randomised worlds: use --backend warp, or --randomize nominal"
            )
        count = power_of_two(len(states))  # of few sizes, each of which has buffers of its own
        with wp.ScopedDevice(self._device), kernels_print_to_stderr():
            if (count, camera) not in self._contexts:
                self._contexts[count, camera] = self._prepare(count, camera)
            model, data, context = self._contexts[count, camera]
            qpos = torch.as_tensor(self._world.qpos(states), dtype=torch.float32)
            wp.to_torch(data.qpos)[: len(states)].copy_(qpos)
            mjw.kinematics(model, data)
            mjw.com_pos(model, data)
            mjw.camlight(model, data)
            mjw.refit_bvh(model, data, context)
            mjw.render(model, data, context)
            packed = context.rgb_data.numpy()[: len(states)]
        channels = [(packed >> shift).astype(np.uint8) for shift in (16, 8, 0)]
        return np.stack(channels, axis=-1).reshape(len(states), *self._size, 3)

    def _prepare(self, count: int, camera: str) -> tuple:
        """Model, data and buffers for so many pictures."""
        height, width = self._size
        context = mjw.create_render_context(
            self._host,
            nworld=count,
            cam_res=(width, height),
            render_rgb=True,
            render_depth=False,
            cam_active=[name == camera for name in self._cameras],
        )
        return mjw.put_model(self._host), mjw.make_data(self._host, nworld=count), context

    def close(self) -> None:
        """Free the memory of the device."""
        self._contexts.clear()


def require_device(device: str) -> None:
    """Fail early.

    Raises:
        SimulationError: there is no GPU to run on, or PyTorch cannot use it.
    """
    if device != "cuda":
        return
    if not wp.is_cuda_available():
        raise SimulationError(
            "backend 'warp' needs an NVIDIA GPU with its driver, and there is none "
            "(warp-cpu runs the same code on the CPU, slowly, for tests)"
        )
    if not torch.cuda.is_available():
        raise SimulationError(
            "backend 'warp' hands its arrays to PyTorch, and this PyTorch was built without CUDA"
        )


@contextlib.contextmanager
def kernels_print_to_stderr() -> Iterator[None]:
    """Kernels print what does not fit; standard output is for results."""
    libc = ctypes.CDLL(None)
    libc.fflush(None)
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        libc.fflush(None)
        os.dup2(kept, 1)
        os.close(kept)


def one_line_name(model: mujoco.MjModel) -> str:
    """What the MJCF file calls it."""
    return bytes(model.names).partition(b"\0")[0].decode()


def adapted(model: mujoco.MjModel) -> mujoco.MjModel:
    """A model that MuJoCo Warp takes. What is changed is logged:

    - the PGS solver becomes Newton's, which solves the same problem to a smaller error;
    - contacts between boxes and meshes get one point where a margin rules out several.
    """
    model = copy.copy(model)
    if model.opt.solver == mujoco.mjtSolver.mjSOL_PGS:
        model.opt.solver = mujoco.mjtSolver.mjSOL_NEWTON
        LOG.warning("backend 'warp' has no PGS solver: Newton's solves the constraints")
    several = not model.opt.disableflags & mujoco.mjtDisableBit.mjDSBL_MULTICCD
    meshes = np.isin(model.geom_type, [mujoco.mjtGeom.mjGEOM_BOX, mujoco.mjtGeom.mjGEOM_MESH])
    if several and model.nmesh and (model.geom_margin[meshes] > 0).any():
        off = mujoco.mjtDisableBit
        model.opt.disableflags |= off.mjDSBL_MULTICCD | off.mjDSBL_NATIVECCD
        LOG.warning("backend 'warp': contacts between meshes with a margin have one point each")
    return model


def power_of_two(least: int) -> int:
    """The first that is at least this."""
    return 1 << int(np.ceil(np.log2(max(least, 1))))

"""Training on several processes (torchrun): each has its own environments, all have the same weights.

Every process draws the random numbers of all and keeps its own rows, and gradients and statistics are sums over all
rows divided by their global number. So R processes of N environments do what one process of R * N does, up to the
order of floating-point sums. Without torchrun everything here does nothing.
"""

import os
from collections.abc import Iterable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from flow_policy_rl.errors import InputError, PeerLost


def begin(timeout_s: float) -> None:
    """Join the other processes, if torchrun started this one.

    Raises:
        InputError: they cannot be reached within the timeout; names the address.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        return
    try:
        dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_s))
        dist.barrier()
    except (RuntimeError, ValueError) as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise InputError(
            f"process {os.environ.get('RANK')} of {os.environ['WORLD_SIZE']} cannot reach the others at {address} "
            f"within {timeout_s:g} s: {first_line(error)}"
        ) from None


def end() -> None:
    """Leave."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def total(values: Tensor) -> Tensor:
    """Sum over the processes, elementwise.

    Raises:
        PeerLost: another process is gone.
    """
    if world_size() > 1:
        values = values.cpu() if values.is_cuda else values.clone()
        try:
            dist.all_reduce(values)
        except RuntimeError as error:
            raise lost_peer(error) from None
    return values


def wait_for_all() -> None:
    """Until every process is here.

    Raises:
        PeerLost: another process is gone.
    """
    sums([0.0])


def lost_peer(error: RuntimeError) -> PeerLost:
    """What an operation that waits for the others failed with."""
    return PeerLost(
        f"another process is gone ({first_line(error)}); once it can start again, --resume goes on from the last "
        "checkpoint"
    )


def sums(numbers: Iterable[float]) -> list[float]:
    """Sums over the processes, of each number."""
    return total(torch.tensor(list(numbers), dtype=torch.float64, device="cpu")).tolist()


def average(values: dict[str, float]) -> dict[str, float]:
    """Mean over the processes, for each name; all have the same names in the same order."""
    return {n: v / world_size() for n, v in zip(values, sums(values.values()), strict=True)}


def gather(values: Tensor, dim: int) -> Tensor:
    """The rows of all processes along `dim`, in the order of the processes; as many from each."""
    if world_size() == 1:
        return values
    mine = values.cpu().contiguous()
    parts = [torch.empty_like(mine) for _ in range(world_size())]
    try:
        dist.all_gather(parts, mine)
    except RuntimeError as error:
        raise lost_peer(error) from None
    return torch.cat(parts, dim).to(values.device)


def sum_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace every gradient by its sum over the processes, in one message."""
    if world_size() == 1:
        return
    parameters = [p for p in parameters if p.requires_grad]
    flat = torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters]
    )
    parts = total(flat).to(flat.device).split([p.numel() for p in parameters])
    for p, part in zip(parameters, parts, strict=True):
        p.grad = part.view_as(p)


def randn(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Standard normal numbers on the generator's device; the first axis is that of the environments."""
    return own_rows(torch.randn(_all(shape), generator=generator, device=generator.device))


def rand(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """The same, uniform in [0, 1)."""
    return own_rows(torch.rand(_all(shape), generator=generator, device=generator.device))


def _all(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[0] * world_size(), *shape[1:])


def own_rows(values: Tensor, dim: int = 0) -> Tensor:
    """The part of this process along an axis, R * B -> B."""
    return values.chunk(world_size(), dim)[rank()]


def first_line(error: Exception) -> str:
    """Of a message."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__

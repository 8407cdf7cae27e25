"""Collectives over all ranks. Without a process group each works as on one rank."""

from __future__ import annotations

import os
import socket
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """The number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's rank; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def local_device() -> torch.device:
    """This rank's device: the GPU of its local rank, which becomes CUDA's current device, or the CPU."""
    if torch.cuda.is_available():
        only_one = torch.cuda.device_count() == 1  # a cluster may show each task its own GPU alone
        device = torch.device("cuda", 0 if only_one else int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        return device
    return torch.device("cpu")


def node_name() -> str:
    """The name of this machine; in a Slurm job that of its node, as Slurm calls it."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


class _Gather(torch.autograd.Function):
    """All-gather along the first dimension; the backward sums the gradients of all ranks.

    Each rank computes the same global loss, so that sum is `world_size` times the true gradient; the mean over ranks
    in the optimizer's reduction divides by `world_size` again. Without the sum two ranks would get half of the
    gradient, and with a local loss one of another direction.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        ctx.count = len(tensor)
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].contiguous()
        dist.all_reduce(gradient)
        start = dist.get_rank() * ctx.count
        return gradient[start : start + ctx.count]


def gather(tensor: Tensor) -> Tensor:
    """Gather [b, ...] of each rank to [B, ...] on all, in rank order, with the true global gradient.

    Every rank must hold the same shape.
    """
    if world_size() == 1:
        return tensor
    if tensor.dtype == torch.bool:  # gloo has no boolean collectives
        return gather(tensor.to(torch.uint8)).bool()
    return _Gather.apply(tensor)


def local_only(tensor: Tensor) -> Tensor:
    """In the place of `gather` for local negatives: return this rank's own [b, ...]."""
    return tensor


def barrier() -> None:
    """Wait until all ranks are here."""
    if world_size() > 1:
        dist.barrier()


def max_over_ranks(value: int, device: torch.device) -> int:
    """The largest `value` of all ranks; every rank must call it."""
    return _reduced(value, device, dist.ReduceOp.MAX)


def sum_over_ranks(value: int, device: torch.device) -> int:
    """The sum of `value` over all ranks; every rank must call it."""
    return _reduced(value, device, dist.ReduceOp.SUM)


def _reduced(value: int, device: torch.device, operation: Any) -> int:
    if world_size() == 1:
        return value
    tensor = torch.tensor(value, device=device)
    dist.all_reduce(tensor, op=operation)
    return int(tensor.item())

"""Ranks: joining the process group, and gathering tensors with the true global gradient."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def local_device() -> torch.device:
    """This rank's device: the accelerator of its local rank, or the CPU."""
    if torch.cuda.is_available():
        # A cluster may show each task its own GPU alone.
        alone = torch.cuda.device_count() == 1
        device = torch.device("cuda", 0 if alone else int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        return device
    return torch.device("cpu")


class _Gather(torch.autograd.Function):
    """All-gather along the first dimension whose backward sums every rank's gradient.

    Each rank computes the same global loss, so the gradients of the gathered tensor, summed over
    ranks, are `world_size` times the true one; the mean over ranks in the optimizer's reduction
    takes that factor out again. Dropping the sum gives half of the gradient on two ranks, and with
    a local loss even another direction.
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
    """[b, ...] on each rank -> [B, ...] on all, in rank order, differentiable.

    Every rank must hold the same shape.
    """
    if world_size() == 1:
        return tensor
    if tensor.dtype == torch.bool:  # gloo has no boolean collectives
        return gather(tensor.to(torch.uint8)).bool()
    gathered: Tensor = _Gather.apply(tensor)
    return gathered


def alone(tensor: Tensor) -> Tensor:
    """In the place of `gather`: what this rank holds."""
    return tensor


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def max_over_ranks(value: int, device: torch.device) -> int:
    if world_size() == 1:
        return value
    tensor = torch.tensor(value, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return int(tensor.item())


def sum_over_ranks(value: int, device: torch.device) -> int:
    if world_size() == 1:
        return value
    tensor = torch.tensor(value, device=device)
    dist.all_reduce(tensor)
    return int(tensor.item())

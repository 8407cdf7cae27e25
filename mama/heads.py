"""The projections of METHOD, and the logit scales."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from mama.dist import gather

MOMENTUM = 0.1  # of the running statistics, as PyTorch's


class BatchNorm(nn.Module):
    """Batch normalisation (Ioffe and Szegedy 2015) over the rows of all ranks, in fp32 whatever the model computes in.

    PyTorch's SyncBatchNorm runs on CUDA only, and BatchNorm1d fails in bf16 under DeepSpeed, which casts the
    parameters and not the buffers.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))
        self.running_mean: Tensor
        self.running_var: Tensor
        self.eps = 1e-5

    def forward(self, rows: Tensor) -> Tensor:
        """[n, width] -> the same; ranks may differ in n."""
        x = rows.float()
        mean, variance = self._statistics(x) if self.training else (self.running_mean, self.running_var)
        normed = (x - mean) * torch.rsqrt(variance + self.eps)
        return (normed * self.weight.float() + self.bias.float()).to(rows.dtype)

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance over all ranks; two passes, as the difference of two sums would cancel."""
        count = gather(torch.full((1,), float(len(x)), device=x.device)).sum()
        mean = gather(x.sum(0, keepdim=True)).sum(0) / count
        variance = gather((x - mean).square().sum(0, keepdim=True)).sum(0) / count
        with torch.no_grad():
            unbiased = variance * count / (count - 1).clamp(min=1)
            self.running_mean.lerp_(mean, MOMENTUM)
            self.running_var.lerp_(unbiased, MOMENTUM)
        return mean, variance


def norm(kind: str, width: int) -> nn.Module:
    return BatchNorm(width) if kind == "batch" else nn.LayerNorm(width)


class LocalHead(nn.Sequential):
    """Patches or sentences [n, width] to the shared space: Linear, norm, ReLU, Linear, norm."""

    def __init__(self, width: int, hidden: int, out: int, kind: str = "layer") -> None:
        super().__init__(
            nn.Linear(width, hidden), norm(kind, hidden), nn.ReLU(), nn.Linear(hidden, out), norm(kind, out)
        )


class ViewHead(nn.Sequential):
    """The projection that the view term is computed on."""

    def __init__(self, width: int, hidden: int, out: int, kind: str = "layer") -> None:
        super().__init__(nn.Linear(width, hidden), norm(kind, hidden), nn.ReLU(), nn.Linear(hidden, out))


class LogitScale(nn.Module):
    """exp(log), at most `largest`.

    The value is capped and not the parameter: ZeRO's fp32 copy would undo a clamp of the parameter.
    """

    def __init__(self, initial: float, largest: float) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.full((1,), math.log(initial)))  # DeepSpeed cannot broadcast a 0-d tensor
        self.largest = largest

    def forward(self) -> Tensor:
        scale: Tensor = _CappedExp.apply(self.log, self.largest)
        return scale.squeeze()


class _CappedExp(torch.autograd.Function):
    """exp(log) in fp32, at most `largest`, with a gradient that leads back below it.

    A clamp has no gradient above its bound: a scale that Adam once carried over it would stay there. So above
    the bound the gradient is that at the bound, and only where it lowers the scale: raising it would change
    nothing but the length of the way back.
    """

    @staticmethod
    def forward(ctx: Any, log: Tensor, largest: float) -> Tensor:
        exact = log.float().exp()
        scale = exact.clamp(max=largest)
        ctx.dtype = log.dtype
        ctx.save_for_backward(scale, exact > largest)
        return scale

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        scale, above = ctx.saved_tensors
        gradient = gradients[0] * scale  # descent moves against it: below 0 it raises the scale
        return gradient.masked_fill(above & (gradient < 0), 0.0).to(ctx.dtype), None

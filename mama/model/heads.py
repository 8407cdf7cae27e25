"""Projection heads and logit scales; see docs/METHOD.md, "Heads and scales".

Letters: n rows (patches or sentences).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mama.runtime.collectives import gather, world_size
from mama.settings.schema import Norm

MOMENTUM = 0.1  # of the running statistics, as PyTorch's


class BatchNorm(nn.Module):
    """Batch normalisation (Ioffe and Szegedy 2015) in fp32, over the rows of all ranks or with `alone` of this rank.

    Needed because PyTorch's SyncBatchNorm runs on CUDA only, and BatchNorm1d fails in bf16 under DeepSpeed, which
    casts parameters but not buffers.
    """

    def __init__(self, width: int, affine: bool = True, alone: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width)) if affine else None
        self.bias = nn.Parameter(torch.zeros(width)) if affine else None
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))
        self.running_mean: Tensor
        self.running_var: Tensor
        self.eps, self.alone = 1e-5, alone

    def forward(self, rows: Tensor) -> Tensor:
        """[n, width] -> [n, width]; ranks may differ in n."""
        x = rows.float()
        weight = x.new_ones(x.shape[1]) if self.weight is None else self.weight.float()
        bias = x.new_zeros(x.shape[1]) if self.bias is None else self.bias.float()
        if not self.training:
            running = self.running_mean.float(), self.running_var.float()
            normed = F.batch_norm(x, *running, weight, bias, eps=self.eps)
        elif not self.alone and world_size() > 1:
            normed, mean, variance, count = _BatchNormOfAllRanks.apply(x, weight, bias, self.eps)
            unbiased = variance * count / (count - 1).clamp(min=1)
            self.running_mean.lerp_(mean, MOMENTUM)
            self.running_var.lerp_(unbiased, MOMENTUM)
        elif len(x) > 1:
            # Copies: autograd saves its inputs, and a head may be called several times before its backward pass.
            running = self.running_mean.float().clone(), self.running_var.float().clone()
            normed = F.batch_norm(x, *running, weight, bias, True, MOMENTUM, self.eps)
            self.running_mean.copy_(running[0])
            self.running_var.copy_(running[1])
        else:
            normed = (x - x) * weight + bias  # one row has no variance
        return normed.to(rows.dtype)


class _BatchNormOfAllRanks(torch.autograd.Function):
    """Normalise [n, width] by the statistics of all ranks; returns rows, mean, biased variance [width] and count."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Statistics of each rank by PyTorch's kernel, combined by the law of total variance."""
        own = torch.stack(torch.batch_norm_update_stats(x, None, None, 0.0)) if len(x) else x.new_zeros(2, x.shape[1])
        counts = gather(x.new_full((1, 1), len(x)))  # [ranks, 1]
        means, variances = gather(own[None]).unbind(1)  # [ranks, width] each
        count = counts.sum()
        mean = (counts * means).sum(0) / count
        variance = (counts * (variances + (means - mean).square())).sum(0) / count
        ctx.save_for_backward(x, weight, mean, variance, count)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, variance, count)
        normed = F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps) if len(x) else x.clone()
        return normed, mean, variance, count

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """PyTorch's kernel treats the statistics as constants; add the gradient through them, summed over all ranks."""
        x, weight, mean, variance, count = ctx.saved_tensors
        if len(x):
            of_x, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
                gradients[0].contiguous(), x, weight, mean, variance, None, None, False, ctx.eps, [True, True, True]
            )
        else:  # the kernel would divide by n = 0
            of_x, of_weight, of_bias = x.clone(), torch.zeros_like(mean), torch.zeros_like(mean)
        by_scale, by_shift = gather(torch.stack([of_weight, of_bias])[None]).sum(0) / count
        inverse = torch.rsqrt(variance + ctx.eps)
        of_x.addcmul_(x - mean, -weight * inverse.square() * by_scale).sub_(weight * inverse * by_shift)
        return of_x, of_weight, of_bias, None


def norm(kind: Norm, width: int, affine: bool = True) -> nn.Module:
    """The norm that `heads.norm` names; `affine=False` leaves out the parameters of a batch norm."""
    if kind == "layer":
        return nn.LayerNorm(width)
    return BatchNorm(width, affine, alone=kind == "published")


class LocalHead(nn.Sequential):
    """Patches or sentences [n, width] -> shared space [n, out]: Linear, norm, ReLU, Linear, norm.

    In the published code the last norm has no parameters.
    """

    def __init__(self, width: int, hidden: int, out: int, kind: Norm = "layer") -> None:
        last = norm(kind, out, affine=kind != "published")
        super().__init__(nn.Linear(width, hidden), norm(kind, hidden), nn.ReLU(), nn.Linear(hidden, out), last)


class ViewHead(nn.Sequential):
    """Image features [n, width] -> space of the view term [n, out]: Linear, norm, ReLU, Linear.

    The published code has no biases, and a norm at the end.
    """

    def __init__(self, width: int, hidden: int, out: int, kind: Norm = "layer") -> None:
        published = kind == "published"
        layers = [nn.Linear(width, hidden, bias=not published), norm(kind, hidden), nn.ReLU()]
        layers.append(nn.Linear(hidden, out, bias=not published))
        super().__init__(*layers, *([norm(kind, out)] if published else []))


class LogitScale(nn.Module):
    """A learnable scale exp(log), at most `largest`.

    The value is capped, not the parameter: ZeRO's fp32 copy would undo a clamp of the parameter.
    """

    def __init__(self, initial: float, largest: float) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.full((1,), math.log(initial)))  # DeepSpeed cannot broadcast a 0-d tensor
        self.largest = largest

    def forward(self) -> Tensor:
        """The scale, 0-d fp32."""
        return _CappedExp.apply(self.log, self.largest).squeeze()


class _CappedExp(torch.autograd.Function):
    """exp(log) in fp32, at most `largest`, with a gradient that can lower it again.

    A clamp has no gradient above its bound: a scale that Adam once moved over it would stay there. So above the bound
    the gradient is that at the bound, but only if it lowers the scale; raising it further would have no effect.
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


def countable(mask: Tensor) -> bool:
    """Whether the true entries of `mask` can be counted without synchronising with a GPU."""
    return mask.device.type == "cpu"

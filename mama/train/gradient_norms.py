"""The norm of each tower's gradient, for the log."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from mama.runtime.collectives import world_size
from mama.train.zero_state import adam, is_plain

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


class GradientNorms:
    """Sums the squares of the gradients that Adam receives on this rank, by tower."""

    def __init__(self, engine: DeepSpeedEngine, clip_norm: float) -> None:
        self.engine, self.clip_norm = engine, clip_norm
        self.squares: dict[str, Tensor] = {}
        adam(engine).register_step_pre_hook(self._add)

    def _add(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for tensor in group["params"]:
                if tensor.grad is not None:
                    square = tensor.grad.float().square().sum()
                    known = self.squares.get(group["tower"])
                    self.squares[group["tower"]] = square if known is None else known + square

    def clear(self) -> None:
        """Forget the gradients of the step before."""
        self.squares = {}

    def read(self, total: float) -> dict[str, float]:
        """Return the norms before clipping by tower, given the step's `total` norm; every rank must call it."""
        if not self.squares:
            return {}  # the step was skipped, on all ranks
        names = ("vision", "text", "heads")
        squares = torch.stack([self.squares.get(name, torch.zeros(())).cpu() for name in names])
        squares = squares.to(self.engine.device)
        if world_size() > 1 and not is_plain(self.engine):  # each rank has its own partitions
            dist.all_reduce(squares)
        clipped = max(1.0, total / self.clip_norm) if self.clip_norm else 1.0
        return dict(zip(names, (squares.sqrt() * clipped).tolist(), strict=True))

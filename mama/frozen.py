"""What must not move and what must: digests of frozen weights, and the gradients of the first step."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mama.dist import rank
from mama.errors import TrainingError

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


# Of no bytes: an earlier version held the registers of a tower without any as a frozen parameter.
EMPTY = hashlib.blake2b(digest_size=16).hexdigest()


def digests(model: nn.Module) -> dict[str, str]:
    """BLAKE2b of every frozen tensor by name, on rank 0; empty on the others, which only take part in gathering."""
    return {name: _digest(p) for name, p in model.named_parameters() if not p.requires_grad and rank() == 0}


def digests_of_engine(engine: DeepSpeedEngine) -> dict[str, str]:
    """The same under any ZeRO stage; every rank must call it."""
    import deepspeed

    found = {}
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                if rank() == 0:
                    found[name] = _digest(parameter)
    return found


def first_difference(before: dict[str, str], now: dict[str, str]) -> str | None:
    """A name that is not in both with the same digest. Only rank 0 can tell: the others hold nothing."""
    if rank() != 0:
        return None
    before = {name: digest for name, digest in before.items() if digest != EMPTY}
    return next((name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)), None)


def _digest(tensor: Tensor) -> str:
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.blake2b(data.numpy().tobytes(), digest_size=16).hexdigest()


class FirstStep:
    """Watches the first step of a process: every trainable tensor gets a gradient, no frozen one moves."""

    def __init__(self, engine: DeepSpeedEngine) -> None:
        self.engine = engine
        self.before = digests_of_engine(engine)
        self.waiting = {name for name, p in engine.module.named_parameters() if p.requires_grad}
        self.hooks = [
            p.register_hook(lambda _, name=name: self.waiting.discard(name))
            for name, p in engine.module.named_parameters()
            if p.requires_grad
        ]

    def check(self) -> None:
        """Call it after the step. Raises `TrainingError` with the names."""
        for hook in self.hooks:
            hook.remove()
        if self.waiting:
            raise TrainingError(f"no gradient reached {', '.join(sorted(self.waiting))}")
        if name := first_difference(self.before, digests_of_engine(self.engine)):
            raise TrainingError(f"the frozen tensor {name} moved in the first step")

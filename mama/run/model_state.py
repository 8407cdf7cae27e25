"""What a checkpoint says of a model: its trained tensors and running statistics, and digests of the frozen tensors."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from mama.runtime.collectives import rank

# Of no bytes: an earlier version held the registers of a tower without any as a frozen parameter.
EMPTY = hashlib.blake2b(digest_size=16).hexdigest()


def digests(model: nn.Module) -> dict[str, str]:
    """BLAKE2b of every frozen tensor by name, on rank 0; empty on the others, which only take part in gathering."""
    return {name: digest_of(p) for name, p in model.named_parameters() if not p.requires_grad and rank() == 0}


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def buffers(model: nn.Module) -> dict[str, Tensor]:
    """Running statistics; the other buffers of the towers are constants of their architecture."""
    return {name: b for name, b in model.named_buffers() if name.endswith(("running_mean", "running_var"))}


def first_difference(before: dict[str, str], now: dict[str, str]) -> str | None:
    """A name that is not in both with the same digest. Only rank 0 can tell: the others hold nothing."""
    if rank() != 0:
        return None
    before = {name: digest for name, digest in before.items() if digest != EMPTY}
    return next((name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)), None)


def digest_of(tensor: Tensor) -> str:
    """BLAKE2b of 16 bytes, in hexadecimal, of a tensor's bytes."""
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.blake2b(data.numpy().tobytes(), digest_size=16).hexdigest()

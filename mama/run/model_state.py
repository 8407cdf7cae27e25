"""The tensors of a model that a checkpoint holds: trained ones, running statistics, and digests of the frozen ones."""

from __future__ import annotations

import hashlib

from torch import Tensor, nn

from mama.run.tensor_file import bytes_of
from mama.runtime.collectives import rank

# Of an empty tensor: an earlier version had a frozen parameter for the registers of towers without registers.
EMPTY = hashlib.blake2b(digest_size=16).hexdigest()


def digests(model: nn.Module) -> dict[str, str]:
    """Return the digest of every frozen tensor by name on rank 0; empty on the other ranks."""
    return {name: digest_of(p) for name, p in model.named_parameters() if not p.requires_grad and rank() == 0}


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable parameters by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return running statistics by name; the other buffers of the towers are constants of their architecture."""
    return {name: b for name, b in model.named_buffers() if name.endswith(("running_mean", "running_var"))}


def first_difference(before: dict[str, str], now: dict[str, str]) -> str | None:
    """Return the first name whose digest differs or is missing. On rank 0 only: the others have no digests."""
    if rank() != 0:
        return None
    before = {name: digest for name, digest in before.items() if digest != EMPTY}
    return next((name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)), None)


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite; ten times as fast on the CPU as `isfinite().all()`, without a copy."""
    return not tensor.numel() or all(bool(extreme.isfinite()) for extreme in tensor.aminmax())  # NaN is both extremes


def digest_of(tensor: Tensor) -> str:
    """Return the BLAKE2b digest, 16 bytes in hexadecimal, of a tensor's bytes."""
    return hashlib.blake2b(bytes_of(tensor.detach().cpu().contiguous()), digest_size=16).hexdigest()

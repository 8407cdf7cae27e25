"""Write safetensors files (https://github.com/huggingface/safetensors): the library hashes nothing, and copies all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor


def write_hashed(tensors: Mapping[str, Tensor], path: Path) -> tuple[int, str]:
    """Write contiguous fp32 tensors on the CPU to a new file, durably, and return its size and SHA-256.

    The digest is of what was to be written, not of what the disk then holds. Raises `OSError`.
    """
    header, end = {}, 0
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.float32
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers are aligned
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for part in (len(text).to_bytes(8, "little"), text, *map(_bytes, tensors.values())):
            digest.update(part)
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
    return 8 + len(text) + end, digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().flatten().view(torch.uint8).numpy())

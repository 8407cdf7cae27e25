"""Files of tensors that are written in portions: what the library reads of them, their digest, and a failing disk."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mama.run import tensor_file
from mama.run.tensor_file import Shape, stored_tensors, write_tensors


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "wide": torch.randn(70, 30),
        "half": torch.randn(33).bfloat16(),
        "turned": torch.randn(20, 40).t(),
        "none": torch.empty(0, 4),
        "flags": torch.rand(7) < 0.5,
        "numbers": torch.arange(11),
        "single": torch.tensor(2.5),
    }


@pytest.mark.parametrize("portion", [1, 97, 2**26])
@pytest.mark.parametrize("ahead", [0, 500, 2**25])
def test_the_library_reads_what_was_written(
    tmp_path: Path, tensors: dict[str, Tensor], portion: int, ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_file, "PORTION", portion)
    monkeypatch.setattr(tensor_file, "AHEAD", ahead)
    path = tmp_path / "x.safetensors"
    shapes = {name: Shape.of(tensor) for name, tensor in tensors.items()}
    digest = write_tensors(path, shapes, tensors.__getitem__, {"format": "pt"})
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    found = load_file(path)
    assert found.keys() == tensors.keys()
    own = {name: stored.read() for name, stored in stored_tensors(path).items()}
    for name, tensor in tensors.items():
        for read in (found[name], own[name]):
            assert read.dtype == tensor.dtype
            assert torch.equal(read, tensor)


@pytest.mark.parametrize("bad", [1, 3, "last"])
def test_a_disk_that_fails_beside_the_writing_is_an_error_of_the_file(
    tmp_path: Path, tensors: dict[str, Tensor], bad: int | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also the last portion: a later fsync may not see its error again."""
    monkeypatch.setattr(tensor_file, "PORTION", 500)
    path = tmp_path / "x.safetensors"
    shapes = {name: Shape.of(tensor) for name, tensor in tensors.items()}
    flush, calls = os.fdatasync, 0

    def count(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == bad:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        flush(descriptor)

    monkeypatch.setattr(os, "fdatasync", count)
    if bad == "last":
        write_tensors(path, shapes, tensors.__getitem__)
        assert calls > 3
        bad, calls = calls, 0
    with pytest.raises(OSError, match=rf"Input/output error: '{path}'$"):
        write_tensors(path, shapes, tensors.__getitem__)


def test_a_tensor_that_was_not_announced_is_refused(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    shapes = {name: Shape.of(tensor, torch.float32) for name, tensor in tensors.items()}
    with pytest.raises(ValueError, match=r"^numbers: torch\.int64 \[11\] is not what was announced$"):
        write_tensors(tmp_path / "x", {"numbers": shapes["numbers"]}, tensors.__getitem__)

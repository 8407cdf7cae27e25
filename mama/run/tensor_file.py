"""Tensors in files of the safetensors format, one at a time: memory is never that of a whole file.

The library maps a file into memory, where every page that was read counts until the file is closed. Here a tensor is
read or written by its place in the file.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mama.errors import ConfigError
from shards.files import named_in_errors

LARGEST_HEADER = 10**8  # bytes, the limit of the format
PORTION = 2**26  # bytes that are written, and then flushed beside the next ones
AHEAD = 2**25  # bytes of tensors that wait for being written, beside the one that is read
STORED_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in STORED_DTYPES.items()}


@dataclass(frozen=True)
class Shape:
    """What a tensor looks like before it is there."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @staticmethod
    def of(tensor: Tensor, dtype: torch.dtype | None = None) -> Shape:
        """That of a tensor, which may be on the meta device, or of one like it in another dtype."""
        return Shape(dtype or tensor.dtype, tuple(tensor.shape))

    @property
    def bytes(self) -> int:
        """The size of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Stored(Shape):
    """A tensor in a file."""

    path: Path
    start: int  # its first byte, counted from that of the file

    def read(self) -> Tensor:
        """The tensor. Raises `ConfigError` if the file is gone or too short."""
        tensor = torch.empty(self.shape, dtype=self.dtype)
        self.read_into(tensor)
        return tensor

    def read_into(self, tensor: Tensor) -> None:
        """Read into a contiguous tensor on the CPU of the same dtype and shape, without a copy beside it."""
        if not self.bytes:
            return
        view = bytes_of(tensor)
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(self.start)
                done = 0
                while done < self.bytes and (count := file.readinto(view[done:])):
                    done += count
        except OSError as error:
            raise ConfigError(f"{self.path}: cannot be read ({error.strerror})") from None
        if done < self.bytes:
            raise ConfigError(f"{self.path}: ends too early; restore it from a copy")


def stored_tensors(path: Path) -> dict[str, Stored]:
    """The tensors of a file by name. Raises `ConfigError` if it is missing or not in the format."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= LARGEST_HEADER:
                raise ValueError("no header")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        return {name: _stored(path, 8 + length, entry) for name, entry in header.items()}
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: is no safetensors file ({type(error).__name__})") from None


def write_tensors(
    path: Path, shapes: Mapping[str, Shape], tensor: Callable[[str], Tensor], metadata: dict[str, str] | None = None
) -> str:
    """Write a file, asking for one tensor at a time; returns its SHA-256.

    Memory: the largest tensor and `AHEAD` bytes; the next ones are asked for while earlier ones are written. Raises
    `ValueError` for a tensor that has not the shape which was announced, and `OSError` with the name of the file if the
    disk is full.
    """
    # Wider types first, as the library does: every tensor then begins at a multiple of its item's size.
    names = sorted(shapes, key=lambda name: -shapes[name].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name in names:
        shape = shapes[name]
        offsets = [end, end := end + shape.bytes]
        header[name] = {"dtype": NAMES[shape.dtype], "shape": list(shape.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    room = AHEAD + max((shape.bytes for shape in shapes.values()), default=0)
    under_way: deque[tuple[int, list[Future[Any]]]] = deque()
    # Reading, hashing and writing take about as long as each other, and none holds Python's lock.
    with (
        named_in_errors(path),
        _Flushed(path) as file,
        ThreadPoolExecutor(1) as hasher,
        ThreadPoolExecutor(1) as writer,
    ):

        def put(data: bytes | memoryview) -> None:
            under_way.append((len(data), [hasher.submit(digest.update, data), writer.submit(file.write, data)]))

        put(len(text).to_bytes(8, "little") + text)
        for name in names:
            while under_way and sum(size for size, _ in under_way) + shapes[name].bytes > room:
                _finish(under_way.popleft()[1])
            found = tensor(name)
            if (found.dtype, tuple(found.shape)) != (shapes[name].dtype, shapes[name].shape):
                raise ValueError(f"{name}: {found.dtype} {list(found.shape)} is not what was announced")
            put(bytes_of(found.contiguous()))
            del found  # or it is held while the next one is read
        while under_way:
            _finish(under_way.popleft()[1])
    return digest.hexdigest()


class _Flushed:
    """A new file whose bytes go to the disk while others are written, and leave the cache once they are there.

    The `fsync` at the end then waits for little, and gigabytes that nobody reads soon do not take the place of what
    others read.
    """

    def __init__(self, path: Path) -> None:
        self.file = path.open("wb")
        self.written = 0  # bytes since the last flush
        self.beside = ThreadPoolExecutor(1)
        self.flushed: Future[None] | None = None

    def __enter__(self) -> _Flushed:
        return self

    def __exit__(self, *error: object) -> None:
        self.beside.shutdown()
        self.file.close()
        if self.flushed:
            self.flushed.result()

    def write(self, data: bytes | memoryview) -> None:
        """Write all of it. Raises `OSError`, also for what was written before."""
        for start in range(0, len(data), PORTION):
            self.written += self.file.write(data[start : start + PORTION])
            if self.written >= PORTION:
                self.file.flush()
                if self.flushed:
                    self.flushed.result()
                self.written, self.flushed = 0, self.beside.submit(self._flush)

    def _flush(self) -> None:
        descriptor = self.file.fileno()
        os.fdatasync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _finish(parts: list[Future[Any]]) -> None:
    for part in parts:
        part.result()


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, not a copy of them."""
    array: NDArray[np.uint8] = tensor.detach().flatten().view(torch.uint8).numpy()
    return array.data


def _stored(path: Path, start: int, entry: dict[str, Any]) -> Stored:
    begin, end = entry["data_offsets"]
    sizes: Sequence[int] = entry["shape"]
    found = Stored(STORED_DTYPES[entry["dtype"]], tuple(map(int, sizes)), path, start + int(begin))
    if int(end) - int(begin) != found.bytes:
        raise ValueError("offsets")
    return found

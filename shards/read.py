"""Studies back from shards, in any order: NumPy, OpenCV and the standard library only."""

from __future__ import annotations

import os
import tarfile
from io import FileIO
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from shards.manifest import Manifest, Shard, load_manifest
from shards.schema import ShardError, Study

__all__ = ["Manifest", "Shard", "ShardReader", "load_manifest"]


class ShardReader:
    """The studies of one split (or of all, `split=None`), numbered 0 .. len - 1 in manifest order.

    Reads by position (`pread`), so that forked and pickled copies do not disturb each other.
    """

    def __init__(self, folder: Path, split: str | None = None) -> None:
        self.folder = Path(folder)
        self.manifest = load_manifest(self.folder)
        self.shards = [shard for shard in self.manifest.shards if split in (None, shard.split)]
        self._samples = [(shard.name, offset) for shard in self.shards for offset in shard.offsets]
        self.view_counts = [count for shard in self.shards for count in shard.view_counts]
        self._files: dict[str, FileIO] = {}

    def __len__(self) -> int:
        return len(self._samples)

    def study(self, i: int) -> Study:
        return Study.from_json(self._member(i, 0, ".json"))

    def image(self, i: int, n: int) -> NDArray[np.uint8]:
        """View `n` of study `i` as [H, W]."""
        if not 0 <= n < self.view_counts[i]:
            raise IndexError(f"study {i} has {self.view_counts[i]} views, there is no view {n}")
        data = self._member(i, n + 1, f".{n}.jpg")
        image = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), cv2.IMREAD_GRAYSCALE)
        if image is None:
            raise ShardError(
                f"{self.folder / self._samples[i][0]}: image {n} of study {i} is damaged; run `mama check`"
            )
        return image.astype(np.uint8, copy=False)

    def _member(self, i: int, number: int, suffix: str) -> bytes:
        """The `number`-th member of a sample: walk the headers from the sample's offset."""
        name, position = self._samples[i]
        file = self._open(name)
        for _ in range(number + 1):
            header = os.pread(file.fileno(), tarfile.BLOCKSIZE, position)
            try:
                info = tarfile.TarInfo.frombuf(header, "utf-8", "strict")
            except tarfile.HeaderError:
                raise ShardError(f"{self.folder / name}: damaged at byte {position}; run `mama check`") from None
            data = position + tarfile.BLOCKSIZE
            position = data + -(-info.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        content = os.pread(file.fileno(), info.size, data)
        if not info.name.endswith(suffix) or len(content) != info.size:
            raise ShardError(f"{self.folder / name}: {info.name} is not the whole {suffix} member; run `mama check`")
        return content

    def _open(self, name: str) -> FileIO:
        if name not in self._files:
            try:
                self._files[name] = FileIO(self.folder / name)
            except OSError as error:
                raise ShardError(f"{self.folder / name}: {error.strerror}; run `mama check {self.folder}`") from None
        return self._files[name]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}

"""Tar files whose bytes depend on the samples alone: no clock, no user, no order of arrival."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from pathlib import Path

from shards.manifest import Shard
from shards.sample import Sample
from shards.schema import Study


class SplitWriter:
    """Cuts the samples of one split into `<split>-000000.tar`, `<split>-000001.tar`, ... of `samples_per_shard`."""

    def __init__(self, folder: Path, split: str, samples_per_shard: int) -> None:
        self.folder = folder
        self.split = split
        self.samples_per_shard = samples_per_shard
        self.shards: list[Shard] = []
        self._tar: tarfile.TarFile | None = None
        self._samples: list[tuple[Study, int]] = []

    def add(self, sample: Sample) -> None:
        if self._tar is None:
            self._tar = tarfile.TarFile(self._aside, "w", format=tarfile.USTAR_FORMAT)
        self._samples.append((sample.study, self._tar.offset))
        for name, data in sample.members():
            info = tarfile.TarInfo(name)  # its defaults are fixed: mode 644, owner 0, time 0
            info.size = len(data)
            self._tar.addfile(info, io.BytesIO(data))
        if len(self._samples) == self.samples_per_shard:
            self._finish()

    def close(self) -> list[Shard]:
        """Finish the last shard and return all of them."""
        if self._samples:
            self._finish()
        return self.shards

    @property
    def _name(self) -> str:
        return f"{self.split}-{len(self.shards):06d}.tar"

    @property
    def _aside(self) -> Path:
        return self.folder / f"{self._name}.part"

    def _finish(self) -> None:
        assert self._tar is not None
        self._tar.close()
        with self._aside.open("rb") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            size = file.seek(0, os.SEEK_END)
        os.replace(self._aside, self.folder / self._name)
        studies = [study for study, _ in self._samples]
        self.shards.append(
            Shard(
                name=self._name,
                split=self.split,
                samples=len(studies),
                bytes=size,
                sha256=digest,
                keys=tuple(study.key for study in studies),
                patients=tuple(study.patient for study in studies),
                view_counts=tuple(len(study.views) for study in studies),
                offsets=tuple(offset for _, offset in self._samples),
            )
        )
        self._tar, self._samples = None, []

"""Tar files whose bytes depend on the samples alone: no clock, no user, no order of arrival."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from shards.pack.sample import Sample
from shards.read.manifest import Shard
from shards.schema import ShardError, Study


@contextmanager
def full_disk_told(folder: Path) -> Iterator[None]:
    """A failed write names no file by itself."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise ShardError(f"pack.out: cannot write to {folder} ({error.strerror}); run again when it can be") from None


def write_shard(folder: Path, name: str, split: str, samples: Iterable[Sample]) -> Shard:
    """Write the samples to `<folder>/<name>`: aside, then renamed when all of it is on the disk."""
    aside = folder / f"{name}.part"
    studies: list[Study] = []
    offsets: list[int] = []
    with tarfile.TarFile(aside, "w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            studies.append(sample.study)
            offsets.append(tar.offset)
            for member, data in sample.members():
                info = tarfile.TarInfo(member)  # its defaults are fixed: mode 644, owner 0, time 0
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    with aside.open("rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = file.seek(0, os.SEEK_END)
    os.replace(aside, folder / name)
    return Shard(
        name=name,
        split=split,
        samples=len(studies),
        bytes=size,
        sha256=digest,
        keys=tuple(study.key for study in studies),
        patients=tuple(study.patient for study in studies),
        view_counts=tuple(len(study.views) for study in studies),
        offsets=tuple(offsets),
    )

"""Write reproducible tars: their bytes depend on the samples only, not on clock, user or timing."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from shards.errors import ShardError
from shards.files import atomic_file
from shards.pack.sample import Sample
from shards.read.manifest import Shard
from shards.schema import Study


@contextmanager
def named_write_errors(folder: Path) -> Iterator[None]:
    """Turn an `OSError` without a file name, as a failed write raises it, into a `ShardError` that names the folder."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise ShardError(f"pack.out: cannot write to {folder} ({error.strerror}); fix that and run again") from None


def write_shard(folder: Path, name: str, split: str, samples: Iterable[Sample]) -> Shard:
    """Write the samples to the tar `<folder>/<name>` (atomic write) and return its entry in the manifest."""
    studies: list[Study] = []
    offsets: list[int] = []
    with atomic_file(folder / name) as file:
        with tarfile.TarFile(name, "w", file, format=tarfile.USTAR_FORMAT) as tar:
            for sample in samples:
                studies.append(sample.study)
                offsets.append(tar.offset)
                for member, data in sample.members():
                    info = tarfile.TarInfo(member)  # its defaults are fixed: mode 644, owner 0, time 0
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = file.tell()
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

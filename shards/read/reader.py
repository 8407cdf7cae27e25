"""Random access to the studies of a folder of shards: NumPy, OpenCV and the standard library only."""

from __future__ import annotations

import errno
import itertools
import os
from pathlib import Path
from typing import Any, BinaryIO

from numpy.typing import NDArray

from shards.errors import FetchError, ShardError, is_machine_error
from shards.read.manifest import load_manifest
from shards.read.open_files import OpenFiles
from shards.read.remote import Remote
from shards.read.tar import BLOCK, Member, decode_image, open_shard, parse_header, parse_study
from shards.schema import Study

_OPEN = OpenFiles()  # shared by all readers of this process
_NUMBERS = itertools.count()
_ADVICE = "check the limits (ulimit -n), the memory and the disk of this machine, and run again"


class ShardReader:
    """The studies of one split (`split=None`: of all), numbered 0 .. len - 1 in manifest order.

    Reads by position (`pread`), so that forked and pickled copies do not interfere. `folder` may be an http(s) URL:
    each tar is then downloaded into `cache` on first use. Methods raise `ShardError` for a damaged shard, and its
    subclass `FetchError` for an error of machine or network.
    """

    def __init__(self, folder: Path | str, split: str | None = None, cache: Path | None = None) -> None:
        self._number = next(_NUMBERS)
        self.remote = Remote.at(folder, cache)
        self.folder = self.remote.manifest() if self.remote else Path(os.path.expanduser(folder))
        self.manifest = load_manifest(self.folder)
        self.shards = [shard for shard in self.manifest.shards if split in (None, shard.split)]
        for shard in self.shards:
            if not shard.samples == len(shard.keys) == len(shard.offsets) == len(shard.view_counts):
                damaged = ShardError("its entry in the manifest was edited or damaged")
                raise _named(self.folder, shard.name, damaged)
        self._samples = [
            (shard.name, key, offset)
            for shard in self.shards
            for key, offset in zip(shard.keys, shard.offsets, strict=True)
        ]
        self.view_counts = [count for shard in self.shards for count in shard.view_counts]
        self._by_name = {shard.name: shard for shard in self.shards}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take a new number: in this process another reader may have the pickled one, and they must not share files."""
        self.__dict__.update(state, _number=next(_NUMBERS))

    def __len__(self) -> int:
        return len(self._samples)

    def key(self, i: int) -> str:
        """The key of study `i`, a keyed hash."""
        return self._samples[i][1]

    def study(self, i: int) -> Study:
        """Study `i` without its pixels."""
        try:
            study = parse_study(self._member(i, 0, ("json",)))
            if len(study.views) != self.view_counts[i]:
                raise ShardError(f"{study.key} has {len(study.views)} views, the manifest {self.view_counts[i]}")
            return study
        except (ShardError, OSError, MemoryError) as error:
            raise self._named(i, error) from None

    def image(self, i: int, n: int) -> NDArray[Any]:
        """View `n` of study `i` as stored: uint8 or uint16 [h, w]. Raises `IndexError` for a view out of range."""
        data = self.encoded(i, n)
        try:
            return decode_image(data)
        except (ShardError, MemoryError) as error:
            raise self._named(i, error, f"image {n} of study {i}: ") from None

    def encoded(self, i: int, n: int) -> bytes:
        """View `n` of study `i` as JPEG or PNG. Raises `IndexError` for a view out of range."""
        if not 0 <= n < self.view_counts[i]:
            raise IndexError(f"study {i} has {self.view_counts[i]} views, there is no view {n}")
        try:
            return self._member(i, n + 1, (f"{n}.jpg", f"{n}.png"))
        except (ShardError, OSError, MemoryError) as error:
            raise self._named(i, error, f"image {n} of study {i}: ") from None

    def _member(self, i: int, number: int, suffixes: tuple[str, ...]) -> bytes:
        """`_read_member`, with a second try after ESTALE: a remounted network disk needs the file opened again."""
        try:
            return self._read_member(i, number, suffixes)
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
            _OPEN.drop((self._number, self._samples[i][0]))
            return self._read_member(i, number, suffixes)

    def _read_member(self, i: int, number: int, suffixes: tuple[str, ...]) -> bytes:
        """The content of the `number`-th member of study `i`, by walking the headers from the sample's offset."""
        name, key, position = self._samples[i]
        file = self._open(name)
        total = os.fstat(file.fileno()).st_size
        member: Member | None = None
        for _ in range(number + 1):
            member = parse_header(os.pread(file.fileno(), BLOCK, position), position, total)
            if member is None:
                raise ShardError(f"ends at byte {position}, before member {number} of {key}")
            position = member.end
        if member is None or member.name not in {f"{key}.{suffix}" for suffix in suffixes}:
            found = member.name if member else "nothing"
            raise ShardError(f"expected {key}.{suffixes[0]}, found {found}")
        content = os.pread(file.fileno(), member.size, member.data)
        if len(content) != member.size:
            raise ShardError(f"{member.name} is cut")
        return content

    def _open(self, name: str) -> BinaryIO:
        def make() -> BinaryIO:
            path = self.remote.shard(self._by_name[name]) if self.remote else self.folder / name
            return open_shard(path, buffering=0)

        return _OPEN.get((self._number, name), make)

    def __del__(self) -> None:
        if _OPEN is None:  # the interpreter is shutting down
            return
        for shard in getattr(self, "shards", ()):
            _OPEN.drop((self._number, shard.name))

    def _named(self, i: int, error: ShardError | OSError | MemoryError, where: str = "") -> ShardError:
        if isinstance(error, FetchError):
            return error
        name = self._samples[i][0]
        if self.remote and not is_machine_error(error):
            return ShardError(f"{self.remote.url}/{name}: {where}{_reason(error)}")
        return _named(self.folder, name, error, where)


def _reason(error: ShardError | OSError | MemoryError) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


def _named(folder: Path, name: str, error: ShardError | OSError | MemoryError, where: str = "") -> ShardError:
    """The error with the path of the shard and what to do about it."""
    if is_machine_error(error):
        return FetchError(f"{folder / name}: {_reason(error)}; the samples are not to blame: {_ADVICE}")
    return ShardError(f"{folder / name}: {where}{_reason(error)}; run `mama check {folder}`")

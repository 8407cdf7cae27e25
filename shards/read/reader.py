"""Studies back from shards, in any order or as a stream: NumPy, OpenCV and the standard library only."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from numpy.typing import NDArray

from shards.errors import is_of_the_machine
from shards.read.manifest import Manifest, Shard, load_manifest
from shards.read.open_files import OpenFiles
from shards.read.remote import Remote
from shards.read.tar import BLOCK, Member, decode_image, members, open_shard, parse_header, parse_study
from shards.schema import FetchError, ShardError, Study

__all__ = ["Manifest", "Shard", "ShardReader", "load_manifest", "stream"]

READ_AHEAD = 2**20  # bytes
_OPEN = OpenFiles()  # of all readers of this process
_NUMBERS = itertools.count()
_ADVICE = "look at the limits (ulimit -n), the memory and the disk of this machine, and run again"


def stream(folder: Path, split: str | None = None) -> Iterator[tuple[Study, list[NDArray[Any]]]]:
    """Every study of a split (or of all) with its images, in the order of the tars, by plain sequential reads.

    Raises `ShardError` where a tar does not hold what the manifest lists, so that nothing is left out in silence.
    """
    folder = Path(folder)
    for shard in load_manifest(folder).shards:
        if split in (None, shard.split):
            try:
                yield from _stream_shard(folder / shard.name, shard)
            except (ShardError, OSError, MemoryError) as error:
                raise _told(folder, shard.name, error) from None


def _stream_shard(path: Path, shard: Shard) -> Iterator[tuple[Study, list[NDArray[Any]]]]:
    with open_shard(path, READ_AHEAD) as file:
        found = members(file, os.fstat(file.fileno()).st_size)

        def content(name: str) -> bytes:
            member, data = next(found, (None, b""))
            if member is None or member.name != name:
                raise ShardError(f"expected {name}, found {member.name if member else 'the end'}")
            return data

        for key in shard.keys:
            study = parse_study(content(f"{key}.json"))
            yield study, [decode_image(content(f"{key}.{view.member}")) for view in study.views]
        if next(found, None):
            raise ShardError("holds more studies than the manifest lists")


class ShardReader:
    """The studies of one split (or of all, `split=None`), numbered 0 .. len - 1 in manifest order.

    Reads by position (`pread`), so that forked and pickled copies do not disturb each other. `folder` may be an
    http(s) URL: then each tar is fetched into `cache` when something of it is first asked for.
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
                raise _told(self.folder, shard.name, damaged)
        self._samples = [
            (shard.name, key, offset)
            for shard in self.shards
            for key, offset in zip(shard.keys, shard.offsets, strict=True)
        ]
        self.view_counts = [count for shard in self.shards for count in shard.view_counts]
        self._by_name = {shard.name: shard for shard in self.shards}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """In another process a reader of its own may have this number; they must not share files."""
        self.__dict__.update(state, _number=next(_NUMBERS))

    def __len__(self) -> int:
        return len(self._samples)

    def key(self, i: int) -> str:
        return self._samples[i][1]

    def study(self, i: int) -> Study:
        try:
            study = parse_study(self._member(i, 0, ("json",)))
            if len(study.views) != self.view_counts[i]:
                raise ShardError(f"{study.key} has {len(study.views)} views, the manifest says {self.view_counts[i]}")
            return study
        except (ShardError, OSError, MemoryError) as error:
            raise self._told(i, error) from None

    def image(self, i: int, n: int) -> NDArray[Any]:
        """View `n` of study `i` as it is stored: uint8 or uint16 [h, w]."""
        if not 0 <= n < self.view_counts[i]:
            raise IndexError(f"study {i} has {self.view_counts[i]} views, there is no view {n}")
        try:
            return decode_image(self._member(i, n + 1, (f"{n}.jpg", f"{n}.png")))
        except (ShardError, OSError, MemoryError) as error:
            raise self._told(i, error, f"image {n} of study {i}: ") from None

    def _member(self, i: int, number: int, suffixes: tuple[str, ...]) -> bytes:
        """As `_read_member`; a network disk that has come back does not know the file any more and is asked again."""
        try:
            return self._read_member(i, number, suffixes)
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
            _OPEN.drop((self._number, self._samples[i][0]))
            return self._read_member(i, number, suffixes)

    def _read_member(self, i: int, number: int, suffixes: tuple[str, ...]) -> bytes:
        """The `number`-th member of a sample: walk the headers from the sample's offset."""
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
            raise ShardError(f"{member.name} is not whole")
        return content

    def _open(self, name: str) -> BinaryIO:
        def make() -> BinaryIO:
            path = self.remote.shard(self._by_name[name]) if self.remote else self.folder / name
            return open_shard(path, buffering=0)

        return _OPEN.get((self._number, name), make)

    def __del__(self) -> None:
        if _OPEN is None:  # the interpreter ends
            return
        for shard in getattr(self, "shards", ()):
            _OPEN.drop((self._number, shard.name))

    def _told(self, i: int, error: ShardError | OSError | MemoryError, where: str = "") -> ShardError:
        if isinstance(error, FetchError):
            return error
        name = self._samples[i][0]
        if self.remote and not is_of_the_machine(error):
            return ShardError(f"{self.remote.url}/{name}: {where}{_words(error)}")
        return _told(self.folder, name, error, where)


def _words(error: ShardError | OSError | MemoryError) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


def _told(folder: Path, name: str, error: ShardError | OSError | MemoryError, where: str = "") -> ShardError:
    if is_of_the_machine(error):
        return FetchError(f"{folder / name}: {_words(error)}; the samples are not to blame: {_ADVICE}")
    return ShardError(f"{folder / name}: {where}{_words(error)}; run `mama check {folder}`")

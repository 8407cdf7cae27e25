"""The shards that a process keeps open: a bounded number, as large archives have more shards than open files allow."""

from __future__ import annotations

import resource
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import BinaryIO

SHARE, MOST = 4, 1024  # use 1/SHARE of RLIMIT_NOFILE: training needs file descriptors for its batches, too


class OpenFiles:
    """An LRU cache of open files by key. Not thread-safe."""

    def __init__(self) -> None:
        self._files: OrderedDict[Hashable, BinaryIO] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], BinaryIO]) -> BinaryIO:
        """The open file of `key`, opened by `make` if necessary; closes the least recently used at the limit."""
        if key not in self._files:
            while len(self._files) >= limit():
                self._files.popitem(last=False)[1].close()
            self._files[key] = make()
        self._files.move_to_end(key)
        return self._files[key]

    def drop(self, key: Hashable) -> None:
        """Close the file of `key` if it is open."""
        if file := self._files.pop(key, None):
            file.close()


def limit() -> int:
    """How many shards this process may keep open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST if soft == resource.RLIM_INFINITY else max(1, min(MOST, soft // SHARE))

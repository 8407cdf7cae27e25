"""The shards that a process keeps open, so many at most: a large archive has more of them than files may be open."""

from __future__ import annotations

import resource
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import BinaryIO

SHARE, MOST = 4, 1024  # the part of RLIMIT_NOFILE that is taken: a training process needs files for its batches too


class OpenFiles:
    """Files by key, of which the one that was used longest ago is closed for a new one. For one thread."""

    def __init__(self) -> None:
        self._files: OrderedDict[Hashable, BinaryIO] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], BinaryIO]) -> BinaryIO:
        if key not in self._files:
            while len(self._files) >= limit():
                self._files.popitem(last=False)[1].close()
            self._files[key] = make()
        self._files.move_to_end(key)
        return self._files[key]

    def drop(self, key: Hashable) -> None:
        if file := self._files.pop(key, None):
            file.close()


def limit() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST if soft == resource.RLIM_INFINITY else max(1, min(MOST, soft // SHARE))

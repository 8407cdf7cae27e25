"""One builder at a time: a POSIX lock, which the kernel releases when its process ends."""

from __future__ import annotations

import fcntl
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from errno import EACCES, EAGAIN
from pathlib import Path

from shards.errors import ShardError

log = logging.getLogger(__name__)


@contextmanager
def locked(file: Path, numbers: Iterable[int] | None = None) -> Iterator[None]:
    """Lock `file`, or only its bytes `numbers`, one a shard, so that several processes can write different shards.

    POSIX record locks, which network file systems support, too. Raises `ShardError` if another process holds one of
    them; on a file system without locks it only logs a warning.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab") as handle:
        try:
            if numbers is None:
                fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for number in () if numbers is None else numbers:
                fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
        except OSError as error:
            if error.errno in (EACCES, EAGAIN):
                raise ShardError(
                    f"pack.out: another process is building {file.parent.parent}; wait for it, or stop it first"
                ) from None
            log.warning("%s: this file system has no locks (%s): start one builder only", file, error.strerror)
        yield

"""The errors of `shards`, an error in one line, and which errors are the machine's rather than a file's."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable

# Out of file descriptors, memory or disk space, or a network disk that is gone: no sample is to blame, and replacing
# the sample would only hide it. A missing or unreadable file (ENOENT, EACCES, EIO) is the sample's own fault.
MACHINE_ERRNOS = frozenset(
    {
        *(errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.ENOSPC, errno.EDQUOT, errno.EROFS),
        *(errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ESHUTDOWN, errno.EHOSTDOWN, errno.EHOSTUNREACH),
        *(errno.ENETDOWN, errno.ENETUNREACH, errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED),
    }
)


class ShardError(ValueError):
    """A user's mistake or a damaged file. The message is one line: what, where, and how to fix it."""


class FetchError(ShardError):
    """A shard could not be read or downloaded for a reason of this machine or the network; the shard may be good."""


class Refused(ShardError):
    """An image that is not stored: `reason` is a code of `schema.REFUSED_REASONS` or `schema.EXCLUDED_REASONS`."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    @property
    def pair(self) -> tuple[str, str]:
        """(reason code, message), as a `SourceView` has it."""
        return self.reason, str(self)


def is_machine_error(error: BaseException) -> bool:
    """Whether the machine caused the error (memory, disk, network, open files) and not the file that was read."""
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in MACHINE_ERRNOS)


def one_line(error: BaseException) -> str:
    """The message of an error without its line breaks, or its type if it has no message."""
    return " ".join(str(error).split()) or type(error).__name__


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of an error message: `; did you mean ...?` with the most similar known word, or an empty string."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""

"""Errors in one line, and which errors of reading a file are the machine's rather than the file's."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable

# Without files, memory or disk space left, or with a network disk that is gone, a sample is not to blame: to take
# another in its place would only hide it. A missing or unreadable file (ENOENT, EACCES, EIO) is the sample's own.
OF_THE_MACHINE = frozenset(
    {
        *(errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.ENOSPC, errno.EDQUOT, errno.EROFS),
        *(errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ESHUTDOWN, errno.EHOSTDOWN, errno.EHOSTUNREACH),
        *(errno.ENETDOWN, errno.ENETUNREACH, errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED),
    }
)


def is_of_the_machine(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in OF_THE_MACHINE)


def one_line(error: BaseException) -> str:
    """The message of an error without its line breaks; its type where there is none."""
    return " ".join(str(error).split()) or type(error).__name__


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean ...?` with the known word that is most like `word`, or nothing: the end of an error message."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""

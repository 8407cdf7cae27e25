"""Which errors of reading a file are the file's, and which would meet any other file as well."""

from __future__ import annotations

import errno

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

"""End this process: by a signal, in good order; or from any thread, while its main thread may hang in a call."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from mama.errors import StoppedError
from slurm import blocked_signals

_cleanups: list[Callable[[], None]] = []  # of the open blocks of `cleaned_up`, the innermost last
_told: list[Callable[[Exception], None]] = []  # of the open blocks of `told_of_end`


@contextmanager
def nothing_written() -> Iterator[None]:
    """Within the block, Ctrl-C and SIGTERM end all open blocks, and so what they were writing is removed.

    Raises `StoppedError` then. In the main thread alone.
    """
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # no `except Exception` catches what it raises
    try:
        if blocked_signals.noted:  # in a job, before this
            raise KeyboardInterrupt
        yield
    except KeyboardInterrupt:
        raise StoppedError("a signal ended it; nothing was written") from None
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def cleaned_up(action: Callable[[], None]) -> Iterator[None]:
    """Call `action` when the block ends, also if `end_process` ends it."""
    _cleanups.append(action)
    try:
        yield
    finally:
        _cleanups.remove(action)
        action()


@contextmanager
def told_of_end(action: Callable[[Exception], None]) -> Iterator[None]:
    """Within the block, call `action` with the error if `end_process` ends this process; no handler sees that error."""
    _told.append(action)
    try:
        yield
    finally:
        _told.remove(action)


def end_process(error: Exception, code: int = 1) -> None:
    """Report `error`, whose message is one line, and exit with `code`; never returns.

    The error goes to the file that the launcher reads, or to stderr if there is none.
    """
    for tell in _told:
        with suppress(Exception):
            tell(error)
    for action in reversed(_cleanups):
        with suppress(Exception):
            action()
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler  # the import takes seconds

        get_error_handler().record_exception(error)
    else:
        print(f"mama: {error}", file=sys.stderr, flush=True)
    os._exit(code)

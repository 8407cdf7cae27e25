"""Being told to stop: a signal is noted, and acted upon by all ranks together at the end of a step."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

REQUEUE = signal.SIGUSR2  # of a cluster that will take its nodes back soon: Slurm's --signal, as submitit sets it
SIGNALS = (signal.SIGTERM, REQUEUE)
STOPPED = 75  # the exit code of a run that has saved and can be continued: EX_TEMPFAIL of sysexits.h

_told: set[int] = set()
_before: dict[int, Any] = {}  # who listened before us


def listen() -> None:
    """From now on `told` says whether this process was asked to stop. Call it in the main thread."""
    _told.clear()
    _install(_note)


def told() -> bool:
    return bool(_told)


def requeued() -> bool:
    """Where a job's own handler would have had the signal, it gets it now, when everything is saved.

    In its first task submitit's handler puts the job back in the queue and ends the process. In the others
    it returns, and so does this, with True: nothing is left to do, and an error would end the first task too.
    """
    handler = _before.get(REQUEUE)
    if REQUEUE not in _told or not callable(handler):
        return False
    handler(REQUEUE, None)
    return True


def ignore() -> None:
    """For loader processes: the rank decides when they end."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def passed_on() -> Iterator[None]:
    """For the launcher, which waits for its ranks: they are told, and it goes on waiting."""
    _told.clear()
    _install(_pass_on)
    try:
        yield
    finally:
        for number in SIGNALS:
            signal.signal(number, _before[number])


def _install(handler: Callable[[int, FrameType | None], None]) -> None:
    for number in SIGNALS:
        before = signal.signal(number, handler)
        if before is not handler:  # a second run in one process
            _before[number] = before


def _note(number: int, frame: FrameType | None) -> None:
    _told.add(number)


def _pass_on(number: int, frame: FrameType | None) -> None:
    _told.add(number)
    for child in multiprocessing.active_children():
        if child.pid is not None:
            os.kill(child.pid, number)

"""Being told to stop: a signal is noted, and acted upon by all ranks together at the end of a step."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR2)  # of a cluster that wants its nodes back; Slurm's --signal
STOPPED = 75  # the exit code of a run that has saved and can be continued: EX_TEMPFAIL of sysexits.h

_told = False


def listen() -> None:
    """From now on `told` says whether this process was asked to stop. Call it in the main thread."""
    global _told
    _told = False
    for number in SIGNALS:
        signal.signal(number, _note)


def told() -> bool:
    return _told


def ignore() -> None:
    """For loader processes: the rank decides when they end."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def passed_on() -> Iterator[None]:
    """For the launcher, which waits for its ranks: they are told, and it goes on waiting."""
    before = {number: signal.signal(number, _pass_on) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _note(number: int, frame: FrameType | None) -> None:
    global _told
    _told = True


def _pass_on(number: int, frame: FrameType | None) -> None:
    for child in multiprocessing.active_children():
        if child.pid is not None:
            os.kill(child.pid, number)

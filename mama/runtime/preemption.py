"""Being told to stop: a signal is noted, and acted upon by all ranks together at the end of a step."""

from __future__ import annotations

import _thread
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from types import FrameType
from typing import Any

from mama.runtime.errors import StoppedError

END, REQUEUE = 1, 2  # where one rank was told the first and another the second, it is the second
# A cluster that ends a job or a user who does, and a cluster that will take its nodes back soon (Slurm's --signal,
# as submitit sets it).
MEANING = {signal.SIGTERM: END, signal.SIGINT: END, signal.SIGUSR2: REQUEUE}
STOPPED = 75  # the exit code of a run that has saved and can be continued: EX_TEMPFAIL of sysexits.h
PATIENCE = 1800  # seconds in which a cluster that preempts a job ends it: longer than its grace time

_told = 0  # nothing yet
_before: dict[int, Any] = {}  # who listened before us
_waiting = threading.Event()  # set while a launcher waits for its ranks


def end_early() -> None:
    """For the seconds in which this process imports: a signal to stop ends it at once, in one line."""
    for number in MEANING:
        signal.signal(number, _end)


def no_more_early() -> None:
    """Signals that `end_early` took are again what they are to any program."""
    for number in MEANING:
        if signal.getsignal(number) is _end:
            signal.signal(number, _default(number))


def _default(number: int) -> Any:
    return signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL


def listen() -> None:
    """From now on `told` says whether this process was asked to stop. Call it in the main thread.

    Raises `StoppedError` where it was asked already: a launcher starts its ranks with interrupts held back.
    """
    _install(_note)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, MEANING)
    if _told:
        raise StoppedError("a signal ended it before its first step; run it again to continue")


def told() -> int:
    """What this process was told: 0, `END` or `REQUEUE`; the largest of all ranks is that of the run."""
    return _told


def agree(code: int) -> None:
    """What the ranks have found out together is what this one was told."""
    global _told
    _told = max(_told, code)


def is_ours(number: int) -> bool:
    """Did a process that ended by this signal end because it was asked to stop, before it could listen?"""
    return bool(_told) and number in MEANING


def requeued() -> bool:
    """Where a job's own handlers would have had the signal, they get it now, when everything is saved.

    On SIGUSR2 submitit's handler in the first task puts the job back in the queue and ends the process. In the
    others it returns, and so does this, with True: nothing is left to do, and an error would end the first
    task too. A cluster that preempts a job sends SIGTERM, and at the end of its grace time ends the job and puts it
    back in the queue: that is waited for, as a job that ends by itself is never put back.
    """
    if not _told:
        return False
    number = signal.SIGUSR2 if _told == REQUEUE else signal.SIGTERM
    handler = _before.get(number)
    if not callable(handler):
        return False
    handler(number, None)
    if _told == REQUEUE:
        return True
    from slurm.rank_environment import being_preempted  # takes a while to import, and loader processes need not

    if being_preempted():
        time.sleep(PATIENCE)
    return False


def ignore() -> None:
    """For loader processes: the rank decides when they end."""
    for number in MEANING:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def passed_on() -> Iterator[None]:
    """For the launcher, which waits for its ranks: they are told, and it goes on waiting.

    A terminal sends Ctrl-C to the ranks as well, which would end those that still import with a traceback each. So
    they are started with interrupts held back, as this thread has them, and another one takes those of the launcher.
    """
    global _waiting
    _waiting = threading.Event()
    _waiting.set()
    resource_tracker.ensure_running()  # its start, with the first rank, would let them through again
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    _install(_pass_on)
    thread = threading.Thread(target=_take_interrupts, args=(_waiting,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        _waiting.clear()
        thread.join()
        for number in MEANING:
            signal.signal(number, _before[number])
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _install(handler: Callable[[int, FrameType | None], None]) -> None:
    global _told
    _told = 0
    for number in MEANING:
        before = signal.signal(number, handler)
        if before is not handler:  # a second run in one process
            _before[number] = _default(number) if before is _end else before


def _end(number: int, frame: FrameType | None) -> None:
    os.write(2, b"mama: a signal ended it before its first step; run it again to continue\n")
    os._exit(STOPPED)  # an exception would come up inside of some module's import, which may catch it


def _note(number: int, frame: FrameType | None) -> None:
    agree(MEANING[signal.Signals(number)])


def _tell_children(number: int, waiting: threading.Event) -> None:
    """Each once, also those that are only being started now."""
    done: set[int] = set()
    while waiting.is_set():
        for child in multiprocessing.active_children():
            if child.pid is not None and child.pid not in done:
                done.add(child.pid)
                with suppress(ProcessLookupError):
                    os.kill(child.pid, number)
        time.sleep(0.1)


def _pass_on(number: int, frame: FrameType | None) -> None:
    _note(number, frame)
    told = signal.SIGTERM if number == signal.SIGINT else number
    threading.Thread(target=_tell_children, args=(told, _waiting), daemon=True).start()
    if number == signal.SIGINT:  # whoever presses Ctrl-C a second time will not wait
        signal.signal(number, signal.default_int_handler)


def _take_interrupts(waiting: threading.Event) -> None:
    """Hand those that the main thread holds back to its handler."""
    while waiting.is_set():
        if signal.sigtimedwait({signal.SIGINT}, 0.2):
            _thread.interrupt_main()

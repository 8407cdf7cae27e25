"""Preemption: record SIGTERM, SIGINT and SIGUSR2; all ranks agree and save at the end of the current step."""

from __future__ import annotations

import _thread
import logging
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

from mama.errors import StoppedError
from mama.runtime.ending import end_process
from shards.errors import one_line
from slurm import blocked_signals
from slurm.profile import SlurmError

log = logging.getLogger(__name__)

END, REQUEUE = 1, 2  # what a signal requests; if ranks received different ones, the larger counts for all
# SIGTERM and SIGINT: a cluster or user ends the job. SIGUSR2: a cluster will take its nodes back soon (sbatch
# --signal, as submitit sets it).
REQUEST_OF = {signal.SIGTERM: END, signal.SIGINT: END, signal.SIGUSR2: REQUEUE}
EXIT_CODE = 75  # of a run that saved and can be continued: EX_TEMPFAIL of sysexits.h
BEFORE_FIRST_STEP = "a signal ended it before its first step; run it again to continue"

_received = 0  # the request received so far: 0, END or REQUEUE
_replaced: dict[int, Any] = {}  # signal -> the handler that ours replaced
_forwarding = threading.Event()  # set while a launcher waits for its ranks


def exit_on_signals() -> None:
    """While this process imports: a signal ends it at once, with one line instead of a traceback."""
    for number in REQUEST_OF:
        signal.signal(number, _exit)


def restore_default_handlers() -> None:
    """Undo `exit_on_signals`: give the signals that it handles Python's default handlers."""
    for number in REQUEST_OF:
        if signal.getsignal(number) is _exit:
            signal.signal(number, _default_handler(number))


def record_signals() -> None:
    """Record signals from now on instead of acting on them. Call it in the main thread.

    Raises `StoppedError` if one arrived before: a launcher starts its ranks with SIGINT blocked, and a job notes
    SIGTERM.
    """
    _install(_record)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, REQUEST_OF)
    if _received:
        raise StoppedError(BEFORE_FIRST_STEP)


@contextmanager
def ending_at_once() -> Iterator[None]:
    """Within the block a signal ends this process, with one line: before the first step there is nothing to save.

    Python runs a handler only when the main thread is back from C. A rank that waits there for a partner who never
    comes would note the signal and wait on; so a thread reads the signals. The job is requeued as after a step.

    Raises `StoppedError` if a signal came before.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer)
    thread = threading.Thread(target=_end_at_signal, args=(reader,), daemon=True)
    thread.start()
    try:
        if _received:
            raise StoppedError(BEFORE_FIRST_STEP)
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.write(writer, b"\0")
        thread.join()
        os.close(reader)
        os.close(writer)


def _end_at_signal(reader: int) -> None:
    """End this process at a signal whose number comes through a pipe; return at a 0."""
    while number := os.read(reader, 1)[0]:
        if number not in REQUEST_OF:
            continue
        adopt_request(REQUEST_OF[signal.Signals(number)])
        end_and_requeue(StoppedError(BEFORE_FIRST_STEP), let_cluster_requeue)


def end_and_requeue(error: Exception, into_queue: Callable[[], bool]) -> None:
    """End this process from any thread with `error`, after `let_cluster_requeue` or `requeue_later`; never returns."""
    code: Any = EXIT_CODE
    try:
        if into_queue():
            code = 0
    except SystemExit as end:  # the job is requeued
        code = end.code
    except Exception as refused:  # submitit has requeued it too often
        error = StoppedError(f"{error}; {one_line(refused)}")
    end_process(error, code if isinstance(code, int) else EXIT_CODE)


def signal_received() -> int:
    """The request that this process received: 0 (none), `END` or `REQUEUE`."""
    return _received


def adopt_request(request: int) -> None:
    """Raise this process's request to `request`, for example the maximum over all ranks."""
    global _received
    _received = max(_received, request)


def was_forwarded(number: int) -> bool:
    """Whether a rank that signal `number` killed was killed by a signal that this launcher received and forwarded."""
    return bool(_received) and number in REQUEST_OF


def let_cluster_requeue() -> bool:
    """Let the cluster requeue this job, now that the checkpoint is on disk; keeps no node waiting.

    Calls the handler that ours replaced, submitit's. Returns whether the job goes back in the queue and nothing is
    left to do for this task.

    - SIGUSR2: in the job's first task submitit requeues the job and ends the process. In the others its handler
      returns, and so does this, with True: an error would end the first task as well.
    - SIGTERM from Slurm's preemption: the first task puts the job back in the queue at once and ends the process, the
      others as above. Slurm itself would do so at the end of the grace time, if at all, and never for a job that has
      ended by itself.
    - SIGTERM from `scontrol requeue` or for a node that is down: the process ends, and Slurm brings the job back.
    - otherwise (no signal, no job, `scancel`): False.
    """
    if not _received:
        return False
    number = signal.SIGUSR2 if _received == REQUEUE else signal.SIGTERM
    handler = _replaced.get(number)
    if not callable(handler):
        return False
    handler(number, None)
    if _received == REQUEUE:
        return True
    from slurm.rank_environment import job_state  # submitit is slow to import, and loader processes need none

    state = job_state()
    if state == "requeued":
        raise SystemExit(EXIT_CODE)  # no result is written: the job is not over
    if state != "preempted":
        return False
    if os.environ.get("RANK", "0") != "0":
        return True
    log.warning("Slurm preempts this job, and all is saved: it goes back in the queue now")
    return _back_in_queue()


def requeue_later() -> bool:
    """Put this job back in the queue without a signal, from any of its tasks, and end the process.

    Returns False if this is no job, or the cluster refuses.
    """
    if os.environ.get("SUBMITIT_EXECUTOR") == "slurm":  # where submitit would put a cancelled job back as well
        return _back_in_queue()
    adopt_request(REQUEUE)  # on the local machine submitit does it
    return let_cluster_requeue()


def _back_in_queue() -> bool:
    from slurm.rank_environment import requeue

    try:
        requeue()
    except SlurmError as error:
        log.warning("%s", error)
        return False
    raise SystemExit(EXIT_CODE)


def ignore_signals() -> None:
    """Ignore the signals, in loader processes: their rank ends them."""
    for number in REQUEST_OF:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def forwarded_to_ranks() -> Iterator[None]:
    """In the launcher: forward signals to the ranks and keep waiting for them; a second Ctrl-C interrupts.

    A terminal sends Ctrl-C to the ranks as well, and would end those that still import with a traceback each. So
    SIGINT is blocked in this thread, which the ranks inherit, and another thread takes the launcher's own.
    """
    global _forwarding
    _forwarding = threading.Event()
    _forwarding.set()
    _install(_forward)
    resource_tracker.ensure_running()  # started later, with the first rank, it would unblock SIGINT
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    thread = threading.Thread(target=_take_interrupts, args=(_forwarding,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        _forwarding.clear()
        thread.join()
        for number in REQUEST_OF:
            signal.signal(number, _replaced[number])
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _default_handler(number: int) -> Any:
    return signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL


def _install(handler: Callable[[int, FrameType | None], None]) -> None:
    """Forget what was received, and install `handler`; remember the handlers that it replaces."""
    global _received
    _received = 0
    for number in REQUEST_OF:
        before = signal.signal(number, handler)
        if before is not handler:  # it is, for a second run in one process
            _replaced[number] = _default_handler(number) if before is _exit else before
    while blocked_signals.noted:  # in a job, before this
        signal.raise_signal(blocked_signals.noted.pop())


def _exit(number: int, frame: FrameType | None) -> None:
    os.write(2, f"mama: {BEFORE_FIRST_STEP}\n".encode())
    os._exit(EXIT_CODE)  # an exception could be caught by the module that is being imported


def _record(number: int, frame: FrameType | None) -> None:
    adopt_request(REQUEST_OF[signal.Signals(number)])


def _forward(number: int, frame: FrameType | None) -> None:
    _record(number, frame)
    sent = signal.SIGTERM if number == signal.SIGINT else number
    threading.Thread(target=_signal_children, args=(sent, _forwarding), daemon=True).start()
    if number == signal.SIGINT:  # whoever presses Ctrl-C a second time does not want to wait
        signal.signal(number, signal.default_int_handler)


def _signal_children(number: int, forwarding: threading.Event) -> None:
    """Send a signal once to each child, also to those that are still being started."""
    done: set[int] = set()
    while forwarding.is_set():
        for child in multiprocessing.active_children():
            if child.pid is not None and child.pid not in done:
                done.add(child.pid)
                with suppress(ProcessLookupError):
                    os.kill(child.pid, number)
        time.sleep(0.1)


def _take_interrupts(forwarding: threading.Event) -> None:
    """Pass each SIGINT that the main thread blocks to that thread's handler."""
    while forwarding.is_set():
        if signal.sigtimedwait({signal.SIGINT}, 0.2):
            _thread.interrupt_main()

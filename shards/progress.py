"""Progress of long loops: a tqdm bar on a terminal, sparse log lines elsewhere."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from tqdm import tqdm

log = logging.getLogger(__name__)
SECONDS_BETWEEN_LINES = 10.0

T = TypeVar("T")

_loops: list[str] = []  # labels of the loops that show their progress now


def progress(
    iterable: Iterable[T], total: int | None, label: str, unit: str, note: Callable[[], str] = str
) -> Iterator[T]:
    """Yield the items of `iterable` and show the progress with rate and remaining time.

    On a terminal (standard error) that is a tqdm bar. Elsewhere it is at most one line of `logging` every ten
    seconds and one at the end, so that a Slurm log stays readable. `total` is None if the length is unknown; `unit`
    is a plural, e.g. "images"; `note` returns a few words about the results so far.
    """
    _loops.append(label)
    try:
        yield from _shown(iterable, total, label, unit, note)
    finally:
        _loops.remove(label)


def _shown(iterable: Iterable[T], total: int | None, label: str, unit: str, note: Callable[[], str]) -> Iterator[T]:
    if sys.stderr.isatty():
        with tqdm(iterable, total=total, desc=label, unit=f" {unit}", dynamic_ncols=True, smoothing=0.1) as bar:
            for item in bar:
                yield item
                bar.set_postfix_str(note(), refresh=False)
        return
    start = last = time.monotonic()
    done = 0
    for item in iterable:
        yield item
        done += 1
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES:
            last = now
            log.info(_line(done, total, label, unit, now - start, note()))
    log.info("%s, done", _line(done, total, label, unit, time.monotonic() - start, note()))


@contextmanager
def repeated(seconds: float, action: Callable[[], None]) -> Iterator[None]:
    """Call `action` every `seconds` seconds in a thread until the block ends."""
    over = threading.Event()

    def repeat() -> None:
        while not over.wait(seconds):
            action()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextmanager
def waiting(label: str) -> Iterator[None]:
    """Log work that cannot be counted, now and every ten seconds, but not while a `progress` loop is running."""
    start = time.monotonic()

    def log_elapsed() -> None:
        if not _loops:
            log.info("%s, %.0f s", label, time.monotonic() - start)

    log.info(label)
    with repeated(SECONDS_BETWEEN_LINES, log_elapsed):
        yield


def _line(done: int, total: int | None, label: str, unit: str, seconds: float, note: str) -> str:
    rate = done / seconds if seconds > 0 else 0.0
    line = f"{label}: {done}{f'/{total}' if total else ''} {unit} in {seconds:.0f} s, {rate:.3g} {unit}/s"
    if total and rate > 0 and done < total:
        line += f", {(total - done) / rate:.0f} s left"
    return f"{line}; {note}" if note else line

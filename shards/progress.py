"""One progress display for every long loop: a bar for a person, sparse log lines for a log file."""

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

_loops: list[str] = []  # labels of those that show how far they are


def progress(
    iterable: Iterable[T], total: int | None, label: str, unit: str, note: Callable[[], str] = str
) -> Iterator[T]:
    """Yield the items of `iterable` while showing how far the loop is.

    On a terminal (standard error) it is a tqdm bar with rate and remaining time. Elsewhere it is
    one line of `logging` at most every ten seconds and one at the end, so that a Slurm log stays
    readable. `total` may be None where the length is not known; `unit` is a plural, e.g. "images";
    `note` gives a few words about how it goes so far.
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
            log.info(_line(done, total, label, unit, now - start) + _behind(note()))
    log.info(_line(done, total, label, unit, time.monotonic() - start) + _behind(note()) + ", done")


@contextmanager
def repeated(seconds: float, action: Callable[[], None]) -> Iterator[None]:
    """Call `action` every so many seconds, in a thread of its own, until the block ends."""
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
    """For work that cannot be counted: a line of `logging` now and every ten seconds, but not beside a counted loop."""
    start = time.monotonic()

    def tell() -> None:
        if not _loops:
            log.info("%s, %.0f s", label, time.monotonic() - start)

    log.info(label)
    with repeated(SECONDS_BETWEEN_LINES, tell):
        yield


def _behind(words: str) -> str:
    return f"; {words}" if words else ""


def _line(done: int, total: int | None, label: str, unit: str, seconds: float) -> str:
    rate = done / seconds if seconds > 0 else 0.0
    line = f"{label}: {done}{f'/{total}' if total else ''} {unit} in {seconds:.0f} s, {rate:.3g} {unit}/s"
    if total and rate > 0 and done < total:
        line += f", {(total - done) / rate:.0f} s left"
    return line

"""Processes that work for another one, and end with it, however it ends."""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import wait

import cv2

PR_SET_PDEATHSIG = 1  # prctl.h of Linux


def die_with_parent() -> None:
    """Be killed when the process that made this one ends, also by a signal that it cannot act upon.

    Otherwise a worker that reads a slow disk, or waits for work that never comes, would stay for ever. Elsewhere
    than on Linux nothing happens. Call it first of all: a parent that is gone already is noticed.
    """
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and wait([parent.sentinel], timeout=0):
        os._exit(1)


def start_single() -> None:
    """A worker of one thread; the pool has as many as there are cores."""
    die_with_parent()
    cv2.setNumThreads(1)


@contextmanager
def quiet() -> Iterator[None]:
    """Drop what the readers of a file print of it: Python's warnings, pydicom's log, and C libraries' lines.

    They would tear the progress line of a build apart, once for every odd header; what comes of the file is told
    by the picture or its refusal. C libraries write to descriptor 2 itself.
    """
    log = logging.getLogger("pydicom")
    earlier = log.disabled
    with warnings.catch_warnings(), _descriptor_dropped(2):
        warnings.simplefilter("ignore")
        log.disabled = True
        try:
            yield
        finally:
            log.disabled = earlier


@contextmanager
def _descriptor_dropped(number: int) -> Iterator[None]:
    with suppress(AttributeError, OSError, ValueError):  # there is none, nobody reads it, or it is closed
        sys.stderr.flush()
    try:
        kept = os.dup(number)
    except OSError:  # closed: nothing is written to it
        yield
        return
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), number)
        yield
    finally:
        os.dup2(kept, number)
        os.close(kept)

"""Worker processes: they end with their parent, use one thread, and print nothing while reading a file."""

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
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h of glibc


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends, even by SIGKILL. Linux only; no effect elsewhere.

    Otherwise a worker that reads a slow disk or waits for work would outlive its parent. Call it first of all: it
    exits at once if the parent is already gone.
    """
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and wait([parent.sentinel], timeout=0):
        os._exit(1)


def start_worker() -> None:
    """Initialise a worker process of a pool or of a data loader."""
    die_with_parent()
    configure_process()


def configure_process() -> None:
    """Configure this process for decoding: one OpenCV thread, and keep freed memory for the next image.

    By default glibc returns tens of megabytes to the kernel after each image and requests them again at once, and the
    page faults take as long as the decoding. No effect on other C libraries.
    """
    cv2.setNumThreads(1)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**30)


def start_single_threaded() -> None:
    """Initialise a worker of a pool that has one process a core: one OpenCV thread each."""
    die_with_parent()
    cv2.setNumThreads(1)


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress Python warnings, pydicom's log, and what C libraries write to file descriptor 2.

    Readers of image files print a line for every odd header, which would break up the progress line of a build.
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
    with suppress(AttributeError, OSError, ValueError):  # no stderr, a broken pipe, or closed
        sys.stderr.flush()
    try:
        kept = os.dup(number)
    except OSError:  # descriptor 2 is closed
        yield
        return
    try:
        with open(os.devnull, "wb") as devnull:
            os.dup2(devnull.fileno(), number)
        yield
    finally:
        os.dup2(kept, number)
        os.close(kept)

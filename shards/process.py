"""Processes that work for another one, and end with it, however it ends."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
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

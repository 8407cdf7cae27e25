"""`in_order`: samples of studies by several processes, in the order of the studies and within bounded memory."""

from __future__ import annotations

import ctypes
import multiprocessing
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from itertools import islice

import cv2

from shards.pack.sample import Sample, SampleConfig, build_sample
from shards.processes import die_with_parent
from shards.schema import SourceStudy

IN_FLIGHT = 4  # studies per worker that are under way or wait for their turn
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h of glibc
CRASH = ("crash", "reading an image of this study ended its process, twice: the decoder crashed or memory ran out")


def in_order(config: SampleConfig, studies: Iterable[SourceStudy], workers: int) -> Iterator[Sample]:
    """`build_sample` of every study. One worker is this process itself.

    A study whose decoder brings its process down is tried once more, alone; if it does so again, all of
    its images are refused.
    """
    if workers == 1:
        settle()
        for study in studies:
            yield build_sample(config, study)
        return
    pool = _pool(workers)
    waiting: deque[tuple[SourceStudy, Future[Sample]]] = deque()
    source = iter(studies)
    try:
        while True:
            for study in islice(source, IN_FLIGHT * workers - len(waiting)):
                waiting.append((study, _submit(pool, config, study)))
            if not waiting:
                return
            study, future = waiting.popleft()
            try:
                yield future.result()
            except BrokenProcessPool:
                yield _alone(config, study)
                pool = _pool(workers)
                waiting = deque((s, f if _is_good(f) else _submit(pool, config, s)) for s, f in waiting)
    finally:
        pool.shutdown(cancel_futures=True)


def _submit(pool: ProcessPoolExecutor, config: SampleConfig, study: SourceStudy) -> Future[Sample]:
    """A pool that broke a moment ago refuses work: that is told by the future, like any other break."""
    try:
        return pool.submit(build_sample, config, study)
    except BrokenProcessPool as error:
        broken: Future[Sample] = Future()
        broken.set_exception(error)
        return broken


def _is_good(future: Future[Sample]) -> bool:
    return future.done() and not future.cancelled() and future.exception() is None


def _alone(config: SampleConfig, study: SourceStudy) -> Sample:
    with _pool(1) as pool:
        try:
            return pool.submit(build_sample, config, study).result()
        except BrokenProcessPool:
            views = tuple(replace(view, refused=view.refused or CRASH) for view in study.views)
            return build_sample(config, replace(study, views=views))


def _pool(workers: int) -> ProcessPoolExecutor:
    # spawn: the caller may hold threads (a tensor library), and those do not survive a fork
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker)


def start_worker() -> None:
    """For a worker process of a pool, or of a loader."""
    die_with_parent()
    settle()


def settle() -> None:
    """One thread a worker, and memory that one image leaves stays for the next.

    Otherwise glibc gives tens of megabytes back after each image and asks for them again at once, and the
    page faults take as long as the decoding. Another C library is left as it is.
    """
    cv2.setNumThreads(1)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**30)

"""Build samples in several processes, in the order of the studies and with bounded memory."""

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

IN_FLIGHT = 4  # studies per worker, running or queued
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h of glibc
CRASH = ("crash", "reading an image of this study killed the process twice: the decoder crashed or memory ran out")


def in_order(config: SampleConfig, studies: Iterable[SourceStudy], workers: int) -> Iterator[Sample]:
    """Yield `build_sample` of every study in order, in `workers` processes; 1: in this process.

    If a decoder kills its process, the study is tried once more in a process of its own; if that dies, too, all
    images of the study are refused.
    """
    if workers == 1:
        configure_process()
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
    """`submit` on a broken pool raises; return a failed future so that the caller handles one case only."""
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
    # spawn: the caller may run threads (a tensor library), which do not survive a fork
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker)


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

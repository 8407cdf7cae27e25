"""Read images in several processes, in their order and with bounded memory; of studies the samples of shards."""

from __future__ import annotations

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import TypeVar

from shards.pack.sample import Sample, SampleConfig, build_sample
from shards.processes import configure_process, start_worker
from shards.schema import SourceStudy

IN_FLIGHT = 4  # studies or images per worker, running or queued
CRASH = ("crash", "reading an image of this study killed the process twice: the decoder crashed or memory ran out")

T = TypeVar("T")
R = TypeVar("R")


def in_order(config: SampleConfig, studies: Iterable[SourceStudy], workers: int) -> Iterator[Sample]:
    """Yield `build_sample` of every study in order, in `workers` processes; 1: in this process.

    If a decoder kills its process twice, all images of the study are refused.
    """

    def crashed(study: SourceStudy) -> Sample:
        views = tuple(replace(view, refused=view.refused or CRASH) for view in study.views)
        return build_sample(config, replace(study, views=views))

    return map_in_order(partial(build_sample, config), studies, 0 if workers == 1 else workers, crashed)


def map_in_order(
    function: Callable[[T], R], items: Iterable[T], workers: int, crashed: Callable[[T], R]
) -> Generator[R, None, None]:
    """Yield `function` of every item in order, in `workers` processes with bounded memory; 0: in this process.

    If `function` kills its process, the item is tried once more in a process of its own; if that dies, too, the result
    is that of `crashed`, called here.
    """
    if workers == 0:
        configure_process()
        for item in items:
            yield function(item)
        return
    pool = _pool(workers)
    waiting: deque[tuple[T, Future[R]]] = deque()
    source = iter(items)
    try:
        while True:
            for item in islice(source, IN_FLIGHT * workers - len(waiting)):
                waiting.append((item, _submit(pool, function, item)))
            if not waiting:
                return
            item, future = waiting.popleft()
            try:
                yield future.result()
            except BrokenProcessPool:
                yield _alone(function, item, crashed)
                pool = _pool(workers)
                waiting = deque((i, f if _is_good(f) else _submit(pool, function, i)) for i, f in waiting)
    finally:
        pool.shutdown(cancel_futures=True)


def _submit(pool: ProcessPoolExecutor, function: Callable[[T], R], item: T) -> Future[R]:
    """`submit` on a broken pool raises; return a failed future so that the caller handles one case only."""
    try:
        return pool.submit(function, item)
    except BrokenProcessPool as error:
        broken: Future[R] = Future()
        broken.set_exception(error)
        return broken


def _is_good(future: Future[R]) -> bool:
    return future.done() and not future.cancelled() and future.exception() is None


def _alone(function: Callable[[T], R], item: T, crashed: Callable[[T], R]) -> R:
    with _pool(1) as pool:
        try:
            return pool.submit(function, item).result()
        except BrokenProcessPool:
            return crashed(item)


def _pool(workers: int) -> ProcessPoolExecutor:
    # spawn: the caller may run threads (a tensor library), which do not survive a fork
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_start)


def _start() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes, and the one that waits ends these
    start_worker()

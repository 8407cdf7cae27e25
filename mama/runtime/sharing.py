"""Share work over the ranks that a launcher started: batches are dealt out, and rank 0 gets what all have computed.

The results travel through gloo, whatever the devices: they are on the CPU, and two ranks may have one GPU.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from itertools import count
from socket import gethostname
from typing import Any, TypeVar

import torch.distributed as dist

from mama.errors import ConfigError, RankError
from mama.runtime import console
from mama.runtime.collectives import rank, world_size
from mama.runtime.launch import is_rank
from shards.errors import one_line

T = TypeVar("T")

JOIN = 300.0  # seconds to wait for ranks that still import
PATIENCE = timedelta(days=7)  # with a rank that works: its end is noticed at once, however it ends
CAUSE = "cause"  # of the end of all ranks: the error of the first

_blocks = count()  # of this process: each has keys of its own in the store


@contextmanager
def joined() -> Iterator[None]:
    """Join the other ranks for the block, if a launcher started this process as one of several.

    An error of one rank ends all: the others raise it as `RankError` as soon as they wait for that rank. Raises
    `ConfigError` for incomplete launcher variables, `RankError` if a rank does not come within `JOIN` seconds.
    """
    if not is_rank():
        yield
        return
    console.configure_logging()  # only now it is known which rank this is
    store = dist.PrefixStore(f"mama-{next(_blocks)}", _rendezvous())
    _join(store)
    try:
        yield
        _wait()  # a rank that left now could take data with it that others have not read
    except _Gone as gone:
        raise RankError(f"rank {rank()} ends as well: {_cause(store, gone)}") from None
    except BaseException as error:
        with suppress(RuntimeError):  # rank 0, which keeps the store, may have ended
            store.set(CAUSE, f"rank {rank()} on {gethostname()}: {one_line(error)}")
        raise
    finally:
        dist.destroy_process_group()


def over_ranks(rows: int, size: int, work: Callable[[list[range]], Iterable[T]]) -> list[T]:
    """Call `work` with batches of `rows` rows, `size` each, and return what it yields, one result for each batch.

    The batches are those of a single process, dealt out in turn: each has the rows and the size that it has there.
    Rank 0 returns the results of all in their order, every other rank its own. A rank for which none is left works
    on one of the others', so that it has a result if there is any.
    """
    batches = [range(start, min(start + size, rows)) for start in range(0, rows, size)]
    own = batches[rank() :: world_size()] or batches[:1]
    of_rank: list[Any] = [None] * world_size()
    of_rank[rank()] = list(work(own))
    if world_size() > 1:
        _wait()
        _collectively(dist.gather_object, of_rank[rank()], of_rank if rank() == 0 else None)
    if rank() > 0:
        return list(of_rank[rank()])
    return [of_rank[number % world_size()][number // world_size()] for number in range(len(batches))]


def of_first(value: T) -> T:
    """What rank 0 passes, on every rank."""
    values = [value]
    if world_size() > 1:
        _wait()
        _collectively(dist.broadcast_object_list, values, 0)
    return values[0]


def require_same(found: dict[str, Any]) -> None:
    """Raise `ConfigError` on all ranks, with the first key that differs, if one of them has found other values."""
    of_all: list[Any] = [None] * world_size()
    of_all[rank()] = (gethostname(), found)
    if world_size() > 1:
        _wait()
        _collectively(dist.all_gather_object, of_all, of_all[rank()])
    host, first = of_all[0]
    for number, (node, other) in enumerate(of_all):
        for key in (*first, *other):
            if first.get(key) != other.get(key):
                raise ConfigError(
                    f"{key}: rank {number} on {node} sees {other.get(key)}, rank 0 on {host} {first.get(key)}; "
                    "all ranks of a launcher share one call"
                )


class _Gone(RuntimeError):
    """Another rank has ended."""


@cache
def _rendezvous() -> dist.Store:
    """Meet the other ranks at the launcher's address; returns the store that all have in common, kept by rank 0."""
    with _others_awaited():
        store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=JOIN)))
    return store


def _join(store: dist.Store) -> None:
    number, ranks = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
    with _others_awaited():
        dist.init_process_group("gloo", store=store, rank=number, world_size=ranks, timeout=PATIENCE)


@contextmanager
def _others_awaited() -> Iterator[None]:
    """Report in one line that ranks have not come; Ctrl-C ends the process, where PyTorch would hold it back."""
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    except RuntimeError as error:
        place = ":".join(os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT"))
        which = f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} on {gethostname()}"
        raise RankError(f"{which} does not find the others at {place}: {one_line(error)}") from None
    finally:
        signal.signal(signal.SIGINT, before)


def _wait() -> None:
    """Wait until all ranks are here, and act on signals meanwhile: within a collective Python would not."""
    if world_size() == 1:
        return
    arrived = dist.barrier(async_op=True)
    while not arrived.is_completed():
        time.sleep(0.02)
    _collectively(arrived.wait)


def _collectively(call: Callable[..., Any], *arguments: Any) -> None:
    try:
        call(*arguments)
    except RuntimeError as error:
        raise _Gone(one_line(error)) from error


def _cause(store: dist.Store, gone: _Gone) -> str:
    """What the rank that failed first has said, if it could."""
    with suppress(RuntimeError):
        if store.check([CAUSE]):
            return store.get(CAUSE).decode()
    reason = str(gone).partition(". This is typically")[0]  # advice that leads nowhere here
    return f"another rank has ended, and its own log says why ({reason})"

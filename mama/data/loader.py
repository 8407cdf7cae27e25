"""Loader processes: batches of a data set, and one-line errors if a process dies, hangs or runs out of shared memory.

For a GPU the batches are in pinned memory, from which they are copied asynchronously.
"""

from __future__ import annotations

import multiprocessing.process
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info

from mama.errors import ConfigError, HungError, TrainingError
from mama.runtime import preemption
from mama.settings.schema import Config
from shards.errors import ShardError
from shards.processes import start_worker as start_process

SHARED = Path("/dev/shm")  # shared memory, through which loader processes pass batches to the training process
AHEAD = 2  # batches that each process prefetches
PATIENCE = 5.0  # seconds that a process or a thread gets to end
CPU = torch.device("cpu")
MIB = 2**20
_DEAD = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (.*)")
_STATES = {"T": "stopped by a signal", "t": "stopped by a debugger", "D": "waiting for a disk", "Z": "dead"}


def load(
    dataset: Dataset[Any],
    config: Config,
    collate: Callable[[list[Any]], Any] = default_collate,
    device: torch.device = CPU,
    **options: Any,
) -> Generator[Any, None, None]:
    """Yield batches from `data.workers` processes, which start now and end with the generator, however it ends.

    The batches are on the CPU, in pinned memory if their destination `device` is a GPU: see `to_device`. `options` go
    to PyTorch's DataLoader. Close the generator also after an error of the caller: a process cannot exit while its
    loader processes live.

    Raises the data set's `ShardError`, whichever process raised it, `TrainingError` if a process dies or runs out of
    shared or pinned memory, and `HungError` if it delivers no batch for `train.timeout` seconds.
    """
    workers = config.data.workers
    if workers:
        options |= {"prefetch_factor": AHEAD, "timeout": config.train.timeout, "worker_init_fn": start_worker}
    pin = device.type == "cuda"
    batches = iter(DataLoader(dataset, num_workers=workers, collate_fn=_Shared(collate), pin_memory=pin, **options))
    if hasattr(batches, "_pin_memory_thread"):
        _hand_on_errors(batches)
    return _plain(batches)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on `device`, asynchronous if `tensor` is pinned.

    Do not write to a pinned tensor afterwards: the copy may not have begun. Dropping it is safe: PyTorch keeps its
    memory until the copy is done.
    """
    return tensor.to(device, non_blocking=tensor.is_pinned())


def numbers_on(device: torch.device, numbers: list[int]) -> Tensor:
    """int64 [n], copied without waiting for a GPU, which a copy from memory that is not pinned may do."""
    return torch.tensor(numbers, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def require_shared_memory(config: Config, images: int, ranks_here: int = 1) -> None:
    """Raise `ConfigError` if /dev/shm cannot hold the prefetched batches, of `images` each, of all ranks on this node.

    Docker's default for a container is 64 MB.
    """
    workers, (height, width) = config.data.workers, config.data.image_size
    if not workers or not SHARED.is_dir():
        return
    need = images * height * width * AHEAD * workers * ranks_here  # uint8; the rest of a batch is small
    free = shutil.disk_usage(SHARED).free
    if need > free:
        raise ConfigError(
            f"data.workers: {workers} loader processes for each of {ranks_here} ranks keep {need / MIB:,.0f} MiB of "
            f"batches in {SHARED}, but {free / MIB:,.0f} MiB are free; start the container with "
            f"--shm-size={-(-need // MIB) + 64}m, or set data.workers=0"
        )


def start_worker(number: int) -> None:
    """Set up a loader process: one thread, freed memory kept, ends with its rank, leaves preemption signals to it."""
    start_process()
    preemption.ignore_signals()


class _Shared:
    """Collate straight into shared memory if in a loader process.

    Otherwise PyTorch's sending thread would move the batch there, and drop it silently if that fails: the training
    process would wait for ever.
    """

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, rows: list[Any]) -> Any:
        batch = self.collate(rows)
        if get_worker_info():
            _share(batch)
        return batch


def _share(batch: Any) -> None:
    if isinstance(batch, Tensor):
        batch.share_memory_()
    elif is_dataclass(batch):
        for field in fields(batch):
            _share(getattr(batch, field.name))
    elif isinstance(batch, list | tuple):
        for part in batch:
            _share(part)


def _hand_on_errors(batches: Any) -> None:
    """Have an error that ends PyTorch's pinning thread raised by the request for the next batch.

    PyTorch itself would print a traceback and wait for the thread until the time limit.
    """
    get, put = batches._data_queue.get, batches._data_queue.put

    def get_or_raise(*args: Any, **kwargs: Any) -> Any:
        result = get(*args, **kwargs)
        if isinstance(result, BaseException):
            raise result
        return result

    batches._data_queue.get = get_or_raise
    batches._pin_memory_thread._invoke_excepthook = lambda thread: put(sys.exc_info()[1])


def _plain(batches: Any) -> Generator[Any, None, None]:
    """The batches of a DataLoader iterator, with its errors in one line."""
    with plain_failures():
        try:
            yield from batches
        except ShardError as error:  # from a worker its message is that worker's traceback
            last = str(error).strip().splitlines()[-1]
            raise type(error)(last.partition(f"{type(error).__name__}: ")[2] or last) from None
        except RuntimeError as error:
            if "DataLoader timed out" in str(error):
                raise HungError(_hanging(batches)) from None
            for worker in getattr(batches, "_workers", ()):
                if "exited unexpectedly" in str(error) and (worker.exitcode or 0) < 0:
                    how = signal.strsignal(-worker.exitcode)
                    raise RuntimeError(f"DataLoader worker (pid {worker.pid}) is killed by signal: {how}") from None
            raise
        finally:
            _end(batches)


@contextmanager
def plain_failures() -> Iterator[None]:
    """Turn PyTorch's error for a dead loader process, raised in a signal handler anywhere in a step, into one line."""
    try:
        yield
    except TrainingError:
        raise
    except RuntimeError as error:
        if dead := _DEAD.search(str(error)):
            how = dead[2].partition(". ")[0].rstrip(". ")
            fix = (
                f"{SHARED} is full: start the container with a larger --shm-size, or set data.workers=0"
                if "Bus error" in how
                else "if memory ran out, lower data.workers or train.micro_batch; it is safe to run again"
            )
            raise TrainingError(f"the loader process {dead[1]} ended ({how}); {fix}") from None
        if "allocate shared memory" in str(error):
            raise TrainingError(
                f"a loader process has no room for its batch in {SHARED}; start the container with a larger "
                "--shm-size, or set data.workers=0"
            ) from None
        if "pin memory thread" in str(error):
            cause = next((line for line in str(error).splitlines()[::-1] if "Error: " in line), "unknown cause")
            raise TrainingError(
                f"a batch could not be copied to pinned memory ({cause}); if memory ran out, lower data.workers or "
                "train.micro_batch; it is safe to run again"
            ) from None
        if "ancdata" in str(error) or "Too many open files" in str(error):
            raise TrainingError(
                "too many open files in the loader processes; raise the limit (ulimit -n), or lower data.workers"
            ) from None
        raise


def _hanging(batches: Any) -> str:
    """The message for a timeout, with the state of the process that owes the next batch, which is then killed."""
    worker = batches._workers[batches._task_info[batches._rcvd_idx][0]]
    message = (
        f"train.timeout: no batch for {batches._timeout:.0f} s from the loader process {worker.pid}"
        f"{_state(worker.pid)}; look at the disk or network of data.shards, raise train.timeout if it is that slow, "
        "or set data.workers=0"
    )
    with suppress(RuntimeError):  # raised by PyTorch's handler for a dead loader process
        worker.kill()
        worker.join(PATIENCE)
    return message


def _state(pid: int) -> str:
    """The state of a process and the tar that it reads, from /proc; empty if unknown."""
    process, facts = Path(f"/proc/{pid}"), []
    with suppress(OSError, IndexError):
        letter = (process / "stat").read_text().rpartition(") ")[2][0]
        facts += [_STATES[letter]] if letter in _STATES else []
    with suppress(OSError, IndexError, ValueError):
        call = (process / "syscall").read_text().split()  # "17 0x5 ...": number and arguments in hexadecimal
        descriptor = os.readlink(process / "fd" / str(int(call[1], 16)))
        facts += [f"reading {descriptor}"] if descriptor.endswith(".tar") else []
    return f" ({', '.join(facts)})" if facts else ""


def _end(batches: Any) -> None:
    """End the loader processes, also those that hang.

    An error's traceback would keep the loader alive until this process exits, and exiting waits for the workers, which
    ignore the signal that should end them. A loader without workers has nothing to shut down.
    """
    if hasattr(batches, "_pin_memory_thread") and not batches._shutdown:  # it is shut down after the last batch
        _end_pinning(batches)
    getattr(batches, "_shutdown_workers", lambda: None)()
    for worker in getattr(batches, "_workers", ()):
        if worker.is_alive():
            worker.kill()
            worker.join(PATIENCE)
        if worker.is_alive():  # not even a kill ends a read of a dead disk: this process must not wait for it
            multiprocessing.process._children.discard(worker)  # type: ignore[attr-defined]


def _end_pinning(batches: Any) -> None:
    """End PyTorch's pinning thread, or leave it if it waits for a hanging process: it ends with that process.

    PyTorch itself would wait for the thread for ever.
    """
    batches._pin_memory_thread_done_event.set()
    batches._worker_result_queue.put((None, None))  # wakes it
    batches._worker_result_queue.cancel_join_thread()  # a killed process may have left the queue locked
    batches._pin_memory_thread.join(PATIENCE)
    if batches._pin_memory_thread.is_alive():
        del batches._pin_memory_thread

"""Start ranks: one training function under our own launcher, torchrun, DeepSpeed's launcher, or srun."""

from __future__ import annotations

import builtins
import gc
import json
import logging
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from pathlib import Path
from typing import TypeVar

from torch.distributed import DistNetworkError
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from mama.errors import ConfigError, LaterError, RankError, StoppedError, TrainingError
from mama.runtime import preemption
from mama.settings.schema import Config
from shards.errors import FetchError, ShardError, one_line
from slurm.rank_environment import export_distributed_environment

T = TypeVar("T")
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # which torch.distributed reads

# Errors whose message is complete in one line: the launcher raises them with the type that they had in the rank.
PLAIN = {e.__name__: e for e in (ConfigError, FetchError, LaterError, ShardError, StoppedError, TrainingError)}
ORPHAN_TIMEOUT = 600.0  # seconds that ranks have to finish their step and save once their launcher is gone


def is_rank() -> bool:
    """Whether a launcher started this process as one rank of several; in a Slurm task, set the rank's variables.

    Raises `ConfigError` for incomplete launcher variables.
    """
    export_distributed_environment()
    if "RANK" not in os.environ:
        return False
    _check_launcher_variables()
    return True


def run_on_ranks(function: Callable[[Config], T], config: Config) -> T:
    """Run `function(config)` on every rank and return rank 0's result.

    A process that a launcher started (RANK is set, or it is a task of a Slurm job) is one rank itself. Otherwise
    start `config.train.ranks` local processes; if one dies the others are ended.

    Raises `ConfigError` for a batch that the ranks cannot share and for incomplete launcher variables; the error of
    the rank that failed first, as `RankError` unless its type is in `PLAIN`; `StoppedError` after a signal.
    """
    if is_rank():
        with _network_errors():
            return function(config)
    config.train.accumulation(config.train.ranks)  # fail now, not after the ranks have imported everything
    launch = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=config.train.ranks,
        run_id="mama",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        monitor_interval=0.5,
        start_method="spawn",  # CUDA does not survive a fork
        signals_to_handle="SIGHUP,SIGQUIT",  # on SIGTERM, SIGINT and SIGUSR2 the ranks save first
    )
    for name in ("torch.distributed.elastic", "torch.multiprocessing.spawn"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # `_error_of` reports the same, once
    try:
        with preemption.forwarded_to_ranks():
            return elastic_launch(launch, _run_while_launcher_lives)(function, config)[0]
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if preemption.was_forwarded(-failure.exitcode):
            raise StoppedError(preemption.BEFORE_FIRST_STEP) from None
        raise _error_of(rank, failure) from None


def _check_launcher_variables() -> None:
    """Raise `ConfigError` if RANK is set but not by a launcher: this process would crash, or wait for other ranks."""
    rank, size, address, port = (os.environ.get(name, "") for name in LAUNCHER_VARIABLES)
    numbers = (rank, size, port, os.environ.get("LOCAL_RANK", "0"))
    if all(number.isdecimal() for number in numbers) and address and int(rank) < int(size):
        return
    given = ", ".join(f"{name}={os.environ.get(name, '')!r}" for name in (*LAUNCHER_VARIABLES, "LOCAL_RANK"))
    raise ConfigError(
        f"RANK: {given} do not describe a rank; unset RANK to start train.ranks ranks here, or use torchrun or srun"
    )


@contextmanager
def _network_errors() -> Iterator[None]:
    """Report in one line that the ranks cannot meet at MASTER_ADDR and MASTER_PORT, or have lost each other."""
    try:
        yield
    except DistNetworkError as error:
        address, port = (os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT"))
        reason = "" if "EADDRINUSE" not in str(error) else "another program uses this port; choose a free one: "
        raise TrainingError(f"MASTER_PORT: {address}:{port}: {reason}{one_line(error)}") from error


def _run_while_launcher_lives(function: Callable[[Config], T], config: Config) -> T:
    """On a rank: run `function(config)`; if the launcher is killed, stop after a step that is saved.

    PyTorch would only interrupt the rank, and then wait forever for the launcher to take its result.
    """
    gc.freeze()  # what was imported with `function` stays: later collections, and that at the end, leave it out
    done = threading.Event()
    launcher = multiprocessing.parent_process()
    assert launcher is not None

    def watch(sentinel: int) -> None:
        wait([sentinel])
        deadline = time.monotonic() + ORPHAN_TIMEOUT
        while not done.wait(0.5) and time.monotonic() < deadline:
            preemption.adopt_request(preemption.END)
        os._exit(preemption.EXIT_CODE)

    threading.Thread(target=watch, args=(launcher.sentinel,), daemon=True).start()
    try:
        return function(config)
    finally:
        done.set()


def _error_of(rank: int, failure: ProcessFailure) -> Exception:
    """The error of the rank that failed first. A rank killed by a signal leaves no error file.

    `rank` is the one that the launcher noticed first, perhaps one brought down by the real failure: the error file
    with the earliest time is that of the cause.
    """
    if failure.exitcode < 0:
        return RankError(f"rank {rank} failed: {failure.message}")
    files = Path(failure.error_file).parent.parent.glob("*/error.json")
    first = min(files, key=lambda path: path.stat().st_mtime_ns, default=None)
    if first is None:
        return RankError(f"rank {rank} failed: {failure.message}")
    report = json.loads(first.read_text())["message"]
    name, _, text = report["message"].partition(": ")
    if name in PLAIN:
        return PLAIN[name](text)
    if isinstance(kind := getattr(builtins, name, None), type) and issubclass(kind, OSError):
        return RankError(f"rank {first.parent.name} failed: {text}")  # a full disk, a read-only folder
    return RankError(f"rank {first.parent.name} failed: {report['message']}\n{report['extraInfo']['py_callstack']}")

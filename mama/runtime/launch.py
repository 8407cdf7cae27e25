"""Starting ranks: the same training function under our own launcher, torchrun, DeepSpeed's, or srun."""

from __future__ import annotations

import builtins
import json
import logging
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import TypeVar

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from mama.runtime import preemption
from mama.runtime.errors import LaterError, RankError, StoppedError, TrainingError
from mama.settings.schema import Config, ConfigError
from shards.schema import FetchError, ShardError
from slurm.rank_environment import export_distributed_environment

T = TypeVar("T")
LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torch.distributed needs of a launcher
START_METHOD = "spawn"  # CUDA does not survive a fork

# Errors that say all in one line; they come out of a rank as what they were.
PLAIN = {e.__name__: e for e in (ConfigError, FetchError, LaterError, ShardError, StoppedError, TrainingError)}
ORPHANED = 600.0  # seconds in which ranks without their launcher may end their step and save


def is_rank() -> bool:
    """Has a launcher started this process as one rank of several?"""
    export_distributed_environment()
    return "RANK" in os.environ


def run_on_ranks(function: Callable[[Config], T], config: Config) -> T:
    """Run `function(config)` on every rank and return rank 0's result.

    A process that a launcher has started (RANK is set, or it is a task of a Slurm job) is one rank.
    Otherwise `config.train.ranks` local processes are started; when one dies the others are ended.
    """
    if is_rank():
        _check_rank()
        return function(config)
    config.train.accumulation(config.train.ranks)  # a batch that cannot be cut is told before anything is loaded
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
        start_method=START_METHOD,
        signals_to_handle="SIGHUP,SIGQUIT",  # on the others the ranks save before they end
    )
    for name in ("torch.distributed.elastic", "torch.multiprocessing.spawn"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # the error below says the same, once
    try:
        with preemption.passed_on():
            return elastic_launch(launch, _follow_launcher)(function, config)[0]
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if preemption.is_ours(-failure.exitcode):
            raise StoppedError("a signal ended it before its first step; run it again to continue") from None
        raise _error_of(rank, failure) from None


def _check_rank() -> None:
    """Raises `ConfigError` where RANK is set but not by a launcher: this process would crash, or wait for others."""
    rank, size, address, port = (os.environ.get(name, "") for name in LAUNCHED)
    numbers = (rank, size, port, os.environ.get("LOCAL_RANK", "0"))
    if all(number.isdecimal() for number in numbers) and address and int(rank) < int(size):
        return
    said = ", ".join(f"{name}={os.environ.get(name, '')!r}" for name in (*LAUNCHED, "LOCAL_RANK"))
    raise ConfigError(f"RANK: {said} name no rank; unset RANK to start train.ranks ranks here, or use torchrun or srun")


def _follow_launcher(function: Callable[[Config], T], config: Config) -> T:
    """A rank: `function(config)`, and when the launcher has been killed an end, after a step that is saved.

    PyTorch only interrupts it then, and would wait for ever for the launcher to take its result.
    """
    done = threading.Event()
    launcher = multiprocessing.parent_process()
    assert launcher is not None

    def watch(sentinel: int) -> None:
        wait([sentinel])
        deadline = time.monotonic() + ORPHANED
        while not done.wait(0.5) and time.monotonic() < deadline:
            preemption.agree(preemption.END)
        os._exit(preemption.STOPPED)

    threading.Thread(target=watch, args=(launcher.sentinel,), daemon=True).start()
    try:
        return function(config)
    finally:
        done.set()


def _error_of(rank: int, failure: ProcessFailure) -> Exception:
    """What the first rank that failed had to say; where one was killed by a signal nothing, it wrote no error file.

    The launcher may notice first a rank that another's death has brought down: the times of the files tell.
    """
    if failure.exitcode < 0:
        return RankError(f"rank {rank} failed: {failure.message}")
    files = Path(failure.error_file).parent.parent.glob("*/error.json")
    first = min(files, key=lambda path: path.stat().st_mtime_ns, default=None)
    if first is None:
        return RankError(f"rank {rank} failed: {failure.message}")
    said = json.loads(first.read_text())["message"]
    name, _, text = said["message"].partition(": ")
    if name in PLAIN:
        return PLAIN[name](text)
    if isinstance(kind := getattr(builtins, name, None), type) and issubclass(kind, OSError):
        return RankError(f"rank {first.parent.name} failed: {text}")  # a full disk, a folder that may not be written
    return RankError(f"rank {first.parent.name} failed: {said['message']}\n{said['extraInfo']['py_callstack']}")

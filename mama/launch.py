"""Starting ranks: the same training function under our own launcher, torchrun, DeepSpeed's, or srun."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import TypeVar

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from mama.config import Config
from slurm.env import export_distributed_environment

T = TypeVar("T")


class RankError(RuntimeError):
    """A rank failed; its own error is in the message."""


def run_on_ranks(function: Callable[[Config], T], config: Config) -> T:
    """Run `function(config)` on every rank and return rank 0's result.

    A process that a launcher has started (RANK is set, or it is a task of a Slurm job) is one rank.
    Otherwise `config.train.ranks` local processes are started; when one dies the others are ended.
    """
    export_distributed_environment()
    if "RANK" in os.environ:
        return function(config)
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
        start_method="spawn",
    )
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # RankError says the same, once
    try:
        return elastic_launch(launch, function)(config)[0]
    except ChildFailedError as error:
        first = min(error.failures.values(), key=lambda failure: failure.timestamp)
        raise RankError(f"rank {error.get_first_failure()[0]} failed: {first.message}") from error

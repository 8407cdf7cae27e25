"""The cores, memory and GPUs that a run needs, compared with those of this machine, container or job.

And what follows from them: whether activations are kept or computed again (`train.activation_checkpointing`).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch

from mama.errors import ConfigError
from mama.runtime.collectives import max_over_ranks
from mama.settings.schema import Config
from mama.train.estimate import rank_bytes, shape_of

log = logging.getLogger(__name__)

PER_CORE = 4  # ranks on one core, for tests and trials; more only wait for each other
LIBRARIES = 600 * 2**20  # bytes of a process that has imported everything, measured without a GPU
CGROUPS = Path("/sys/fs/cgroup")
GIB = 2**30
MARGIN = 0.1  # of the free memory, for what estimates leave out; on one H200 peaks were within 2 % of them


def require_capacity(config: Config) -> None:
    """Raises `ConfigError` if `train.ranks` ranks do not fit on this machine, unless `train.oversubscribe` is set.

    Two ranks on one GPU are refused in any case: NCCL does not allow them.
    """
    ranks, gpus = config.train.ranks, torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus and ranks > gpus:
        raise ConfigError(
            f"train.ranks: {ranks}, but this machine shows {gpus} GPUs, and each rank needs its own; "
            f"use train.ranks={gpus}, and a larger train.micro_batch for as many negatives"
        )
    if config.train.oversubscribe or ranks == 1:
        return
    if not gpus and ranks > PER_CORE * cores():
        raise ConfigError(
            f"train.ranks: {ranks}, but this process may use {cores()} cores; start at most {PER_CORE} ranks a core, "
            "or force it with train.oversubscribe=true"
        )
    checkpointed = config.train.activation_checkpointing is not False  # `auto`: if need be
    device, host = rank_bytes(config, shape_of(config), ranks, checkpointed, mask=1 if gpus else 4)
    need = ranks * (LIBRARIES + host + (0 if gpus else device))
    if need > (free := free_memory()):
        raise ConfigError(
            f"train.ranks: {ranks} ranks take about {need / GIB:.1f} GiB (see --dry-run), and {free / GIB:.1f} GiB of "
            "memory are free; start fewer, lower train.micro_batch, or force it with train.oversubscribe=true"
        )


def decided(config: Config, need: int, device: torch.device) -> Config:
    """Return `config` with `train.activation_checkpointing` true or false: `auto` is true if some rank lacks memory.

    `need`: bytes of a rank that keeps its activations, by `mama.train.estimate`. Logs what `auto` has become. Every
    rank must call it; all get the same answer.
    """
    if config.train.activation_checkpointing != "auto":
        return config
    free = room(device)
    fits = need <= (1 - MARGIN) * free
    again = bool(max_over_ranks(int(not fits), device))
    how = "computed again in the backward pass" if again else "kept"
    where = "; another rank has less" if fits and again else ""
    log.info("activations: %s (all take about %.1f GiB, %.1f are free%s)", how, need / GIB, free / GIB, where)
    return replace(config, train=replace(config.train, activation_checkpointing=again))


def room(device: torch.device) -> int:
    """Return the bytes that this rank may take: free ones of its GPU, or its part of this machine's free memory."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return free_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def cores() -> int:
    """Return the number of cores, at least 1, that CPU affinity and the control group's quota allow this process."""
    count = float(len(os.sched_getaffinity(0)))
    for folder in _cgroup():
        with suppress(OSError, ValueError):
            quota, period = (folder / "cpu.max").read_text().split()
            count = min(count, int(quota) / int(period))
    return max(1, int(count))


def free_memory() -> int:
    """Return the bytes of memory that are free on this machine and within the limit of the control group."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    for folder in _cgroup():
        with suppress(OSError, ValueError):
            statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            used = int((folder / "memory.current").read_text()) - int(statistics.get("inactive_file", 0))
            free = min(free, int((folder / "memory.max").read_text()) - used)
    return free


def _cgroup() -> Iterator[Path]:
    """Yield the folders of this process's control group (version 2) and its parents; a container's own is its root."""
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            if line.startswith("0::"):
                folder = CGROUPS / line[3:].lstrip("/")
                yield folder
                yield from (parent for parent in folder.parents if parent.is_relative_to(CGROUPS))

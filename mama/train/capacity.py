"""The cores, memory and GPUs that a run needs, compared with those of this machine, container or job."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

from mama.errors import ConfigError
from mama.settings.schema import Config
from mama.train.estimate import rank_bytes, shape_of

PER_CORE = 4  # ranks on one core, for tests and trials; more only wait for each other
LIBRARIES = 600 * 2**20  # bytes of a process that has imported everything, measured without a GPU
CGROUPS = Path("/sys/fs/cgroup")
GIB = 2**30


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
    device, host = rank_bytes(config, shape_of(config), ranks, mask=1 if gpus else 4)
    need = ranks * (LIBRARIES + host + (0 if gpus else device))
    if need > (free := free_memory()):
        raise ConfigError(
            f"train.ranks: {ranks} ranks take about {need / GIB:.1f} GiB (see --dry-run), and {free / GIB:.1f} GiB of "
            "memory are free; start fewer, lower train.micro_batch, or force it with train.oversubscribe=true"
        )


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

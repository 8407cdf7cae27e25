"""What a rank finds on its node before training starts: its device, memory, files, and the code that it runs."""

from __future__ import annotations

import json
import platform
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from mama.run.environment import versions
from mama.run.kept_settings import flat, is_among
from mama.runtime.collectives import local_device, node_name
from mama.settings.schema import Config
from mama.train.agreement import short_digest
from mama.train.capacity import GIB, LIBRARIES, free_memory
from mama.train.heartbeat import FOLDER
from shards.errors import ShardError, one_line
from shards.read.manifest import MANIFEST
from shards.read.remote import local_folder
from slurm.snapshot import code_digest

VISIBLE = 10.0  # seconds in which a new file must be seen on all nodes
MAY_DIFFER = ("pack", "eval", "data.workers", "data.cache")  # settings without effect on what a rank computes


@dataclass(frozen=True)
class Facts:
    """What one rank finds on its node."""

    node: str
    problem: str  # why the node cannot train; empty if it can
    free: float  # share of its GPU's memory that is free
    settings: dict[str, str]
    sees: dict[str, tuple[str, bool]]  # file or version -> what it is, and whether it could be read

    @staticmethod
    def parsed(text: str) -> Facts:
        """The facts that another rank has sent as JSON."""
        found = json.loads(text)
        return Facts(**found | {"sees": {key: (value[0], value[1]) for key, value in found["sees"].items()}})


def facts_of(config: Config, nonce: str) -> Facts:
    """What this rank finds; `nonce` is a file in `alive/` that rank 0 has just written."""
    problem, free = _device()
    if not problem and (memory := free_memory()) < LIBRARIES:
        problem = f"{memory / GIB:.1f} GiB of memory are free"
    settings = {key: repr(value) for key, value in flat(asdict(config)).items() if not is_among(key, MAY_DIFFER)}
    sees = {str(config.run_folder): _nonce(config.run_folder / FOLDER / nonce)}
    for folder in config.data.shards:
        sees[f"data.shards {folder}"] = _manifest(folder, config.data.cache_folder)
    for name, version in {"python": platform.python_version(), **versions()}.items():
        sees[f"version of {name}"] = str(version), version is not None
    sees["code of mama, shards and slurm"] = code_digest(), True
    return Facts(node_name(), problem, free, settings, sees)


def _device() -> tuple[str, float]:
    """Why this rank's device cannot compute, or nothing; and the share of its memory that is free."""
    numbers = torch.arange(256 * 256).reshape(256, 256) % 4
    try:
        device = local_device()
        there = numbers.float().to(device)
        right = torch.equal((there @ there).cpu(), (numbers @ numbers).float())  # whole numbers: exact, also in TF32
        if device.type != "cuda":
            return "" if right else "its processor computes wrongly", 1.0
        free, total = torch.cuda.mem_get_info(device)
        return "" if right else f"its GPU ({device}) computes wrongly", free / total
    except (RuntimeError, AssertionError) as error:
        return f"its device does not work: {one_line(error)}", 1.0


def _nonce(file: Path) -> tuple[str, bool]:
    """Whether this rank sees the file that rank 0 has just written, after a while if need be."""
    deadline = time.monotonic() + VISIBLE
    while True:
        with suppress(OSError):
            return ("a new file", True) if file.read_text() == file.name else ("another file", False)
        if time.monotonic() > deadline:
            return f"no file that is new there (after {VISIBLE:.0f} s)", False
        time.sleep(0.2)


def _manifest(folder: str, cache: Path) -> tuple[str, bool]:
    """The digest of a manifest, or why it cannot be read."""
    try:
        file = local_folder(folder, cache) / MANIFEST
    except ShardError as error:
        return str(error), False
    return short_digest(file), file.exists()

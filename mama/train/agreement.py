"""Check at the start that all ranks read the same files, even if each has its own disk or a network file system."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from dataclasses import asdict
from pathlib import Path
from socket import gethostname
from typing import Any

import torch.distributed as dist

from mama.errors import ConfigError
from mama.run import checkpoints
from mama.run.checkpoint_marker import MARKER, damage
from mama.run.files import sha256_or_reason
from mama.run.run_folder import flat, is_among, prepare
from mama.runtime.collectives import rank, world_size
from mama.settings.schema import Config
from shards.errors import ShardError
from shards.read.manifest import MANIFEST
from shards.read.remote import local_folder

log = logging.getLogger(__name__)

WAIT = 90.0  # seconds; an NFS client may use its cached view of a folder for 60 (nfs(5): acdirmax)
DIGITS = 12  # of a SHA-256, in messages
MAY_DIFFER = ("pack", "eval", "data.workers", "data.cache")  # settings without effect on what a rank computes


def prepare_and_agree(config: Config) -> Path | None:
    """Prepare the run folder on rank 0, and return the checkpoint that all ranks resume from, if there is one.

    Rank 0 chooses it; the others wait until they see the same one, and the same tokenizer. Every rank must call it.
    Raises `ConfigError` on all ranks if one of them reads other settings, shards, tokenizer or checkpoint files.
    """
    chosen = prepare(config) if rank() == 0 else None
    if world_size() == 1:
        return chosen
    own = _read(config)
    first: list[Any] = [None]
    if rank() == 0:
        first = [(chosen.name if chosen else None, gethostname(), own, _written(config, chosen))]
    dist.broadcast_object_list(first)
    name, host, read, written = first[0]
    chosen = config.run_folder / "checkpoints" / name if name else None
    problem = ""
    if rank() != 0:
        if problem := _differs(own, read, host):
            problem += "; start all ranks with the same settings and shards"
        else:
            problem = _wait_for(config, chosen, written, host)
    problems = [""] * world_size()
    dist.all_gather_object(problems, problem)
    if any(problems):
        raise ConfigError(next(filter(None, problems)))
    return chosen


def _wait_for(config: Config, chosen: Path | None, expected: dict[str, Any], host: str) -> str:
    """Wait until this rank sees the run folder as rank 0 does; returns what still differs after `WAIT` seconds."""
    deadline, warned = time.monotonic() + WAIT, False
    while problem := _differs(_written(config, chosen), expected, host):
        if time.monotonic() > deadline:
            return f"{problem} (after {WAIT:.0f} s); is the run folder on a disk that all machines share?"
        if not warned:
            log.warning("%s; waiting up to %.0f s for it", problem, WAIT)
            warned = True
        time.sleep(1)
    if chosen is None and (own := checkpoints.checkpoints(config.run_folder)):
        log.warning(
            "rank %d on %s sees %s, rank 0 sees no checkpoint and starts from step 0", rank(), gethostname(), own[-1]
        )
    return ""


def _differs(own: dict[str, Any], theirs: dict[str, Any], host: str) -> str:
    """Describe the first entry that differs between this rank's dictionary and rank 0's; empty if none does."""
    for key in (*theirs, *own):
        if own.get(key) != theirs.get(key):
            here, there = own.get(key, "nothing"), theirs.get(key, "nothing")
            return f"{key}: rank {rank()} on {gethostname()} sees {here}, rank 0 on {host} {there}"
    return ""


def _read(config: Config) -> dict[str, Any]:
    """The settings, and for each folder of shards the digest of its manifest, or why it cannot be read."""
    found = {key: value for key, value in flat(asdict(config)).items() if not is_among(key, MAY_DIFFER)}
    for folder in config.data.shards:
        try:
            found[f"data.shards {folder}"] = _short_digest(local_folder(folder, config.data.cache_folder) / MANIFEST)
        except ShardError as error:
            found[f"data.shards {folder}"] = str(error)
    return found


def _written(config: Config, chosen: Path | None) -> dict[str, Any]:
    """Digests, as this rank reads them, of the tokenizer and of the checkpoint that rank 0 has chosen."""
    tokenizer = config.run_folder / "tokenizer"
    files = {path.name: _short_digest(path) for path in sorted(tokenizer.glob("*"))}
    found = {str(tokenizer): _digest(files) if files else "nothing"}
    if chosen:
        found[str(chosen)] = (damage(chosen) or _short_digest(chosen / MARKER)).partition(";")[0]
    return found


def _short_digest(path: Path) -> str:
    """The first `DIGITS` digits of a file's SHA-256, or why it cannot be read."""
    found = sha256_or_reason(path)
    return found[:DIGITS] if len(found) == 64 else found


def _digest(document: Any) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:DIGITS]

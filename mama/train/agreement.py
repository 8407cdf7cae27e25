"""Resume on all ranks from the checkpoint that rank 0 has chosen, even if a network file system shows it late."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mama.errors import ConfigError
from mama.run import checkpoints
from mama.run.checkpoint_marker import MARKER, damage
from mama.run.files import sha256_or_reason
from mama.run.run_folder import prepare
from mama.runtime.collectives import node_name, rank, world_size
from mama.settings.schema import Config

log = logging.getLogger(__name__)

WAIT = 90.0  # seconds; an NFS client may use its cached view of a folder for 60 (nfs(5): acdirmax)
DIGITS = 12  # of a SHA-256, in messages


def prepare_and_agree(config: Config, prepare: Callable[[Config], Path | None] = prepare) -> Path | None:
    """Let rank 0 `prepare` the run folder, and return the checkpoint that all ranks resume from, if there is one.

    Rank 0 chooses it; the others wait until they see the same one, and the same tokenizer. Every rank must call it.
    Raises `ConfigError` on all ranks if one of them reads another tokenizer or other checkpoint files.
    """
    chosen = prepare(config) if rank() == 0 else None
    if world_size() == 1:
        return chosen
    first: list[Any] = [None]
    if rank() == 0:
        first = [(chosen.name if chosen else None, node_name(), _written(config, chosen))]
    dist.broadcast_object_list(first)
    name, host, written = first[0]
    chosen = config.run_folder / "checkpoints" / name if name else None
    problem = _wait_for(config, chosen, written, host) if rank() != 0 else ""
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
            "rank %d on %s sees %s, rank 0 sees no checkpoint and starts from step 0", rank(), node_name(), own[-1]
        )
    return ""


def _differs(own: dict[str, Any], theirs: dict[str, Any], host: str) -> str:
    """Describe the first entry that differs between this rank's dictionary and rank 0's; empty if none does."""
    for key in (*theirs, *own):
        if own.get(key) != theirs.get(key):
            here, there = own.get(key, "nothing"), theirs.get(key, "nothing")
            return f"{key}: rank {rank()} on {node_name()} sees {here}, rank 0 on {host} {there}"
    return ""


def _written(config: Config, chosen: Path | None) -> dict[str, Any]:
    """Digests, as this rank reads them, of the tokenizer and of the checkpoint that rank 0 has chosen."""
    tokenizer = config.run_folder / "tokenizer"
    files = {path.name: short_digest(path) for path in sorted(tokenizer.glob("*"))}
    found = {str(tokenizer): _digest(files) if files else "nothing"}
    if chosen:
        found[str(chosen)] = (damage(chosen) or short_digest(chosen / MARKER)).partition(";")[0]
    return found


def short_digest(path: Path) -> str:
    """The first `DIGITS` digits of a file's SHA-256, or why it cannot be read."""
    found = sha256_or_reason(path)
    return found[:DIGITS] if len(found) == 64 else found


def _digest(document: Any) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:DIGITS]

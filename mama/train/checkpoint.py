"""Resumable checkpoints: `checkpoints/step-000500/`, complete only when its marker file is there.

A checkpoint holds every trained tensor whole, in fp32, with its two moments of Adam, whatever the ranks and
the ZeRO stage: any other number of ranks and any other stage continues from it. Frozen weights are not
written again; their digests are, and are compared. It is written beside its place and renamed, the marker
being the last file in it, with the size and the SHA-256 of every other. Resuming takes the newest whose
files are those; damaged ones are left alone and named in the log.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mama.run.checkpoint_marker import FROZEN, MARKER, Marker, folder_name, read_marker, write_marker
from mama.run.checkpoints import best, checkpoints, read_tensors, save_tensors
from mama.run.digests import remove, replace_folder, sha256
from mama.run.model_state import trained
from mama.runtime.collectives import barrier, rank, world_size
from mama.runtime.errors import TrainingError
from mama.settings.schema import ConfigError
from mama.train import zero_state

if TYPE_CHECKING:  # what only looks for checkpoints does without it
    from deepspeed import DeepSpeedEngine

log = logging.getLogger(__name__)

PIECE = 2**31  # bytes of tensors in one file, which is what rank 0 holds in memory besides


def save(
    engine: DeepSpeedEngine,
    run: Path,
    step: int,
    keep: int,
    frozen: dict[str, str],
    facts: Mapping[str, int] | None = None,
) -> None:
    """Write the state after `step` steps; every rank must call it.

    `facts` are what a resumed run wants to know besides. All checkpoints but the `keep` newest and the best are
    deleted. Raises `TrainingError` where a tensor is not finite: nothing could be trained from it.
    """
    folder = run / "checkpoints" / folder_name(step)
    aside = folder.with_name(folder.name + ".partial")
    if rank() == 0:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    _write_pieces(zero_state.tensors(engine), aside)
    if rank() == 0:
        (aside / FROZEN).write_text(json.dumps(frozen, indent=0))
        files = sorted(aside.iterdir())
        marker = Marker(
            step=step,
            ranks=world_size(),
            score=None,
            adam_steps=_adam_steps(engine),
            facts=dict(facts or {}),
            bytes={path.name: path.stat().st_size for path in files},
            sha256={path.name: sha256(path) for path in files},
        )
        write_marker(aside, marker)
        replace_folder(aside, folder)
        _prune(run, keep)
    barrier()


def add_score(run: Path, step: int, score: float, keep: int) -> None:
    """Note a validation score in the marker of a checkpoint that `save` has written; on rank 0."""
    folder = run / "checkpoints" / folder_name(step)
    write_marker(folder, replace(read_marker(folder), score=score))
    _prune(run, keep)


def load_optimizer(engine: DeepSpeedEngine, checkpoint: Path) -> None:
    """Give the engine ZeRO's own fp32 weights, Adam's moments and its step counts; every rank must call it."""
    from mama.train.deepspeed_engine import adam, adam_tensors

    steps = read_marker(checkpoint).adam_steps
    for group, tensor in adam_tensors(engine):
        if (name := _group_name(group)) not in steps:
            raise ConfigError(
                f"{checkpoint}: has no step count of the parameter group {name}; another release wrote it"
            )
        adam(engine).state[tensor]["step"].fill_(steps[name])
    parameters = trained(engine.module)
    for kind, name, value in read_tensors(checkpoint, zero_state.STATE):
        if name in parameters:
            zero_state.put(engine, parameters[name], kind, value)


def _prune(run: Path, keep: int) -> None:
    complete = checkpoints(run)
    kept = {*complete[-keep:], best(run)}
    for old in complete:
        if old not in kept:
            if not old.is_symlink():
                (old / MARKER).unlink()  # first, so that a half-deleted checkpoint is never complete
            remove(old)


def _adam_steps(engine: DeepSpeedEngine) -> dict[str, float]:
    from mama.train.deepspeed_engine import adam, adam_tensors

    state = adam(engine).state
    return {_group_name(group): float(state[tensor]["step"]) for group, tensor in adam_tensors(engine)}


def _group_name(group: dict[str, Any]) -> str:
    return f"{group['tower']}/{group['term']}/{'decayed' if group['weight_decay'] else 'plain'}"


def _write_pieces(tensors: Iterator[tuple[str, Tensor]], folder: Path) -> None:
    """Rank 0 writes, the others take part in gathering."""
    piece: dict[str, Tensor] = {}
    number = size = 0
    for key, tensor in tensors:
        if not tensor.isfinite().all():  # on all ranks: they hold the same
            raise TrainingError(f"{folder.stem}: {key} is not finite, and is not saved; start again with a lower rate")
        if rank() != 0:
            continue
        if piece and size + tensor.nbytes > PIECE:
            save_tensors(piece, folder / f"state-{number:05d}.safetensors")
            piece, number, size = {}, number + 1, 0
        piece[key] = tensor.float().contiguous()
        size += tensor.nbytes
    if rank() == 0:
        save_tensors(piece, folder / f"state-{number:05d}.safetensors")

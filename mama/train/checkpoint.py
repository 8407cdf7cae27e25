"""Resumable checkpoints: `checkpoints/step-000500/`, complete only when its marker file is there.

A checkpoint holds every trained tensor whole, in fp32, with Adam's two moments, so that any number of ranks and any
ZeRO stage can continue from it. Frozen weights are not written, only their digests, which are compared on resume.
The folder is written as `.partial` and then renamed. The marker is its last file, with size and SHA-256 of all others:
a run resumes from the newest checkpoint whose files agree with it. Damaged ones are logged, and left alone.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from mama.errors import ConfigError, TrainingError
from mama.run.checkpoint_marker import FROZEN, MARKER, Marker, folder_name, read_marker, write_marker
from mama.run.checkpoints import best, checkpoints, read_tensors, save_tensors
from mama.run.files import remove, replace_folder, sha256
from mama.run.model_state import trained
from mama.runtime.collectives import barrier, rank, world_size
from mama.train import zero_state
from mama.train.zero_state import DeepSpeedEngine, adam, adam_tensors

PIECE = 2**31  # bytes of tensors in one file; rank 0 holds as many in memory


def save(
    engine: DeepSpeedEngine,
    run: Path,
    step: int,
    keep: int,
    frozen: dict[str, str],
    facts: Mapping[str, int] | None = None,
) -> None:
    """Write the train state after `step` steps, with the digests of the `frozen` weights; every rank must call it.

    `facts` are counts that a resumed run continues from. Deletes all checkpoints but the `keep` newest and the best.
    Raises `TrainingError` if a tensor is not finite, since training could not continue from it.
    """
    folder = run / "checkpoints" / folder_name(step)
    partial = folder.with_name(folder.name + ".partial")
    if rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    _write_pieces(zero_state.tensors(engine), partial)
    if rank() == 0:
        (partial / FROZEN).write_text(json.dumps(frozen, indent=0))
        files = sorted(partial.iterdir())
        marker = Marker(
            step=step,
            ranks=world_size(),
            score=None,
            adam_steps=_adam_steps(engine),
            facts=dict(facts or {}),
            bytes={path.name: path.stat().st_size for path in files},
            sha256={path.name: sha256(path) for path in files},
        )
        write_marker(partial, marker)
        replace_folder(partial, folder)
        _prune(run, keep)
    barrier()


def add_score(run: Path, step: int, score: float, keep: int) -> None:
    """Add a validation score to the marker of a saved checkpoint; on rank 0."""
    folder = run / "checkpoints" / folder_name(step)
    write_marker(folder, replace(read_marker(folder), score=score))
    _prune(run, keep)


def load_optimizer(engine: DeepSpeedEngine, checkpoint: Path) -> None:
    """Load ZeRO's fp32 weights, Adam's moments and its step counts into the engine; every rank must call it.

    Raises `ConfigError` if the checkpoint has no step count of a parameter group.
    """
    steps = read_marker(checkpoint).adam_steps
    for group, tensor in adam_tensors(engine):
        if (name := _group_name(group)) not in steps:
            raise ConfigError(
                f"{checkpoint}: has no step count of the parameter group {name}; resume with the release that wrote it"
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
    """Adam's step count of each parameter group."""
    state = adam(engine).state
    return {_group_name(group): float(state[tensor]["step"]) for group, tensor in adam_tensors(engine)}


def _group_name(group: dict[str, Any]) -> str:
    part = group.get("layer", group["term"])  # fine-tuning has a group for each layer
    return f"{group['tower']}/{part}/{'decayed' if group['weight_decay'] else 'plain'}"


def _write_pieces(tensors: Iterator[tuple[str, Tensor]], folder: Path) -> None:
    """Write tensors to files of at most `PIECE` bytes on rank 0; the other ranks only take part in gathering."""
    piece: dict[str, Tensor] = {}
    number = size = 0
    for key, tensor in tensors:
        if not tensor.isfinite().all():  # on all ranks, which hold the same
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

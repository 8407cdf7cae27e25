"""Resumable checkpoints: `checkpoints/step-000500/`, complete only when its marker file is there.

A checkpoint holds every trained tensor whole, in fp32, with Adam's two moments, so that any number of ranks and any
ZeRO stage can continue from it. Frozen weights are not written, only their digests, which are compared on resume.
Ranks write side by side, each its own tensors, into pieces that hold either weights or moments.
The folder is written as `.partial` and then renamed. The marker is its last file, with size and SHA-256 of all others:
a run resumes from the newest checkpoint whose files agree with it. Damaged ones are logged, and left alone.

ZeRO's own pieces, as DeepSpeed writes them, would need no gathering. But they are pickles, of flat vectors whose order
and padding belong to a stage, a number of ranks and a release. torch.distributed.checkpoint has a pickle for its index,
and cuts anew only tensors of its own kinds, which ZeRO's are not.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from mama.errors import ConfigError, TrainingError
from mama.run.checkpoint_marker import FROZEN, MARKER, Marker, folder_name, read_marker, run_digest, write_marker
from mama.run.checkpoints import WEIGHTS, best, checkpoints, read_tensors
from mama.run.files import remove, replace_folder, sha256, sync
from mama.run.model_state import is_finite, trained
from mama.run.tensor_file import Shape, write_tensors
from mama.runtime.collectives import node_name, rank, world_size
from mama.train import zero_state
from mama.train.agreement import WAIT
from mama.train.zero_state import DeepSpeedEngine, adam, adam_tensors

PIECE = 2**28  # bytes of tensors in one file, unless one is larger; each rank that writes holds as many in memory

log = logging.getLogger(__name__)

T = TypeVar("T")


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
    Raises `TrainingError` if a tensor is not finite, since training could not continue from it, and `OSError`; on all
    ranks, and then nothing is complete that was not before.
    """
    folder = run / "checkpoints" / folder_name(step)
    new = folder.with_name(folder.name + ".partial")

    def begin() -> None:
        if rank() == 0:
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir(parents=True)

    def finish() -> None:
        if rank() == 0:
            (new / FROZEN).write_text(json.dumps(frozen, indent=0))
            files = written | {FROZEN: ((new / FROZEN).stat().st_size, sha256(new / FROZEN))}
            marker = Marker(
                step=step,
                ranks=world_size(),
                score=None,
                adam_steps=_adam_steps(engine),
                facts=dict(facts or {}),
                bytes={name: size for name, (size, _) in files.items()},
                sha256={name: digest for name, (_, digest) in files.items()},
                run=run_digest(run),
            )
            write_marker(new, marker)
            replace_folder(new, folder)
            try:
                _prune(run, keep)
            except OSError as error:  # the new one is complete all the same
                log.warning("an old checkpoint is left: %s", error)

    _on_all_ranks(begin)
    written = _write_pieces(engine, new)
    _on_all_ranks(finish)


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


def _write_pieces(engine: DeepSpeedEngine, folder: Path) -> dict[str, tuple[int, str]]:
    """Write the train state; returns the size and SHA-256 of every file by name. Every rank must call it.

    As many ranks write as there are pieces to fill: rank 0 alone for the small state of LoRA.
    """
    writers = min(world_size(), 1 + zero_state.size(engine) // PIECE)
    written: dict[str, tuple[int, str]] = {}
    first = 0  # number of the next piece of rank 0
    for kinds in (WEIGHTS, zero_state.MOMENTS):  # in files of their own: who needs a model reads no moments
        for piece, count in _deal(zero_state.tensors(engine, kinds), writers):
            path = folder / f"state-{first + rank():05d}.safetensors"
            for found in _on_all_ranks(partial(_write_piece, piece, path)):
                written |= found
            first += count
            piece.clear()  # before the next one is filled
    return written


def _deal(tensors: Iterator[tuple[str, Tensor]], writers: int) -> Iterator[tuple[dict[str, Tensor], int]]:
    """Deal tensors to the first ranks, until all have a piece; yield this rank's, and how many ranks have one.

    Each tensor goes to the rank that has the fewest bytes, and only there to the CPU. Running statistics are those of
    rank 0: the published batch norms have their own on each rank, and mean and variance belong together.
    """
    piece: dict[str, Tensor] = {}
    held = [0] * writers
    for key, tensor in tensors:
        size = 4 * tensor.numel() + 100  # its line in the header
        owner = 0 if key.startswith("buffer/") else held.index(min(held))
        if held[owner] and held[owner] + size > PIECE:
            yield piece, writers
            piece, held, owner = {}, [0] * writers, 0
        held[owner] += size
        if owner == rank():
            piece[key] = tensor.to("cpu", torch.float32).contiguous()
    yield piece, sum(map(bool, held))


def _write_piece(piece: dict[str, Tensor], path: Path) -> dict[str, tuple[int, str]]:
    for key, tensor in piece.items():
        if not is_finite(tensor):
            step = path.parent.stem
            raise TrainingError(f"{step}: {key} is not finite, and is not saved; start again with a lower rate")
    if not piece:
        return {}
    _wait_for(path.parent)
    digest = write_tensors(path, {key: Shape.of(tensor) for key, tensor in piece.items()}, piece.__getitem__)
    sync(path)
    return {path.name: (path.stat().st_size, digest)}


def _wait_for(folder: Path) -> None:
    """Wait until this machine sees the folder that rank 0 has made. Raises `OSError` after `WAIT` seconds."""
    deadline = time.monotonic() + WAIT
    while not folder.exists():
        if time.monotonic() > deadline:
            raise OSError(f"{folder}: not there after {WAIT:.0f} s; is it on a disk that all machines share?")
        time.sleep(0.1)


def _on_all_ranks(work: Callable[[], T]) -> list[T]:
    """Do this rank's `work`; returns the results of all ranks. An error of one of them is raised on all."""
    try:
        own: T | Exception = work()
    except (TrainingError, ConfigError) as error:
        own = error
    except OSError as error:
        own = OSError(f"rank {rank()} on {node_name()}: {error}")
    of_all = [own] * world_size()
    if world_size() > 1:
        dist.all_gather_object(of_all, own)
    for one in of_all:
        if isinstance(one, Exception):
            raise one
    return cast(list[T], of_all)

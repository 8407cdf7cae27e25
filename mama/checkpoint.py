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
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mama import zero_state
from mama.config import ConfigError
from mama.dist import barrier, rank, world_size
from mama.errors import TrainingError
from mama.files import read_object, remove, replace_folder, sha256
from mama.frozen import first_difference
from mama.marker import FROZEN, MARKER, Marker, damage, folder_name, read_marker, write_marker
from shards.files import set_default_mode

if TYPE_CHECKING:  # what only looks for checkpoints does without it
    from deepspeed import DeepSpeedEngine

log = logging.getLogger(__name__)

STEP = re.compile(r"step-(\d{6,})")
PIECE = 2**31  # bytes of tensors in one file, which is what rank 0 holds in memory besides


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first, by their markers and the sizes of their files."""
    return [folder for folder in _folders(run) if not damage(folder)]


def best(run: Path) -> Path | None:
    """The complete checkpoint with the highest validation score; the newest of equals."""
    return next(iter(_by_score(run)), None)


def newest(run: Path) -> Path | None:
    """The checkpoint to resume from: the newest that is whole to the last byte. None where the run has saved none.

    Damaged ones are named in the log. Raises `ConfigError` where all are: no run begins anew by itself.
    """
    return _first_whole(run, reversed(_folders(run)))


def best_whole(run: Path) -> Path | None:
    """The same of those with a validation score, the highest first."""
    return _first_whole(run, _by_score(run))


def step_of(checkpoint: Path) -> int:
    """How many steps had been taken."""
    return read_marker(checkpoint).step


def facts_of(checkpoint: Path) -> dict[str, int]:
    """What `save` was given as `facts`."""
    return read_marker(checkpoint).facts


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


def load_weights(model: nn.Module, checkpoint: Path, frozen: dict[str, str]) -> None:
    """Put the trained weights and the buffers into a model that no engine has taken yet.

    Raises `ConfigError` where the model has other trained tensors, or frozen ones with another digest.
    """
    if name := first_difference(read_object(checkpoint / FROZEN), frozen):
        raise ConfigError(f"{checkpoint}: the frozen tensor {name} is not the one that the run was trained with")
    wanted = zero_state.trained(model) | zero_state.buffers(model)
    found = 0
    for _, name, tensor in _read(checkpoint, ("weight", "buffer")):
        if name not in wanted or wanted[name].shape != tensor.shape:
            raise ConfigError(f"{checkpoint}: this configuration's model has no tensor {name} {list(tensor.shape)}")
        wanted[name].data.copy_(tensor)
        found += 1
    if found != len(wanted):
        raise ConfigError(f"{checkpoint}: holds {found} of the {len(wanted)} trained tensors of this configuration")


def load_optimizer(engine: DeepSpeedEngine, checkpoint: Path) -> None:
    """Give the engine ZeRO's own fp32 weights, Adam's moments and its step counts; every rank must call it."""
    from mama.engine import adam, adam_tensors

    steps = read_marker(checkpoint).adam_steps
    for group, tensor in adam_tensors(engine):
        if (name := _group_name(group)) not in steps:
            raise ConfigError(
                f"{checkpoint}: has no step count of the parameter group {name}; another release wrote it"
            )
        adam(engine).state[tensor]["step"].fill_(steps[name])
    trained = zero_state.trained(engine.module)
    for kind, name, value in _read(checkpoint, zero_state.STATE):
        if name in trained:
            zero_state.put(engine, trained[name], kind, value)


def weights(checkpoint: Path) -> dict[str, Tensor]:
    """The trained tensors and buffers by name, in fp32."""
    return {name: tensor for _, name, tensor in _read(checkpoint, ("weight", "buffer"))}


def _number(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _folders(run: Path) -> list[Path]:
    """Whatever bears the name of a checkpoint, oldest first: by number, as names sort `step-1000000` first."""
    found = (path for path in (run / "checkpoints").glob("step-*") if STEP.fullmatch(path.name))
    return sorted(found, key=_number)


def _by_score(run: Path) -> list[Path]:
    """The complete checkpoints that were validated, the best first, the newest of equals first."""
    scored = [(score, path) for path in checkpoints(run) if (score := read_marker(path).score) is not None]
    return [path for _, path in sorted(scored, key=lambda pair: (pair[0], _number(pair[1])), reverse=True)]


def _first_whole(run: Path, folders: Iterable[Path]) -> Path | None:
    passed = 0
    for folder in folders:
        reason = damage(folder, contents=True)
        if reason is None:
            return folder
        log.warning("%s; this checkpoint is passed over", reason)
        passed += 1
    if passed:
        place = run / "checkpoints"
        raise ConfigError(
            f"{place}: none of {passed} checkpoints is whole, the last: {reason}; or move {place} away to begin anew"
        )
    return None


def _prune(run: Path, keep: int) -> None:
    complete = checkpoints(run)
    kept = {*complete[-keep:], best(run)}
    for old in complete:
        if old not in kept:
            if not old.is_symlink():
                (old / MARKER).unlink()  # first, so that a half-deleted checkpoint is never complete
            remove(old)


def _adam_steps(engine: DeepSpeedEngine) -> dict[str, float]:
    from mama.engine import adam, adam_tensors

    state = adam(engine).state
    return {_group_name(group): float(state[tensor]["step"]) for group, tensor in adam_tensors(engine)}


def _group_name(group: dict[str, Any]) -> str:
    return f"{group['tower']}/{group['term']}/{'decayed' if group['weight_decay'] else 'plain'}"


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """A safetensors file that others may read where the user's umask lets them."""
    save_file(tensors, path, metadata)
    set_default_mode(path)


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


def _read(checkpoint: Path, kinds: Collection[str]) -> Iterator[tuple[str, str, Tensor]]:
    """Kind, name and tensor of all that are of these kinds; the others are not read from the disk.

    Raises `ConfigError` for a tensor that is not finite, and a file that is none of tensors.
    """
    for path in (checkpoint / name for name in read_marker(checkpoint).pieces):
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 (it is no dict)
                    kind, _, name = key.partition("/")
                    if kind not in kinds:
                        continue
                    tensor = file.get_tensor(key)
                    if not tensor.isfinite().all():
                        raise ConfigError(f"{path}: {key} is not finite; remove {checkpoint} to take the one before")
                    yield kind, name, tensor
        except SafetensorError as error:
            raise ConfigError(f"{path}: {error}; remove {checkpoint} to take the one before") from None

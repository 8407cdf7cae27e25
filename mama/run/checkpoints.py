"""Find and read the checkpoints of a run folder, `checkpoints/step-000500/`, without DeepSpeed.

`mama.train.checkpoint` writes them. Complete: marker and sizes agree. Whole: the digests of all files do as well.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mama.errors import ConfigError
from mama.run.checkpoint_marker import FROZEN, STEP, damage, folder_name, read_marker
from mama.run.files import read_object
from mama.run.model_state import buffers, first_difference, is_finite, trained
from mama.run.tensor_file import Stored, stored_tensors

log = logging.getLogger(__name__)

WEIGHTS = ("weight", "buffer")  # kinds of tensors that a model needs; the optimizer's are others


def checkpoints(run: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    return [folder for folder in _folders(run) if not damage(folder)]


def best(run: Path) -> Path | None:
    """Return the complete checkpoint with the highest validation score, the newest of equals; None without a score."""
    return next(iter(_by_score(run)), None)


def newest(run: Path, weights_only: bool = False) -> Path | None:
    """Return the newest whole checkpoint, to resume from; None if the run has saved none.

    With `weights_only` the optimizer's files need not be whole, and are not read. Damaged ones are logged. Raises
    `ConfigError` if all are damaged, so that no run starts again from step 0 unasked.
    """
    return _first_whole(run, reversed(_folders(run)), weights_only)


def best_whole(run: Path, weights_only: bool = False) -> Path | None:
    """Return the whole checkpoint with the highest validation score; None and errors as for `newest`."""
    return _first_whole(run, _by_score(run), weights_only)


def whole_at(run: Path, step: int) -> Path:
    """Return the checkpoint after `step` steps, whose weights are whole. Raises `ConfigError` otherwise."""
    folder = run / "checkpoints" / folder_name(step)
    if not folder.is_dir():
        there = ", ".join(str(_number(path)) for path in checkpoints(run))
        raise ConfigError(f"{run}: has no checkpoint of step {step}; there are {there or 'none'}")
    if reason := _damage(folder, weights_only=True):
        raise ConfigError(f"{reason}; name another step, or restore {folder} from a copy")
    return folder


def stored_weights(model: nn.Module, checkpoint: Path) -> dict[str, Stored]:
    """Where the trained weights and the buffers of a model are in the files of a checkpoint, by name.

    Raises `ConfigError` if the model, which may be on the meta device, has other trained tensors.
    """
    expected = trained(model) | buffers(model)
    found = {}
    for path in (checkpoint / name for name in read_marker(checkpoint).pieces):
        for key, stored in stored_tensors(path).items():
            kind, _, name = key.partition("/")
            if kind not in WEIGHTS:
                continue
            if name not in expected or tuple(expected[name].shape) != stored.shape:
                raise ConfigError(f"{checkpoint}: this configuration's model has no tensor {name} {list(stored.shape)}")
            found[name] = stored
    if len(found) != len(expected):
        raise ConfigError(
            f"{checkpoint}: holds {len(found)} of the {len(expected)} trained tensors of this configuration"
        )
    return found


def load_weights(model: nn.Module, checkpoint: Path, frozen: dict[str, str]) -> None:
    """Load the trained weights and the buffers into a model, before an engine is started with it.

    `frozen` are the digests of its frozen weights. Raises `ConfigError` if they differ from the checkpoint's, or if
    the model has other trained tensors.
    """
    if name := first_difference(read_object(checkpoint / FROZEN), frozen):
        raise ConfigError(f"{checkpoint}: the frozen tensor {name} is not the one that the run was trained with")
    expected = trained(model) | buffers(model)
    found = 0
    for _, name, tensor in read_tensors(checkpoint, WEIGHTS):
        if name not in expected or expected[name].shape != tensor.shape:
            raise ConfigError(f"{checkpoint}: this configuration's model has no tensor {name} {list(tensor.shape)}")
        expected[name].data.copy_(tensor)
        found += 1
    if found != len(expected):
        raise ConfigError(f"{checkpoint}: holds {found} of the {len(expected)} trained tensors of this configuration")


def read_tensors(checkpoint: Path, kinds: Collection[str]) -> Iterator[tuple[str, str, Tensor]]:
    """Yield (kind, name, tensor) of all tensors of these kinds; the others are not read from the disk.

    Raises `ConfigError` if a tensor is not finite, or a file is not in the safetensors format.
    """
    for path in (checkpoint / name for name in read_marker(checkpoint).pieces):
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 (it is no dict)
                    kind, _, name = key.partition("/")
                    if kind not in kinds:
                        continue
                    tensor = file.get_tensor(key)
                    if not is_finite(tensor):
                        raise ConfigError(f"{path}: {key} is not finite; remove {checkpoint} to take the one before")
                    yield kind, name, tensor
        except SafetensorError as error:
            raise ConfigError(f"{path}: {error}; remove {checkpoint} to take the one before") from None


def _number(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _folders(run: Path) -> list[Path]:
    """All folders with the name of a checkpoint, oldest first: by number, since `step-1000000` sorts first by name."""
    found = (path for path in (run / "checkpoints").glob("step-*") if STEP.fullmatch(path.name))
    return sorted(found, key=_number)


def _by_score(run: Path) -> list[Path]:
    """The complete checkpoints with a validation score, best first, the newest of equals first."""
    scored = [(score, path) for path in checkpoints(run) if (score := read_marker(path).score) is not None]
    return [path for _, path in sorted(scored, key=lambda pair: (pair[0], _number(pair[1])), reverse=True)]


def _damage(checkpoint: Path, weights_only: bool) -> str | None:
    """What is wrong with the files of a checkpoint, or with those that hold its weights."""
    if not weights_only:
        return damage(checkpoint, contents=True)
    return damage(checkpoint) or damage(checkpoint, contents=True, only={FROZEN, *_pieces_with_weights(checkpoint)})


def _pieces_with_weights(checkpoint: Path) -> Iterator[str]:
    """The names of the files that hold weights or buffers, and of those that cannot tell."""
    for name in read_marker(checkpoint).pieces:
        try:
            if any(key.partition("/")[0] in WEIGHTS for key in stored_tensors(checkpoint / name)):
                yield name
        except ConfigError:
            yield name


def _first_whole(run: Path, folders: Iterable[Path], weights_only: bool) -> Path | None:
    damaged = 0
    for folder in folders:
        reason = _damage(folder, weights_only)
        if reason is None:
            return folder
        log.warning("%s; this checkpoint is skipped", reason)
        damaged += 1
    if damaged:
        place = run / "checkpoints"
        raise ConfigError(
            f"{place}: none of {damaged} checkpoints is whole, the last: {reason}; or move {place} away to start again"
        )
    return None

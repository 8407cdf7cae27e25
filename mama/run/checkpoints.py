"""Find and read the checkpoints of a run folder, `checkpoints/step-000500/`, without DeepSpeed.

`mama.train.checkpoint` writes them. Complete: marker and sizes agree. Whole: the digests of all files do as well.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mama.errors import ConfigError
from mama.run.checkpoint_marker import FROZEN, KINDS, OF_MODEL, damage, read_marker
from mama.run.files import read_object
from mama.run.model_state import buffers, first_difference, is_finite, trained
from shards.files import set_default_mode

log = logging.getLogger(__name__)

STEP = re.compile(r"step-(\d{6,})")


def checkpoints(run: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    return [folder for folder in _folders(run) if not damage(folder)]


def best(run: Path) -> Path | None:
    """Return the complete checkpoint with the highest validation score, the newest of equals; None without a score."""
    return next(iter(_by_score(run)), None)


def newest(run: Path, kinds: Collection[str] = KINDS["state"]) -> Path | None:
    """Return the newest whole checkpoint, to resume from; None if the run has saved none.

    For those who read only tensors of these `kinds`, files without any need not be whole. Damaged ones are logged. Raises `ConfigError` if all are damaged, so that no run starts again from step 0 unasked.
    """
    return _first_whole(run, reversed(_folders(run)), kinds)


def best_whole(run: Path, kinds: Collection[str] = KINDS["state"]) -> Path | None:
    """Return the whole checkpoint with the highest validation score; `kinds`, None and errors as for `newest`."""
    return _first_whole(run, _by_score(run), kinds)


def load_weights(model: nn.Module, checkpoint: Path, frozen: dict[str, str]) -> None:
    """Load the trained weights and the buffers into a model, before an engine is started with it.

    `frozen` are the digests of its frozen weights. Raises `ConfigError` if they differ from the checkpoint's, or if
    the model has other trained tensors.
    """
    if name := first_difference(read_object(checkpoint / FROZEN), frozen):
        raise ConfigError(f"{checkpoint}: the frozen tensor {name} is not the one that the run was trained with")
    expected = trained(model) | buffers(model)
    found = 0
    for _, name, tensor in read_tensors(checkpoint, OF_MODEL):
        if name not in expected or expected[name].shape != tensor.shape:
            raise ConfigError(f"{checkpoint}: this configuration's model has no tensor {name} {list(tensor.shape)}")
        expected[name].data.copy_(tensor)
        found += 1
    if found != len(expected):
        raise ConfigError(f"{checkpoint}: holds {found} of the {len(expected)} trained tensors of this configuration")


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file with the permissions of the user's umask."""
    save_file(tensors, path, metadata)
    set_default_mode(path)


def read_tensors(checkpoint: Path, kinds: Collection[str]) -> Iterator[tuple[str, str, Tensor]]:
    """Yield (kind, name, tensor) of all tensors of these kinds; the others are not read from the disk.

    Raises `ConfigError` if a tensor is not finite, or a file is not in the safetensors format.
    """
    for path in (checkpoint / name for name in read_marker(checkpoint).pieces(kinds)):
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


def _first_whole(run: Path, folders: Iterable[Path], kinds: Collection[str]) -> Path | None:
    damaged = 0
    for folder in folders:
        reason = damage(folder, contents=True, kinds=kinds)
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

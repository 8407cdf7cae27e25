"""Find and read the checkpoints of a run folder, `checkpoints/step-000500/`, without DeepSpeed.

`mama.train.checkpoint` writes them. Complete: marker and sizes agree. Whole: the digests of all files do as well.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import TypeVar

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mama.errors import ConfigError
from mama.run.checkpoint_marker import FROZEN, STEP, damage, folder_name, read_marker
from mama.run.files import read_object
from mama.run.model_state import buffers, first_difference, is_finite, trained
from mama.run.tensor_file import Stored, stored_tensors

log = logging.getLogger(__name__)

T = TypeVar("T")
WEIGHTS = ("weight", "buffer")  # kinds of tensors that a model needs; the optimizer's are others


class DamagedError(ConfigError):
    """A file of a checkpoint is missing, or not as it was written; the message names it."""


def checkpoints(run: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    return [folder for folder in _folders(run) if not damage(folder)]


def best(run: Path) -> Path | None:
    """Return the complete checkpoint with the highest validation score, the newest of equals; None without a score."""
    return next(iter(best_first(run)), None)


def newest(run: Path) -> Path | None:
    """Return the newest whole checkpoint, to resume from; None if the run has saved none.

    Damaged ones are logged. Raises `ConfigError` if all are damaged, so that no run starts again from step 0 unasked.
    """
    return use_first(run, newest_first(run), _whole)


def best_whole(run: Path) -> Path | None:
    """Return the whole checkpoint with the highest validation score; None and errors as for `newest`."""
    return use_first(run, best_first(run), _whole)


def at(run: Path, step: int) -> Path:
    """Return the checkpoint after `step` steps, in whatever state. Raises `ConfigError` if there is none."""
    folder = run / "checkpoints" / folder_name(step)
    if not folder.is_dir():
        there = ", ".join(str(_number(path)) for path in checkpoints(run))
        raise ConfigError(f"{run}: has no checkpoint of step {step}; there are {there or 'none'}")
    return folder


def newest_first(run: Path) -> Iterator[Path]:
    """All folders with the name of a checkpoint, the newest first, whatever is in them."""
    return reversed(_folders(run))


def best_first(run: Path) -> list[Path]:
    """The complete checkpoints with a validation score, best first, the newest of equals first."""
    scored = [(score, path) for path in checkpoints(run) if (score := read_marker(path).score) is not None]
    return [path for _, path in sorted(scored, key=lambda pair: (pair[0], _number(pair[1])), reverse=True)]


def use_first(run: Path, folders: Iterable[Path], use: Callable[[Path], T]) -> T | None:
    """What `use` makes of the first of these checkpoints that is not damaged; None if there are none.

    It is to raise `DamagedError`, as `proved` does; damaged ones are logged. Raises `ConfigError` if all are.
    """
    damaged = 0
    for folder in folders:
        try:
            return use(folder)
        except DamagedError as error:
            reason = str(error)
            log.warning("%s; this checkpoint is skipped", reason)
            damaged += 1
    if damaged:
        place = run / "checkpoints"
        raise ConfigError(
            f"{place}: none of {damaged} checkpoints is whole, the last: {reason}; or move {place} away to start again"
        )
    return None


@contextmanager
def proved(checkpoint: Path, weights_only: bool = False) -> Iterator[None]:
    """Compare the digests of a checkpoint's files, or of those that hold weights, while the block reads them too.

    What the block made holds if it ends without an error. Raises `DamagedError` at its end, also in place of an error
    that damage has led to; at once if the marker or the size of a file is wrong.
    """
    if reason := damage(checkpoint):
        raise DamagedError(reason)
    stop = Event()
    with ThreadPoolExecutor(1) as beside:
        only = {FROZEN, *_pieces_with_weights(checkpoint)} if weights_only else None
        found = beside.submit(damage, checkpoint, contents=True, only=only, stop=stop)
        try:
            yield
        except ConfigError:
            _require_whole(found)
            raise
        else:
            _require_whole(found)
        finally:  # after an error of the disk, or a signal, nobody waits for gigabytes to be hashed
            stop.set()


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


def _require_whole(found: Future[str | None]) -> None:
    if reason := found.result():
        raise DamagedError(reason) from None


def _whole(checkpoint: Path) -> Path:
    with proved(checkpoint):
        return checkpoint


def _pieces_with_weights(checkpoint: Path) -> Iterator[str]:
    """The names of the files that hold weights or buffers, and of those that cannot tell."""
    for name in read_marker(checkpoint).pieces:
        try:
            if any(key.partition("/")[0] in WEIGHTS for key in stored_tensors(checkpoint / name)):
                yield name
        except ConfigError:
            yield name

"""Checkpoints of a run folder, `checkpoints/step-000500/`: which there are, which are whole, and their tensors.

Written by `mama.train.checkpoint`; what only looks for them or reads them does without DeepSpeed.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mama.run.checkpoint_marker import FROZEN, damage, read_marker
from mama.run.digests import read_object
from mama.run.model_state import buffers, first_difference, trained
from mama.settings.schema import ConfigError
from shards.files import set_default_mode

log = logging.getLogger(__name__)

STEP = re.compile(r"step-(\d{6,})")


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


def load_weights(model: nn.Module, checkpoint: Path, frozen: dict[str, str]) -> None:
    """Put the trained weights and the buffers into a model that no engine has taken yet.

    Raises `ConfigError` where the model has other trained tensors, or frozen ones with another digest.
    """
    if name := first_difference(read_object(checkpoint / FROZEN), frozen):
        raise ConfigError(f"{checkpoint}: the frozen tensor {name} is not the one that the run was trained with")
    wanted = trained(model) | buffers(model)
    found = 0
    for _, name, tensor in read_tensors(checkpoint, ("weight", "buffer")):
        if name not in wanted or wanted[name].shape != tensor.shape:
            raise ConfigError(f"{checkpoint}: this configuration's model has no tensor {name} {list(tensor.shape)}")
        wanted[name].data.copy_(tensor)
        found += 1
    if found != len(wanted):
        raise ConfigError(f"{checkpoint}: holds {found} of the {len(wanted)} trained tensors of this configuration")


def weights(checkpoint: Path) -> dict[str, Tensor]:
    """The trained tensors and buffers by name, in fp32."""
    return {name: tensor for _, name, tensor in read_tensors(checkpoint, ("weight", "buffer"))}


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """A safetensors file that others may read where the user's umask lets them."""
    save_file(tensors, path, metadata)
    set_default_mode(path)


def read_tensors(checkpoint: Path, kinds: Collection[str]) -> Iterator[tuple[str, str, Tensor]]:
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

"""Features on disk: what a model made of the images of a split is computed once and read by every later evaluation.

`features/` lies in the folder of the results. A file is named after what it holds, and records what it was computed
from: another model, other images, settings or code replace it. It may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from mama.data.held_out import Split
from mama.run.environment import versions
from mama.run.model_state import digest_of
from mama.run.run_folder import shards_digest
from mama.runtime import sharing
from mama.runtime.collectives import rank
from mama.settings.schema import Config
from shards.files import atomic_file
from slurm.snapshot import code_digest

log = logging.getLogger(__name__)

Arrays = dict[str, NDArray[Any]]

FOLDER = "features"
IDENTITY = "identity"  # the array that holds what the others were computed from, as JSON


@dataclass(frozen=True)
class KeptFeatures:
    """The folder `features/` of an evaluation of `config` on `device`."""

    folder: Path
    config: Config
    device: torch.device

    def of(
        self, what: str, split: Split, model: dict[str, Any] | None, compute: Callable[[], Arrays], **more: Any
    ) -> Arrays:
        """On rank 0 the arrays that `compute` returns there, from the file if it holds them; on other ranks {}.

        `model` and `more` name what `compute` depends on beside the images, their preparation and the code, with
        values of JSON. Every rank must call it; if the file does not serve, every rank calls `compute`.
        """
        identity = self._identity(split, model, more)
        images = hashlib.sha256(json.dumps(identity["shards"]).encode()).hexdigest()[:8]
        path = self.folder / f"{split.name}-{images}-{what}.npz"
        found = _read(path, identity) if rank() == 0 else None
        if sharing.of_first(found is not None):
            return found or {}
        computed = compute()
        if rank() > 0:
            return {}
        _write(path, identity, computed)
        return computed

    def _identity(self, split: Split, model: dict[str, Any] | None, more: dict[str, Any]) -> dict[str, Any]:
        """Batches and device are in it, as both decide about the last digits of a matrix product."""
        data, device = self.config.data, self.device
        return {
            "shards": [shards_digest(reader.manifest, {split.name}) for reader in split.images.readers],
            "images": len(split),
            "model": model,
            "image_size": list(data.image_size),
            "fit": data.fit,
            "batch": self.config.eval.batch,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "code": code_digest(),
            "versions": versions() | {"opencv": cv2.__version__},
            **more,
        }


def state_digest(model: nn.Module) -> str:
    """A digest of all weights of a model that has no file of its own."""
    digests = {name: digest_of(tensor) for name, tensor in model.state_dict().items()}
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def _read(path: Path, identity: dict[str, Any]) -> Arrays | None:
    """The arrays in a file; None if it is missing, damaged (a zip has checksums) or of something else."""
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            if str(file[IDENTITY]) != _text(identity):
                return None
            found = {name: file[name] for name in file.files if name != IDENTITY}
    except (OSError, KeyError, ValueError, EOFError, BadZipFile) as error:
        log.warning("%s: is damaged (%s), its features are computed again", path, type(error).__name__)
        return None
    log.info("%s: features of an earlier evaluation", path)
    return found


def _write(path: Path, identity: dict[str, Any], arrays: Arrays) -> None:
    """Where it fails, only time is lost: the next evaluation computes them again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path, f".{secrets.token_hex(8)}.part") as file:  # two evaluations may write it
            np.savez(file, allow_pickle=False, **{IDENTITY: np.array(_text(identity)), **arrays})
    except OSError as error:
        log.warning("%s: cannot be written (%s), so the next evaluation computes it again", path, error.strerror)


def _text(identity: dict[str, Any]) -> str:
    return json.dumps(identity, sort_keys=True)

"""The patients and images that a model was trained on, as they travel with it: `trained_on.safetensors` in its folder.

They are the keyed hashes of the shards, hashed once more and cut to 8 bytes each: the file names nobody, also to those
who have the shards of other patients. Half a million images of a hundred thousand patients take 5 MB.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from mama.data.images import Images
from mama.errors import ConfigError
from mama.run.run_folder import shards_digest
from shards.files import atomic_write, named_in_errors

TRAINED_ON = "trained_on.safetensors"
SALT = b"mama trained on\0"

Hashes = NDArray[np.uint64]


@dataclass(frozen=True)
class TrainedOn:
    """Sorted hashes of patients [p] and images [m], and the digest of the training shards of each folder."""

    patients: Hashes
    images: Hashes
    shards: list[str]

    def patients_among(self, patients: Iterable[str]) -> set[str]:
        """Those of these patients, keyed hashes of a manifest, that the model was trained on."""
        return _among(set(patients), self.patients)

    def images_among(self, instances: Iterable[str]) -> set[str]:
        """Those of these images, keyed hashes of their SOP Instance UIDs, that the model was trained on."""
        return _among(set(instances), self.images)


def hashes(keyed: Iterable[str]) -> Hashes:
    """Keyed hashes -> the hashes that travel, in the same order."""
    digests = [hashlib.sha256(SALT + word.encode()).digest()[:8] for word in keyed]
    return np.array([int.from_bytes(digest, "big") for digest in digests], dtype=np.uint64)


def write_trained_on(images: Images, instances: Iterable[str], folder: Path) -> None:
    """Write the patients of the training `images` by the manifests, and the keyed hashes of their SOP instances."""
    patients = {p for reader in images.readers for shard in reader.shards for p in shard.patients}
    found = {"patients": np.unique(hashes(patients)), "images": np.unique(hashes(instances))}
    digests = [shards_digest(reader.manifest, {"train"}) for reader in images.readers]
    with named_in_errors(folder / TRAINED_ON):
        atomic_write(folder / TRAINED_ON, save(found, {"shards": json.dumps(digests)}))


def read_trained_on(folder: Path) -> TrainedOn | None:
    """What `write_trained_on` left in a model folder; None if an earlier release wrote the model.

    Raises `ConfigError` if the file is damaged.
    """
    path = folder / TRAINED_ON
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="np") as file:
            shards = json.loads((file.metadata() or {})["shards"])
            return TrainedOn(file.get_tensor("patients"), file.get_tensor("images"), [str(one) for one in shards])
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise ConfigError(f"{path}: is damaged ({type(error).__name__}); run `mama consolidate` again") from None


def _among(keyed: set[str], known: Hashes) -> set[str]:
    words = sorted(keyed)
    return {word for word, is_known in zip(words, np.isin(hashes(words), known), strict=True) if is_known}

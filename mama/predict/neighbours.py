"""Nearest neighbours: the images of shards whose embeddings have the highest cosine with that of an image.

Images of patients that the model was trained on are left out, with the hashes that travel with the model: what it
learned by heart is no comparison. An image is compared with those of its view; the side does not matter, as the model
sees every breast with the chest wall on the left. One neighbour a patient, and none of the image's own patient, where
that is known.

Letters: n images, D shared width.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from mama.data.held_out import Item, Split
from mama.errors import ConfigError
from mama.evaluate.arrays import Float32s
from mama.evaluate.retrieval import facts
from mama.export.trained_on import TRAINED_ON, TrainedOn
from mama.model.embed import embed_split
from mama.model.mama_model import MamaModel
from mama.predict.seen import Seen
from mama.settings.schema import Config
from shards.read.manifest import load_manifest
from shards.read.remote import local_folder

COUNT = 5  # neighbours of an image at most


@dataclass(frozen=True)
class Neighbour:
    """An image of the shards: its key, its labels and findings in words, its stored pixels [h, w]."""

    key: str  # <study key>/<member>
    cosine: float
    facts: list[str]
    pixels: NDArray[np.uint8]
    laterality: str
    flipped: bool  # as `Seen.flipped`


@dataclass(frozen=True)
class Archive:
    """The images that may be neighbours, with unit embeddings [n, D] and the split that each is read from."""

    items: list[Item]
    splits: list[Split]
    embeddings: Float32s

    def nearest(self, seen: Seen, embedding: Float32s) -> list[Neighbour]:
        """The neighbours of an image with this unit embedding [D], nearest first.

        Raises `ShardError` if the pixels of one cannot be read any more.
        """
        cosines = self.embeddings @ embedding
        found: dict[str, int] = {}  # patient -> nearest image
        for row in np.argsort(-cosines, kind="stable").tolist():
            item = self.items[row]
            if seen.view in (None, item.view.view) and item.study.patient != seen.patient:
                found.setdefault(item.study.patient, row)
            if len(found) == COUNT:
                break
        return [self._neighbour(row, float(cosines[row])) for row in found.values()]

    def _neighbour(self, row: int, cosine: float) -> Neighbour:
        item, view = self.items[row], self.items[row].view
        said = facts(replace(view, report=None))  # no words of another patient's report
        return Neighbour(item.key, cosine, said, self.splits[row].stored(item), view.laterality, view.flipped)


@torch.inference_mode()
def embed_archive(
    model: MamaModel, config: Config, shards: Sequence[str], trained: TrainedOn | None, device: torch.device
) -> Archive:
    """Embed all images of the folders `shards`, of all splits, but those that the model knows from its training.

    `config` is that of the model. Images that cannot be read are left out. Raises `ConfigError` if the model does not
    record what it was trained on, or if no image is left; `ShardError` as `Split` does.
    """
    if trained is None:
        raise ConfigError(f"--neighbours: the model has no {TRAINED_ON}; run `mama consolidate` again")
    config = replace(config, data=replace(config.data, shards=list(shards), shard_weights=[]))
    cache = config.data.cache_folder
    names = {one.split for folder in shards for one in load_manifest(local_folder(folder, cache)).shards}
    items: list[Item] = []
    splits: list[Split] = []
    embeddings: list[Float32s] = []
    for name in sorted(names):
        split = Split(config, name, max_unreadable=sys.maxsize)
        rows = _unknown(split.items, trained)
        if not rows:
            continue
        embedded = embed_split(
            model, split, config, device, config.eval.batch, indices=rows, title=f"neighbours: {name} images"
        )
        readable = embedded.readable.numpy()
        items += [split.items[row] for row, good in zip(rows, readable, strict=True) if good]
        splits += [split] * int(readable.sum())
        embeddings.append(embedded.images.numpy()[readable])
    if not items:
        raise ConfigError(f"--neighbours: the model was trained on every patient of {', '.join(shards)}; name others")
    return Archive(items, splits, np.concatenate(embeddings))


def _unknown(items: Sequence[Item], trained: TrainedOn) -> list[int]:
    """The rows of images that the model was not trained on, and of no patient of its training."""
    patients = trained.patients_among(item.study.patient for item in items)
    images = trained.images_among(item.view.instance for item in items if item.view.instance)
    return [
        row for row, item in enumerate(items) if item.study.patient not in patients and item.view.instance not in images
    ]

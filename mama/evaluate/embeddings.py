"""Held-out images and texts -> embeddings, in batches, in float32.

Letters: n images, t texts, D shared width, d width of the image tower.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from mama.data.augment import normalise
from mama.data.batches import tokenise
from mama.data.images import Images
from mama.data.loader import load, require_shared_memory, to_device
from mama.data.tokenizer import Tokenizer
from mama.model.mama_model import MamaModel
from mama.settings.schema import Config
from shards.progress import progress
from shards.schema import Study, View

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Item:
    """One image of a split: where `Images` finds it, and its facts."""

    number: int  # of the study
    position: int  # of the view in the study
    study: Study

    @property
    def view(self) -> View:
        return self.study.views[self.position]

    @property
    def key(self) -> str:
        return f"{self.study.key}/{self.view.member}"


class Split(Dataset[Tensor]):
    """All images of one split in manifest order: `items[i]` are the facts, `split[i]` the pixels."""

    def __init__(self, config: Config, name: str) -> None:
        self.name = name
        self.size, self.style = config.data.image_size, config.data.style
        self.images = Images(config.data, name)
        studies = [self.images.study(number) for number in range(len(self.images.studies))]
        self.items = [Item(n, position, s) for n, s in enumerate(studies) for position in range(len(s.views))]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Tensor:
        """uint8 [1, H, W], as the model sees the image in training, unaugmented."""
        return torch.from_numpy(self.pixels(self.items[index]))[None]

    def pixels(self, item: Item, larger: int = 1) -> NDArray[np.uint8]:
        """uint8 [larger * H, larger * W]."""
        size = (larger * self.size[0], larger * self.size[1])
        pixels: NDArray[np.uint8] = self.images.pixels(item.number, item.position, size)
        return pixels

    def stored(self, item: Item) -> NDArray[np.uint8]:
        """uint8 [h, w], as it is stored."""
        stored: NDArray[np.uint8] = self.images.stored(item.number, item.position)
        return stored


@dataclass(frozen=True)
class Features:
    """What a model makes of the images of a split."""

    embeddings: Floats  # [n, D], unit
    tower: Floats  # [n, d], before the projection: what a probe sees


@torch.inference_mode()
def embed_images(model: MamaModel, split: Split, config: Config, device: torch.device, label: str) -> Features:
    """Embed every image of `split`, in its order."""
    require_shared_memory(config, config.eval.batch)
    count, title = -(-len(split) // config.eval.batch), f"{label}: {split.name} images"
    embeddings, tower = [], []
    with closing(load(split, config, device=device, batch_size=config.eval.batch)) as batches:
        for pixels in progress(batches, count, title, "batches"):
            unit, features = model.embed_images(normalise(to_device(pixels, device)))
            embeddings.append(unit.float().cpu().numpy())
            tower.append(features.float().cpu().numpy())
    return Features(np.concatenate(embeddings), np.concatenate(tower))


@torch.inference_mode()
def embed_texts(
    model: MamaModel, tokenizer: Tokenizer, texts: list[list[str]], config: Config, device: torch.device
) -> Floats:
    """Unit embeddings [t, D] of texts given as lists of sentences."""
    parts = []
    for start in range(0, len(texts), config.eval.batch):
        batch = tokenise(tokenizer, texts[start : start + config.eval.batch], config.data.max_tokens)
        parts.append(model.embed_texts(batch.to(device)).float().cpu().numpy())
    return np.concatenate(parts)

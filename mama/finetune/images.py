"""Labelled images -> batches, in the global order of `mama.data.sample_order`. Letters: b images, n labelled images."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from mama.data import augment, sample_order
from mama.data.batches import MicroBatches, Tensors
from mama.data.images import Images
from mama.data.loader import load
from mama.data.unreadable import UnreadableSamples
from mama.evaluate.arrays import Float64s, Ints
from mama.finetune.labels import Labels
from mama.runtime.collectives import rank, world_size
from mama.settings.schema import Config
from shards.errors import FetchError, ShardError

ATTEMPTS = 100  # draws for one sample before giving up


@dataclass
class Sample:
    """One augmented training image before collation."""

    key: str  # "<study key>/<number of the view>"
    pixels: NDArray[np.uint8]  # [H, W]
    change: NDArray[np.float32]  # [10], augmentation parameters
    label: int
    unreadable: int  # unreadable samples drawn before, which this one replaces


@dataclass
class LabelledBatch(Tensors):
    """One micro-batch of b images."""

    keys: list[str]
    images: Tensor  # uint8 [b, 1, H, W]
    changes: Tensor  # float32 [b, 10]
    labels: Tensor  # int64 [b]
    unreadable: int


def probabilities(labels: Ints, balanced: bool) -> Float64s:
    """The probability [n] of each image to be drawn: alike, or inversely proportional to the frequency of its class."""
    _, kind, count = np.unique(labels, return_inverse=True, return_counts=True)
    weights = 1 / count[kind] if balanced else np.ones(len(labels))
    return np.asarray(weights / weights.sum())


class LabelledImages(Dataset[Sample]):
    """Training images by global sample index: `images[g]` depends on (manifests, labels, seed, g) alone."""

    def __init__(self, config: Config, labels: Labels) -> None:
        self.config, self.seed, self.labels = config.data, config.seed, labels
        self.balanced = config.finetune.sampling == "balanced"
        self.ends = np.cumsum(probabilities(labels.labels, self.balanced))
        self.images = Images(config.data, "train")
        self.unreadable = UnreadableSamples(config.data.max_corrupt)

    def place(self, index: int, attempt: int = 0) -> int:
        """The place in `labels` of sample `index`, or after unreadable ones that of a replacement."""
        if self.balanced or attempt:
            return sample_order.drawn_at(index, attempt, self.ends, self.seed)
        return sample_order.image_at(index, len(self.ends), self.seed)

    def __getitem__(self, index: int) -> Sample:
        """Raises `ShardError` for more unreadable samples than `data.max_corrupt`, and after `ATTEMPTS` draws."""
        for attempt in range(ATTEMPTS):
            place = self.place(index, attempt)
            number, view = self.images.locate(int(self.labels.rows[place]))
            try:
                pixels = self.images.pixels(number, view, self.config.image_size)
            except FetchError:
                raise  # the network or disk is at fault: other samples would fail as well
            except ShardError as error:
                self.unreadable.add(self.images.key(number), error)
                continue
            change = augment.draw(self.config.augment, pixels, sample_order.generator_at(index, self.seed))
            label = int(self.labels.labels[place])
            return Sample(f"{self.images.key(number)}/{view}", pixels, change, label, attempt)
        raise ShardError(f"data.shards: {ATTEMPTS} samples drawn, all unreadable; run `mama check`")


def collate(samples: list[Sample]) -> LabelledBatch:
    """Samples -> a batch."""
    return LabelledBatch(
        keys=[s.key for s in samples],
        images=torch.from_numpy(np.stack([s.pixels for s in samples])[:, None]),
        changes=torch.from_numpy(np.stack([s.change for s in samples])),
        labels=torch.tensor([s.label for s in samples]),
        unreadable=sum(s.unreadable for s in samples),
    )


def labelled_batches(
    config: Config, labels: Labels, steps: range, device: torch.device
) -> Generator[LabelledBatch, None, None]:
    """This rank's micro-batches for `steps`, in order, for `device`. Raises as `mama.data.loader.load` does."""
    batches = MicroBatches(config, steps, rank(), world_size())
    return load(LabelledImages(config, labels), config, collate, device, batch_sampler=batches)

"""Shards -> pixels: every image of a split by its number, fitted to the canvas that the model sees."""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate

import cv2
import numpy as np

from mama.config import ConfigError, DataConfig
from shards.read import ShardReader
from shards.schema import Study


class Images:
    """Every image of a split of several shard folders, numbered 0 .. len - 1 in manifest order."""

    def __init__(self, config: DataConfig, split: str) -> None:
        if not config.shards:
            raise ConfigError("data.shards: empty; name at least one folder written by `mama pack`")
        # A loader's worker that is forked while OpenCV has threads waits for ever for those that it did not inherit.
        cv2.setNumThreads(1)
        self.readers = [ShardReader(folder, split, config.cache_folder) for folder in config.shards]
        studies = [(reader, i) for reader in self.readers for i in range(len(reader))]
        counts = [count for reader in self.readers for count in reader.view_counts]
        self.studies = studies
        self.ends = list(accumulate(counts))
        if not self.ends:
            raise ConfigError(f"data.shards: {', '.join(config.shards)} hold no image of the split {split!r}")

    def __len__(self) -> int:
        return self.ends[-1]

    def locate(self, image: int) -> tuple[int, int]:
        """Number of the study and of the view within it."""
        study = bisect_right(self.ends, image)
        return study, image - (self.ends[study - 1] if study else 0)

    def key(self, number: int) -> str:
        """The key of a study, as the manifest says it."""
        reader, i = self.studies[number]
        return reader.key(i)

    def study(self, number: int) -> Study:
        reader, i = self.studies[number]
        return reader.study(i)

    def pixels(self, number: int, view: int, size: tuple[int, int]) -> np.ndarray:
        """uint8 [H, W] of one view, fitted to `size`."""
        return fit(self.stored(number, view), size)

    def stored(self, number: int, view: int) -> np.ndarray:
        """uint8 [h, w] of one view; of shards with 16 bits the upper eight, rounded."""
        reader, i = self.studies[number]
        image = reader.image(i, view)
        return image if image.dtype == np.uint8 else ((image.astype(np.uint32) + 128) // 257).astype(np.uint8)


def fit(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Scale uint8 [h, w] to fit in (H, W) with its aspect kept; air fills the right and both ends.

    The chest wall stays at the left edge, where packing puts it.
    """
    scale, top, _ = fit_geometry((image.shape[0], image.shape[1]), size)
    height, width = (max(1, round(side * scale)) for side in image.shape)
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    canvas = np.zeros(size, dtype=np.uint8)
    canvas[top : top + height, :width] = cv2.resize(image, (width, height), interpolation=interpolation)
    return canvas


def fit_geometry(stored: tuple[int, int], size: tuple[int, int]) -> tuple[float, int, int]:
    """Scale, top and left offset that `fit` uses: canvas x = scale * stored x + left, likewise y."""
    scale = min(size[0] / stored[0], size[1] / stored[1])
    return scale, (size[0] - max(1, round(stored[0] * scale))) // 2, 0

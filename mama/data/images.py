"""Shards -> pixels: every image of a split by its number, fitted to the canvas that the model sees."""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate

import cv2
import numpy as np

from mama.settings.schema import ConfigError, DataConfig, Fit
from shards.read.reader import ShardReader
from shards.schema import Study

AIR = 8  # grey value: what is not above it shows no tissue


class Images:
    """Every image of a split of several shard folders, numbered 0 .. len - 1 in manifest order."""

    def __init__(self, config: DataConfig, split: str) -> None:
        if not config.shards:
            raise ConfigError("data.shards: empty; name at least one folder written by `mama pack`")
        # A loader's worker that is forked while OpenCV has threads waits for ever for those that it did not inherit.
        cv2.setNumThreads(1)
        self.fit = config.fit
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
        return fit(self.stored(number, view), size, self.fit)

    def stored(self, number: int, view: int) -> np.ndarray:
        """uint8 [h, w] of one view; of shards with 16 bits the upper eight, rounded."""
        reader, i = self.studies[number]
        image = reader.image(i, view)
        return image if image.dtype == np.uint8 else ((image.astype(np.uint32) + 128) // 257).astype(np.uint8)


def fit(image: np.ndarray, size: tuple[int, int], how: Fit = "letterbox") -> np.ndarray:
    """Scale uint8 [h, w] to (H, W): letterboxed, with its aspect kept and air at the right and both ends, or stretched.

    The chest wall stays at the left edge, where packing puts it.
    """
    across, down, top = fit_geometry((image.shape[0], image.shape[1]), size, how)
    height, width = max(1, round(image.shape[0] * down)), max(1, round(image.shape[1] * across))
    canvas = np.zeros(size, dtype=np.uint8)
    canvas[top : top + height, :width] = _resize(image, height, width)
    return canvas


def _resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Area averages along the axes that shrink, then linear interpolation along those that grow."""
    shrunk = min(width, image.shape[1]), min(height, image.shape[0])
    image = cv2.resize(image, shrunk, interpolation=cv2.INTER_AREA)
    return image if shrunk == (width, height) else cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)


def fit_geometry(stored: tuple[int, int], size: tuple[int, int], how: Fit) -> tuple[float, float, int]:
    """Scales and top offset that `fit` uses: canvas x = across * stored x, canvas y = down * stored y + top."""
    across, down = size[1] / stored[1], size[0] / stored[0]
    if how == "letterbox":
        across = down = min(across, down)
    return across, down, (size[0] - max(1, round(stored[0] * down))) // 2

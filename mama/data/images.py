"""Shards -> pixels: every image of a split by its number, scaled to the canvas that the model sees; false colours."""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate

import cv2
import numpy as np
from numpy.typing import NDArray

from mama.errors import ConfigError
from mama.settings.schema import DataConfig, Fit
from shards.read.reader import ShardReader
from shards.read.remote import Remote
from shards.read.tar import to_uint8
from shards.schema import Box, Study

BACKGROUND = 8  # grey level of the background at most; tissue is brighter


class Images:
    """All images of a split of several shard folders, numbered 0 .. len - 1 in manifest order."""

    def __init__(self, config: DataConfig, split: str) -> None:
        if not config.shards:
            raise ConfigError("data.shards: empty; name at least one folder written by `mama pack`")
        # A loader worker forked while OpenCV has threads would wait for ever for threads that it did not inherit.
        cv2.setNumThreads(1)
        self.fit = config.fit
        self.readers = [ShardReader(folder, split, config.cache_folder) for folder in config.shards]
        self.studies = [(reader, i) for reader in self.readers for i in range(len(reader))]
        self.ends = list(accumulate(count for reader in self.readers for count in reader.view_counts))
        if not self.ends:
            raise ConfigError(f"data.shards: {', '.join(config.shards)} hold no image of the split {split!r}")

    def __len__(self) -> int:
        return self.ends[-1]

    def locate(self, image: int) -> tuple[int, int]:
        """Number of the study that holds an image, and of the view within it."""
        study = bisect_right(self.ends, image)
        return study, image - (self.ends[study - 1] if study else 0)

    def key(self, number: int) -> str:
        """The key of study `number` in the manifest; reads no shard."""
        reader, i = self.studies[number]
        return reader.key(i)

    def study(self, number: int) -> Study:
        """The facts of study `number`. Raises `ShardError` if they cannot be read."""
        reader, i = self.studies[number]
        return reader.study(i)

    def pixels(self, number: int, view: int, size: tuple[int, int]) -> NDArray[np.uint8]:
        """uint8 [H, W] of one view, scaled to the canvas `size` according to `data.fit`. Raises as `stored`."""
        return to_canvas(self.stored(number, view), size, self.fit)

    def stored(self, number: int, view: int) -> NDArray[np.uint8]:
        """uint8 [h, w] of one view at its stored size, 16 bits reduced to 8. Raises `ShardError` if unreadable."""
        reader, i = self.studies[number]
        return to_uint8(reader.image(i, view))


def is_remote(config: DataConfig) -> bool:
    """Whether some shards are at URLs: what is not in the cache has to be downloaded."""
    return any(Remote.at(folder, config.cache_folder) for folder in config.shards)


def to_canvas(image: NDArray[np.uint8], size: tuple[int, int], how: Fit = "letterbox") -> NDArray[np.uint8]:
    """Scale uint8 [h, w] to (H, W): letterboxed (aspect kept, background at right, top and bottom) or stretched.

    The chest wall stays at the left edge, where packing puts it.
    """
    top, height, width = canvas_extent((image.shape[0], image.shape[1]), size, how)
    canvas = np.zeros(size, dtype=np.uint8)
    canvas[top : top + height, :width] = _resize(image, height, width)
    return canvas


def _resize(image: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Area averages along the axes that shrink, then linear interpolation along those that grow."""
    shrunk = min(width, image.shape[1]), min(height, image.shape[0])
    image = cv2.resize(image, shrunk, interpolation=cv2.INTER_AREA)  # type: ignore[assignment]
    if shrunk != (width, height):
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)  # type: ignore[assignment]
    return image


def canvas_geometry(stored: tuple[int, int], size: tuple[int, int], how: Fit) -> tuple[float, float, int]:
    """Scales and top offset of `to_canvas`: canvas x = across * stored x, canvas y = down * stored y + top.

    `stored` is (h, w), `size` (H, W), in pixels.
    """
    across, down = size[1] / stored[1], size[0] / stored[0]
    if how == "letterbox":
        across = down = min(across, down)
    return across, down, (size[0] - max(1, round(stored[0] * down))) // 2


def fit_box(box: Box, stored: tuple[int, int], size: tuple[int, int], how: Fit) -> Box:
    """(x0, y0, x1, y1) in pixels of the stored image (height, width) -> in those of the canvas (H, W)."""
    across, down, top = canvas_geometry(stored, size, how)
    x0, y0, x1, y1 = box
    return across * x0, down * y0 + top, across * x1, down * y1 + top


def canvas_extent(stored: tuple[int, int], size: tuple[int, int], how: Fit) -> tuple[int, int, int]:
    """The part of the canvas that `to_canvas` fills, (top, height, width) in whole pixels; it starts at the left."""
    across, down, top = canvas_geometry(stored, size, how)
    return top, max(1, round(stored[0] * down)), max(1, round(stored[1] * across))


def inferno(levels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """uint8 [h, w] -> BGR uint8 [h, w, 3] of matplotlib's "inferno", for maps over images: 0 black, 255 pale yellow."""
    return np.asarray(cv2.applyColorMap(levels, cv2.COLORMAP_INFERNO), dtype=np.uint8)

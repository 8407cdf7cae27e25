"""An image as its page shows it: hung as a radiologist does, as a JPEG of a browser's size, with its maps.

The chest wall of a right breast is at the right and that of a left one at the left, whatever the file has; an image
whose side is not known is as in its file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from mama.data.images import BACKGROUND, canvas_extent, inferno
from mama.evaluate.arrays import Float32s
from mama.evaluate.localisation import patch_means
from mama.evaluate.smooth_maps import at_points
from mama.predict.neighbours import Neighbour
from mama.predict.seen import Seen
from mama.report.figures import data_uri
from mama.report.pictures import jpeg
from mama.settings.schema import Fit
from shards.image.crop import chest_wall_is_right

LONG_SIDE = 1000  # pixels of a picture at most
MAP_SIDE = 256  # pixels of a map, several a patch; the browser enlarges it smoothly
THUMBNAIL_SIDE = 200  # of a neighbour


@dataclass(frozen=True)
class ShownNeighbour:
    """A neighbour with its picture as a `data:` URI."""

    picture: str
    cosine: float
    facts: list[str]
    key: str


@dataclass(frozen=True)
class Shown:
    """A picture as a `data:` URI, and where in the original it lies.

    `region` (x0, y0, x1, y1) is in pixels of the original. `maps` [h, w] lie over the picture, NaN without tissue.
    """

    picture: str
    region: tuple[float, float, float, float]
    mirrored: bool  # against the file
    maps: dict[str, NDArray[np.float32]]
    neighbours: list[ShownNeighbour]

    @property
    def extent(self) -> tuple[float, float]:
        """Height and width in pixels of the original."""
        return self.region[3] - self.region[1], self.region[2] - self.region[0]

    def place(self, box: Sequence[float]) -> tuple[float, float, float, float]:
        """A box in pixels of the original -> (x, y, width, height) in the picture, of `extent`."""
        x0, y0, x1, y1 = box
        x = self.region[2] - x1 if self.mirrored else x0 - self.region[0]
        return x, y0 - self.region[1], x1 - x0, y1 - y0


def shown(seen: Seen, maps: Mapping[str, Float32s], fit: Fit, near: Sequence[Neighbour] = ()) -> Shown:
    """What the page needs of an image, small enough to be kept for many; `maps` [gh, gw] are those of sentences."""
    (height, width), (a, _, tx, _, d, ty) = seen.stored.shape, seen.to_original
    mirror = _mirror(seen.stored, seen.flipped, seen.laterality)
    x0, x1 = sorted((tx, a * width + tx))
    over = {}
    for sentence, values in maps.items():
        lying = _over_picture(values, seen, fit)
        over[sentence] = lying[:, ::-1] if mirror else lying
    return Shown(
        _picture(seen.stored, mirror, LONG_SIDE),
        (x0, ty, x1, d * height + ty),
        mirror != seen.flipped,
        over,
        [_neighbour(one) for one in near],
    )


def overlay(values: NDArray[np.float32], low: float, high: float) -> str:
    """A map as a `data:` URI in false colours: transparent at `low` and without tissue, opaque at `high`."""
    share = (values.astype(np.float32) - low) / (high - low) if high > low else np.zeros(values.shape, np.float32)
    levels = np.rint(255 * np.clip(np.nan_to_num(share), 0, 1)).astype(np.uint8)
    pixels = np.dstack([inferno(levels), levels])
    return data_uri("image/png", cv2.imencode(".png", pixels)[1].tobytes())


def _mirror(stored: NDArray[np.uint8], flipped: bool, laterality: str | None) -> bool:
    """Whether the stored picture must be mirrored to hang as it should."""
    if laterality is None:
        return flipped
    tissue = np.where(stored > BACKGROUND, 255, 0).astype(np.uint8)
    at_right = not flipped and chest_wall_is_right(tissue, laterality)
    return at_right != (laterality == "R")


def _picture(stored: NDArray[np.uint8], mirror: bool, long_side: int) -> str:
    scale = min(1.0, long_side / max(stored.shape))
    size = max(1, round(stored.shape[1] * scale)), max(1, round(stored.shape[0] * scale))
    pixels = cv2.resize(stored, size, interpolation=cv2.INTER_AREA)
    return jpeg(np.ascontiguousarray(pixels[:, ::-1] if mirror else pixels).astype(np.uint8))


def _over_picture(values: Float32s, seen: Seen, fit: Fit) -> NDArray[np.float32]:
    """A map [gh, gw], smooth between the patches of tissue, where the stored picture lies on the canvas."""
    (height, width), canvas = seen.stored.shape, (seen.canvas.shape[0], seen.canvas.shape[1])
    top, tall, wide = canvas_extent((height, width), canvas, fit)
    tissue = patch_means(seen.canvas, (values.shape[0], values.shape[1])) > BACKGROUND
    scale = MAP_SIDE / max(height, width)
    rows, columns = max(1, round(height * scale)), max(1, round(width * scale))
    y = (top + (np.arange(rows) + 0.5) / rows * tall) / canvas[0] * values.shape[0]
    x = (np.arange(columns) + 0.5) / columns * wide / canvas[1] * values.shape[1]
    return at_points(np.where(tissue, values, np.float32("nan")), y, x)


def _neighbour(one: Neighbour) -> ShownNeighbour:
    mirror = _mirror(one.pixels, one.flipped, one.laterality)
    return ShownNeighbour(_picture(one.pixels, mirror, THUMBNAIL_SIDE), one.cosine, one.facts, one.key)

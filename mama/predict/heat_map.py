"""Heat maps: the cosine of a sentence with each patch of an image, back in the pixels of the original file.

The cosines are those that the evaluation measures (`mama.evaluate.localisation`). A map has one value a patch. In the
pixels of the original it is smooth as there (`mama.evaluate.smooth_maps`): bilinear between the centres of patches as
they lie in the original. Where the model saw no tissue, outside of the breast's crop and in patches of background,
there is no value.

Letters: b images, s sentences, gh x gw patches of the canvas H x W, H0 x W0 pixels of the original.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mama.data.images import BACKGROUND, canvas_extent
from mama.data.tokenizer import Tokenizer
from mama.errors import ConfigError
from mama.evaluate import boxes
from mama.evaluate.arrays import Float32s, Float64s, Ints
from mama.evaluate.localisation import (
    asked_sentence,
    cosines_with,
    on_grid,
    patch_grid,
    patch_means,
    sentence_vectors,
)
from mama.evaluate.smooth_maps import at_points
from mama.model.mama_model import MamaModel
from mama.predict.seen import Seen
from mama.settings.schema import Fit, Style

LEVELS = 254  # of a PNG between the lowest and the highest patch, which are 1 and 255; 0: no value
OUTSIDE = -1  # no patch


@dataclass(frozen=True)
class Marks:
    """Range, highest patch and its surroundings of a map; coordinates are those of the original file.

    `low` and `high` are the lowest and the highest patch: no pixel of the smooth map is beyond them. `peak` is the
    pixel (x, y) in the middle of the highest patch. `box` (x0, y0, x1, y1), x1 and y1 excluded, holds all pixels of the
    mark of this peak (`mama.evaluate.boxes.marks`): of the patches that sides connect with it from half way between the
    median and it on. A map that is the same everywhere, or as high as its peak in more than half of its patches, has
    neither.
    """

    low: float
    high: float
    peak: tuple[int, int] | None
    box: tuple[int, int, int, int] | None


def has_maps(model: MamaModel) -> bool:
    """Whether the model was trained with the local term (`loss.local`), without which no patch has an embedding."""
    return model.patch_head is not None


@torch.inference_mode()
def asked_vectors(
    model: MamaModel,
    tokenizer: Tokenizer,
    sentences: Sequence[str],
    max_tokens: int,
    device: torch.device,
    style: Style,
) -> Tensor:
    """Unit embeddings [s, D] of sentences that maps are asked for, of a model that `has_maps`.

    A sentence is read in the place that the model knows for it, as in the evaluation: by itself (`text.sentences`), or
    in a report text of the training `style` (`data.style`) of which nothing else is known. Raises `ConfigError` for one
    that does not fit in `max_tokens` there.
    """
    by_itself = model.reads_alone
    asked = [((words,), 0) if by_itself else asked_sentence(words, style) for words in sentences]
    for text, number in asked:
        needed = len(tokenizer.encode(list(text[: number + 1]), sys.maxsize).tokens)
        if needed > max_tokens:
            before = "with the text before it, " if number else ""
            raise ConfigError(
                f"{text[number][:40]!r}: {before}it has {needed} tokens, and the model reads {max_tokens}; shorten it"
            )
    return sentence_vectors(model, tokenizer, asked, max_tokens, device)


@torch.inference_mode()
def embed_with_maps(model: MamaModel, pixels: Tensor, asked: Tensor) -> tuple[Tensor, Tensor, Float32s]:
    """`MamaModel.embed_images` of [b, 1, H, W], and from the same pass the maps [b, s, gh, gw].

    These are the cosines of the sentences `asked` [s, D] with the patches.
    """
    unit, tower, patches = model.embed_images_and_patches(pixels)
    grid = patch_grid(model, (pixels.shape[2], pixels.shape[3]))
    return unit, tower, on_grid(cosines_with(asked, patches), grid)


def to_original(values: Float32s, seen: Seen, canvas_size: tuple[int, int], fit: Fit) -> Float32s:
    """A map [gh, gw] in the pixels of the original file, [H0, W0]; NaN where it has no value.

    `canvas_size` (H, W) and `fit` are those of the model.
    """
    down, across = _axes(values.shape, seen, canvas_size, fit)
    tissue = _tissue(seen, down, across)
    return at_points(np.where(tissue, values, np.float32("nan")), down.points(), across.points())


def marks(values: Float32s, seen: Seen, canvas_size: tuple[int, int], fit: Fit) -> Marks | None:
    """What stands out in a map [gh, gw], by the rule of `mama.evaluate.detection`; None if no patch has a value."""
    down, across = _axes(values.shape, seen, canvas_size, fit)
    tissue = _tissue(seen, down, across)
    if not tissue.any():
        return None
    low, high = float(values[tissue].min()), float(values[tissue].max())
    found, scores = boxes.marks(values, tissue, values.shape)  # boxes in patches
    if not len(scores):
        return Marks(low, high, None, None)
    left, top, right, bottom = (int(side) for side in found[0])
    row, column = np.unravel_index(np.where(tissue, values, -np.inf).argmax(), values.shape)
    (x0, x1), (y0, y1) = across.span(left, right), down.span(top, bottom)
    return Marks(low, high, (across.middle(int(column)), down.middle(int(row))), (x0, y0, x1, y1))


def map_png(values: Float32s, low: float, high: float) -> bytes:
    """A map of any size as an 8-bit grey PNG: 1 is `low`, 255 is `high` (of its `marks`), 0 is where it has no value.

    So value = low + (grey - 1) / 254 x (high - low). There is no value beyond.
    """
    levels = np.zeros(values.shape, np.uint8)
    inside = np.isfinite(values)
    step = (high - low) / LEVELS or 1.0
    levels[inside] = 1 + np.rint((values[inside] - low) / step).astype(np.uint8)
    return cv2.imencode(".png", levels)[1].tobytes()


@dataclass(frozen=True)
class _Axis:
    """Rows or columns on their way: pixels of the original -> of the stored image -> of the canvas -> patches."""

    original: int
    slope: float  # original = slope * stored + start
    start: float
    stored: int
    fitted: int  # pixels of the canvas that the stored image fills, from `first` on
    first: int
    patch: float  # pixels of the canvas
    count: int  # of patches

    def points(self) -> Float64s:
        """For each pixel of the original where its centre lies, in patches; NaN outside of the stored image."""
        stored = (np.arange(self.original) + 0.5 - self.start) / self.slope
        on_canvas = self.first + stored * self.fitted / self.stored
        return np.where((stored >= 0) & (stored < self.stored), on_canvas / self.patch, np.nan)

    def patches(self) -> Ints:
        """For each pixel of the original the patch that saw its centre, or `OUTSIDE`."""
        points = self.points()
        inside = ~np.isnan(points)
        patches = np.minimum(np.where(inside, points, 0), self.count - 1).astype(np.int64)
        return np.where(inside, patches, OUTSIDE)

    def middle(self, patch: int) -> int:
        """The middle one of the pixels of the original whose centre a patch saw."""
        own = np.flatnonzero(self.patches() == patch)
        return int(own[0] + own[-1]) // 2

    def span(self, first: int, past: int) -> tuple[int, int]:
        """The pixels of the original, from and to but without, of which the patches `first` to `past` saw any part."""
        scale = self.stored / self.fitted
        more = max(0.0, (1 - scale) / 2)  # interpolation, where the canvas is larger, looks at the pixel beside
        low = np.floor(round((first * self.patch - self.first) * scale - more, 6))
        high = np.ceil(round((past * self.patch - self.first) * scale + more, 6))
        ends = sorted(self.slope * end + self.start for end in np.clip([low, high], 0, self.stored))
        start, end = np.clip([np.floor(round(ends[0], 6)), np.ceil(round(ends[1], 6))], 0, self.original)
        return int(start), int(end)


def _axes(grid: tuple[int, ...], seen: Seen, canvas_size: tuple[int, int], fit: Fit) -> tuple[_Axis, _Axis]:
    """Down and across."""
    (height, width), (a, _, tx, _, d, ty) = seen.stored.shape, seen.to_original
    top, tall, wide = canvas_extent((height, width), canvas_size, fit)
    return (
        _Axis(seen.original_size[0], d, ty, height, tall, top, canvas_size[0] / grid[0], grid[0]),
        _Axis(seen.original_size[1], a, tx, width, wide, 0, canvas_size[1] / grid[1], grid[1]),
    )


def _tissue(seen: Seen, down: _Axis, across: _Axis) -> NDArray[np.bool_]:
    """The patches [gh, gw] of tissue, of those that saw the centre of a pixel of the original."""
    tissue: NDArray[np.bool_] = patch_means(seen.canvas, (down.count, across.count)) > BACKGROUND
    rows, columns = np.zeros(down.count, bool), np.zeros(across.count, bool)
    for axis, reached in ((down, rows), (across, columns)):
        own = axis.patches()
        reached[own[own != OUTSIDE]] = True
    return tissue & rows[:, None] & columns

"""Mammograms of the report as JPEG: thumbnails, and local alignment maps over the image."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
from numpy.typing import NDArray

from mama.data.held_out import Split
from mama.data.images import canvas_geometry, inferno
from mama.errors import ConfigError
from mama.evaluate import provenance, retrieval
from mama.evaluate.provenance import Document
from mama.evaluate.smooth_maps import smooth
from mama.report.figures import data_uri
from mama.settings.schema import Config
from shards.errors import ShardError
from shards.schema import Box

HEAT_MAP_HEIGHT = 480  # pixels at least, of the canvas
THUMBNAIL_HEIGHT = 200
BOX_COLOUR = (255, 230, 40)  # BGR: cyan, a colour that the colour map does not have


class Pictures:
    """Images of the evaluated split by key, read when the page needs one.

    A picture whose image cannot be read any more is None.
    """

    def __init__(self, config: Config) -> None:
        self.split = Split(config, config.eval.split)
        self.by_key = {item.key: item for item in self.split.items}

    def thumbnail(self, key: str) -> str | None:
        """The stored image, `THUMBNAIL_HEIGHT` high."""
        try:
            pixels = self.split.stored(self.by_key[key])
        except (ShardError, OSError, KeyError):
            return None
        width = max(1, round(pixels.shape[1] * THUMBNAIL_HEIGHT / pixels.shape[0]))
        return jpeg(np.asarray(cv2.resize(pixels, (width, THUMBNAIL_HEIGHT), interpolation=cv2.INTER_AREA), np.uint8))

    def facts(self, key: str) -> list[str]:
        """Side, view, labels and findings of the image, in short; none if it is not there any more."""
        return retrieval.facts(self.by_key[key].view) if key in self.by_key else []

    def heat_map(self, key: str, boxes: list[Box], values: NDArray[np.float32]) -> Document | None:
        """The image with its `boxes`, in pixels of the canvas, and the same under the map `values` [gh, gw].

        The map is NaN, and the image bare, where no patch was computed.
        Both are enlarged, and without the background that the letterbox added.
        """
        height, width = self.split.size
        scale = max(1, -(-HEAT_MAP_HEIGHT // height))
        try:
            stored = self.split.stored(self.by_key[key])
            fitted = self.split.pixels(self.by_key[key], scale)
        except (ShardError, OSError, KeyError):
            return None
        across, down, top = canvas_geometry((stored.shape[0], stored.shape[1]), (height, width), self.split.images.fit)
        rows = slice(scale * top, scale * (top + round(stored.shape[0] * down)))
        columns = slice(0, scale * round(stored.shape[1] * across))
        scaled = [(scale * x0, scale * y0, scale * x1, scale * y1) for x0, y0, x1, y1 in boxes]
        return {
            "plain": jpeg(draw_boxes(fitted, scaled)[rows, columns]),
            "heat": jpeg(draw_boxes(blend(fitted, values), scaled)[rows, columns]),
            "smallest": float(np.nanmin(values)),
            "largest": float(np.nanmax(values)),
        }


def open_pictures(config: Config, marker: Document) -> Pictures | None:
    """The evaluated images, in `data.shards` or where they were when evaluated; None if they are in neither place.

    `marker` is the `complete.json` of the evaluation.
    """
    settings = marker["settings"]
    for places in (config.data.shards, marker["places"]):
        fitted = {"image_size": tuple(settings["image_size"]), "fit": settings.get("fit", config.data.fit)}
        data = replace(config.data, shards=places, shard_weights=[], **fitted)
        there = replace(config, data=data, eval=replace(config.eval, split=marker["shards"]["split"]))
        try:
            if provenance.shard_set(there)["digest"] == marker["shards"]["digest"]:
                return Pictures(there)
        except (ConfigError, ShardError, OSError):
            continue
    return None


def jpeg(pixels: NDArray[np.uint8]) -> str:
    """A grey [h, w] or BGR [h, w, 3] image as a `data:` URI."""
    return data_uri("image/jpeg", cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 88])[1].tobytes())


def draw_boxes(pixels: NDArray[np.uint8], boxes: list[Box]) -> NDArray[np.uint8]:
    """Grey [h, w] or BGR [h, w, 3] -> BGR with the outlines of `boxes`."""
    coloured = cv2.cvtColor(pixels, cv2.COLOR_GRAY2BGR) if pixels.ndim == 2 else pixels.copy()
    for x0, y0, x1, y1 in boxes:
        cv2.rectangle(coloured, (round(x0), round(y0)), (round(x1), round(y1)), BOX_COLOUR, 2, cv2.LINE_AA)
    return np.asarray(coloured, dtype=np.uint8)


def blend(pixels: NDArray[np.uint8], values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The map `values` [gh, gw] over grey [h, w] as BGR: transparent at its minimum, bright at its maximum.

    It is smooth (`mama.evaluate.smooth_maps`). Where it is NaN the picture stays as it is.
    """
    low, span = float(np.nanmin(values)), float(np.nanmax(values) - np.nanmin(values))
    drawn = smooth(values, (pixels.shape[0], pixels.shape[1]))
    shares = np.nan_to_num((drawn - low) / span) if span > 0 else np.zeros_like(drawn)
    colours = inferno(np.rint(shares * 255).astype(np.uint8)).astype(np.float32)
    opacity = 0.75 * shares[..., None]
    grey = np.repeat(pixels[..., None], 3, axis=2).astype(np.float32)
    return np.asarray(np.rint(grey * (1 - opacity) + colours * opacity), dtype=np.uint8)

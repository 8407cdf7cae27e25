"""Pointing: whether the map of the sentence that names a finding is high in its box, and low in the rest of the breast.

Letters: t targets, gh x gw patches of an image.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mama.data.held_out import Item
from mama.data.images import BACKGROUND
from mama.evaluate import bootstrap
from mama.evaluate.arrays import Flags, Float32s, Float64s
from mama.evaluate.boxes import Lesion, Stratum, strata
from mama.evaluate.smooth_maps import smooth
from mama.settings.schema import Config
from shards.schema import Box

BESIDE = {"hit": 1, "strict_hit": 0}  # patches around a box that count as a hit


@dataclass(frozen=True)
class Target:
    """A sentence about a finding in one image, number `row` of the split, and the finding's lesions."""

    row: int
    item: Item
    text: list[str]
    sentence: int
    lesions: tuple[Lesion, ...]

    @property
    def boxes(self) -> tuple[Box, ...]:
        """The boxes of the lesions, in pixels of the canvas."""
        return tuple(lesion.box for lesion in self.lesions)


def document(
    maps: dict[str, Float32s], grey: Float32s, targets: list[Target], size: tuple[int, int], config: Config
) -> dict[str, Any]:
    """Hit rates and box AUC over the targets with boxes, and by kind and size of lesion.

    `maps` [t, gh, gw] are those of each model, `grey` the mean grey values of the same patches; a patch whose value is
    NaN was not computed, as it holds no tissue, and is never the highest. A hit is a map whose highest patch lies in a
    box or next to it, a strict one overlaps the box itself; `chance` and `strict_chance` are the mean shares of tissue
    patches that would be one. Source: Zhang et al., "Top-down neural attention by excitation backprop", 2018,
    section 4.2. The box AUC is that of the pixels of tissue, those in the boxes against all others, by the smooth map
    of the tissue patches (`mama.evaluate.smooth_maps`).
    """
    boxed = [i for i, target in enumerate(targets) if target.lesions]
    if not boxed:
        return {"findings": 0, "rows": [], "strata": [], "patients": 0, "reason": "no finding of this split has a box"}
    own = [targets[i] for i in boxed]
    scores = {name: values[boxed] for name, values in {**maps, "brightest patch": grey}.items()}
    areas = {name: _Areas(values, grey[boxed], own, size) for name, values in scores.items()}
    kinds = strata([lesion for target in own for lesion in target.lesions])
    measured = [
        {"by": one.by, "name": one.name} | _measure(scores, areas, grey[boxed], own, one, size, config) for one in kinds
    ]
    whole = {key: value for key, value in measured[0].items() if key not in ("by", "name")}
    return whole | {"strata": measured[1:]}


def _measure(
    scores: dict[str, Float32s],
    areas: dict[str, _Areas],
    grey: Float32s,
    targets: list[Target],
    kept: Stratum,
    size: tuple[int, int],
    config: Config,
) -> dict[str, Any]:
    """Of the targets with a lesion of the stratum `kept`, where only its lesions are to be pointed at."""
    rows = [i for i, target in enumerate(targets) if any(map(kept.holds, target.lesions))]
    patients = [targets[i].item.study.patient for i in rows]
    grid, cells = (grey.shape[1], grey.shape[2]), grey[0].size
    own = [tuple(lesion.box for lesion in targets[i].lesions if kept.holds(lesion)) for i in rows]
    tissue = grey[rows].reshape(-1, cells) > BACKGROUND
    regions = {
        key: np.array([region(boxes, size, grid, beside) for boxes in own], bool).reshape(-1, cells)
        for key, beside in BESIDE.items()
    }
    found = []
    for name, values in scores.items():
        flat = values[rows].reshape(-1, cells)
        peaks = np.nanargmax(flat, 1)
        hits = {key: of[np.arange(len(rows)), peaks].astype(np.float64) for key, of in regions.items()}
        figures = {f"{key}_rate": each for key, each in hits.items()}
        figures["box_auc"] = np.array([areas[name].of(i, boxes) for i, boxes in zip(rows, own, strict=True)])
        found.append({"model": name} | {key: _mean(each, patients, config) for key, each in figures.items()})
    chances = {key: (of & tissue).sum(1) / np.maximum(tissue.sum(1), 1) for key, of in regions.items()}
    chance, strict = (float(shares.mean()) if rows else None for shares in chances.values())
    counts = {"findings": len(rows), "rows": found, "patients": len(set(patients))}
    return counts | {"chance": chance, "strict_chance": strict}


def _mean(values: Float64s, patients: list[str], config: Config) -> dict[str, Any]:
    """Over the targets whose value is defined."""
    defined = np.flatnonzero(~np.isnan(values))
    own = [patients[i] for i in defined]
    return asdict(bootstrap.mean(values[defined], own, config.eval.bootstrap, config.seed))


def region(boxes: tuple[Box, ...], size: tuple[int, int], grid: tuple[int, int], beside: int) -> Flags:
    """Flags [gh, gw] of the patches that overlap a box, or lie up to `beside` patches from one that does.

    Boxes are in pixels of the canvas (H, W).
    """
    inside = np.zeros(grid, dtype=bool)
    tall, wide = size[0] / grid[0], size[1] / grid[1]
    for x0, y0, x1, y1 in boxes:
        top, bottom = max(0, int(y0 // tall) - beside), int(np.ceil(y1 / tall)) + beside
        left, right = max(0, int(x0 // wide) - beside), int(np.ceil(x1 / wide)) + beside
        inside[top:bottom, left:right] = True
    return inside


class _Areas:
    """Box AUCs of a model's maps [t, gh, gw] of targets, of any of the boxes of each.

    Most targets have one box, whichever stratum it is looked at in: each AUC is computed once.
    """

    def __init__(self, values: Float32s, grey: Float32s, targets: list[Target], size: tuple[int, int]) -> None:
        self.values, self.targets, self.size = np.where(grey > BACKGROUND, values, np.float32("nan")), targets, size
        self.known: dict[tuple[int, tuple[Box, ...]], float] = {}

    def of(self, target: int, boxes: tuple[Box, ...]) -> float:
        """That of the pixels in these `boxes` of a target against those in none of its boxes."""
        if (target, boxes) not in self.known:
            self.known[target, boxes] = self._measure(target, boxes)
        return self.known[target, boxes]

    def _measure(self, target: int, boxes: tuple[Box, ...]) -> float:
        pixels = smooth(self.values[target], self.size)
        tissue = ~np.isnan(pixels)
        all_boxes = touched(self.targets[target].boxes, self.size)
        return pixel_auc(pixels[tissue & touched(boxes, self.size)], pixels[tissue & ~all_boxes])


def touched(boxes: tuple[Box, ...], size: tuple[int, int]) -> Flags:
    """Flags [H, W] of the pixels that a box touches; boxes in pixels of the canvas (H, W)."""
    pixels = np.zeros(size, bool)
    for x0, y0, x1, y1 in boxes:
        pixels[max(0, int(y0)) : int(np.ceil(y1)), max(0, int(x0)) : int(np.ceil(x1))] = True
    return pixels


def pixel_auc(inside: Float32s, outside: Float32s) -> float:
    """P(value of a pixel inside > of one outside) + P(equal) / 2; NaN if there is none of one kind.

    The smaller side is looked up in the other one, which is sorted: O(n log n) for n pixels.
    """
    pairs = len(inside) * len(outside)
    if not pairs:
        return float("nan")
    ordered = np.sort(outside)
    below, not_above = (np.searchsorted(ordered, inside, side) for side in ("left", "right"))
    return float((below.sum() + not_above.sum()) / (2 * pairs))

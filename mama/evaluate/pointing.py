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

BRIGHTEST = "brightest patch"  # its map are mean grey values
BESIDE = {"hit_rate": 1, "strict_hit_rate": 0}  # patches around a box that count as a hit
CHANCES = {"hit_rate": "chance", "strict_hit_rate": "strict_chance"}


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
    """Hit rates and box AUC over the targets with boxes, and by kind, size and pathology.

    `maps` [t, gh, gw] are those of each model, `grey` the mean grey values of the same patches; a patch whose value is
    NaN was not computed, as it holds no tissue, and is never the highest. A hit is a map whose highest patch lies in a
    box or next to it, a strict one overlaps the box itself; `chance` and `strict_chance` are the mean shares of tissue
    patches that would be one. Source: Zhang et al., "Top-down neural attention by excitation backprop", 2018, section
    4.2. `differences` are those of the trained model to the brightest patch, in the same images. The box AUC is that of
    the pixels of tissue, those in the boxes against all others, by the smooth map of the tissue patches
    (`mama.evaluate.smooth_maps`).
    """
    boxed = [i for i, target in enumerate(targets) if target.lesions]
    if not boxed:
        reason = "no finding of this split has a box"
        return {"findings": 0, "rows": [], "differences": [], "strata": [], "patients": 0, "reason": reason}
    own, tissue = [targets[i] for i in boxed], grey[boxed] > BACKGROUND
    pointed = {name: Pointed(of[boxed], tissue, own, size) for name, of in {**maps, BRIGHTEST: grey}.items()}
    kinds = strata([lesion for target in own for lesion in target.lesions])
    whole, *parts = [
        {"by": one.by, "name": one.name} | _measure(pointed, tissue, own, one, size, config) for one in kinds
    ]
    del whole["by"], whole["name"]
    differences = []
    if "trained" in pointed:
        ours, theirs = (pointed[name].figures() for name in ("trained", BRIGHTEST))
        against = difference(ours, theirs, [target.item.study.patient for target in own], config)
        differences = [{"model": "trained", "against": BRIGHTEST} | against]
    return whole | {"differences": differences, "strata": parts}


def _measure(
    pointed: dict[str, Pointed],
    tissue: Flags,
    targets: list[Target],
    kept: Stratum,
    size: tuple[int, int],
    config: Config,
) -> dict[str, Any]:
    """Of the targets with a lesion of the stratum `kept`, where only its lesions are to be pointed at."""
    rows = [i for i, target in enumerate(targets) if any(map(kept.holds, target.lesions))]
    patients = [targets[i].item.study.patient for i in rows]
    own = {i: tuple(lesion.box for lesion in targets[i].lesions if kept.holds(lesion)) for i in rows}
    found = [
        {"model": name} | {key: estimate(each, patients, config) for key, each in one.figures(own).items()}
        for name, one in pointed.items()
    ]
    counts = {"findings": len(rows), "rows": found, "patients": len(set(patients))}
    for key, beside in BESIDE.items():
        shares = [
            (region(boxes, size, tissue[i].shape, beside) & tissue[i]).sum() / max(1, tissue[i].sum())
            for i, boxes in own.items()
        ]
        counts[CHANCES[key]] = float(np.mean(shares)) if rows else None
    return counts


def estimate(values: Float64s, patients: list[str], config: Config) -> dict[str, Any]:
    """The mean over the targets whose value is defined."""
    defined = np.flatnonzero(~np.isnan(values))
    own = [patients[i] for i in defined]
    return asdict(bootstrap.mean(values[defined], own, config.eval.bootstrap, config.seed))


def difference(
    ours: dict[str, Float64s], theirs: dict[str, Float64s], patients: list[str], config: Config
) -> dict[str, Any]:
    """Our figures minus theirs [t], of the same targets with these `patients`: the mean where both are defined."""
    found = {}
    for key, values in ours.items():
        both = np.flatnonzero(~np.isnan(values + theirs[key]))
        own = [patients[i] for i in both]
        paired = values[both], theirs[key][both]
        found[key] = asdict(bootstrap.mean_difference(*paired, own, config.eval.bootstrap, config.seed))
    return found


class Pointed:
    """What the maps [t, gh, gw] of a model point at, in images with so much `tissue` [t, gh, gw].

    Most targets have one box, whichever stratum it is looked at in: each box AUC is computed once.
    """

    def __init__(self, values: Float32s, tissue: Flags, targets: list[Target], size: tuple[int, int]) -> None:
        self.values, self.tissue, self.targets, self.size = values, tissue, targets, size
        self.areas: dict[tuple[int, tuple[Box, ...]], float] = {}

    def figures(self, wanted: dict[int, tuple[Box, ...]] | None = None) -> dict[str, Float64s]:
        """Hits of 0 and 1, strict ones, and box AUCs (NaN: undefined), of each of the targets [t].

        `wanted` has the boxes to be pointed at for some of the targets; None: all boxes of all.
        """
        if wanted is None:
            wanted = {i: target.boxes for i, target in enumerate(self.targets)}
        found: dict[str, Float64s] = {}
        for key, beside in BESIDE.items():
            hits = [self._peaks_in(i, region(boxes, self.size, self._grid, beside)) for i, boxes in wanted.items()]
            found[key] = np.array(hits, np.float64)
        return found | {"box_auc": np.array([self._area(*one) for one in wanted.items()], np.float64)}

    @property
    def _grid(self) -> tuple[int, int]:
        return self.values.shape[1], self.values.shape[2]

    def _peaks_in(self, target: int, patches: Flags) -> bool:
        return bool(patches.ravel()[np.nanargmax(self.values[target])])

    def _area(self, target: int, boxes: tuple[Box, ...]) -> float:
        """That of the pixels in these `boxes` of a target against those in none of its boxes."""
        if (target, boxes) not in self.areas:
            pixels = smooth(np.where(self.tissue[target], self.values[target], np.float32("nan")), self.size)
            tissue, others = ~np.isnan(pixels), ~touched(self.targets[target].boxes, self.size)
            area = pixel_auc(pixels[tissue & touched(boxes, self.size)], pixels[tissue & others])
            self.areas[target, boxes] = area
        return self.areas[target, boxes]


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


def touched(boxes: tuple[Box, ...], size: tuple[int, int]) -> Flags:
    """Flags [H, W] of the pixels that a box touches; boxes in pixels of the canvas (H, W)."""
    pixels = np.zeros(size, bool)
    for x0, y0, x1, y1 in boxes:
        pixels[max(0, int(y0)) : int(np.ceil(y1)), max(0, int(x0)) : int(np.ceil(x1))] = True
    return pixels


def pixel_auc(inside: Float32s, outside: Float32s) -> float:
    """P(value of a pixel inside > of one outside) + P(equal) / 2; NaN if there is none of one kind.

    Those inside are looked up among those outside, which are sorted: O(n log n) for n pixels.
    """
    pairs = len(inside) * len(outside)
    if not pairs:
        return float("nan")
    ordered = np.sort(outside)
    below, not_above = (np.searchsorted(ordered, inside, side) for side in ("left", "right"))
    return float((below.sum() + not_above.sum()) / (2 * pairs))

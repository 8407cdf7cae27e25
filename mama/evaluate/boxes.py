"""Lesions with a box, boxes marked from a map, and which mark finds which lesion.

Boxes are (x0, y0, x1, y1) in pixels of the canvas (H, W). Letters: gh x gw patches of an image, l lesions, m marks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from mama.data.images import fit_box
from mama.evaluate.arrays import Flags, Float32s, Float64s, Ints
from mama.settings.schema import Fit
from shards.schema import Box, Finding, View

SHARE = 0.5  # of a peak's height above the median over tissue: patches from there on belong to its mark
NONE = -1  # no lesion
MILLIMETRES, PERCENT = "mm", "% of the image's height"
PATHOLOGIES = ("benign", "malignant")  # the worst last
LIMITS = {MILLIMETRES: (10, 20), PERCENT: (5, 10)}  # between small, middle and large lesions


@dataclass(frozen=True)
class Lesion:
    """A finding with a box. `side` is the longer side of the box in percent of the stored image's height.

    `millimetres` is the same side in mm, None if the pixel spacing is unknown. `pathology` is benign or malignant.
    """

    box: Box
    kind: str
    side: float
    millimetres: float | None
    pathology: str | None = None


@dataclass(frozen=True)
class Stratum:
    """Lesions of one kind or size; `by` is "all", "kind", "size" or "pathology"."""

    by: str
    name: str
    holds: Callable[[Lesion], bool]


ALL = Stratum("all", "all", lambda lesion: True)


def lesions(view: View, findings: Sequence[Finding], size: tuple[int, int], how: Fit) -> tuple[Lesion, ...]:
    """The lesions among the `findings` of an image; findings in one box, as a mass with a distortion, are one lesion.

    Its kind is that of the first of them; it is malignant if one of them is. `size` is that of the canvas.
    """
    of_box: dict[Box, list[Finding]] = {}
    for finding in findings:
        if finding.box:
            of_box.setdefault(finding.box, []).append(finding)
    found = []
    for box, told in of_box.items():
        x0, y0, x1, y1 = box
        percent = 100 * max(x1 - x0, y1 - y0) / view.size[0]
        worst = max((one.pathology for one in told if one.pathology), key=PATHOLOGIES.index, default=None)
        canvas_box = fit_box(box, view.size, size, how)
        found.append(Lesion(canvas_box, told[0].kind, percent, _millimetres(view, box), worst))
    return tuple(found)


def _millimetres(view: View, box: Box) -> float | None:
    if view.pixel_spacing is None:
        return None
    across, down = abs(view.to_original[0]) * view.pixel_spacing[1], view.to_original[4] * view.pixel_spacing[0]
    return max(across * (box[2] - box[0]), down * (box[3] - box[1]))


def strata(found: Sequence[Lesion]) -> list[Stratum]:
    """All lesions, each kind that occurs, and three sizes: in mm if all have a pixel spacing, else in percent.

    If the pathology of all is known, also benign and malignant ones.
    """
    told = {lesion.pathology for lesion in found}
    pathologies = () if None in told else (name for name in PATHOLOGIES if name in told)
    kinds = sorted({lesion.kind for lesion in found})
    measured = all(lesion.millimetres is not None for lesion in found)
    unit = MILLIMETRES if measured else PERCENT
    small, large = LIMITS[unit]

    def length(lesion: Lesion) -> float:
        return lesion.millimetres if measured and lesion.millimetres is not None else lesion.side

    return [
        ALL,
        *(Stratum("kind", kind, lambda lesion, kind=kind: lesion.kind == kind) for kind in kinds),  # type: ignore[misc]
        Stratum("size", f"up to {small} {unit}", lambda lesion: length(lesion) <= small),
        Stratum("size", f"{small} to {large} {unit}", lambda lesion: small < length(lesion) <= large),
        Stratum("size", f"over {large} {unit}", lambda lesion: length(lesion) > large),
        *(
            Stratum("pathology", name, lambda lesion, name=name: lesion.pathology == name)  # type: ignore[misc]
            for name in pathologies
        ),
    ]


def marks(values: Float32s, tissue: Flags, size: tuple[int, int]) -> tuple[Float64s, Float64s]:
    """Boxes [m, 4] and scores [m], falling, of the peaks of a map `values` [gh, gw] over `tissue` [gh, gw].

    A peak is a patch above the median that none of the eight around it exceeds: a local maximum of the smooth map
    (`mama.evaluate.smooth_maps`) too, which is bilinear between the centres of patches. Its value is the score. Its box
    encloses the patches that sides connect with it from half of its height above the median on, and corners where both
    are as high as it is. The highest peak takes its patches first; no patch is taken twice, and a peak that is taken
    with a higher one marks nothing.

    Values that are not finite are no tissue. A map that is the same everywhere marks nothing.
    """
    known = tissue & np.isfinite(values)
    if not known.any():
        return np.zeros((0, 4)), np.zeros(0)
    heights = np.pad(np.where(known, values, -np.inf).astype(np.float64), 1, constant_values=-np.inf)
    low = float(np.median(values[known].astype(np.float64)))
    peaks = np.flatnonzero((heights == ndimage.maximum_filter(heights, 3)) & (heights > low))
    tall, wide = size[0] / values.shape[0], size[1] / values.shape[1]
    # Filled over plain floats: SciPy's labels, made anew for each peak, took 20 times as long.
    free, across = heights.ravel().tolist(), heights.shape[1]  # patch n is in row n // across of the padded map
    boxes: list[Box] = []
    scores: list[float] = []
    for peak in peaks[np.argsort(-heights.ravel()[peaks], kind="stable")].tolist():
        score = free[peak]
        if score == -np.inf:  # taken
            continue
        level = low + SHARE * (score - low)
        own, to_visit = [], [peak]
        while to_visit:
            patch = to_visit.pop()
            if (height := free[patch]) >= level:
                free[patch] = -np.inf
                own.append(divmod(patch, across))
                above, below = patch - across, patch + across
                to_visit += above, patch - 1, patch + 1, below
                if height == score:
                    to_visit += [n for n in (above - 1, above + 1, below - 1, below + 1) if free[n] == score]
        rows, columns = zip(*own, strict=True)
        boxes.append(((min(columns) - 1) * wide, (min(rows) - 1) * tall, max(columns) * wide, max(rows) * tall))
        scores.append(score)
    return np.array(boxes, dtype=np.float64).reshape(-1, 4), np.array(scores, dtype=np.float64)


def overlaps(one: Float64s, other: Float64s) -> Float64s:
    """Intersection over union [m, l] of boxes [m, 4] and [l, 4]."""
    low = np.maximum(one[:, None, :2], other[None, :, :2])
    high = np.minimum(one[:, None, 2:], other[None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(1) for boxes in (one, other)]
    union = areas[0][:, None] + areas[1][None] - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def centres_inside(one: Float64s, other: Float64s) -> Flags:
    """Whether the centre of each box [m, 4] lies in each of the other boxes [l, 4], flags [m, l]."""
    centres = ((one[:, :2] + one[:, 2:]) / 2)[:, None]
    inside = (other[None, :, :2] <= centres) & (centres <= other[None, :, 2:])
    return np.asarray(inside.all(axis=2), dtype=bool)


def matched(overlap: Float64s, scores: Float64s, least: float) -> Ints:
    """The lesion that each mark of an image finds [m], or `NONE`, from their overlaps [m, l].

    The marks choose by falling score: each takes the lesion that it overlaps most, by `least` or more, of those that no
    mark before it has taken.
    """
    free = overlap.copy()
    taken = np.full(len(scores), NONE)
    if not free.size:
        return taken
    for mark in np.argsort(-scores, kind="stable"):
        if free[mark].max() >= least:
            taken[mark] = free[mark].argmax()
            free[:, taken[mark]] = -1
    return taken

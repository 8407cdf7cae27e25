"""FROC and average precision of marked boxes, each for many weightings of the images at once.

Letters: n images, l lesions, m marks, f false marks, R weightings (`mama.evaluate.bootstrap`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mama.evaluate.arrays import Flags, Float64s, Ints

ROUNDING = 1e-9


@dataclass(frozen=True)
class Froc:
    """Scores: of each lesion [l] that of the best mark that hits it, else -inf, and of each false mark [f]."""

    found: Float64s
    false: Float64s

    def sensitivities(self, lesions: Float64s, false: Float64s, images: Float64s, rates: tuple[float, ...]) -> Float64s:
        """Weighted share of lesions found with at most `rates` false marks an image, [rates, R]; NaN without a lesion.

        `lesions` [R, l] and `false` [R, f] are weights, `images` [R] the sum of those of all images. The threshold is
        the lowest with so few false marks, so that no point between two marks is invented.
        """
        lowest = self.found[np.isfinite(self.found)].min(initial=np.inf)
        felt = self.false >= lowest  # a threshold below the last lesion finds no more of them
        false = false[:, felt]
        scores, starts, order = _falling(self.false[felt])
        above = _cumulated(false[:, order], starts)  # [R, steps]
        allowed = [(above <= rate * images[:, None] + ROUNDING).sum(1) for rate in rates]  # steps, [R] each
        best = np.argsort(-self.found, kind="stable")
        limits = np.append(scores, -np.inf)
        count = np.searchsorted(-self.found[best], -limits, side="left")  # lesions found above each step
        reached = np.concatenate([np.zeros((len(lesions), 1)), lesions[:, best].cumsum(1)], axis=1)
        rows, total = np.arange(len(lesions)), reached[:, -1]
        shares = [np.divide(reached[rows, count[steps]], total, out=np.full(len(total), np.nan), where=total > 0)
                  for steps in allowed]  # fmt: skip
        return np.stack(shares)


def average_precision(scores: Float64s, true: Flags, marks: Float64s, lesions: Float64s) -> Float64s:
    """Area [R] under the precision over the recall of marks [m] by falling score; NaN without a lesion.

    `true` flags the marks that find a lesion, `marks` [R, m] are weights, `lesions` [R] the sum of those of all
    lesions. At each recall the precision is the best at that recall or a higher one, as PASCAL VOC does since 2010
    (Everingham et al. 2015), and marks of one score are one step.
    """
    felt = scores >= scores[true].min(initial=np.inf)  # below the last true mark the recall does not rise
    scores, true, marks = scores[felt], true[felt], marks[:, felt]
    _, starts, order = _falling(scores)
    hits, all_marks = (_cumulated((marks * flags)[:, order], starts) for flags in (true, np.ones_like(true)))
    precision = np.divide(hits, all_marks, out=np.zeros_like(hits), where=all_marks > 0)
    best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    area = (np.diff(hits, axis=1, prepend=0) * best).sum(1)
    return np.divide(area, lesions, out=np.full(len(lesions), np.nan), where=lesions > 0)


def _falling(scores: Float64s) -> tuple[Float64s, Ints, Ints]:
    """The distinct scores, falling, where each starts in the order by falling score, and that order."""
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    starts = np.flatnonzero(np.concatenate([[True], ranked[1:] != ranked[:-1]])) if len(ranked) else order
    return ranked[starts], starts, order


def _cumulated(ranked: Float64s, starts: Ints) -> Float64s:
    """Weights [R, m] in order, summed down to the end of each step, [R, steps]."""
    if not len(starts):
        return np.zeros((len(ranked), 0))
    summed: Float64s = np.add.reduceat(ranked, starts, axis=1).cumsum(1)
    return summed

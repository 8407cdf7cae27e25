"""FROC and average precision of marked boxes, each for many weightings of the images at once.

Letters: l lesions, m marks, t thresholds, R weightings (`mama.evaluate.bootstrap`).
"""

from __future__ import annotations

import numpy as np

from mama.evaluate.arrays import Float64s

ROUNDING = 1e-9


def above(scores: Float64s, weights: Float64s, thresholds: Float64s) -> Float64s:
    """Summed weights [R, t] of the marks with `scores` [m] at or above each threshold [t]; `weights` [R, m]."""
    order = np.argsort(-scores, kind="stable")
    summed = np.concatenate([np.zeros((len(weights), 1)), weights[:, order].cumsum(1)], axis=1)
    return summed[:, np.searchsorted(-scores[order], -thresholds, side="right")]


def sensitivities(
    found: Float64s, false: Float64s, lesions: Float64s, images: Float64s, rates: tuple[float, ...]
) -> Float64s:
    """Weighted share of lesions found with at most `rates` false marks an image, [rates, R]; NaN without a lesion.

    `found` [l] is the score of the best mark that hits a lesion, else -inf, `false` [R, l] the weight of the false
    marks with that score or a higher one. `lesions` [R, l] are weights, `images` [R] the sum of those of all images.
    The threshold is the lowest with so few false marks, so that no point between two marks is invented.
    """
    total = lesions.sum(1)
    shares = []
    for rate in rates:
        counted = np.isfinite(found) & (false <= rate * images[:, None] + ROUNDING)
        shares.append(np.divide((lesions * counted).sum(1), total, out=np.full(len(total), np.nan), where=total > 0))
    return np.stack(shares)


def average_precision(scores: Float64s, marks: Float64s, all_marks: Float64s, lesions: Float64s) -> Float64s:
    """Area [R] under the precision over the recall of marks by falling score; NaN without a lesion.

    Of the marks [t] that find a lesion these are the `scores`, the weights `marks` [R, t], and the weights `all_marks`
    [R, t] of all marks with that score or a higher one; `lesions` [R] is the summed weight of all lesions. At each
    recall the precision is the best at that recall or a higher one, as PASCAL VOC does since 2010 (Everingham et al.
    2015), and marks of one score are one step.
    """
    order = np.argsort(-scores, kind="stable")
    hits, of_all = above(scores, marks, scores)[:, order], all_marks[:, order]
    precision = np.divide(hits, of_all, out=np.zeros_like(hits), where=of_all > 0)
    best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    area = (marks[:, order] * best).sum(1)
    return np.divide(area, lesions, out=np.full(len(lesions), np.nan), where=lesions > 0)

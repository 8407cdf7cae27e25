"""DeLong's test: the difference of the AUCs of two methods on the same images, without resampling.

DeLong, DeLong and Clarke-Pearson 1988, in the form of Obuchowski 1997 for patients with several images; with one image
of each patient both are the same. Letters: n images, M of them positive, N negative.
"""

from __future__ import annotations

import numpy as np
from scipy.special import ndtr, ndtri
from scipy.stats import rankdata

from mama.evaluate.arrays import Flags, Float64s, Ints
from mama.evaluate.intervals import LEVEL, NOISE, Difference

FEWEST = 2  # patients with a positive image, and with a negative one


def delong(labels: Ints, ours: list[Float64s], theirs: list[Float64s], patients: list[str]) -> Difference | None:
    """The mean AUC of the scores `ours` minus that of `theirs`; each of them is of one training, [n].

    `labels` [n] are 0 and 1. The p value and the 95 % interval are of the normal distribution, as the test is defined.
    None if fewer than `FEWEST` patients have a positive image, or a negative one.
    """
    positive = labels == 1
    names, patient_of = np.unique(np.asarray(patients, dtype=object).astype(str), return_inverse=True)
    counts = [np.bincount(patient_of[side], minlength=len(names)) for side in (positive, ~positive)]
    with_either = [int((count > 0).sum()) for count in counts]
    if min(with_either) < FEWEST:
        return None
    means = [np.mean([_placements(positive, scores) for scores in side], axis=0) for side in (ours, theirs)]
    placed = means[0] - means[1]
    value = float(placed[positive].mean())
    # Of each patient: the sum over her positive images of placement - difference, and that over the negative ones.
    sums = [np.bincount(patient_of[side], placed[side], len(names)) - count * value
            for side, count in zip((positive, ~positive), counts, strict=True)]  # fmt: skip
    variance = 0.0
    for of_patient, count, k in zip(sums, counts, with_either, strict=True):
        variance += k / (k - 1) * float(of_patient @ of_patient) / int(count.sum()) ** 2
    k = len(names)
    variance += 2 * k / (k - 1) * float(sums[0] @ sums[1]) / (int(counts[0].sum()) * int(counts[1].sum()))
    error = max(variance, 0.0) ** 0.5
    if error < NOISE:
        return Difference(value, value, value, 1.0 if abs(value) < NOISE else 0.0)
    half = float(ndtri((1 + LEVEL) / 2)) * error
    return Difference(value, max(-1.0, value - half), min(1.0, value + half), float(2 * ndtr(-abs(value) / error)))


def _placements(positive: Flags, scores: Float64s) -> Float64s:
    """Of a positive image the share of negatives below it, of a negative one that of positives above; ties by half."""
    among_all, found = rankdata(scores), np.empty(len(scores))
    for side, others in ((positive, ~positive), (~positive, positive)):
        found[side] = (among_all[side] - rankdata(scores[side])) / others.sum()
    found[~positive] = 1 - found[~positive]
    return found

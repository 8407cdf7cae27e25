"""Figures of merit with 95 % intervals (`mama.evaluate.intervals`) from a bootstrap over patients.

Every metric is computed for many weightings of the images at once: all ones for the figure itself,
and for a resample the number of times that each image's patient was drawn. Letters: n images, K
classes, R weightings. A metric that a weighting leaves undefined is NaN inside this module and
`None` with a reason outside it, never 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mama.evaluate.intervals import Part, interval

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]
Sides = tuple[Flags, ...]  # the images [n] that a figure rests on; of two sides the rarer one counts

SENSITIVITY = 0.8  # at which the specificity is read
CELLS = 4_000_000  # of a [R, n] array that is held at once

REASONS = {
    "auc": "the images are all of one class",
    "balanced_accuracy": "the images are all of one class",
    "sensitivity": "there is no positive image",
    "specificity": "there is no negative image",
    "ppv": "no image was called positive",
    "npv": "no image was called negative",
    "f1": "there is no positive image",
    "probabilistic_f1": "there is no positive image",
    "specificity_at_sensitivity": "the images are all of one class",
}
ALWAYS = ("auc", "balanced_accuracy")
NO_IMAGE = "there is no image"


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval; `resamples` of the bootstrap defined it."""

    value: float | None
    low: float | None = None
    high: float | None = None
    resamples: int = 0
    reason: str | None = None  # why `value` or the interval is missing


def measure(
    labels: Ints, scores: Floats, patients: list[str], binary: bool, resamples: int, seed: int
) -> dict[str, Estimate]:
    """Metrics of probabilities `scores` [n, K] against `labels` [n]; an image is called what scores highest.

    Always `auc` (each class that occurs against the rest, averaged) and `balanced_accuracy`. If
    `binary`, K is 2, `auc` is the AUC of class 1, and the metrics of its decision, `probabilistic_f1`
    and `specificity_at_sensitivity` (80 %) come in addition.
    """
    if not len(labels):
        return {name: Estimate(None, reason=NO_IMAGE) for name in (REASONS if binary else ALWAYS)}
    draws = _Draws(patients, resamples, seed)
    point = _all(labels, scores, np.ones((1, len(labels))), binary)
    boots = [_all(labels, scores, weights, binary) for weights in draws]
    sides = _sides(labels, scores.argmax(1), binary)
    return {name: _estimate(point[name], [b[name] for b in boots], sides[name], draws, REASONS[name]) for name in point}


def mean(values: Floats, patients: list[str], resamples: int, seed: int) -> Estimate:
    """The mean over images of `values` [n] in [0, 1], for example hits of 0 and 1."""
    if not len(values):
        return Estimate(None, reason=NO_IMAGE)
    draws = _Draws(patients, resamples, seed)
    boots = [(weights @ values / weights.sum(1))[None] for weights in draws]
    return _estimate(values.mean()[None, None], boots, [(np.ones(len(values), bool),)], draws, NO_IMAGE)


def confusion(labels: Ints, scores: Floats) -> Ints:
    """Counts [K, K]: rows are the truth, columns the call."""
    count = scores.shape[1]
    return np.bincount(labels * count + scores.argmax(1), minlength=count**2).reshape(count, count)


def roc(labels: Ints, scores: Floats) -> tuple[Floats, Floats]:
    """False and true positive rates of `labels` [n] in 0, 1 by falling `scores` [n], from (0, 0) to (1, 1)."""
    above_negative, above_positive = _Ranked(scores).cumulate(np.ones((1, len(labels))), labels == 1)
    rates = [np.concatenate([[0.0], counts[0] / counts[0, -1]]) for counts in (above_negative, above_positive)]
    return rates[0], rates[1]


class _Draws:
    """Weightings [r, n] of the bootstrap, in pieces of bounded size.

    Patients are drawn with replacement, each with all images: images of one patient resemble each
    other, so that drawing images would make the intervals too short.
    """

    def __init__(self, patients: list[str], resamples: int, seed: int) -> None:
        names, self.member = np.unique(np.asarray(patients, dtype=object).astype(str), return_inverse=True)
        self.patients, self.resamples, self.seed = len(names), resamples, seed

    def count(self, images: Flags) -> int:
        """How many patients these images [n] are of."""
        return len(np.unique(self.member[images]))

    def __iter__(self) -> Iterator[Floats]:
        rng = np.random.default_rng(self.seed)
        piece = max(1, CELLS // max(1, len(self.member)))
        for start in range(0, self.resamples, piece):
            size = min(piece, self.resamples - start)
            drawn = rng.multinomial(self.patients, np.full(self.patients, 1 / self.patients), size=size)
            yield drawn[:, self.member].astype(np.float64)


class _Ranked:
    """Images sorted by falling score, equal scores as one step."""

    def __init__(self, scores: Floats) -> None:
        self.order = np.argsort(-scores, kind="stable")
        ranked = scores[self.order]
        self.starts = np.flatnonzero(np.concatenate([[True], ranked[1:] != ranked[:-1]]))

    def cumulate(self, weights: Floats, positive: Flags) -> tuple[Floats, Floats]:
        """Weight of the negatives and of the positives down to each step, [R, steps] each."""
        sorted_weights = weights[:, self.order]
        flags = positive[self.order]
        below = [np.add.reduceat(sorted_weights * part, self.starts, axis=1).cumsum(1) for part in (~flags, flags)]
        return below[0], below[1]


def _all(labels: Ints, scores: Floats, weights: Floats, binary: bool) -> dict[str, Floats]:
    """Every metric for `weights` [R, n] as [parts, R] each: it is the mean of its parts, classes or itself alone."""
    present = np.unique(labels)
    columns = [1] if binary else list(present)
    areas = [_auc(labels == k, scores[:, k], weights) for k in columns]
    called = scores.argmax(1)
    recalls = [_share(weights, (called == k) & (labels == k), labels == k) for k in present]
    single = len(present) < 2
    undefined = np.full((1, len(weights)), np.nan)
    measured = {
        "auc": undefined if single else np.stack(areas),
        "balanced_accuracy": undefined if single else np.stack(recalls),
    }
    if binary:
        alone = _binary(labels == 1, called == 1, scores[:, 1], weights)
        measured |= {name: value[None] for name, value in alone.items()}
    return measured


def _sides(labels: Ints, called: Ints, binary: bool) -> dict[str, list[Sides]]:
    """What each part of each metric of `_all` rests on."""
    of_class = [labels == k for k in np.unique(labels)]
    against = [(flags, ~flags) for flags in of_class]
    truth, positive = labels == 1, called == 1
    sides: dict[str, list[Sides]] = {
        "auc": [(truth, ~truth)] if binary else [*against],
        "balanced_accuracy": [(flags,) for flags in of_class],
    }
    alone = {
        "sensitivity": truth,
        "specificity": ~truth,
        "ppv": positive,
        "npv": ~positive,
        "f1": truth | positive,
        "probabilistic_f1": truth,
    }
    if binary:
        sides |= {name: [(flags,)] for name, flags in alone.items()}
        sides["specificity_at_sensitivity"] = [(truth, ~truth)]
    return sides


def _binary(truth: Flags, called: Flags, score: Floats, weights: Floats) -> dict[str, Floats]:
    true_positive, false_positive = weights @ (truth & called), weights @ (~truth & called)
    positives = weights @ truth
    soft_true, soft_false = weights @ (score * truth), weights @ (score * ~truth)
    return {
        "sensitivity": _share(weights, truth & called, truth),
        "specificity": _share(weights, ~truth & ~called, ~truth),
        "ppv": _share(weights, truth & called, called),
        "npv": _share(weights, ~truth & ~called, ~called),
        "f1": _divide(2 * true_positive, true_positive + false_positive + positives, positives > 0),
        # The F1 of soft counts, as the RSNA breast cancer challenge scored it.
        "probabilistic_f1": _divide(2 * soft_true, soft_true + soft_false + positives, positives > 0),
        "specificity_at_sensitivity": _specificity_at(truth, score, weights),
    }


def _auc(positive: Flags, score: Floats, weights: Floats) -> Floats:
    """Area under the ROC curve as P(score of a positive > of a negative) + P(equal) / 2."""
    negatives, positives = _Ranked(score).cumulate(weights, positive)
    all_negatives, all_positives = negatives[:, -1:], positives[:, -1:]
    step = np.diff(positives, axis=1, prepend=0)
    here = np.diff(negatives, axis=1, prepend=0)
    pairs = (step * (all_negatives - negatives + here / 2)).sum(1)
    total = (all_negatives * all_positives)[:, 0]
    return _divide(pairs, total, total > 0)


def _specificity_at(positive: Flags, score: Floats, weights: Floats) -> Floats:
    """The best specificity among thresholds whose sensitivity is at least `SENSITIVITY`."""
    negatives, positives = _Ranked(score).cumulate(weights, positive)
    enough = positives >= SENSITIVITY * positives[:, -1:] - 1e-9
    first = enough.argmax(1)  # specificity falls down the steps
    rows = np.arange(len(weights))
    total = negatives[:, -1]
    defined = (total > 0) & (positives[:, -1] > 0)
    return _divide(total - negatives[rows, first], total, defined)


def _share(weights: Floats, part: Flags, whole: Flags) -> Floats:
    total = weights @ whole
    return _divide(weights @ part, total, total > 0)


def _divide(above: Floats, below: Floats, defined: Flags) -> Floats:
    return np.divide(above, below, out=np.full(np.shape(above), np.nan), where=defined)


def _estimate(point: Floats, boots: list[Floats], sides: list[Sides], draws: _Draws, reason: str) -> Estimate:
    """From the parts of a metric for all images, [parts, 1], and for pieces of the resamples, [parts, r] each."""
    if np.isnan(point).any():
        return Estimate(None, reason=reason)
    value = float(point.mean())
    if draws.patients < 2:
        return Estimate(value, reason="no interval: the images are of one patient")
    drawn = np.concatenate([point[:, :0], *boots], axis=1)
    defined = int((~np.isnan(drawn)).all(0).sum())
    if defined < 2:
        return Estimate(value, reason="no interval: fewer than two resamples define the metric")
    parts = [
        Part(float(whole[0]), of_part, min(map(draws.count, own)))
        for whole, of_part, own in zip(point, drawn, sides, strict=True)
    ]
    limits = interval(parts)
    if limits is None:
        return Estimate(value, reason="no interval: it rests on the images of one patient")
    return Estimate(value, *limits, defined)

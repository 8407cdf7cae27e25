"""Figures of merit with 95 % intervals from a bootstrap over patients. NumPy only.

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

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

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


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval; `resamples` of the bootstrap defined it and made the interval."""

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
    draws = _Draws(patients, resamples, seed)
    point = _all(labels, scores, np.ones((1, len(labels))), binary)
    boots = [_all(labels, scores, weights, binary) for weights in draws]
    return {
        name: _estimate(
            value[0], np.concatenate([np.zeros(0), *(b[name] for b in boots)]), draws.patients, REASONS[name]
        )
        for name, value in point.items()
    }


def mean(values: Floats, patients: list[str], resamples: int, seed: int) -> Estimate:
    """The mean over images of `values` [n], for example hits of 0 and 1."""
    if not len(values):
        return Estimate(None, reason="there is no image")
    draws = _Draws(patients, resamples, seed)
    boots = np.concatenate([np.zeros(0), *(weights @ values / weights.sum(1) for weights in draws)])
    return _estimate(float(values.mean()), boots, draws.patients, "there is no image")


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

    def cumulate(self, weights: Floats, positive: NDArray[np.bool_]) -> tuple[Floats, Floats]:
        """Weight of the negatives and of the positives down to each step, [R, steps] each."""
        sorted_weights = weights[:, self.order]
        flags = positive[self.order]
        below = [np.add.reduceat(sorted_weights * part, self.starts, axis=1).cumsum(1) for part in (~flags, flags)]
        return below[0], below[1]


def _all(labels: Ints, scores: Floats, weights: Floats, binary: bool) -> dict[str, Floats]:
    """Every metric for `weights` [R, n]: [R] each."""
    present = np.unique(labels)
    columns = [1] if binary else list(present)
    areas = [_auc(labels == k, scores[:, k], weights) for k in columns]
    called = scores.argmax(1)
    recalls = [_share(weights, (called == k) & (labels == k), labels == k) for k in present]
    single = len(present) < 2
    measured = {
        "auc": np.full(len(weights), np.nan) if single else np.mean(areas, axis=0),
        "balanced_accuracy": np.full(len(weights), np.nan) if single else np.mean(recalls, axis=0),
    }
    return measured | _binary(labels == 1, called == 1, scores[:, 1], weights) if binary else measured


def _binary(truth: NDArray[np.bool_], called: NDArray[np.bool_], score: Floats, weights: Floats) -> dict[str, Floats]:
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


def _auc(positive: NDArray[np.bool_], score: Floats, weights: Floats) -> Floats:
    """Area under the ROC curve as P(score of a positive > of a negative) + P(equal) / 2."""
    negatives, positives = _Ranked(score).cumulate(weights, positive)
    all_negatives, all_positives = negatives[:, -1:], positives[:, -1:]
    step = np.diff(positives, axis=1, prepend=0)
    here = np.diff(negatives, axis=1, prepend=0)
    pairs = (step * (all_negatives - negatives + here / 2)).sum(1)
    total = (all_negatives * all_positives)[:, 0]
    return _divide(pairs, total, total > 0)


def _specificity_at(positive: NDArray[np.bool_], score: Floats, weights: Floats) -> Floats:
    """The best specificity among thresholds whose sensitivity is at least `SENSITIVITY`."""
    negatives, positives = _Ranked(score).cumulate(weights, positive)
    enough = positives >= SENSITIVITY * positives[:, -1:] - 1e-9
    first = enough.argmax(1)  # specificity falls down the steps
    rows = np.arange(len(weights))
    total = negatives[:, -1]
    defined = (total > 0) & (positives[:, -1] > 0)
    return _divide(total - negatives[rows, first], total, defined)


def _share(weights: Floats, part: NDArray[np.bool_], whole: NDArray[np.bool_]) -> Floats:
    total = weights @ whole
    return _divide(weights @ part, total, total > 0)


def _divide(above: Floats, below: Floats, defined: NDArray[np.bool_]) -> Floats:
    return np.divide(above, below, out=np.full(np.shape(above), np.nan), where=defined)


def _estimate(value: float, boots: Floats, patients: int, reason: str) -> Estimate:
    """Percentile interval (Efron and Tibshirani 1993, section 13.3) over the resamples that define the metric."""
    if np.isnan(value):
        return Estimate(None, reason=reason)
    defined = boots[~np.isnan(boots)]
    if patients < 2:
        return Estimate(float(value), reason="no interval: the images are of one patient")
    if not len(defined):
        return Estimate(float(value), reason="no interval: no resample defines the metric")
    low, high = np.percentile(defined, [2.5, 97.5])
    return Estimate(float(value), float(low), float(high), len(defined))

"""Classification metrics: AUC, balanced accuracy, and those of a binary decision.

Each is computed for many weightings of the images at once (`mama.evaluate.bootstrap`). Letters: n images, K classes,
R weightings.
"""

from __future__ import annotations

import numpy as np

from mama.evaluate.arrays import Flags, Float64s, Ints
from mama.evaluate.bootstrap import NO_IMAGE, Bootstrap, Estimate, Sides, estimate, parts
from mama.evaluate.intervals import Part

SENSITIVITY = 0.8  # at which the specificity is read

# Why a metric is undefined.
REASONS = {
    "auc": "the images are all of one class",
    "balanced_accuracy": "the images are all of one class",
    "sensitivity": "there is no positive image",
    "specificity": "there is no negative image",
    "ppv": "no image was predicted positive",
    "npv": "no image was predicted negative",
    "f1": "there is no positive image",
    "probabilistic_f1": "there is no positive image",
    "specificity_at_sensitivity": "the images are all of one class",
}
ALWAYS = ("auc", "balanced_accuracy")  # also of more than two classes


def measure(
    labels: Ints, scores: Float64s, patients: list[str], binary: bool, resamples: int, seed: int
) -> dict[str, Estimate]:
    """Metrics of probabilities `scores` [n, K] against true `labels` [n]; the predicted class has the highest score.

    Always `auc` (each class that occurs against the rest, averaged) and `balanced_accuracy`. With `binary`, K is 2,
    `auc` is the AUC of class 1, and the metrics of its decision, `probabilistic_f1` and `specificity_at_sensitivity`
    (80 %) are added.
    """
    if not len(labels):
        return {name: Estimate(None, reason=NO_IMAGE) for name in (REASONS if binary else ALWAYS)}
    bootstrap = Bootstrap(patients, resamples, seed)
    drawn = drawn_parts(labels, scores, bootstrap, binary)
    return {name: estimate(of_metric, bootstrap.patients, REASONS[name]) for name, of_metric in drawn.items()}


def drawn_parts(labels: Ints, scores: Float64s, bootstrap: Bootstrap, binary: bool) -> dict[str, list[Part]]:
    """The parts of each metric of `measure`, whose mean it is, and their values in the resamples of `bootstrap`."""
    point = _all(labels, scores, np.ones((1, len(labels))), binary)
    draws = [_all(labels, scores, weights, binary) for weights in bootstrap]
    sides = _sides(labels, scores.argmax(1), binary)
    return {name: parts(point[name], [drawn[name] for drawn in draws], sides[name], bootstrap) for name in point}


def confusion(labels: Ints, scores: Float64s) -> Ints:
    """Counts [K, K]: rows are the true class, columns the predicted one."""
    count = scores.shape[1]
    return np.bincount(labels * count + scores.argmax(1), minlength=count**2).reshape(count, count)


def roc(labels: Ints, scores: Float64s) -> tuple[Float64s, Float64s]:
    """False and true positive rates of `labels` [n] in 0, 1 by falling `scores` [n], from (0, 0) to (1, 1)."""
    above_negative, above_positive = _Ranked(scores).cumulate(np.ones((1, len(labels))), labels == 1)
    rates = [np.concatenate([[0.0], counts[0] / counts[0, -1]]) for counts in (above_negative, above_positive)]
    return rates[0], rates[1]


class _Ranked:
    """Images sorted by falling score, equal scores as one step."""

    def __init__(self, scores: Float64s) -> None:
        self.order = np.argsort(-scores, kind="stable")
        ranked = scores[self.order]
        self.starts = np.flatnonzero(np.concatenate([[True], ranked[1:] != ranked[:-1]]))

    def cumulate(self, weights: Float64s, positive: Flags) -> tuple[Float64s, Float64s]:
        """Weight of the negatives and of the positives down to each step, [R, steps] each."""
        sorted_weights = weights[:, self.order]
        flags = positive[self.order]
        below = [np.add.reduceat(sorted_weights * part, self.starts, axis=1).cumsum(1) for part in (~flags, flags)]
        return below[0], below[1]


def _all(labels: Ints, scores: Float64s, weights: Float64s, binary: bool) -> dict[str, Float64s]:
    """Every metric for `weights` [R, n] as [parts, R]: a mean over classes has a part for each, others have one."""
    present = np.unique(labels)
    columns = [1] if binary else list(present)
    areas = [_auc(labels == k, scores[:, k], weights) for k in columns]
    predicted = scores.argmax(1)
    recalls = [_share(weights, (predicted == k) & (labels == k), labels == k) for k in present]
    single = len(present) < 2
    undefined = np.full((1, len(weights)), np.nan)
    measured = {
        "auc": undefined if single else np.stack(areas),
        "balanced_accuracy": undefined if single else np.stack(recalls),
    }
    if binary:
        decision = _binary(labels == 1, predicted == 1, scores[:, 1], weights)
        measured |= {name: value[None] for name, value in decision.items()}
    return measured


def _sides(labels: Ints, predicted: Ints, binary: bool) -> dict[str, list[Sides]]:
    """The images that each part of each metric of `_all` rests on."""
    of_class = [labels == k for k in np.unique(labels)]
    positive, predicted_positive = labels == 1, predicted == 1
    sides: dict[str, list[Sides]] = {
        "auc": [(positive, ~positive)] if binary else [(flags, ~flags) for flags in of_class],
        "balanced_accuracy": [(flags,) for flags in of_class],
    }
    decision = {
        "sensitivity": positive,
        "specificity": ~positive,
        "ppv": predicted_positive,
        "npv": ~predicted_positive,
        "f1": positive | predicted_positive,
        "probabilistic_f1": positive,
    }
    if binary:
        sides |= {name: [(flags,)] for name, flags in decision.items()}
        sides["specificity_at_sensitivity"] = [(positive, ~positive)]
    return sides


def _binary(true: Flags, predicted: Flags, score: Float64s, weights: Float64s) -> dict[str, Float64s]:
    """Metrics [R] of the decision: `true` and `predicted` [n] flag the positive images."""
    true_positive, false_positive = weights @ (true & predicted), weights @ (~true & predicted)
    positives = weights @ true
    soft_true, soft_false = weights @ (score * true), weights @ (score * ~true)
    return {
        "sensitivity": _share(weights, true & predicted, true),
        "specificity": _share(weights, ~true & ~predicted, ~true),
        "ppv": _share(weights, true & predicted, predicted),
        "npv": _share(weights, ~true & ~predicted, ~predicted),
        "f1": _divide(2 * true_positive, true_positive + false_positive + positives, positives > 0),
        # The F1 of soft counts, as the RSNA breast cancer challenge scored it.
        "probabilistic_f1": _divide(2 * soft_true, soft_true + soft_false + positives, positives > 0),
        "specificity_at_sensitivity": _specificity_at(true, score, weights),
    }


def _auc(positive: Flags, score: Float64s, weights: Float64s) -> Float64s:
    """Area under the ROC curve as P(score of a positive > of a negative) + P(equal) / 2."""
    negatives, positives = _Ranked(score).cumulate(weights, positive)
    all_negatives, all_positives = negatives[:, -1:], positives[:, -1:]
    step = np.diff(positives, axis=1, prepend=0)
    here = np.diff(negatives, axis=1, prepend=0)
    pairs = (step * (all_negatives - negatives + here / 2)).sum(1)
    total = (all_negatives * all_positives)[:, 0]
    return _divide(pairs, total, total > 0)


def _specificity_at(positive: Flags, score: Float64s, weights: Float64s) -> Float64s:
    """The best specificity among thresholds whose sensitivity is at least `SENSITIVITY`."""
    negatives, positives = _Ranked(score).cumulate(weights, positive)
    enough = positives >= SENSITIVITY * positives[:, -1:] - 1e-9
    first = enough.argmax(1)  # specificity falls down the steps
    rows = np.arange(len(weights))
    total = negatives[:, -1]
    defined = (total > 0) & (positives[:, -1] > 0)
    return _divide(total - negatives[rows, first], total, defined)


def _share(weights: Float64s, part: Flags, whole: Flags) -> Float64s:
    total = weights @ whole
    return _divide(weights @ part, total, total > 0)


def _divide(above: Float64s, below: Float64s, defined: Flags) -> Float64s:
    return np.divide(above, below, out=np.full(np.shape(above), np.nan), where=defined)

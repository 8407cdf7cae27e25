"""Classification metrics: AUC, average precision, balanced accuracy, Brier score, and those of a binary decision.

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
    "average_precision": "the images are all of one class",
    "brier": NO_IMAGE,
    "sensitivity": "there is no positive image",
    "specificity": "there is no negative image",
    "ppv": "no image was predicted positive",
    "npv": "no image was predicted negative",
    "f1": "there is no positive image",
    "probabilistic_f1": "there is no positive image",
    "specificity_at_sensitivity": "the images are all of one class",
}
ALWAYS = ("auc", "balanced_accuracy", "average_precision", "brier")  # also of more than two classes
LOWER_IS_BETTER = ("brier", "ece")


def measure(
    labels: Ints, scores: Float64s, patients: list[str], binary: bool, resamples: int, seed: int
) -> dict[str, Estimate]:
    """Metrics of probabilities `scores` [n, K] against true `labels` [n]; the predicted class has the highest score.

    Always `auc` and `average_precision` (each class that occurs against the rest, averaged), `balanced_accuracy` and
    `brier` (half of the summed squared errors of the probabilities). With `binary`, K is 2, `auc` and
    `average_precision` are those of class 1, and the metrics of its decision, `probabilistic_f1` and
    `specificity_at_sensitivity` (80 %) are added.
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
    order = np.argsort(-scores, kind="stable")
    last = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))  # of equal scores
    counts = [np.cumsum(labels[order] == k)[last] for k in (0, 1)]
    rates = [np.concatenate([[0.0], count / count[-1]]) for count in counts]
    return rates[0], rates[1]


def precision_recall(labels: Ints, scores: Float64s) -> tuple[Float64s, Float64s]:
    """Recall and precision of `labels` [n] in 0, 1 down to each distinct score that a positive has, by falling scores.

    It begins at recall 0, with the first precision. Under its steps, each as high as at its right end, lies the
    average precision.
    """
    order = np.argsort(-scores, kind="stable")
    last = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))  # of equal scores
    found = np.cumsum(labels[order] == 1)[last]
    rises = np.diff(found, prepend=0) > 0
    precision = (found / (last + 1))[rises]
    return np.append(0.0, found[rises] / found[-1]), np.append(precision[:1], precision)


class _Steps:
    """Weights [R, steps] of the images down to each distinct score that a positive has, from the highest down.

    `positives` and `negatives` are those at or above a step, `new` and `equal` those of the step itself.
    """

    def __init__(self, positive: Flags, score: Float64s, weights: Float64s) -> None:
        order = np.argsort(-score, kind="stable")
        ranked, flags = score[order], positive[order]
        last = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))
        count = np.cumsum(flags)[last]  # positives down to each distinct score
        here = np.diff(count, prepend=0) > 0
        ranked_weights = weights[:, order]
        of_positives = np.cumsum(ranked_weights[:, flags], axis=1)
        of_all = np.cumsum(ranked_weights, axis=1, out=ranked_weights)
        before = np.concatenate([[-1], last[:-1]])[here]  # the image above the step; -1: there is none
        above = np.where(before >= 0, of_all[:, before], 0.0)
        self.all_positives, self.all_negatives = of_positives[:, -1], of_all[:, -1] - of_positives[:, -1]
        self.positives = of_positives[:, count[here] - 1]
        self.new = np.diff(self.positives, axis=1, prepend=0)
        through = of_all[:, last[here]]
        self.negatives = through - self.positives
        self.equal = through - above - self.new


def _all(labels: Ints, scores: Float64s, weights: Float64s, binary: bool) -> dict[str, Float64s]:
    """Every metric for `weights` [R, n] as [parts, R]: a mean over classes has a part for each, others have one."""
    present = np.unique(labels)
    single = len(present) < 2
    columns = [] if single else [1] if binary else list(present)
    ranked: dict[str, list[Float64s]] = {"auc": [], "average_precision": [], "specificity_at_sensitivity": []}
    for k in columns:
        steps = _Steps(labels == k, scores[:, k], weights)
        ranked["auc"].append(_auc(steps))
        ranked["average_precision"].append(_average_precision(steps))
        ranked["specificity_at_sensitivity"].append(_specificity_at(steps))
    predicted = scores.argmax(1)
    recalls = [_share(weights, (predicted == k) & (labels == k), labels == k) for k in present]
    undefined = np.full((1, len(weights)), np.nan)
    of_ranks = {name: np.stack(values) if values else undefined for name, values in ranked.items()}
    measured = {
        "auc": of_ranks["auc"],
        "balanced_accuracy": undefined if single else np.stack(recalls),
        "average_precision": of_ranks["average_precision"],
        "brier": (weights @ squared_errors(labels, scores) / weights.sum(1))[None],
    }
    if binary:
        decision = _binary(labels == 1, predicted == 1, scores[:, 1], weights)
        measured |= {name: value[None] for name, value in decision.items()}
        measured["specificity_at_sensitivity"] = of_ranks["specificity_at_sensitivity"]
    return measured


def squared_errors(labels: Ints, scores: Float64s) -> Float64s:
    """Of each image [n], whose mean is the Brier score: half of the sum over classes, so that it lies in [0, 1]."""
    errors: Float64s = ((scores - np.eye(scores.shape[1])[labels]) ** 2).sum(1) / 2
    return errors


def _sides(labels: Ints, predicted: Ints, binary: bool) -> dict[str, list[Sides]]:
    """The images that each part of each metric of `_all` rests on."""
    of_class = [labels == k for k in np.unique(labels)]
    positive, predicted_positive = labels == 1, predicted == 1
    sides: dict[str, list[Sides]] = {
        "auc": [(positive, ~positive)] if binary else [(flags, ~flags) for flags in of_class],
        "balanced_accuracy": [(flags,) for flags in of_class],
        "average_precision": [(positive, ~positive)] if binary else [(flags, ~flags) for flags in of_class],
        "brier": [(np.ones(len(labels), bool),)],
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
    }


def _auc(steps: _Steps) -> Float64s:
    """Area under the ROC curve as P(score of a positive > of a negative) + P(equal) / 2."""
    negatives = steps.all_negatives[:, None]
    pairs = (steps.new * (negatives - steps.negatives + steps.equal / 2)).sum(1)
    total = steps.all_negatives * steps.all_positives
    return _divide(pairs, total, total > 0)


def _average_precision(steps: _Steps) -> Float64s:
    """The mean over positives of the precision down to their score: no interpolation between the steps."""
    called = steps.positives + steps.negatives
    precision = np.divide(steps.positives, called, out=np.zeros_like(called), where=called > 0)
    defined = (steps.all_positives > 0) & (steps.all_negatives > 0)
    return _divide((steps.new * precision).sum(1), steps.all_positives, defined)


def _specificity_at(steps: _Steps) -> Float64s:
    """The best specificity among thresholds whose sensitivity is at least `SENSITIVITY`."""
    enough = steps.positives >= SENSITIVITY * steps.all_positives[:, None] - 1e-9
    first = enough.argmax(1)  # specificity falls down the steps
    above = steps.negatives[np.arange(len(first)), first]
    defined = (steps.all_negatives > 0) & (steps.all_positives > 0)
    return _divide(steps.all_negatives - above, steps.all_negatives, defined)


def _share(weights: Float64s, part: Flags, whole: Flags) -> Float64s:
    total = weights @ whole
    return _divide(weights @ part, total, total > 0)


def _divide(above: Float64s, below: Float64s, defined: Flags) -> Float64s:
    return np.divide(above, below, out=np.full(np.shape(above), np.nan), where=defined)

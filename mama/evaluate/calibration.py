"""Whether probabilities mean what they say: reliability curve, expected calibration error (ECE), recalibration.

Of two classes the stated probability is that of class 1, and the outcome whether it is the true one; of more it is
the probability of the predicted class, and the outcome whether that is right. Letters: n images, m of the split `val`,
K classes, B bins, R resamples.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from sklearn.isotonic import IsotonicRegression

from mama.evaluate.arrays import Flags, Float64s, Ints
from mama.evaluate.bootstrap import NO_IMAGE, Bootstrap, Estimate, estimate, share
from mama.evaluate.intervals import Part, absolute_sum_interval
from mama.evaluate.metrics import squared_errors

BINS, FEWEST = 10, 10  # bins of equally many images, as long as each has ten
FEWEST_OF_CLASS = 10  # images of each class in `val` for an isotonic regression
SMALLEST = 1e-12  # probability, before its logarithm is taken
RANGE = (-5.0, 5.0)  # of the logarithm of a temperature
NO_VAL = "there is no split `val` besides the evaluated one"
ONE_CLASS = "`val` has one class only"
TOO_FEW = f"`val` has fewer than {FEWEST_OF_CLASS} of a class"

Val = tuple[Ints, Float64s]  # labels [m] and scores [m, K] of the split `val`
Steps = dict[str, Any]  # "class": its number; "x": scores of it, rising; "y": their probabilities


def calibration(labels: Ints, scores: Float64s, binary: bool, bootstrap: Bootstrap, val: Val | None) -> dict[str, Any]:
    """Brier score, ECE and reliability curve of `scores` [n, K] as they are, and recalibrated in either way."""
    if not len(labels):
        return {name: _missing(NO_IMAGE) for name in ("uncalibrated", "temperature", "isotonic")}
    document = {"uncalibrated": _measured(labels, scores, binary, bootstrap)}
    if reason := _no_temperature(val):
        document["temperature"] = _missing(reason)
    else:
        assert val
        found = temperature(val)
        document["temperature"] = {"temperature": found, "fitted_on": len(val[0])} | _measured(
            labels, cooled(scores, found), binary, bootstrap
        )
    if reason := _no_temperature(val) or _no_isotonic(val, labels):
        document["isotonic"] = _missing(reason)
    else:
        assert val
        steps = isotonic_steps(val)
        document["isotonic"] = {"steps": steps, "fitted_on": len(val[0])} | _measured(
            labels, by_steps(scores, steps), binary, bootstrap
        )
    return document


def temperature(val: Val) -> float:
    """The temperature with the smallest mean log loss on `val` (Guo et al. 2017)."""
    labels, scores = val
    logits = _logits(scores)

    def loss(logarithm: float) -> float:
        shares = log_softmax(logits / np.exp(logarithm), axis=1)
        return -float(shares[np.arange(len(labels)), labels].mean())

    return float(np.exp(minimize_scalar(loss, bounds=RANGE, method="bounded").x))


def cooled(scores: Float64s, temperature: float) -> Float64s:
    """Probabilities [n, K] whose logits are divided by the temperature."""
    found: Float64s = softmax(_logits(scores) / temperature, axis=1)
    return found


def isotonic_steps(val: Val) -> list[Steps]:
    """Rising steps of the probability of each class, fitted on `val` (Zadrozny and Elkan 2002).

    Of two classes those of class 1 alone. Of more each class has its own, against the rest.
    """
    labels, given = val
    count = given.shape[1]
    found: list[Steps] = []
    for k in range(count) if count > 2 else [1]:
        fit = IsotonicRegression(y_min=0, y_max=1).fit(given[:, k], labels == k)
        found.append({"class": k, "x": fit.X_thresholds_.tolist(), "y": fit.y_thresholds_.tolist()})
    return found


def by_steps(scores: Float64s, steps: list[Steps]) -> Float64s:
    """Probabilities [n, K] by `isotonic_steps`: linear between the points (x, y) of a class, constant beyond the last.

    Of more than two classes they are scaled to a sum of 1; where all are 0, each class gets 1 / K.
    """
    columns = np.stack([np.interp(scores[:, one["class"]], one["x"], one["y"]) for one in steps], axis=1)
    if scores.shape[1] == 2:
        return np.concatenate([1 - columns, columns], axis=1)
    total = columns.sum(1, keepdims=True)
    return np.divide(columns, total, out=np.full(columns.shape, 1 / len(steps)), where=total > 0)


def bins(stated: Float64s) -> Ints:
    """The bin [n] of each stated probability, by their quantiles: equal ones share a bin, and none is empty."""
    count = max(1, min(BINS, len(stated) // FEWEST))
    edges = np.quantile(stated, np.arange(1, count) / count)
    found: Ints = np.unique(np.searchsorted(edges, stated), return_inverse=True)[1]
    return found


def _measured(labels: Ints, scores: Float64s, binary: bool, bootstrap: Bootstrap) -> dict[str, Any]:
    stated = scores[:, 1] if binary else scores.max(1)
    outcome = (labels == 1) if binary else scores.argmax(1) == labels
    bin_of = bins(stated)
    members = np.arange(bin_of.max() + 1) == bin_of[:, None]
    point, drawn = bootstrap.sums(
        np.concatenate(
            [squared_errors(labels, scores)[:, None], members, members * outcome[:, None], members * stated[:, None]],
            axis=1,
        )
    )
    of_bins = [(point[columns], drawn[:, columns]) for columns in _columns(members.shape[1])]
    everyone, reason = bootstrap.patients, NO_IMAGE
    images = of_bins[0][1].sum(1)
    brier = Part(float(point[0] / len(labels)), share(drawn[:, 0], images), everyone)
    gaps = (of_bins[1][0] - of_bins[2][0]) / len(labels), (of_bins[1][1] - of_bins[2][1]) / images[:, None]
    return {
        "reason": None,
        "brier": asdict(estimate([brier], everyone, reason)),
        "ece": asdict(_calibration_error(*gaps, everyone)),
        "curve": _curve(members, of_bins, bootstrap),
    }


def _columns(count: int) -> list[slice]:
    """Of images, outcomes and stated probabilities by bin, behind the squared errors."""
    return [slice(1 + k * count, 1 + (k + 1) * count) for k in range(3)]


def _calibration_error(point: Float64s, draws: Float64s, patients: int) -> Estimate:
    """The sum over bins of |gap|, each the share of the outcomes minus the mean probability, weighted by its images."""
    value = float(np.abs(point).sum())
    if patients < 2:
        return Estimate(value, reason="no interval: the images are of one patient")
    limits = absolute_sum_interval(point, draws, patients)
    if limits is None:
        return Estimate(value, reason="no interval: fewer than two resamples define the metric")
    return Estimate(value, *limits, len(draws))


def _curve(members: Flags, of_bins: list[tuple[Float64s, Float64s]], bootstrap: Bootstrap) -> list[dict[str, Any]]:
    """Of each bin, by rising probability: the mean stated one, and the share of outcomes with its interval."""
    (images, images_drawn), (outcomes, outcomes_drawn), (stated, _) = of_bins
    rows = []
    for b in range(len(images)):
        part = Part(
            float(outcomes[b] / images[b]),
            share(outcomes_drawn[:, b], images_drawn[:, b]),
            bootstrap.count(members[:, b]),
        )
        observed = estimate([part], bootstrap.patients, NO_IMAGE)
        interval = {"observed": observed.value, "low": observed.low, "high": observed.high}
        rows.append({"n": int(images[b]), "predicted": float(stated[b] / images[b]), **interval})
    return rows


def _logits(scores: Float64s) -> Float64s:
    """Up to a constant of each image."""
    found: Float64s = np.log(np.maximum(scores, SMALLEST))
    return found


def _no_temperature(val: Val | None) -> str | None:
    if val is None or not len(val[0]):
        return NO_VAL
    return ONE_CLASS if len(np.unique(val[0])) < 2 else None


def _no_isotonic(val: Val | None, labels: Ints) -> str | None:
    """Every class of the held-out images and of `val` needs a few in `val`."""
    assert val
    needed = np.union1d(labels, val[0])
    counts = np.bincount(val[0], minlength=val[1].shape[1])
    return TOO_FEW if counts[needed].min() < FEWEST_OF_CLASS else None


def _missing(reason: str) -> dict[str, Any]:
    absent = asdict(Estimate(None, reason=reason))
    return {"reason": reason, "brier": absent, "ece": absent, "curve": []}

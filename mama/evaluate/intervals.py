"""95 % intervals for figures between 0 and 1 that also hold with few patients.

The percentile interval of a bootstrap over few patients is too short, and has length 0 if every prediction is right.
Here the bootstrap only estimates the variance between draws of patients. This gives an effective number of images, and
the interval is Wilson's score interval for that number, with Student's t in place of the normal quantile (Korn and
Graubard 1998, there with the interval of Clopper and Pearson). For a mean over classes the limits of the classes are
combined (Zou and Donner 2008), and so are those of two methods whose difference is asked for. Measured coverage and
rate of false alarms: docs/benchmarks.md. Letters: R resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri, stdtrit

from mama.evaluate.arrays import Float64s

LEVEL = 0.95
NOISE = 1e-12  # a variance or length below this is rounding
STEPS = 24  # of the search for a p value, which is exact to 2**-STEPS
METHOD = "Wilson's score interval with the variance of a bootstrap over patients"


@dataclass(frozen=True)
class Part:
    """A figure, or the share of one class in a mean over classes.

    `draws` [R] are its values in the resamples, NaN where undefined. `patients` is the number that it rests on: for a
    proportion those in its denominator, for an AUC those of the rarer class.
    """

    value: float
    draws: Float64s
    patients: int


def interval(parts: Sequence[Part]) -> tuple[float, float] | None:
    """Limits of the mean of `parts`, which at least two resamples define; None if each rests on a single patient."""
    if all(part.patients < 2 for part in parts):
        return None
    low, high = _WeightedSum(parts, np.full(len(parts), 1 / len(parts))).limits(LEVEL)
    return max(0.0, low), min(1.0, high)


def odds_interval(gained: Part, lost: Part, odds: float) -> tuple[float, float] | None:
    """Limits of g o / (g o + l), with o = `odds`, for figures g and l that are estimated on the same patients.

    PPV at another prevalence is that, with sensitivity, 1 - specificity, and the odds of disease. A value t is within
    the limits if those of the difference (1 - t) o g - t l (`difference`) include 0, which also holds where l is 0.
    None if both rest on a single patient, or fewer than two resamples define them.
    """
    both = [gained, lost]
    if all(part.patients < 2 for part in both) or _defined(both).shape[1] < 2:
        return None

    figure = _WeightedSum(both, np.zeros(2))

    def limits(value: float) -> tuple[float, float]:
        figure.weights = np.array([(1 - value) * odds, -value])
        return figure.limits(LEVEL)

    return _last(lambda value: limits(value)[0] > 0), _last(lambda value: limits(value)[1] >= 0)


def absolute_sum_interval(point: Float64s, draws: Float64s, patients: int) -> tuple[float, float] | None:
    """Limits of the sum of absolute values of `point` [B], of which `draws` [R, B] are values in resamples.

    Noise alone makes such a sum positive, so that an interval around it would never reach down to a true 0. The lower
    limit is the largest c `point`, with c from 0 to 1, to which the noise of the resamples adds so little that at most
    2.5 % of the sums reach the observed one; it is 0 where noise alone does so more often. The upper limit is that of
    `interval`. None without two patients and two resamples.
    """
    if patients < 2 or len(draws) < 2:
        return None
    observed = float(np.abs(point).sum())
    usual = interval([Part(observed, np.abs(draws).sum(1), patients)])
    if usual is None or float(draws.var(0).sum()) < NOISE:
        return usual
    widened = stdtrit(patients - 1, (1 + LEVEL) / 2) / ndtri((1 + LEVEL) / 2)
    noise = (draws - draws.mean(0)) * (widened * (patients / (patients - 1)) ** 0.5)

    def too_small(multiple: float) -> bool:
        reach = np.abs(multiple * point + noise).sum(1) >= observed
        return float(reach.mean()) <= (1 - LEVEL) / 2

    return _last(too_small) * observed, usual[1]


def _last(holds: Callable[[float], bool]) -> float:
    """The value between 0 and 1 up to which a condition holds, to 2**-STEPS."""
    below, above = 0.0, 1.0
    for _ in range(STEPS):
        middle = (below + above) / 2
        below, above = (middle, above) if holds(middle) else (below, middle)
    return above if below == 1 - 2.0**-STEPS else below


@dataclass(frozen=True)
class Difference:
    """A difference of two figures, its 95 % interval, and the p value that belongs to that interval."""

    value: float
    low: float
    high: float
    # 1 - the level of the widest interval that leaves 0 out; None if a part that rests on a single patient, who says
    # nothing about others, keeps 0 within the interval of every level.
    p: float | None


def difference(ours: Sequence[Sequence[Part]], theirs: Sequence[Sequence[Part]]) -> Difference | None:
    """The mean figure of `ours` minus that of `theirs`, each a list of trainings with the parts of their figure.

    All draws must be of the same resampled patients: what both methods find hard then cancels out. None if each part
    rests on a single patient, or fewer than two resamples define all of them.
    """
    parts = [part for training in (*ours, *theirs) for part in training]
    weights = np.concatenate([np.full(len(t), sign / len(t) / len(side))
                              for sign, side in ((1, ours), (-1, theirs)) for t in side])  # fmt: skip
    if all(part.patients < 2 for part in parts) or _defined(parts).shape[1] < 2:
        return None
    both = _WeightedSum(parts, weights)
    (low, high), value = both.limits(LEVEL), float(both.values @ weights)
    return Difference(value, max(-1.0, low), min(1.0, high), _p_value(both))


def _p_value(figure: _WeightedSum) -> float | None:
    low, high = figure.limits(0.0)
    if low <= 0 <= high and figure.patients.min() < 2:
        return None
    below, above = 0.0, 1.0
    for _ in range(STEPS):
        level = (below + above) / 2
        low, high = figure.limits(level)
        below, above = (level, above) if low > 0 or high < 0 else (below, level)
    return 1 - below


class _WeightedSum:
    """The sum of `weights` times the values of parts, with limits combined from those of the parts."""

    def __init__(self, parts: Sequence[Part], weights: Float64s) -> None:
        self.weights, self.related = weights, _correlations(parts)
        self.values = np.array([part.value for part in parts])
        self.patients = np.array([part.patients for part in parts])
        self.images = np.array([_effective_images(part) if part.patients > 1 else np.nan for part in parts])

    def limits(self, level: float) -> tuple[float, float]:
        low, high = self._wilson(level)
        down, up = self.values - low, high - self.values
        # What is subtracted pulls the sum down where it goes up itself.
        arms = [np.where(self.weights > 0, one, other) * self.weights for one, other in ((down, up), (up, down))]
        lengths = [max(0.0, float(arm @ self.related @ arm)) ** 0.5 for arm in arms]
        middle = float(self.weights @ self.values)
        return middle - lengths[0], middle + lengths[1]

    def _wilson(self, level: float) -> tuple[Float64s, Float64s]:
        """Of each part; 0 and 1 for one of a single patient, who says nothing about other patients."""
        value, n = self.values, self.images
        z = stdtrit(np.maximum(self.patients - 1, 1), (1 + level) / 2)
        middle, half = value + z**2 / (2 * n), z * np.sqrt(value * (1 - value) / n + z**2 / (4 * n**2))
        low, high = (middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n)
        return np.where(self.patients > 1, low, 0.0), np.where(self.patients > 1, high, 1.0)


def _effective_images(part: Part) -> float:
    """The number of independent images with the same variance; one per patient if no resample differs from another."""
    drawn = part.draws[~np.isnan(part.draws)]
    middle = float(drawn.mean())
    # Resampling k patients understates the variance by (k - 1) / k.
    variance = float(drawn.var(ddof=1)) * part.patients / (part.patients - 1)
    return middle * (1 - middle) / variance if variance > NOISE else part.patients


def _defined(parts: Sequence[Part]) -> Float64s:
    """The draws [parts, r] of the resamples that define every part."""
    draws = np.stack([part.draws for part in parts])
    found: Float64s = draws[:, ~np.isnan(draws).any(0)]
    return found


def _correlations(parts: Sequence[Part]) -> Float64s:
    """Of their draws, [parts, parts]; a part without variance counts as independent of the others."""
    draws = _defined(parts)
    centred = draws - draws.mean(1, keepdims=True)
    lengths = np.sqrt((centred**2).sum(1, keepdims=True))
    unit = np.divide(centred, lengths, out=np.zeros_like(centred), where=lengths > NOISE)
    related: Float64s = unit @ unit.T
    np.fill_diagonal(related, 1.0)
    return related

"""95 % intervals of figures between 0 and 1, from few patients too.

A percentile interval of a bootstrap over few patients is too short, and has no length at all where no image is wrong.
Here the bootstrap only says how much a figure varies between draws of patients: that makes an effective number of
images, and Wilson's score interval for so many images is the interval, with Student's t in place of the normal
quantile (Korn and Graubard 1998, there with Clopper and Pearson's interval). A mean over classes takes the limits of
the classes together (Zou and Donner 2008). How often they hold the true value: BENCHMARKS.md. Letters: R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

Floats = NDArray[np.float64]

LEVEL = 0.95
NOISE = 1e-12  # a variance that is rounding
METHOD = "Wilson's score interval with the variance of a bootstrap over patients"


@dataclass(frozen=True)
class Part:
    """A figure, or what one class brings to a mean over classes.

    `draws` [R] are its values in the resamples, NaN where undefined; `patients` are those that it rests on: of a share
    those of its whole, of an AUC those of the rarer side.
    """

    value: float
    draws: Floats
    patients: int


def interval(parts: Sequence[Part]) -> tuple[float, float] | None:
    """Limits of the mean of `parts`, which two resamples define at least; None where each rests on a single patient."""
    if all(part.patients < 2 for part in parts):
        return None
    draws = np.stack([part.draws for part in parts])
    whole = draws[:, ~np.isnan(draws).any(0)]
    values = np.array([part.value for part in parts])
    limits = np.array([_wilson(part) for part in parts])  # [parts, 2]
    related = _correlations(whole)
    low, high = (np.sqrt(max(0.0, arm @ related @ arm)) / len(parts) for arm in np.abs(limits - values[:, None]).T)
    return max(0.0, float(values.mean() - low)), min(1.0, float(values.mean() + high))


def _wilson(part: Part) -> tuple[float, float]:
    if part.patients < 2:  # says nothing about other patients
        return 0.0, 1.0
    value, z = part.value, float(stdtrit(part.patients - 1, (1 + LEVEL) / 2))
    n = _effective(part)
    middle, half = value + z**2 / (2 * n), z * np.sqrt(value * (1 - value) / n + z**2 / (4 * n**2))
    return (middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n)


def _effective(part: Part) -> float:
    """How many independent images vary as much; where no resample differs from another, one for each patient."""
    drawn = part.draws[~np.isnan(part.draws)]
    middle = float(drawn.mean())
    # Resampling k patients understates the variance by (k - 1) / k.
    variance = float(drawn.var(ddof=1)) * part.patients / (part.patients - 1)
    return middle * (1 - middle) / variance if variance > NOISE else part.patients


def _correlations(draws: Floats) -> Floats:
    """[parts, R] -> [parts, parts]; a part that does not vary is taken to be independent of the others."""
    centred = draws - draws.mean(1, keepdims=True)
    lengths = np.sqrt((centred**2).sum(1, keepdims=True))
    unit = np.divide(centred, lengths, out=np.zeros_like(centred), where=lengths > 1e-12)
    related: Floats = unit @ unit.T
    np.fill_diagonal(related, 1.0)
    return related

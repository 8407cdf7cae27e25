"""95 % intervals for figures between 0 and 1 that also hold with few patients.

The percentile interval of a bootstrap over few patients is too short, and has length 0 if every prediction is right.
Here the bootstrap only estimates the variance between draws of patients. This gives an effective number of images, and
the interval is Wilson's score interval for that number, with Student's t in place of the normal quantile (Korn and
Graubard 1998, there with the interval of Clopper and Pearson). For a mean over classes the limits of the classes are
combined (Zou and Donner 2008). Measured coverage: docs/benchmarks.md. Letters: R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from mama.evaluate.arrays import Float64s

LEVEL = 0.95
NOISE = 1e-12  # a variance or length below this is rounding
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
    draws = np.stack([part.draws for part in parts])
    defined = draws[:, ~np.isnan(draws).any(0)]
    values = np.array([part.value for part in parts])
    limits = np.array([_wilson(part) for part in parts])  # [parts, 2]
    related = _correlations(defined)
    low, high = (np.sqrt(max(0.0, arm @ related @ arm)) / len(parts) for arm in np.abs(limits - values[:, None]).T)
    return max(0.0, float(values.mean() - low)), min(1.0, float(values.mean() + high))


def _wilson(part: Part) -> tuple[float, float]:
    if part.patients < 2:  # no information about other patients
        return 0.0, 1.0
    value, z = part.value, float(stdtrit(part.patients - 1, (1 + LEVEL) / 2))
    n = _effective_images(part)
    middle, half = value + z**2 / (2 * n), z * np.sqrt(value * (1 - value) / n + z**2 / (4 * n**2))
    return (middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n)


def _effective_images(part: Part) -> float:
    """The number of independent images with the same variance; one per patient if no resample differs from another."""
    drawn = part.draws[~np.isnan(part.draws)]
    middle = float(drawn.mean())
    # Resampling k patients understates the variance by (k - 1) / k.
    variance = float(drawn.var(ddof=1)) * part.patients / (part.patients - 1)
    return middle * (1 - middle) / variance if variance > NOISE else part.patients


def _correlations(draws: Float64s) -> Float64s:
    """[parts, R] -> [parts, parts]; a part without variance counts as independent of the others."""
    centred = draws - draws.mean(1, keepdims=True)
    lengths = np.sqrt((centred**2).sum(1, keepdims=True))
    unit = np.divide(centred, lengths, out=np.zeros_like(centred), where=lengths > NOISE)
    related: Float64s = unit @ unit.T
    np.fill_diagonal(related, 1.0)
    return related

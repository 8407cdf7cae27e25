"""All figures of one set of predictions on one unit: metrics, confusion, calibration, operating points.

Letters: n held-out units (images, breasts, exams or patients), m of the split `val`, K classes.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from mama.evaluate import metrics
from mama.evaluate.arrays import Float64s, Ints
from mama.evaluate.bootstrap import Bootstrap
from mama.evaluate.calibration import Val, calibration
from mama.evaluate.operating_points import operating_points
from mama.settings.schema import Config


def measured_row(
    labels: Ints, scores: Float64s, patients: list[str], binary: bool, val: Val | None, config: Config
) -> dict[str, Any]:
    """Measure probabilities `scores` [n, K] against `labels` [n]; intervals are over `patients` [n].

    `val` has labels [m] and scores [m, K]: None where the shards have no such split, or it is the one that is
    evaluated. Calibrations are fitted, and thresholds chosen, on it alone. What cannot be computed is None, with a
    `reason`; `operating_points` are of a binary task.
    """
    measured = metrics.measure(labels, scores, patients, binary, config.eval.bootstrap, config.seed)
    bootstrap = Bootstrap(patients, config.eval.bootstrap, config.seed)
    calibrated = calibration(labels, scores, binary, bootstrap, val)
    points = operating_points(labels, scores, bootstrap, val, config.eval.prevalence or []) if binary else []
    return {
        "metrics": {name: asdict(one) for name, one in measured.items()} | {"ece": calibrated["uncalibrated"]["ece"]},
        "confusion": metrics.confusion(labels, scores).tolist(),
        "calibration": calibrated,
        "operating_points": points,
    }

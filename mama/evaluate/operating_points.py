"""Operating points of a binary task: thresholds chosen on the split `val`, measured on the held-out images.

An image is recalled where its probability of class 1 is at or above the threshold. The intervals hold for this
threshold: what another `val` would have chosen is not in them. Letters: n images, m of `val`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from math import ceil
from typing import Any

import numpy as np

from mama.evaluate.arrays import Flags, Float64s, Ints
from mama.evaluate.bootstrap import NO_IMAGE, Bootstrap, Estimate, estimate
from mama.evaluate.calibration import NO_VAL, Val
from mama.evaluate.intervals import Part, odds_interval
from mama.evaluate.metrics import REASONS

SENSITIVITIES = (0.8, 0.9)
RECALL_RATE = 0.1  # share of all images
NONE_RECALLED = "no image was recalled"
SHOWN = ("sensitivity", "specificity", "ppv", "npv", "recall_rate")


class _NoThreshold(Exception):
    """Why `val` gives no threshold."""


def operating_points(
    labels: Ints, scores: Float64s, bootstrap: Bootstrap, val: Val | None, prevalences: list[float]
) -> list[dict[str, Any]]:
    """Measure `scores` [n, 2] at each operating point; PPV also at the `prevalences` of the eventual patients."""
    rules: list[tuple[str, float, Callable[[Flags, Float64s, float], float]]] = [
        *(("sensitivity", target, sensitive) for target in SENSITIVITIES),
        ("recall rate", RECALL_RATE, recalling),
    ]
    points = []
    for rule, target, choose in rules:
        point: dict[str, Any] = {"rule": rule, "target": target, "threshold": None, "val": None, "reason": None}
        try:
            if val is None or not len(val[0]):
                raise _NoThreshold(NO_VAL)
            positive, score = val[0] == 1, val[1][:, 1]
            threshold = choose(positive, score, target)
        except _NoThreshold as why:
            absent = asdict(Estimate(None, reason=str(why)))
            points.append(point | {"reason": str(why), "metrics": dict.fromkeys(SHOWN, absent), "ppv_at_prevalence": [
                {"prevalence": one} | absent for one in prevalences]})  # fmt: skip
            continue
        point |= {"threshold": threshold, "val": _on_val(positive, score >= threshold)}
        points.append(point | _measured(labels == 1, scores[:, 1] >= threshold, bootstrap, prevalences))
    return points


def sensitive(positive: Flags, score: Float64s, target: float) -> float:
    """The highest threshold with at least the sensitivity `target`, of which fewer positives cannot fall short."""
    ranked = np.sort(score[positive])[::-1]
    needed = ceil(1 / (1 - target) - 1e-9)
    if len(ranked) < needed:
        raise _NoThreshold(f"`val` has {len(ranked)} positive images; {needed} are needed for {100 * target:g} %")
    return float(ranked[ceil(target * len(ranked) - 1e-9) - 1])


def recalling(positive: Flags, score: Float64s, target: float) -> float:
    """The lowest threshold that recalls at most the share `target`, whatever the truth."""
    distinct, counts = np.unique(score, return_counts=True)
    at_or_above = np.cumsum(counts[::-1])[::-1]
    fit = distinct[at_or_above <= target * len(score) + 1e-9]
    if not len(fit):
        raise _NoThreshold(f"no threshold recalls at most {100 * target:g} % of the images of `val`, but some")
    return float(fit[0])


def _on_val(positive: Flags, recalled: Flags) -> dict[str, Any]:
    count = int(positive.sum())
    return {
        "images": len(positive),
        "positives": count,
        "sensitivity": float(recalled[positive].mean()) if count else None,
        "recall_rate": float(recalled.mean()),
    }


def _measured(true: Flags, recalled: Flags, bootstrap: Bootstrap, prevalences: list[float]) -> dict[str, Any]:
    everyone = np.ones(len(true), bool)
    names = (*SHOWN, "false_positive_rate")
    pairs = [(recalled, true), (~recalled, ~true), (true, recalled), (~true, ~recalled), (recalled, everyone)]
    parts = dict(zip(names, bootstrap.shares([*pairs, (recalled, ~true)]), strict=True))
    reasons = REASONS | {"ppv": NONE_RECALLED, "npv": "every image was recalled", "recall_rate": NO_IMAGE}
    return {
        "metrics": {name: asdict(estimate([parts[name]], bootstrap.patients, reasons[name])) for name in SHOWN},
        "ppv_at_prevalence": [
            {"prevalence": one} | asdict(_ppv_at(one, parts["sensitivity"], parts["false_positive_rate"]))
            for one in prevalences
        ],
    }


def _ppv_at(prevalence: float, sensitivity: Part, false_positives: Part) -> Estimate:
    """PPV where the given share of images is positive, with sensitivity and false positive rate as they are here."""
    gained, lost = prevalence * sensitivity.value, (1 - prevalence) * false_positives.value
    if np.isnan(gained + lost):
        return Estimate(None, reason=REASONS["auc"])
    if gained + lost == 0:
        return Estimate(None, reason=NONE_RECALLED)
    value = gained / (gained + lost)
    if max(sensitivity.patients, false_positives.patients) < 2:
        return Estimate(value, reason="no interval: it rests on the images of one patient")
    limits = odds_interval(sensitivity, false_positives, prevalence / (1 - prevalence))
    if limits is None:
        return Estimate(value, reason="no interval: fewer than two resamples define the metric")
    defined = ~np.isnan(sensitivity.draws) & ~np.isnan(false_positives.draws)
    return Estimate(value, *limits, int(defined.sum()))

"""Simulated evaluations whose true figures are known, of patients with several images each.

A patient has `IMAGES` images. In a share of the patients those of one breast show cancer. The scores of both classes
are normal with variance 1; those of the images of one patient correlate. Letters: n images.
"""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
from scipy.special import expit, logit, ndtr, ndtri

from mama.evaluate.arrays import Float64s, Ints
from mama.evaluate.boxes import Lesion
from mama.evaluate.calibration import BINS
from mama.evaluate.detection import Marks

IMAGES = 4  # of a patient, two of each breast
WITHIN = 0.5  # correlation of the scores of two images of a patient with the same ground truth
ALIKE = 0.7  # correlation of the scores that two methods give an image
MARKED, FALSE = 0.85, 2.0  # share of the lesions that have a mark, and false marks an image
LESION, ELSEWHERE = (0.0, 0.0, 1.0, 1.0), (2.0, 2.0, 3.0, 3.0)  # boxes
GRID = np.linspace(-10, 10, 40_001)  # scores, to integrate over


def simulate(rng: np.random.Generator, patients: int, share: float, area: float) -> tuple[Ints, Float64s]:
    """Draw labels [n] and probabilities [n, 2] of `IMAGES` images of each patient; both classes occur."""
    labels = _labels(rng, patients, share)
    return labels.ravel(), _probabilities(labels, _noise(rng, patients), area)


def simulate_pair(
    rng: np.random.Generator, patients: int, share: float, area: float
) -> tuple[Ints, tuple[Float64s, Float64s]]:
    """Draw labels [n], and probabilities [n, 2] of two methods that are equally good and find the same images hard."""
    labels, shared = _labels(rng, patients, share), _noise(rng, patients)
    own = (np.sqrt(1 - ALIKE) * _noise(rng, patients) for _ in range(2))
    first, second = (_probabilities(labels, np.sqrt(ALIKE) * shared + noise, area) for noise in own)
    return labels.ravel(), (first, second)


def simulate_marks(
    rng: np.random.Generator, patients: int, share: float, area: float
) -> tuple[list[Marks], list[tuple[Lesion, ...]]]:
    """Draw the marks and the lesions of `IMAGES` images of each patient; an image with cancer has one lesion.

    A true mark has a higher score than a false one of another patient with probability `area`.
    """
    shows = _labels(rng, patients, share).ravel() == 1
    common, marks = np.repeat(rng.normal(size=patients), IMAGES), []
    for n, own in enumerate(shows):
        true = np.arange(rng.poisson(FALSE) + 1) == 0
        true = true[0 if own and rng.random() < MARKED else 1 :]
        noise = np.sqrt(WITHIN) * common[n] + np.sqrt(1 - WITHIN) * rng.normal(size=len(true))
        boxes = np.where(true[:, None], LESION, ELSEWHERE)
        marks.append((boxes, _distance(area) * true + noise))
    return marks, [(Lesion(LESION, "mass", 5.0, None),) if own else () for own in shows]


def calibrated(scores: Float64s, share: float, area: float) -> Float64s:
    """The probabilities [n, 2] that are right for the `scores` [n, 2] of `simulate`, by Bayes' theorem."""
    return _both(expit(_distance(area) * logit(scores[:, 1]) + logit(_prevalence(share))))


def true_values(share: float, area: float) -> dict[str, float]:
    """Return each metric in the population of `simulate`; `ece_calibrated` is that of `calibrated`."""
    recall = NormalDist().cdf(_distance(area) / 2)
    positive, negative = _densities(area)
    everyone = _prevalence(share) * positive + (1 - _prevalence(share)) * negative
    sick = _prevalence(share) * positive
    precision = _above(sick) / np.maximum(_above(everyone), 1e-300)
    stated = expit(GRID)
    bins = np.minimum((everyone.cumsum() * BINS).astype(int), BINS - 1)
    return {
        "auc": area,
        "balanced_accuracy": recall,
        "sensitivity": recall,
        "specificity": recall,
        "average_precision": float(positive @ precision),
        "brier": float(sick @ (1 - stated) ** 2 + (everyone - sick) @ stated**2),
        "ece": float(np.abs(np.bincount(bins, sick - everyone * stated)).sum()),
        "ece_calibrated": 0.0,
    }


def true_values_at(threshold: float, share: float, area: float, prevalence: float) -> dict[str, float]:
    """Return the figures of the images of `simulate` whose probability is at or above a threshold."""
    half, score, sick = _distance(area) / 2, logit(threshold), _prevalence(share)
    sensitivity, false_positives = float(ndtr(half - score)), float(ndtr(-half - score))
    recalled = sick * sensitivity + (1 - sick) * false_positives
    found, lost = prevalence * sensitivity, (1 - prevalence) * false_positives
    return {
        "sensitivity": sensitivity,
        "specificity": 1 - false_positives,
        "ppv": sick * sensitivity / recalled,
        "npv": (1 - sick) * (1 - false_positives) / (1 - recalled),
        "recall_rate": recalled,
        "ppv_at_prevalence": found / (found + lost),
    }


def true_detection(share: float, area: float, rates: tuple[float, ...]) -> tuple[float, list[float]]:
    """Return the average precision of `simulate_marks`, and the sensitivity at each rate of false marks an image."""
    distance = _distance(area)
    hits, false = _prevalence(share) * MARKED * ndtr(distance - GRID), FALSE * ndtr(-GRID)
    best = np.maximum.accumulate(hits / (hits + false))
    of_lesions = np.exp(-((GRID - distance) ** 2) / 2)
    limits = -ndtri(np.array(rates) / FALSE)
    return MARKED * float(of_lesions @ best / of_lesions.sum()), (MARKED * ndtr(distance - limits)).tolist()


def _labels(rng: np.random.Generator, patients: int, share: float) -> Ints:
    """[patients, IMAGES]: cancer in one breast of some."""
    labels = np.zeros((patients, IMAGES), dtype=np.int64)
    while not labels.any():
        sick = rng.random(patients) < share
        left = rng.random(patients) < 0.5
        labels = (sick[:, None] & (left[:, None] == (np.arange(IMAGES) < IMAGES // 2))).astype(np.int64)
    return labels


def _noise(rng: np.random.Generator, patients: int) -> Float64s:
    """[patients, IMAGES], of variance 1."""
    own, common = rng.normal(size=(patients, IMAGES)), rng.normal(size=(patients, 1))
    noise: Float64s = np.sqrt(WITHIN) * common + np.sqrt(1 - WITHIN) * own
    return noise


def _probabilities(labels: Ints, noise: Float64s, area: float) -> Float64s:
    return _both(1 / (1 + np.exp(-(_distance(area) * (labels - 0.5) + noise).ravel())))


def _both(positive: Float64s) -> Float64s:
    return np.stack([1 - positive, positive], axis=1)


def _prevalence(share: float) -> float:
    """Of cancer, among images: patients have it in one breast."""
    return share / 2


def _distance(area: float) -> float:
    """The distance between the means of two normal distributions of variance 1 whose AUC is `area`."""
    return float(np.sqrt(2) * NormalDist().inv_cdf(area))


def _densities(area: float) -> tuple[Float64s, Float64s]:
    """Weights on `GRID` of the scores of positive and of negative images."""
    weights = [np.exp(-((GRID - sign * _distance(area) / 2) ** 2) / 2) for sign in (1, -1)]
    return weights[0] / weights[0].sum(), weights[1] / weights[1].sum()


def _above(weights: Float64s) -> Float64s:
    """The weight at or above each point of `GRID`."""
    above: Float64s = weights[::-1].cumsum()[::-1]
    return above

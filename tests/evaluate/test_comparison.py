"""DeLong's test against its formulas, written out over all pairs of images."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from mama.bench.simulated_evaluation import IMAGES, simulate_pair
from mama.evaluate.comparison import delong


def components(labels: NDArray, scores: NDArray) -> tuple[NDArray, NDArray]:
    """Of each positive image the share of pairs that it wins, and of each negative one that of pairs that it loses."""
    gaps = scores[labels == 1, None] - scores[None, labels == 0]
    wins = (gaps > 0) + 0.5 * (gaps == 0)
    return wins.mean(1), wins.mean(0)


def clustered(labels: NDArray, one: NDArray, other: NDArray, patients: list[str]) -> tuple[float, float]:
    """Difference of AUCs and its standard error by Obuchowski 1997, from the covariance matrix of both AUCs."""
    names = sorted(set(patients))
    owner = np.array([names.index(p) for p in patients])
    sides = [owner[labels == 1], owner[labels == 0]]
    areas, sums = [], []
    for scores in (one, other):
        parts = components(labels, scores)
        areas.append(parts[0].mean())
        sums.append([[(part[side == i] - areas[-1]).sum() for i in range(len(names))]
                     for part, side in zip(parts, sides, strict=True)])  # fmt: skip
    of_sums = np.array(sums)  # [2 methods, positive and negative, patients]
    have, m = [len(set(side)) for side in sides], [len(side) for side in sides]
    covariance = np.zeros((2, 2))
    for r in range(2):
        for s in range(2):
            for k in range(2):
                covariance[r, s] += have[k] / (have[k] - 1) / m[k] ** 2 * (of_sums[r, k] @ of_sums[s, k])
            crossed = of_sums[r, 0] @ of_sums[s, 1] + of_sums[r, 1] @ of_sums[s, 0]
            covariance[r, s] += len(names) / (len(names) - 1) / (m[0] * m[1]) * crossed
    return areas[0] - areas[1], float(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]) ** 0.5


def pair(patients: int) -> tuple[NDArray, NDArray, NDArray, list[str]]:
    """Labels, scores of two methods with ties, and the patients of the images."""
    rng = np.random.default_rng(1)
    labels, (one, other) = simulate_pair(rng, patients, 0.5, 0.8)
    better = one[:, 1] + 0.2 * labels
    return labels, np.round(better, 1), np.round(other[:, 1], 1), [f"p{n // IMAGES}" for n in range(len(labels))]


def test_patients_with_several_images_have_the_variance_of_obuchowski() -> None:
    labels, one, other, patients = pair(40)
    found = delong(labels, [one], [other], patients)
    assert found
    value, error = clustered(labels, one, other, patients)
    assert value == pytest.approx(roc_auc_score(labels, one) - roc_auc_score(labels, other))
    assert (found.value, found.low, found.high) == pytest.approx(
        (value, value - 1.959964 * error, value + 1.959964 * error)
    )
    assert found.p == pytest.approx(2 * norm.sf(abs(value) / error))
    separate = delong(labels, [one], [other], [str(n) for n in range(len(labels))])
    assert separate
    assert separate.high - separate.low != pytest.approx(found.high - found.low, rel=0.05), "the patients matter"


def test_of_single_images_it_is_delongs_own_test() -> None:
    labels, one, other, _ = pair(40)
    found = delong(labels, [one], [other], [str(n) for n in range(len(labels))])
    assert found
    gaps = [a - b for a, b in zip(components(labels, one), components(labels, other), strict=True)]
    error = sum(gap.var(ddof=1) / len(gap) for gap in gaps) ** 0.5
    assert (found.high - found.low) / 2 == pytest.approx(1.959964 * error)


def test_trainings_of_a_method_count_by_their_mean() -> None:
    labels, one, other, patients = pair(40)
    found, twice = delong(labels, [one], [other], patients), delong(labels, [one, one], [other], patients)
    assert twice == found
    mixed = delong(labels, [one, other], [other], patients)
    assert found
    assert mixed
    assert (mixed.value, mixed.high - mixed.low) == pytest.approx((found.value / 2, (found.high - found.low) / 2))
    back = delong(labels, [other], [one], patients)
    assert back
    assert (back.value, back.p) == pytest.approx((-found.value, found.p))


def test_equal_methods_do_not_differ_and_one_patient_says_nothing() -> None:
    labels, one, _, patients = pair(20)
    same = delong(labels, [one], [one], patients)
    assert same
    assert (same.value, same.p) == (0.0, 1.0)
    sick = patients[int(labels.argmax())]
    alone = np.array([label if p == sick else 0 for label, p in zip(labels, patients, strict=True)])
    assert delong(alone, [one], [one], patients) is None
    assert delong(np.zeros_like(labels), [one], [one], patients) is None

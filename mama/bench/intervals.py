"""`mama bench intervals`: coverage of the 95 % intervals in simulated evaluations, and false alarms of comparisons."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import NormalDist

import numpy as np

from mama.evaluate import intervals, metrics
from mama.evaluate.arrays import Float64s, Ints
from mama.evaluate.bootstrap import Bootstrap

PATIENTS = (20, 40, 80, 200)
SHARES = (0.5, 0.25)  # of patients with cancer, in one breast
AREAS = (0.75, 0.9, 0.97)  # true AUC
IMAGES = 4  # of a patient, two of each breast
WITHIN = 0.5  # correlation of the scores of two images of a patient with the same ground truth
ALIKE = 0.7  # correlation of the scores that two methods give an image
COMPARED = ("auc", "balanced_accuracy")
SHOWN = ("auc", "balanced_accuracy", "sensitivity", "specificity")


def bench_intervals(rounds: int, resamples: int) -> Iterator[str]:
    """Simulate `rounds` evaluations of each setting; yield tables in Markdown: coverage, length, false alarms."""
    titles = [name.replace("_", " ").replace("auc", "AUC") for name in (*SHOWN, *COMPARED)]
    yield f"| patients | with cancer | true AUC | {' | '.join(titles[: len(SHOWN)])} |"
    yield "|---" * (3 + len(SHOWN)) + "|"
    for share in SHARES:
        for patients in PATIENTS:
            for area in AREAS:
                cells = coverage(patients, share, area, rounds, resamples)
                shown = " | ".join(f"{100 * held:.1f} % ({length:.3f})" for held, length in cells.values())
                yield f"| {patients} | {100 * share:g} % | {area} | {shown} |"
    yield ""
    yield f"| patients | with cancer | true AUC of both | {' | '.join(titles[len(SHOWN) :])} |"
    yield "|---" * (3 + len(COMPARED)) + "|"
    for share in SHARES:
        for patients in PATIENTS:
            for area in AREAS:
                alarms = false_alarms(patients, share, area, rounds, resamples).values()
                shown = " | ".join(f"{100 * rate:.1f} %" for rate in alarms)
                yield f"| {patients} | {100 * share:g} % | {area} | {shown} |"


def coverage(patients: int, share: float, area: float, rounds: int, resamples: int) -> dict[str, tuple[float, float]]:
    """Return by metric the share of `rounds` intervals that contain the true value, and their mean length; seeded."""
    rng = np.random.default_rng([patients, round(100 * share), round(100 * area)])
    names = [f"{n:04d}" for n in range(patients) for _ in range(IMAGES)]
    truth = true_values(area)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in SHOWN}
    for number in range(rounds):
        estimates = metrics.measure(*simulate(rng, patients, share, area), names, True, resamples, number)
        for name in SHOWN:
            one = estimates[name]
            if one.low is not None and one.high is not None:
                found[name].append((one.low <= truth[name] <= one.high, one.high - one.low))
    return {name: tuple(np.mean(pairs or [(np.nan, np.nan)], axis=0)) for name, pairs in found.items()}


def false_alarms(patients: int, share: float, area: float, rounds: int, resamples: int) -> dict[str, float]:
    """Return by metric the share of `rounds` paired comparisons of two equally good methods with p < 0.05; seeded."""
    rng = np.random.default_rng([patients, round(100 * share), round(100 * area), 2])
    names = [f"{n:04d}" for n in range(patients) for _ in range(IMAGES)]
    alarms: dict[str, list[bool]] = {name: [] for name in COMPARED}
    for number in range(rounds):
        labels, pair = simulate_pair(rng, patients, share, area)
        bootstrap = Bootstrap(names, resamples, number)
        ours, theirs = (metrics.drawn_parts(labels, scores, bootstrap, True) for scores in pair)
        for name in COMPARED:
            if found := intervals.difference([ours[name]], [theirs[name]]):
                alarms[name].append(found.p is not None and found.p < 0.05)
    return {name: float(np.mean(of_metric)) if of_metric else float("nan") for name, of_metric in alarms.items()}


def true_values(area: float) -> dict[str, float]:
    """Return each metric in the population of `simulate`, whose scores are normal with variance 1 in both classes."""
    recall = NormalDist().cdf(_distance(area) / 2)
    return {"auc": area, "balanced_accuracy": recall, "sensitivity": recall, "specificity": recall}


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
    positive = 1 / (1 + np.exp(-(_distance(area) * (labels - 0.5) + noise).ravel()))
    return np.stack([1 - positive, positive], axis=1)


def _distance(area: float) -> float:
    """The distance between the means of two normal distributions of variance 1 whose AUC is `area`."""
    return float(np.sqrt(2) * NormalDist().inv_cdf(area))

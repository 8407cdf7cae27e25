"""`mama bench intervals`: coverage of the 95 % intervals in simulated evaluations, and false alarms of comparisons."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from mama.bench.simulated_evaluation import (
    IMAGES,
    calibrated,
    simulate,
    simulate_marks,
    simulate_pair,
    true_detection,
    true_values,
    true_values_at,
)
from mama.evaluate import detection, intervals, metrics
from mama.evaluate.bootstrap import Bootstrap
from mama.evaluate.calibration import calibration
from mama.evaluate.comparison import delong
from mama.evaluate.operating_points import operating_points
from mama.settings.schema import Config, EvalConfig

PATIENTS = (20, 40, 80, 200)
SHARES = (0.5, 0.25)  # of patients with cancer, in one breast
AREAS = (0.75, 0.9, 0.97)  # true AUC
SHOWN = ("auc", "balanced_accuracy", "sensitivity", "specificity")
PROBABILITIES = ("average_precision", "brier", "ece", "ece_calibrated")
COMPARED = ("auc", "balanced_accuracy", "average_precision", "brier")
PREVALENCE = 0.005
FALSE_MARKS = (0.25, 1.0)  # an image, at which the sensitivity of a detection is simulated
TITLES = {
    "auc": "AUC",
    "auc_by_delong": "AUC, DeLong",
    "brier": "Brier score",
    "ece": "ECE",
    "ece_calibrated": "ECE, calibrated",
    "ppv": "PPV",
    "npv": "NPV",
    "ppv_at_prevalence": f"PPV at {100 * PREVALENCE:g} %",
}

Found = dict[str, list[tuple[float, float]]]  # by metric and simulation: 1 if the interval is right, its length
Shares = dict[str, tuple[float, float]]  # by metric: the share of right intervals, their mean length


def bench_intervals(rounds: int, resamples: int) -> Iterator[str]:
    """Simulate `rounds` evaluations of each setting; yield tables in Markdown: coverage and length, false alarms."""
    for measure in (coverage, coverage_of_probabilities, coverage_at_threshold, coverage_of_detection, false_alarms):
        if measure is not coverage:
            yield ""
        head = False
        for share in SHARES:
            for patients in PATIENTS:
                for area in AREAS:
                    cells: Mapping[str, Any] = measure(patients, share, area, rounds, resamples)
                    if not head:
                        titles = [TITLES.get(name, name.replace("_", " ")) for name in cells]
                        true = "true AUC of both" if measure is false_alarms else "true AUC"
                        yield f"| patients | with cancer | {true} | {' | '.join(titles)} |"
                        yield "|---" * (3 + len(titles)) + "|"
                        head = True
                    yield f"| {patients} | {100 * share:g} % | {area} | {' | '.join(map(_cell, cells.values()))} |"


def coverage(patients: int, share: float, area: float, rounds: int, resamples: int) -> Shares:
    """Return by metric the share of `rounds` intervals that contain the true value, and their mean length; seeded."""
    rng = np.random.default_rng(_seed(patients, share, area))
    names, truth, found = _names(patients), true_values(share, area), _none(SHOWN)
    for number in range(rounds):
        estimates = metrics.measure(*simulate(rng, patients, share, area), names, True, resamples, number)
        for name in SHOWN:
            _add(found, name, asdict(estimates[name]), truth[name])
    return _shares(found)


def coverage_of_probabilities(patients: int, share: float, area: float, rounds: int, resamples: int) -> Shares:
    """As `coverage`, of average precision, Brier score and ECE; the ECE also of a calibrated method."""
    rng = np.random.default_rng([*_seed(patients, share, area), 3])
    names, truth, found = _names(patients), true_values(share, area), _none(PROBABILITIES)
    for number in range(rounds):
        labels, scores = simulate(rng, patients, share, area)
        bootstrap = Bootstrap(names, resamples, number)
        precision = metrics.measure(labels, scores, names, True, resamples, number)["average_precision"]
        raw, right = (
            calibration(labels, one, True, bootstrap, None)["uncalibrated"]
            for one in (scores, calibrated(scores, share, area))
        )
        measured = asdict(precision), raw["brier"], raw["ece"], right["ece"]
        for name, estimate in zip(PROBABILITIES, measured, strict=True):
            _add(found, name, estimate, truth[name])
    return _shares(found)


def coverage_at_threshold(patients: int, share: float, area: float, rounds: int, resamples: int) -> Shares:
    """As `coverage`, of the figures at a threshold with 80 % sensitivity among as many other patients."""
    rng = np.random.default_rng([*_seed(patients, share, area), 4])
    names, found = _names(patients), _none(true_values_at(0.5, share, area, PREVALENCE))
    for number in range(rounds):
        val, held_out = (simulate(rng, patients, share, area) for _ in range(2))
        bootstrap = Bootstrap(names, resamples, number)
        point = operating_points(*held_out, bootstrap, val, [PREVALENCE])[0]
        if point["threshold"] is None:
            continue
        measured = point["metrics"] | {"ppv_at_prevalence": point["ppv_at_prevalence"][0]}
        for name, truth in true_values_at(point["threshold"], share, area, PREVALENCE).items():
            _add(found, name, measured[name], truth)
    return _shares(found)


def coverage_of_detection(patients: int, share: float, area: float, rounds: int, resamples: int) -> Shares:
    """As `coverage`, of the average precision of marked boxes, and of the sensitivity at two rates of false ones."""
    rng = np.random.default_rng([*_seed(patients, share, area), 5])
    names, (precision, sensitivities) = _names(patients), true_detection(share, area, FALSE_MARKS)
    truth = {"average_precision": precision, **dict(zip(map(_at_rate, FALSE_MARKS), sensitivities, strict=True))}
    found = _none(tuple(truth))
    for number in range(rounds):
        marks, lesions = simulate_marks(rng, patients, share, area)
        config = Config(seed=number, eval=EvalConfig(bootstrap=resamples))
        (row,) = detection.document({"simulated": marks}, detection.Searched(names, lesions), config)["rows"]
        measured = {_at_rate(one["false_positives"]): one["sensitivity"] for one in row["froc"]}
        for name, true in truth.items():
            _add(found, name, (measured | {"average_precision": row["ap"]["0.25"]})[name], true)
    return _shares(found)


def _at_rate(rate: float) -> str:
    return f"sensitivity at {rate:g} an image"


def false_alarms(patients: int, share: float, area: float, rounds: int, resamples: int) -> dict[str, float]:
    """Return by metric the share of `rounds` paired comparisons of two equally good methods with p < 0.05; seeded."""
    rng = np.random.default_rng([*_seed(patients, share, area), 2])
    names = _names(patients)
    alarms: dict[str, list[bool]] = {name: [] for name in (*COMPARED, "auc_by_delong")}
    for number in range(rounds):
        labels, pair = simulate_pair(rng, patients, share, area)
        bootstrap = Bootstrap(names, resamples, number)
        ours, theirs = (metrics.drawn_parts(labels, scores, bootstrap, True) for scores in pair)
        differences = {name: intervals.difference([ours[name]], [theirs[name]]) for name in COMPARED}
        differences["auc_by_delong"] = delong(labels, [pair[0][:, 1]], [pair[1][:, 1]], names)
        for name, difference in differences.items():
            if difference:
                alarms[name].append(difference.p is not None and difference.p < 0.05)
    return {name: float(np.mean(of_metric)) if of_metric else float("nan") for name, of_metric in alarms.items()}


def _seed(patients: int, share: float, area: float) -> list[int]:
    return [patients, round(100 * share), round(100 * area)]


def _names(patients: int) -> list[str]:
    """The patient of each image."""
    return [f"{n:04d}" for n in range(patients) for _ in range(IMAGES)]


def _none(names: Mapping[str, Any] | tuple[str, ...]) -> Found:
    return {name: [] for name in names}


def _add(found: Found, name: str, estimate: Mapping[str, Any], truth: float) -> None:
    low, high = estimate["low"], estimate["high"]
    if low is not None:
        found[name].append((float(low <= truth <= high), high - low))


def _shares(found: Found) -> Shares:
    means = {name: np.mean(np.array(pairs, float).reshape(-1, 2), axis=0) for name, pairs in found.items()}
    return {name: (float(held), float(length)) for name, (held, length) in means.items()}


def _cell(value: tuple[float, float] | float) -> str:
    return f"{100 * value:.1f} %" if isinstance(value, float) else f"{100 * value[0]:.1f} % ({value[1]:.3f})"

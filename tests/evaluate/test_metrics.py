from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import t as student
from sklearn.metrics import (
    average_precision_score,
    balanced_accuracy_score,
    brier_score_loss,
    confusion_matrix,
    f1_score,
    precision_recall_curve,
    precision_score,
    recall_score,
    roc_auc_score,
    roc_curve,
)

from mama.bench.intervals import coverage
from mama.bench.simulated_evaluation import IMAGES, simulate, true_values
from mama.evaluate import bootstrap, intervals, metrics
from mama.evaluate.bootstrap import Estimate
from mama.evaluate.intervals import Part


def cohort(seed: int, classes: int, images: int = 120, patients: int = 30) -> tuple:
    """Labels, scores with many ties, and patients of unequal numbers of images."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, images)
    scores = rng.integers(1, 9, (images, classes)) + 3.0 * np.eye(classes)[labels]
    scores /= scores.sum(1, keepdims=True)
    if classes == 2:
        scores = np.round(scores, 1)  # ties
    names = [f"p{n}" for n in rng.integers(0, patients, images) ** 2 // patients]
    return labels, scores, names


def values(found: dict[str, Estimate]) -> dict[str, float | None]:
    return {name: estimate.value for name, estimate in found.items()}


@pytest.mark.parametrize("seed", range(4))
def test_binary_metrics_equal_scikit_learn(seed: int) -> None:
    labels, scores, patients = cohort(seed, 2)
    predicted = scores.argmax(1)
    found = values(metrics.measure(labels, scores, patients, True, 0, 0))
    soft_true, soft_false = scores[labels == 1, 1].sum(), scores[labels == 0, 1].sum()
    precision, recall = soft_true / (soft_true + soft_false), soft_true / (labels == 1).sum()
    false_positive, true_positive, _ = roc_curve(labels, scores[:, 1], drop_intermediate=False)
    assert found == pytest.approx(
        {
            "auc": roc_auc_score(labels, scores[:, 1]),
            "balanced_accuracy": balanced_accuracy_score(labels, predicted),
            "average_precision": average_precision_score(labels, scores[:, 1]),
            "brier": brier_score_loss(labels, scores[:, 1]),
            "sensitivity": recall_score(labels, predicted),
            "specificity": recall_score(labels, predicted, pos_label=0),
            "ppv": precision_score(labels, predicted),
            "npv": precision_score(labels, predicted, pos_label=0),
            "f1": f1_score(labels, predicted),
            "probabilistic_f1": 2 * precision * recall / (precision + recall),
            "specificity_at_sensitivity": (1 - false_positive[true_positive >= 0.8]).max(),
        }
    )


@pytest.mark.parametrize("classes", [3, 5])
def test_metrics_of_several_classes_equal_scikit_learn(classes: int) -> None:
    labels, scores, patients = cohort(classes, classes)
    found = values(metrics.measure(labels, scores, patients, False, 0, 0))
    assert found == pytest.approx(
        {
            "auc": roc_auc_score(labels, scores, multi_class="ovr", average="macro"),
            "balanced_accuracy": balanced_accuracy_score(labels, scores.argmax(1)),
            "average_precision": average_precision_score(np.eye(classes)[labels], scores, average="macro"),
            "brier": np.mean([brier_score_loss(labels == k, scores[:, k]) for k in range(classes)]) * classes / 2,
        }
    )
    assert np.array_equal(metrics.confusion(labels, scores), confusion_matrix(labels, scores.argmax(1)))


def test_a_class_that_does_not_occur_is_left_out_of_the_means() -> None:
    labels, scores, patients = cohort(7, 4)
    here = labels != 2
    found = values(metrics.measure(labels[here], scores[here], list(np.array(patients)[here]), False, 0, 0))
    areas = [roc_auc_score(labels[here] == k, scores[here, k]) for k in (0, 1, 3)]
    recalls = [np.mean(scores[here].argmax(1)[labels[here] == k] == k) for k in (0, 1, 3)]
    assert (found["auc"], found["balanced_accuracy"]) == pytest.approx((np.mean(areas), np.mean(recalls)))
    precisions = [average_precision_score(labels[here] == k, scores[here, k]) for k in (0, 1, 3)]
    assert found["average_precision"] == pytest.approx(np.mean(precisions))


def redrawn(labels: NDArray, scores: NDArray, patients: list[str], resamples: int, seed: int) -> list[tuple]:
    """The bootstrap by hand: draw patients, and write down the images of each as often as she was drawn."""
    names = sorted(set(patients))
    counts = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)
    samples = []
    for row in counts:
        rows = [
            i
            for name, times in zip(names, row, strict=True)
            for _ in range(times)
            for i, p in enumerate(patients)
            if p == name
        ]
        samples.append((labels[rows], scores[rows]))
    return samples


def test_intervals_are_those_of_a_bootstrap_over_patients_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    labels, scores, patients = cohort(11, 2, images=60, patients=9)
    monkeypatch.setattr(bootstrap, "CELLS", 60 * 7)  # several pieces
    kept = metrics.measure(labels, scores, patients, True, 40, 5)
    monkeypatch.setattr(bootstrap, "HELD", 0)  # drawn anew for each figure
    assert metrics.measure(labels, scores, patients, True, 40, 5) == kept
    found = metrics.measure(labels, scores, patients, True, 40, 5)
    samples = redrawn(labels, scores, patients, 40, 5)
    by_hand = {
        "auc": [roc_auc_score(y, s[:, 1]) for y, s in samples],
        "average_precision": [average_precision_score(y, s[:, 1]) for y, s in samples],
        "brier": [brier_score_loss(y, s[:, 1]) for y, s in samples],
        "ppv": [precision_score(y, s.argmax(1)) for y, s in samples],
        "specificity_at_sensitivity": [
            (1 - fpr[tpr >= 0.8 - 1e-12]).max()
            for fpr, tpr, _ in (roc_curve(y, s[:, 1], drop_intermediate=False) for y, s in samples)
        ],
    }
    rarer = {  # patients of the class, of the positive calls, of the class that fewer have
        "auc": min(len({p for p, y in zip(patients, labels, strict=True) if y == k}) for k in (0, 1)),
        "ppv": len({p for p, s in zip(patients, scores, strict=True) if s.argmax() == 1}),
    }
    rarer |= {"specificity_at_sensitivity": rarer["auc"], "average_precision": rarer["auc"]}
    rarer["brier"] = len(set(patients))
    for name, drawn in by_hand.items():
        expected = solved(found[name].value or 0.0, np.array(drawn), rarer[name])
        assert (found[name].low, found[name].high) == pytest.approx(expected)
        assert found[name].resamples == 40


def solved(value: float, drawn: NDArray, patients: int) -> tuple[float, float]:
    """Wilson's limits by search: the true shares from which `value` is just not too far away."""
    variance = drawn.var(ddof=1) * patients / (patients - 1)
    images, quantile = drawn.mean() * (1 - drawn.mean()) / variance, student.ppf(0.975, patients - 1)

    def excess(true: float) -> float:
        return (value - true) ** 2 - quantile**2 * true * (1 - true) / images

    return brentq(excess, 0, value), brentq(excess, value, 1)


def test_the_interval_of_a_mean_over_classes_adds_those_of_the_classes_as_they_vary_together() -> None:
    labels, scores, patients = cohort(4, 3)
    found = metrics.measure(labels, scores, patients, False, 200, 1)["balanced_accuracy"]
    recalls = np.array([[np.mean(s.argmax(1)[y == k] == k) for k in range(3)]
                        for y, s in redrawn(labels, scores, patients, 200, 1)])  # fmt: skip
    point = [np.mean(scores.argmax(1)[labels == k] == k) for k in range(3)]
    counts = [len({p for p, y in zip(patients, labels, strict=True) if y == k}) for k in range(3)]
    limits = np.array([solved(point[k], recalls[:, k], counts[k]) for k in range(3)])
    related = np.corrcoef(recalls.T)
    low, high = (sum(related[i, j] * arm[i] * arm[j] for i in range(3) for j in range(3)) ** 0.5 / 3
                 for arm in (point - limits[:, 0], limits[:, 1] - point))  # fmt: skip
    assert (found.low, found.high) == pytest.approx((np.mean(point) - low, np.mean(point) + high))


@pytest.mark.parametrize(("share", "area"), [(0.5, 0.75), (0.5, 0.97), (0.25, 0.9)])
def test_95_of_100_intervals_of_twenty_patients_hold_the_true_value(share: float, area: float) -> None:
    """The standard error of a share of 150 is 0.018: percentile intervals hold it in 0.75 to 0.90."""
    for name, (held, length) in coverage(20, share, area, rounds=150, resamples=60).items():
        assert held > 0.9, name
        assert length < 0.8, name


def test_simulations_without_any_interval_have_no_coverage() -> None:
    """Of two patients one at most has cancer here."""
    assert np.isnan(coverage(2, 0.25, 0.9, rounds=1, resamples=10)["auc"]).all()


def test_the_simulated_truth_is_that_of_a_large_cohort() -> None:
    labels, scores = simulate(np.random.default_rng(1), 20000, 0.4, 0.8)
    found = values(metrics.measure(labels, scores, [str(n // IMAGES) for n in range(len(labels))], True, 0, 0))
    truth = true_values(0.4, 0.8)
    for name in set(truth) - {"ece", "ece_calibrated"}:
        assert found[name] == pytest.approx(truth[name], abs=0.01), name


def test_no_image_is_no_figure() -> None:
    for classes, binary in ((2, True), (0, False)):
        found = metrics.measure(np.zeros(0, np.int64), np.zeros((0, classes)), [], binary, 10, 0)
        assert set(found) == set(metrics.REASONS if binary else metrics.ALWAYS)
        for estimate in found.values():
            assert estimate == Estimate(None, reason="there is no image")


def test_where_no_image_is_wrong_the_interval_has_a_length_all_the_same() -> None:
    labels = np.arange(24) % 2
    scores = np.stack([1.0 - labels, labels], axis=1)
    for patients, shortest, longest in ((6, 0.3, 0.6), (24, 0.1, 0.4)):
        found = metrics.measure(labels, scores, [f"p{n * patients // 24}" for n in range(24)], True, 50, 0)
        for name, estimate in found.items():
            best, worst = (0.0, estimate.high) if name == "brier" else (1.0, estimate.low)
            assert estimate.value == best, name
            assert best in (estimate.low, estimate.high), name
            assert shortest < abs(best - (worst or 0)) < longest, name


def test_a_class_of_one_patient_makes_no_interval_alone_and_a_wide_one_among_others() -> None:
    labels = np.array([0] * 30 + [1] * 30 + [2] * 4)
    scores = np.eye(3)[labels]
    patients = [f"p{n // 2}" for n in range(60)] + ["alone"] * 4
    found = metrics.measure(labels, scores, patients, False, 100, 0)["balanced_accuracy"]
    assert (found.value, found.high) == (1.0, 1.0)
    assert (found.low or 0) < 2 / 3, "its recall may be anything"
    two = labels != 1
    alone = metrics.measure(labels[two] // 2, scores[two][:, [0, 2]], list(np.array(patients)[two]), True, 100, 0)
    for name in ("auc", "sensitivity"):
        assert (alone[name].value, alone[name].low) == (1.0, None)
        assert "one patient" in str(alone[name].reason)
    assert alone["specificity"].low is not None


def test_copies_of_a_patients_image_do_not_shorten_the_interval() -> None:
    labels, scores, _ = cohort(3, 2, images=40)
    once = metrics.measure(labels, scores, [str(n) for n in range(40)], True, 500, 0)["auc"]
    copied = np.repeat(np.arange(40), 10)
    ten = metrics.measure(labels[copied], scores[copied], [str(n) for n in copied], True, 500, 0)["auc"]
    assert (ten.value, ten.low, ten.high) == pytest.approx((once.value, once.low, once.high))


def test_resamples_without_a_class_are_left_out_and_counted() -> None:
    labels = np.array([1, 1, 0, 0, 0])
    scores = np.array([[0.1, 0.9], [0.3, 0.7], [0.8, 0.2], [0.7, 0.3], [0.25, 0.75]])
    auc = metrics.measure(labels, scores, list("abcde"), True, 1000, 0)["auc"]
    share_with_both = 1 - (3 / 5) ** 5 - (2 / 5) ** 5
    assert auc.value == pytest.approx(5 / 6)
    assert auc.resamples == pytest.approx(1000 * share_with_both, abs=60)
    assert auc.low is not None
    assert auc.high is not None
    assert 0 <= auc.low < 5 / 6 < auc.high <= 1.0


def test_an_undefined_metric_is_none_with_a_reason_and_never_zero() -> None:
    scores = np.array([[0.9, 0.1], [0.8, 0.2]])
    found = metrics.measure(np.array([0, 0]), scores, ["a", "b"], True, 10, 0)
    for name in (
        "auc",
        "balanced_accuracy",
        "average_precision",
        "sensitivity",
        "ppv",
        "f1",
        "probabilistic_f1",
        "specificity_at_sensitivity",
    ):
        assert found[name].value is None, name
        assert found[name].reason == metrics.REASONS[name]
    assert found["specificity"].value == 1.0
    alone = metrics.measure(np.array([0, 1]), np.array([[0.9, 0.1], [0.2, 0.8]]), ["a", "a"], True, 10, 0)["auc"]
    assert (alone.value, alone.low) == (1.0, None)
    assert "one patient" in str(alone.reason)


def drawn(labels: NDArray, scores: list[NDArray], patients: list[str], metric: str) -> list[list[Part]]:
    """The parts of each training's figure, on the same resampled patients."""
    resampled = bootstrap.Bootstrap(patients, 1000, 0)
    return [metrics.drawn_parts(labels, one, resampled, one.shape[1] == 2)[metric] for one in scores]


def delong(labels: NDArray, one: NDArray, other: NDArray) -> tuple[float, float]:
    """The difference of two AUCs and its standard error by DeLong et al. 1988, from all pairs of images."""
    placements = []
    for scores in (one, other):
        pairs = scores[labels == 1, None] - scores[None, labels == 0]
        wins = (pairs > 0) + 0.5 * (pairs == 0)
        placements.append((wins.mean(1), wins.mean(0)))
    of_positive, of_negative = (placements[0][k] - placements[1][k] for k in (0, 1))
    variance = of_positive.var(ddof=1) / len(of_positive) + of_negative.var(ddof=1) / len(of_negative)
    return of_positive.mean(), variance**0.5


@pytest.mark.parametrize("better", [0.0, 0.4])
def test_a_difference_of_independent_patients_is_that_of_delong(better: float) -> None:
    rng = np.random.default_rng(2)
    labels = np.arange(300) % 3 // 2
    common = labels + rng.normal(size=300)
    pair = [np.stack([-s, s], axis=1) for s in (common + extra * labels + 0.7 * rng.normal(size=300)
                                                for extra in (better, 0.0))]  # fmt: skip
    ours, theirs = (drawn(labels, [one], [str(n) for n in range(300)], "auc") for one in pair)
    found = intervals.difference(ours, theirs)
    assert found
    value, error = delong(labels, pair[0][:, 1], pair[1][:, 1])
    assert found.value == pytest.approx(value)
    assert (found.low, found.high) == pytest.approx((value - 1.96 * error, value + 1.96 * error), abs=0.15 * error)
    assert found.p is not None
    assert found.p == pytest.approx(2 * student.sf(abs(value) / error, 99), rel=0.5)
    assert (found.p < 0.05) == (found.low > 0) == (better > 0)
    back = intervals.difference(theirs, ours)
    assert back
    assert (back.value, back.low, back.high, back.p) == pytest.approx(
        (-found.value, -found.high, -found.low, found.p), abs=1e-9
    )


@pytest.mark.parametrize(("classes", "metric"), [(2, "auc"), (4, "balanced_accuracy")])
def test_a_difference_over_seeds_is_that_of_a_bootstrap_by_hand(classes: int, metric: str) -> None:
    """In each resample of patients: the mean over the trainings of one method, minus that over the other's."""
    rng = np.random.default_rng(3)
    labels, easy, patients = cohort(3, classes, images=240, patients=60)
    sides = [[easy + weight * rng.random(easy.shape) for _ in range(seeds)] for weight, seeds in ((0.3, 3), (0.6, 2))]
    ours, theirs = (drawn(labels, side, patients, metric) for side in sides)
    found = intervals.difference(ours, theirs)

    def by_hand(rows: NDArray) -> float:
        alone = ["she"] * len(rows), classes == 2, 0, 0
        means = [np.mean([values(metrics.measure(labels[rows], one[rows], *alone))[metric] for one in side])
                 for side in sides]  # fmt: skip
        return float(means[0] - means[1])

    images = {name: [n for n, p in enumerate(patients) if p == name] for name in set(patients)}
    names = sorted(images)
    redraws = [by_hand(np.concatenate([images[n] for n in rng.choice(names, len(names))])) for _ in range(300)]
    assert found
    assert found.value == pytest.approx(by_hand(np.arange(240)))
    assert found.high - found.low == pytest.approx(2 * 2.01 * np.std(redraws), rel=0.25)
    apart = np.std(ours[0][0].draws) + np.std(theirs[0][0].draws)
    assert found.high - found.low < 2 * apart or metric != "auc", "the same patients are hard for both"


def test_equal_methods_do_not_differ_and_methods_without_variance_do() -> None:
    labels, scores, patients = cohort(5, 2)
    same = drawn(labels, [scores], patients, "auc")
    found = intervals.difference(same, same)
    assert found
    assert (found.value, found.p) == (0, 1)
    assert -0.03 < found.low <= 0 <= found.high < 0.03
    perfect, blind = np.eye(2)[labels], np.full((len(labels), 2), 0.5)
    found = intervals.difference(drawn(labels, [perfect], patients, "auc"), drawn(labels, [blind], patients, "auc"))
    assert found
    assert found.value == 0.5
    assert 0.1 < found.low < 0.45 < found.high < 0.9
    assert found.p is not None
    assert found.p < 0.05


def test_a_class_of_one_patient_gives_no_p_value() -> None:
    """It could lie anywhere between 0 and 1 for other patients, so that 0 is within every interval."""
    labels = np.repeat([0, 1, 2], [20, 20, 1])
    patients = [str(n // 2) for n in range(41)]
    rng = np.random.default_rng(0)
    good, bad = 0.3 * np.eye(3)[labels] + rng.normal(0, 1, (41, 3)), rng.normal(0, 1, (41, 3))
    found = intervals.difference(drawn(labels, [good], patients, "auc"), drawn(labels, [bad], patients, "auc"))
    assert found
    assert found.low < 0 < found.value
    assert found.p is None


def test_one_patient_makes_no_difference() -> None:
    labels, scores, _ = cohort(5, 2)
    parts = drawn(labels, [scores], ["she"] * len(labels), "auc")
    assert intervals.difference(parts, parts) is None


def test_mean_and_roc() -> None:
    hits = np.array([1.0, 0.0, 1.0, 1.0])
    found = bootstrap.mean(hits, ["a", "a", "b", "c"], 200, 0)
    assert found.value == 0.75
    by_patient = np.random.default_rng(0).multinomial(3, [1 / 3] * 3, size=200)
    drawn = by_patient @ [1, 1, 1] / (by_patient @ [2, 1, 1])
    assert (found.low, found.high) == pytest.approx(solved(0.75, drawn, 3))
    assert bootstrap.mean(np.array([]), [], 10, 0).value is None
    labels, scores, _ = cohort(2, 2)
    false_positive, true_positive = metrics.roc(labels, scores[:, 1])
    expected = roc_curve(labels, scores[:, 1], drop_intermediate=False)
    assert np.allclose(false_positive, expected[0])
    assert np.allclose(true_positive, expected[1])
    recall, precision = metrics.precision_recall(labels, scores[:, 1])
    high, share, _ = precision_recall_curve(labels, scores[:, 1])  # from recall 1 to recall 0
    rises = np.diff(share[::-1]) > 0
    assert np.allclose(recall[1:], share[-2::-1][rises])
    assert np.allclose(precision[1:], high[-2::-1][rises])
    assert precision[0] == precision[1]

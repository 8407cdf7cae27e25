from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import (
    balanced_accuracy_score,
    confusion_matrix,
    f1_score,
    precision_score,
    recall_score,
    roc_auc_score,
    roc_curve,
)

from mama import metrics


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


def values(found: dict[str, metrics.Estimate]) -> dict[str, float | None]:
    return {name: estimate.value for name, estimate in found.items()}


@pytest.mark.parametrize("seed", range(4))
def test_binary_metrics_equal_scikit_learn(seed: int) -> None:
    labels, scores, patients = cohort(seed, 2)
    called = scores.argmax(1)
    found = values(metrics.measure(labels, scores, patients, True, 0, 0))
    soft_true, soft_false = scores[labels == 1, 1].sum(), scores[labels == 0, 1].sum()
    precision, recall = soft_true / (soft_true + soft_false), soft_true / (labels == 1).sum()
    false_positive, true_positive, _ = roc_curve(labels, scores[:, 1], drop_intermediate=False)
    assert found == pytest.approx(
        {
            "auc": roc_auc_score(labels, scores[:, 1]),
            "balanced_accuracy": balanced_accuracy_score(labels, called),
            "sensitivity": recall_score(labels, called),
            "specificity": recall_score(labels, called, pos_label=0),
            "ppv": precision_score(labels, called),
            "npv": precision_score(labels, called, pos_label=0),
            "f1": f1_score(labels, called),
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
        }
    )
    assert np.array_equal(metrics.confusion(labels, scores), confusion_matrix(labels, scores.argmax(1)))


def test_a_class_that_does_not_occur_is_left_out_of_the_means() -> None:
    labels, scores, patients = cohort(7, 4)
    here = labels != 2
    found = values(metrics.measure(labels[here], scores[here], list(np.array(patients)[here]), False, 0, 0))
    areas = [roc_auc_score(labels[here] == k, scores[here, k]) for k in (0, 1, 3)]
    recalls = [np.mean(scores[here].argmax(1)[labels[here] == k] == k) for k in (0, 1, 3)]
    assert found == pytest.approx({"auc": np.mean(areas), "balanced_accuracy": np.mean(recalls)})


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
    monkeypatch.setattr(metrics, "CELLS", 60 * 7)  # several pieces
    found = metrics.measure(labels, scores, patients, True, 40, 5)
    samples = redrawn(labels, scores, patients, 40, 5)
    by_hand = {
        "auc": [roc_auc_score(y, s[:, 1]) for y, s in samples],
        "ppv": [precision_score(y, s.argmax(1)) for y, s in samples],
        "specificity_at_sensitivity": [
            (1 - fpr[tpr >= 0.8 - 1e-12]).max()
            for fpr, tpr, _ in (roc_curve(y, s[:, 1], drop_intermediate=False) for y, s in samples)
        ],
    }
    for name, drawn in by_hand.items():
        assert (found[name].low, found[name].high) == pytest.approx(tuple(np.percentile(drawn, [2.5, 97.5])))
        assert found[name].resamples == 40


def test_copies_of_a_patients_image_do_not_shorten_the_interval() -> None:
    labels, scores, _ = cohort(3, 2, images=40)
    once = metrics.measure(labels, scores, [str(n) for n in range(40)], True, 500, 0)["auc"]
    copied = np.repeat(np.arange(40), 10)
    ten = metrics.measure(labels[copied], scores[copied], [str(n) for n in copied], True, 500, 0)["auc"]
    assert (ten.value, ten.low, ten.high) == pytest.approx((once.value, once.low, once.high))


def test_resamples_without_a_class_are_left_out_and_counted() -> None:
    labels = np.array([1, 0, 0, 0])
    scores = np.array([[0.1, 0.9], [0.8, 0.2], [0.7, 0.3], [0.05, 0.95]])
    auc = metrics.measure(labels, scores, ["a", "b", "c", "d"], True, 1000, 0)["auc"]
    share_with_the_positive = 1 - (3 / 4) ** 4
    assert auc.value == pytest.approx(2 / 3)
    assert auc.resamples == pytest.approx(1000 * share_with_the_positive, abs=60)
    assert auc.high == 1.0


def test_an_undefined_metric_is_none_with_a_reason_and_never_zero() -> None:
    scores = np.array([[0.9, 0.1], [0.8, 0.2]])
    found = metrics.measure(np.array([0, 0]), scores, ["a", "b"], True, 10, 0)
    for name in (
        "auc",
        "balanced_accuracy",
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


def test_mean_and_roc() -> None:
    hits = np.array([1.0, 0.0, 1.0, 1.0])
    found = metrics.mean(hits, ["a", "a", "b", "c"], 200, 0)
    assert found.value == 0.75
    assert (found.low, found.high) == (0.5, 1.0)
    assert metrics.mean(np.array([]), [], 10, 0).value is None
    labels, scores, _ = cohort(2, 2)
    false_positive, true_positive = metrics.roc(labels, scores[:, 1])
    expected = roc_curve(labels, scores[:, 1], drop_intermediate=False)
    assert np.allclose(false_positive, expected[0])
    assert np.allclose(true_positive, expected[1])

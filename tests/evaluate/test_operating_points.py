from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import t as student
from sklearn.metrics import precision_score, recall_score, roc_curve

from mama.bench.simulated_evaluation import simulate
from mama.errors import ConfigError
from mama.evaluate.bootstrap import Bootstrap
from mama.evaluate.measured_row import measured_row
from mama.evaluate.operating_points import NO_VAL, operating_points
from mama.settings.schema import Config, EvalConfig


def cohort(seed: int, patients: int = 60) -> tuple[NDArray, NDArray]:
    labels, scores = simulate(np.random.default_rng(seed), patients, 0.5, 0.8)
    return labels, np.round(scores, 2)  # ties


def names(labels: NDArray) -> list[str]:
    return [f"p{n // 4}" for n in range(len(labels))]


def points(held_out: tuple, val: tuple | None, prevalences: list[float] | None = None) -> list[dict]:
    labels, scores = held_out
    return operating_points(labels, scores, Bootstrap(names(labels), 200, 0), val, prevalences or [])


@pytest.mark.parametrize("seed", range(3))
def test_thresholds_are_the_best_on_val_and_applied_to_the_held_out_images(seed: int) -> None:
    val, held_out = cohort(seed), cohort(seed + 10)
    _, true_positive, thresholds = roc_curve(val[0], val[1][:, 1], drop_intermediate=False)
    recalled = np.array([(val[1][:, 1] >= t).mean() for t in thresholds])
    eighty, ninety, recall = points(held_out, val)
    for point, target in ((eighty, 0.8), (ninety, 0.9)):
        best = thresholds[true_positive >= target - 1e-12][0]
        assert (point["rule"], point["target"], point["threshold"]) == ("sensitivity", target, best)
        assert point["val"]["sensitivity"] >= target
    assert recall["threshold"] == thresholds[recalled <= 0.1][-1]
    assert recall["val"]["recall_rate"] <= 0.1
    for point in (eighty, ninety, recall):
        called = held_out[1][:, 1] >= point["threshold"]
        by_hand = {
            "sensitivity": recall_score(held_out[0], called),
            "specificity": recall_score(held_out[0], called, pos_label=0),
            "ppv": precision_score(held_out[0], called),
            "npv": precision_score(held_out[0], called, pos_label=0),
            "recall_rate": called.mean(),
        }
        assert {name: one["value"] for name, one in point["metrics"].items()} == pytest.approx(by_hand)
        assert all(one["low"] < one["value"] < one["high"] for one in point["metrics"].values())


def test_ppv_at_a_prevalence_is_that_of_bayes_and_at_the_own_one_the_measured() -> None:
    val, held_out = cohort(1), cohort(2)
    own = float(held_out[0].mean())
    point = points(held_out, val, [0.005, own])[0]
    sensitivity, specificity = (point["metrics"][name]["value"] for name in ("sensitivity", "specificity"))
    rare, same = point["ppv_at_prevalence"]
    expected = 0.005 * sensitivity / (0.005 * sensitivity + 0.995 * (1 - specificity))
    assert (rare["prevalence"], rare["value"]) == (0.005, pytest.approx(expected))
    assert rare["low"] < rare["value"] < rare["high"] < 0.1
    assert same["value"] == pytest.approx(point["metrics"]["ppv"]["value"])
    measured = point["metrics"]["ppv"]
    shorter = (same["high"] - same["low"]) / (measured["high"] - measured["low"])
    assert 0.3 < shorter < 1, "the prevalence is given, and does not vary with the patients"


def test_without_false_positives_the_ppv_at_a_prevalence_keeps_a_lower_limit() -> None:
    labels = np.arange(120) % 2
    scores = np.stack([1.0 - labels, labels], axis=1)
    found = operating_points(labels, scores, Bootstrap([str(n) for n in range(120)], 100, 0), (labels, scores), [0.01])
    at = found[0]["ppv_at_prevalence"][0]
    assert (at["value"], at["high"]) == (1.0, 1.0)
    # By hand, for independent shares (Donner and Zou 2012): the ratio of 1 to 0 from the limits of both by Wilson.
    z = student.ppf(0.975, 59)
    lowest, highest = 60 / (60 + z**2), z**2 / (60 + z**2)
    odds = np.sqrt(lowest * (2 - lowest)) / highest * 0.01 / 0.99
    assert at["low"] == pytest.approx(odds / (1 + odds), rel=1e-4)


def test_what_val_cannot_tell_is_absent_with_its_reason() -> None:
    held_out = cohort(3)
    for point in points(held_out, None, [0.01]):
        assert (point["threshold"], point["reason"]) == (None, NO_VAL)
        assert {one["reason"] for one in point["metrics"].values()} == {NO_VAL}
        assert point["ppv_at_prevalence"][0]["value"] is None
    val = cohort(4)
    few = np.concatenate([np.flatnonzero(val[0] == 1)[:7], np.flatnonzero(val[0] == 0)])
    eighty, ninety, recall = points(held_out, (val[0][few], val[1][few]))
    assert eighty["threshold"] is not None
    assert ninety["reason"] == "`val` has 7 positive images; 10 are needed for 90 %"
    assert recall["threshold"] is not None
    flat = (val[0], np.full_like(val[1], 0.5))
    assert "no threshold recalls at most 10 %" in points(held_out, flat)[2]["reason"]
    negative = (np.zeros_like(held_out[0]), held_out[1])
    found = points(negative, val, [0.01])[0]
    assert found["metrics"]["sensitivity"]["reason"] == "there is no positive image"
    assert found["metrics"]["specificity"]["value"] is not None
    assert found["ppv_at_prevalence"][0]["reason"] == "the images are all of one class"


def test_a_prevalence_is_a_share() -> None:
    with pytest.raises(ConfigError, match=r"eval.prevalence: 5 is no share"):
        EvalConfig(prevalence=[0.005, 5])


def test_a_row_has_everything_of_one_set_of_predictions() -> None:
    val, (labels, scores) = cohort(5), cohort(6)
    config = Config(eval=EvalConfig(bootstrap=50, prevalence=[0.005]))
    row = measured_row(labels, scores, names(labels), True, val, config)
    assert row["metrics"]["ece"] == row["calibration"]["uncalibrated"]["ece"]
    assert row["metrics"]["brier"]["value"] == pytest.approx(row["calibration"]["uncalibrated"]["brier"]["value"])
    assert {"auc", "average_precision"} < row["metrics"].keys()
    assert [len(point["ppv_at_prevalence"]) for point in row["operating_points"]] == [1, 1, 1]
    assert measured_row(labels, scores, names(labels), False, val, config)["operating_points"] == []
    empty = measured_row(labels[:0], scores[:0], [], True, None, config)
    assert {one["reason"] for one in empty["metrics"].values()} == {"there is no image"}
    empty = measured_row(labels[:0], scores[:0], [], True, val, config)
    assert empty["operating_points"][0]["metrics"]["sensitivity"]["value"] is None
    assert empty["calibration"]["isotonic"]["reason"] == "there is no image"
    none = measured_row(
        labels, scores, names(labels), True, val, Config(eval=EvalConfig(bootstrap=0, prevalence=[0.1]))
    )
    assert none["operating_points"][0]["ppv_at_prevalence"][0]["reason"].startswith("no interval: fewer than two res")

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import softmax
from sklearn.calibration import calibration_curve
from sklearn.isotonic import IsotonicRegression
from sklearn.metrics import brier_score_loss

from mama.bench.intervals import coverage_at_threshold, coverage_of_probabilities
from mama.bench.simulated_evaluation import IMAGES, calibrated, simulate, true_values
from mama.data.held_out import Split
from mama.data.wording import Wording
from mama.evaluate import metrics, results
from mama.evaluate.bootstrap import Bootstrap
from mama.evaluate.calibration import (
    NO_VAL,
    ONE_CLASS,
    TOO_FEW,
    bins,
    by_steps,
    calibration,
    cooled,
    isotonic_steps,
    temperature,
)
from mama.evaluate.results import predictions_file, write
from mama.evaluate.task_data import Predictions, task_data
from mama.evaluate.tasks import load_task
from mama.settings.schema import Config, DataConfig, EvalConfig
from tests.support.cohort import write_shards


def predictions(seed: int, images: int, classes: int, confidence: float) -> tuple[NDArray, NDArray]:
    """Labels drawn from right probabilities, and these with logits that are `confidence` times too large."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(images, classes)) * 1.5
    right = softmax(logits, axis=1)
    labels = np.array([rng.choice(classes, p=row) for row in right])
    return labels, softmax(confidence * logits, axis=1)


def names(images: int) -> list[str]:
    return [f"p{n // 3}" for n in range(images)]


def measured(labels: NDArray, scores: NDArray, val: tuple[NDArray, NDArray] | None = None) -> dict:
    return calibration(labels, scores, scores.shape[1] == 2, Bootstrap(names(len(labels)), 100, 0), val)


def test_ece_and_curve_of_two_classes_equal_scikit_learn() -> None:
    labels, scores = predictions(0, 300, 2, 2.0)
    found = measured(labels, scores)["uncalibrated"]
    observed, predicted = calibration_curve(labels, scores[:, 1], n_bins=10, strategy="quantile")
    assert [row["n"] for row in found["curve"]] == [30] * 10
    assert [row["predicted"] for row in found["curve"]] == pytest.approx(predicted)
    assert [row["observed"] for row in found["curve"]] == pytest.approx(observed)
    assert all(row["low"] <= row["observed"] <= row["high"] for row in found["curve"])
    assert found["ece"]["value"] == pytest.approx(np.abs(observed - predicted).mean())
    assert found["brier"]["value"] == pytest.approx(brier_score_loss(labels, scores[:, 1]))
    again = metrics.measure(labels, scores, names(300), True, 100, 0)["brier"]
    assert (found["brier"]["low"], found["brier"]["high"]) == pytest.approx((again.low, again.high))


def test_ece_of_several_classes_is_that_of_the_predicted_one() -> None:
    labels, scores = predictions(1, 250, 4, 3.0)
    stated, right = scores.max(1), scores.argmax(1) == labels
    order = np.array_split(np.argsort(stated), 10)
    by_hand = sum(len(rows) / 250 * abs(right[rows].mean() - stated[rows].mean()) for rows in order)
    found = measured(labels, scores)["uncalibrated"]
    assert found["ece"]["value"] == pytest.approx(by_hand)
    assert found["brier"]["value"] == pytest.approx(((scores - np.eye(4)[labels]) ** 2).sum(1).mean() / 2)


def test_equal_probabilities_share_a_bin_and_small_sets_have_fewer_bins() -> None:
    tied = np.repeat([0.1, 0.2, 0.9], [50, 30, 20])
    assert [len(set(bins(tied)[tied == value])) for value in (0.1, 0.2, 0.9)] == [1, 1, 1]
    assert set(np.diff(np.unique(bins(tied)))) == {1}, "no bin is empty"
    assert len(np.unique(bins(np.linspace(0, 1, 35)))) == 3
    assert len(np.unique(bins(np.linspace(0, 1, 5)))) == 1


@pytest.mark.parametrize("classes", [2, 4])
def test_the_temperature_has_the_smallest_log_loss_and_finds_the_true_one(classes: int) -> None:
    labels, scores = predictions(2, 4000, classes, 2.5)

    def loss(t: NDArray) -> float:
        return -np.log(softmax(np.log(scores) / t[0], axis=1)[np.arange(4000), labels]).mean()

    found = temperature((labels, scores))
    assert found == pytest.approx(minimize(loss, [1.0], method="Nelder-Mead").x[0], rel=1e-3)
    assert found == pytest.approx(2.5, rel=0.1)
    assert np.array_equal(cooled(scores, found).argmax(1), scores.argmax(1)), "no decision changes"


def test_calibration_is_fitted_on_val_alone_and_repairs_the_held_out_images() -> None:
    labels, scores = predictions(3, 3000, 2, 3.0)
    val, held_out = (labels[:1500], scores[:1500]), (labels[1500:], scores[1500:])
    found = measured(*held_out, val)
    steps = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(val[1][:, 1], val[0])
    assert by_steps(held_out[1], isotonic_steps(val))[:, 1] == pytest.approx(steps.predict(held_out[1][:, 1]))
    assert found["temperature"]["temperature"] == temperature(val)
    for name in ("temperature", "isotonic"):
        for figure in ("brier", "ece"):
            assert found[name][figure]["value"] < 0.95 * found["uncalibrated"][figure]["value"], (name, figure)
    flipped = measured(1 - held_out[0], held_out[1], val)
    assert flipped["temperature"]["temperature"] == found["temperature"]["temperature"], "blind to held-out labels"
    assert [row["predicted"] for row in flipped["isotonic"]["curve"]] == [
        row["predicted"] for row in found["isotonic"]["curve"]
    ]


def test_isotonic_steps_of_several_classes_are_scaled_to_one() -> None:
    labels, scores = predictions(4, 900, 3, 2.0)
    val = labels[:600], scores[:600]
    columns = [IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(val[1][:, k], val[0] == k)
               .predict(scores[600:, k]) for k in range(3)]  # fmt: skip
    found = by_steps(scores[600:], isotonic_steps(val))
    assert found == pytest.approx(np.stack(columns, 1) / np.sum(columns, 0)[:, None])
    assert found.sum(1) == pytest.approx(1)


@pytest.mark.parametrize("name", ["cancer", "density"])
def test_the_saved_calibrations_give_the_calibrated_probabilities_of_the_saved_ones(tmp_path: Path, name: str) -> None:
    """By the rules in docs/run-folder.md, from the two files alone; of images, and of a unit that they make up."""
    write_shards(tmp_path / "shards", {"val": 40, "test": 12})
    config = Config(data=DataConfig(shards=[str(tmp_path / "shards")]), eval=EvalConfig(bootstrap=0, units=["patient"]))
    splits = [Split(config, split).items for split in ("test", "val")]
    data = task_data(load_task(name), splits[0], [], splits[1], Wording())
    rng = np.random.default_rng(6)
    scores, of_val = (softmax(rng.normal(size=(len(rows), len(data.classes))), axis=1)
                      for rows in (data.rows, data.val_rows))  # fmt: skip
    data.predictions = [Predictions("zero-shot", "trained", scores, of_val)]
    document = results.document(data, splits[0], "test", config)
    write({name: document, "alignment": {}}, [data], splits[0], {}, np.zeros((0, 1, 1), np.float32), tmp_path)
    saved = json.loads((tmp_path / name / "metrics.json").read_text())
    for unit, row in ((row["unit"], row) for row in saved["rows"] if row["unit"] in ("image", "patient")):
        with (tmp_path / name / predictions_file(unit)).open(newline="") as file:
            lines = list(csv.DictReader(file))
        classes = [one["name"] for one in saved["classes"]]
        stated = np.array([[float(line[c]) for c in classes] for line in lines])
        steps, temperature_ = row["calibration"]["isotonic"]["steps"], row["calibration"]["temperature"]["temperature"]
        columns = [np.interp(stated[:, one["class"]], one["x"], one["y"]) for one in steps]
        if len(classes) == 2:
            columns = [1 - columns[0], columns[0]]
        by_steps = np.stack(columns, 1) / np.sum(columns, 0)[:, None]
        val = data.val_units(unit).labels, data.val_units(unit).pooled(of_val, "mean", data.task.binary)
        now = data.units(unit).pooled(scores, "mean", data.task.binary)
        fitted = [IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(val[1][:, k], val[0] == k)
                  .predict(now[:, k]) for k in range(len(classes))]  # fmt: skip
        if len(classes) == 2:
            fitted[0] = 1 - fitted[1]
        np.testing.assert_allclose(by_steps, np.stack(fitted, 1) / np.sum(fitted, 0)[:, None], atol=1e-9, rtol=0)
        labels = np.array([classes.index(line["label"]) for line in lines])
        for kind, probabilities in (("isotonic", by_steps), ("temperature", softmax(np.log(stated) / temperature_, 1))):
            errors = ((probabilities - np.eye(len(classes))[labels]) ** 2).sum(1) / 2
            assert row["calibration"][kind]["brier"]["value"] == pytest.approx(errors.mean(), abs=1e-9), (kind, unit)
        assert len(steps) == (1 if len(classes) == 2 else 4)
        assert len(steps[0]["x"]) > 2


def test_what_cannot_be_fitted_says_why() -> None:
    labels, scores = predictions(5, 200, 2, 1.0)
    one_class, few = (np.zeros_like(labels), scores), (labels[:12], scores[:12])
    for val, temperature_, isotonic_ in (
        (None, NO_VAL, NO_VAL),
        (one_class, ONE_CLASS, ONE_CLASS),
        (few, None, TOO_FEW),
    ):
        found = measured(labels, scores, val)
        assert (found["temperature"]["reason"], found["isotonic"]["reason"]) == (temperature_, isotonic_)
        assert found["isotonic"]["ece"] == {
            "value": None,
            "low": None,
            "high": None,
            "resamples": 0,
            "reason": isotonic_,
        }
        assert found["isotonic"]["curve"] == []
        assert found["uncalibrated"]["ece"]["low"] is not None
    nothing = measured(labels[:0], scores[:0])["uncalibrated"]
    assert (nothing["ece"]["value"], nothing["ece"]["reason"]) == (None, "there is no image")
    alone = calibration(labels, scores, True, Bootstrap(["she"] * 200, 50, 0), None)["uncalibrated"]["ece"]
    assert alone["value"] is not None
    assert (alone["low"], alone["reason"]) == (None, "no interval: the images are of one patient")


def test_the_simulated_truth_of_probabilities_is_that_of_a_large_cohort() -> None:
    labels, scores = simulate(np.random.default_rng(1), 20000, 0.4, 0.8)
    truth = true_values(0.4, 0.8)
    patients = [str(n // IMAGES) for n in range(len(labels))]
    found = calibration(labels, scores, True, Bootstrap(patients, 0, 0), None)["uncalibrated"]
    right = calibration(labels, calibrated(scores, 0.4, 0.8), True, Bootstrap(patients, 0, 0), None)["uncalibrated"]
    assert found["ece"]["value"] == pytest.approx(truth["ece"], abs=0.005)
    assert right["ece"]["value"] < 0.01


@pytest.mark.parametrize("measure", [coverage_of_probabilities, coverage_at_threshold])
def test_95_of_100_further_intervals_hold_the_true_value(measure: Callable[..., Any]) -> None:
    """The standard error of a share of 150 is 0.018: that of an ECE by quantiles holds a true 0 never."""
    for name, (held, length) in measure(40, 0.5, 0.9, rounds=150, resamples=60).items():
        assert held > 0.88, name
        assert length < 0.6, name

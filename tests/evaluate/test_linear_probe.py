from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from mama.evaluate import linear_probe


def features(seed: int, count: int, strength: float) -> tuple[np.ndarray, np.ndarray]:
    """Three classes that differ in the first two of 40 features, of very different scale."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count)
    values = rng.normal(size=(count, 40))
    values[:, 0] += strength * (labels == 1)
    values[:, 1] += strength * (labels == 2)
    return values * np.logspace(-3, 3, 40), labels


def test_learns_what_can_be_learned_and_nothing_else() -> None:
    for strength, low, high in ((4.0, 0.95, 1.0), (0.0, 0.35, 0.65)):
        x, y = features(0, 240, strength)
        unseen, true = features(1, 240, strength)
        classifier = linear_probe.fit(x, y, [str(i // 4) for i in range(240)], seed=0)
        shares = linear_probe.probabilities(classifier, unseen, 3)
        assert shares.sum(1) == pytest.approx(np.ones(240))
        assert low <= roc_auc_score(true, shares, multi_class="ovr") <= high


def test_noise_gets_a_strong_penalty() -> None:
    """Features without a signal must not be fitted: the cross-validation has to see it."""
    x, y = features(0, 120, 0.0)
    classifier = linear_probe.fit(x, y, [str(i) for i in range(120)], seed=0)
    assert min(linear_probe.PENALTIES) == classifier[-1].C


def test_the_penalty_is_chosen_across_patients() -> None:
    """Each patient has a fingerprint and one label: only folds by patient find that it does not carry over."""
    rng = np.random.default_rng(0)
    fingerprints, per_patient = rng.normal(size=(40, 60)), rng.integers(0, 2, 40)
    who = np.repeat(np.arange(40), 6)
    x = fingerprints[who] + 0.01 * rng.normal(size=(240, 60))
    classifier = linear_probe.fit(x, per_patient[who], [str(p) for p in who], seed=0)
    assert min(linear_probe.PENALTIES) == classifier[-1].C


def test_classes_are_weighed_alike() -> None:
    rng = np.random.default_rng(0)
    y = (np.arange(400) % 20 == 0).astype(int)
    x = rng.normal(size=(400, 3)) + 1.5 * y[:, None]
    predicted = linear_probe.probabilities(linear_probe.fit(x, y, [str(i) for i in range(400)], 0), x, 2).argmax(1)
    assert predicted[y == 1].mean() > 0.7


def test_a_class_that_training_lacks_has_probability_zero() -> None:
    x, y = features(0, 60, 4.0)
    classifier = linear_probe.fit(x[y != 1], y[y != 1], [str(i) for i in range(int((y != 1).sum()))], seed=0)
    shares = linear_probe.probabilities(classifier, x, 4)
    assert np.all(shares[:, [1, 3]] == 0)
    assert shares.sum(1) == pytest.approx(np.ones(60))


def test_two_patients_are_enough_to_fit() -> None:
    x, y = features(0, 12, 4.0)
    classifier = linear_probe.fit(x, (y == 1).astype(int), ["a"] * 6 + ["b"] * 6, seed=0)
    assert np.isfinite(linear_probe.probabilities(classifier, x, 2)).all()


def test_an_optimiser_that_was_stopped_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(linear_probe, "ITERATIONS", 2)
    x, y = features(0, 60, 4.0)
    linear_probe.fit(x, y, [str(i) for i in range(60)], seed=0)
    assert caplog.messages == ["linear probe on 60 images: its optimiser was stopped after 2 iterations"]
    assert not recwarn.list


@pytest.mark.parametrize("shape", [(1, 1), (17, 31), (300, 200)])
def test_intensity_percentiles_equal_numpys(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    image = (rng.random(shape) ** 3 * 256).astype(np.uint8)
    expected = np.percentile(image, np.linspace(0, 100, 31), method="inverted_cdf")
    assert np.array_equal(linear_probe.intensity_percentiles(image), expected)

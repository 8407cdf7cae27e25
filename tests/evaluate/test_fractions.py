"""Fractions of the training labels: by patient, nested, every class kept, the same whatever the order of rows."""

from __future__ import annotations

import numpy as np
import pytest

from mama.evaluate.fractions import drawn, draws, seed_of
from mama.settings.schema import EvalConfig

FRACTIONS = (0.01, 0.1, 0.3, 1.0)


def cohort(seed: int, patients: int = 300) -> tuple[np.ndarray, np.ndarray]:
    """Four images of each patient; class 3 is of two patients, and of one breast of theirs alone."""
    rng = np.random.default_rng(seed)
    names = np.repeat([f"patient {n}" for n in range(patients)], 4)
    labels = np.repeat(rng.choice(3, patients, p=[0.6, 0.3, 0.1]), 4)
    labels[[0, 1, -1]] = 3
    return names, labels


@pytest.mark.parametrize("seed", range(3))
def test_fractions_are_nested_and_of_whole_patients_with_every_class(seed: int) -> None:
    names, labels = cohort(seed)
    before: set[int] = set()
    for fraction in FRACTIONS:
        rows = drawn(names.tolist(), labels, fraction, seed)
        assert np.array_equal(rows, np.unique(rows))
        assert before <= set(rows.tolist())
        before = set(rows.tolist())
        assert np.isin(names[rows], np.delete(names, rows)).sum() == 0, "a patient is drawn with all images"
        assert set(labels[rows]) == {0, 1, 2, 3}
        wanted = max(3, round(fraction * 300))  # class 3 comes with one of the others
        assert abs(len(set(names[rows])) - wanted) <= 1
    assert np.array_equal(rows, np.arange(1200))


def test_the_draw_does_not_depend_on_the_order_of_rows() -> None:
    names, labels = cohort(0)
    mixed = np.random.default_rng(1).permutation(len(names))
    for fraction in FRACTIONS:
        rows = drawn(names.tolist(), labels, fraction, 5)
        other = drawn(names[mixed].tolist(), labels[mixed], fraction, 5)
        assert np.array_equal(np.sort(mixed[other]), rows)
        assert np.array_equal(rows, drawn(names.tolist(), labels, fraction, 5))


def test_draws_differ_and_are_as_the_archive_is() -> None:
    """But for the patients that are there so that no class is missing."""
    names, labels = cohort(0)
    found = [drawn(names.tolist(), labels, 0.1, seed_of(42, n)) for n in range(20)]
    assert len({rows.tobytes() for rows in found}) == 20
    common = np.mean([(labels[rows] == 0).mean() for rows in found])
    assert common == pytest.approx((labels == 0).mean(), abs=0.06)


def test_of_all_labels_there_is_one_draw() -> None:
    assert list(draws(EvalConfig(fractions=[0.01, 1.0], draws=2))) == [(0.01, 0), (0.01, 1), (1.0, 0)]
    assert list(draws(EvalConfig())) == [(1.0, 0)]

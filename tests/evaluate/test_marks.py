"""Marks of a map, against plain loops over its patches and against peaks that were put there."""

from __future__ import annotations

from statistics import median

import numpy as np
import pytest
from scipy import ndimage

from mama.evaluate.arrays import Flags, Float32s
from mama.evaluate.boxes import marks
from mama.evaluate.smooth_maps import smooth

Patch = tuple[int, int]
SIDES = ((-1, 0), (1, 0), (0, -1), (0, 1))
AROUND = [(down, across) for down in (-1, 0, 1) for across in (-1, 0, 1) if (down, across) != (0, 0)]


def naive(values: Float32s, tissue: Flags, size: tuple[int, int]) -> list[tuple[float, list[float]]]:
    """Score and box of each mark, patch by patch."""
    height = {
        (row, column): float(values[row, column])
        for row, column in np.ndindex(*values.shape)
        if tissue[row, column] and np.isfinite(values[row, column])
    }
    if not height:
        return []
    low, free, found = median(height.values()), set(height), []
    tall, wide = size[0] / values.shape[0], size[1] / values.shape[1]

    def beside(patch: Patch, steps: list[Patch] | tuple[Patch, ...]) -> list[Patch]:
        return [(patch[0] + down, patch[1] + across) for down, across in steps]

    peaks = [
        patch
        for patch, own in height.items()
        if own > low and all(height.get(other, own) <= own for other in beside(patch, AROUND))
    ]
    for peak in sorted(peaks, key=lambda patch: (-height[patch], patch)):
        if peak not in free:
            continue
        mark, to_visit = {peak}, [peak]
        while to_visit:
            last = to_visit.pop()
            for other in beside(last, AROUND):
                is_beside = other in beside(last, SIDES)
                as_high = height[last] == height.get(other) == height[peak]
                if other not in free - mark or not (is_beside or as_high):
                    continue
                if height[other] - low >= (height[peak] - low) / 2:
                    mark.add(other)
                    to_visit.append(other)
        free -= mark
        rows, columns = zip(*mark, strict=True)
        box = [min(columns) * wide, min(rows) * tall, (max(columns) + 1) * wide, (max(rows) + 1) * tall]
        found.append((height[peak], box))
    return found


@pytest.mark.parametrize("grid", [(10, 5), (37, 37), (1, 1), (1, 7), (4, 6)])
@pytest.mark.parametrize("kind", ["noise", "smooth", "ties"])
def test_marks_are_those_of_plain_loops(grid: tuple[int, int], kind: str) -> None:
    random, size = np.random.default_rng(1), (grid[0] * 16, grid[1] * 14)
    counts = set()
    for _ in range(12 if grid == (37, 37) else 40):
        drawn = random.normal(size=grid)
        if kind == "smooth":
            drawn = ndimage.gaussian_filter(drawn, 1.5)
        if kind == "ties":
            drawn = random.integers(0, 4, grid) / 4  # halves are exact
        values = drawn.astype(np.float32)
        values[random.random(grid) < 0.05] = np.nan
        tissue = random.random(grid) < 0.85
        expected = naive(values, tissue, size)
        boxes, scores = marks(values, tissue, size)
        assert boxes.shape == (len(expected), 4)
        assert scores.tolist() == [score for score, _ in expected]
        assert boxes.tolist() == [box for _, box in expected]
        counts.add(len(scores))
    assert len(counts) > 1 or grid == (1, 1)


def bumps(grid: tuple[int, int], *of_each: tuple[float, float, float, float]) -> Float32s:
    """The highest at each patch of Gaussian bumps: row and column of the middle, width (sigma) and height."""
    rows, columns = np.mgrid[: grid[0], : grid[1]]
    each = [
        high * np.exp(-((rows - row) ** 2 + (columns - column) ** 2) / (2 * wide**2))
        for row, column, wide, high in of_each
    ]
    return np.asarray(np.max(each, 0), np.float32)


@pytest.mark.parametrize(("grid", "width"), [((10, 5), 0.7), ((37, 37), 0.7), ((37, 37), 2.5)])
def test_two_planted_peaks_are_two_marks_with_their_scores_and_half_widths(grid: tuple[int, int], width: float) -> None:
    places = [(2, 1), (7, 3)] if grid == (10, 5) else [(8, 10), (28, 25)]
    values = bumps(grid, (*places[0], width, 0.5), (*places[1], width, 0.9))
    boxes, scores = marks(values, np.ones(grid, bool), grid)  # in patches
    np.testing.assert_allclose(scores, [0.9, 0.5], atol=1e-6)
    for (row, column), box in zip(places[::-1], boxes, strict=True):
        middle = np.array([column, row, column, row]) + 0.5
        np.testing.assert_allclose(box + box[[2, 3, 0, 1]], 2 * middle)  # symmetric
        assert (box[2:] - box[:2]) == pytest.approx(2.355 * width, abs=1)  # full width at half maximum
    alone, _ = marks(bumps(grid, (*places[0], width, 0.5)), np.ones(grid, bool), grid)
    assert alone.tolist() == boxes[1:].tolist(), "a mark does not depend on a higher one elsewhere"


def test_a_peak_in_the_mark_of_a_higher_one_is_no_mark_of_its_own() -> None:
    rim = bumps((37, 37), (10, 10, 3, 1.0), (10, 13, 3, 0.97), (30, 30, 2, 0.6))
    _, scores = marks(rim, np.ones((37, 37), bool), (37, 37))
    np.testing.assert_allclose(scores, [1.0, 0.6], atol=0.01)


def test_a_peak_of_the_map_is_one_of_the_smooth_map() -> None:
    """No pixel around the middle of a mark's peak is higher."""
    values = np.random.default_rng(2).random((6, 5), dtype=np.float32)
    fine = smooth(values, (6 * 9, 5 * 9))  # 4 is the pixel in the middle of a patch
    highest = ndimage.maximum_filter(fine, 9)
    tops = {float(values[row, column]) for row, column in np.ndindex(6, 5)
            if fine[9 * row + 4, 9 * column + 4] == highest[9 * row + 4, 9 * column + 4]}  # fmt: skip
    _, scores = marks(values, np.ones((6, 5), bool), (6, 5))
    assert len(scores) > 2
    assert set(scores.tolist()) <= tops


def test_what_marks_nothing() -> None:
    tissue = np.ones((4, 6), bool)
    for values in (np.full((4, 6), 0.5, np.float32), np.full((4, 6), np.nan, np.float32)):
        boxes, scores = marks(values, tissue, (40, 120))
        assert (boxes.shape, scores.shape) == ((0, 4), (0,))
    values = np.zeros((4, 6), np.float32)
    values[0, 5] = 1.6
    assert len(marks(values, tissue, (40, 120))[1]) == 1
    values[0, 0] = np.nan  # never marked
    assert marks(values, tissue, (40, 120))[0].tolist() == [[100, 0, 120, 10]]
    tissue[0, 5] = False
    assert len(marks(values, tissue, (40, 120))[1]) == 0, "it is no tissue"


def test_patches_of_one_height_that_share_a_corner_are_one_mark() -> None:
    values = np.zeros((5, 5), np.float32)
    values[1, 1] = values[2, 2] = values[3, 1] = 1
    found, scores = marks(values, np.ones((5, 5), bool), (50, 50))
    assert (found.tolist(), scores.tolist()) == ([[10, 10, 30, 40]], [1])

"""Smooth maps against plain loops, and against SciPy's interpolation where every patch has a value."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from mama.evaluate import smooth_maps
from mama.evaluate.smooth_maps import at_points, smooth
from tests.support.smooth import naive_smooth


@pytest.mark.parametrize("size", [(30, 20), (29, 31), (6, 4), (3, 9)])
def test_patches_without_a_value_weigh_nothing(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smooth_maps, "PIXELS", 45)  # several bands
    random = np.random.default_rng(0)
    values = random.normal(size=(2, 3, 6, 4)).astype(np.float32)
    values[random.random(values.shape) < 0.3] = np.nan
    found = smooth(values, size)
    assert (found.shape, found.dtype) == ((2, 3, *size), np.float32)
    for place in np.ndindex(2, 3):
        np.testing.assert_allclose(found[place], naive_smooth(values[place], size), atol=1e-6)


def test_without_gaps_it_is_the_bilinear_interpolation_of_scipy() -> None:
    random = np.random.default_rng(1)
    values = random.normal(size=(5, 7)).astype(np.float32)
    down, across = random.uniform(0, 5, 50), random.uniform(0, 7, 40)
    places = np.meshgrid(down - 0.5, across - 0.5, indexing="ij")
    expected = ndimage.map_coordinates(values.astype(np.float64), places, order=1, mode="nearest")
    np.testing.assert_allclose(at_points(values, down, across), expected, atol=1e-6)


def test_the_highest_point_lies_in_the_highest_patch() -> None:
    """And no point leaves the range of the patches; a map that is the same everywhere stays so, to the last digit."""
    values = np.random.default_rng(2).random((20, 6, 4)).astype(np.float32)
    values[:, 4:] = np.nan
    found = smooth(values, (54, 36))  # patches of 9 pixels: the fifth is the centre
    for one, pixels in zip(values, found, strict=True):
        row, column = np.unravel_index(np.nanargmax(one), one.shape)
        assert pixels[9 * row + 4, 9 * column + 4] == np.nanmax(pixels) == np.nanmax(one)
        y, x = np.unravel_index(np.nanargmax(pixels), pixels.shape)  # another one, where the map goes on as it ends
        assert (y // 9, x // 9) == (row, column)
        assert np.nanmin(pixels) == np.nanmin(one)
        assert np.isnan(pixels[36:]).all()
        assert np.isfinite(pixels[:36]).all()
    flat = np.full((6, 4), 0.3, np.float32)
    flat[0, 0] = flat[3, 2] = np.nan
    assert np.unique(smooth(flat, (35, 23))).tolist() == [pytest.approx(0.3), pytest.approx(np.nan, nan_ok=True)]
    assert len(np.unique(smooth(flat, (35, 23)))) == 2


def test_points_in_no_patch_have_no_value() -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    found = at_points(values, np.array([-0.1, 0.0, 2.0, 2.1, np.nan]), np.array([np.nan, 0.5, 3.0, 3.1]))
    nothing = np.nan
    np.testing.assert_array_equal(
        found,
        [[nothing] * 4, [nothing, 0, 2, nothing], [nothing, 3, 5, nothing], [nothing] * 4, [nothing] * 4],
    )

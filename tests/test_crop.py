from __future__ import annotations

import numpy as np
import pytest
from archives import BOX, breast

from shards.crop import find_breast, prepare


@pytest.mark.parametrize("side", ["L", "R"])
@pytest.mark.parametrize("long_side", [500, 61])
@pytest.mark.parametrize("crop", [True, False])
def test_a_box_stays_on_its_tissue_and_the_affine_leads_back(side: str, long_side: int, crop: bool) -> None:
    image = np.kron(breast(side), np.ones((3, 3), dtype=np.uint16)) * np.uint16(16)
    x0, y0, x1, y1 = (3 * value for value in BOX)
    box = (x0, y0, x1, y1) if side == "L" else (480 - x1, y0, 480 - x0, y1)
    stored, geometry = prepare(image, long_side, crop)
    assert max(stored.shape) == long_side or (crop and max(stored.shape) < 500)
    assert stored.shape == geometry.size
    assert geometry.flipped == (side == "R")

    marked = (stored > 240).copy()
    marked[: stored.shape[0] // 4] = False  # the letter block of the uncropped picture
    rows, columns = np.nonzero(marked)
    seen = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    mapped = geometry.box_to_stored(box)
    assert mapped is not None
    np.testing.assert_allclose(mapped, seen, atol=1.0)

    a, b, tx, c, d, ty = geometry.to_original
    back = np.array([[a, b], [c, d]]) @ np.array(mapped).reshape(2, 2).T + np.array([[tx], [ty]])
    np.testing.assert_allclose(np.sort(back, axis=1).T.ravel(), box, atol=1e-9)


def test_letters_outside_of_the_breast_go_and_tissue_stays() -> None:
    image = breast("L") * np.uint16(16)
    stored, geometry = prepare(image, 1000)
    x0, y0, x1, y1 = geometry.crop
    kept = np.zeros(image.shape, dtype=bool)
    kept[y0:y1, x0:x1] = stored > 0
    tissue = image > 1200 * 15
    tissue[:20, 120:] = False
    assert not kept[5:15, 130:155].any()
    assert (kept & tissue).sum() >= 0.995 * tissue.sum()


def test_bright_tissue_in_a_faint_breast_is_not_taken_for_the_breast() -> None:
    y, x = np.mgrid[:256, :256]
    image = np.zeros((256, 256), dtype=np.uint8)
    image[((y - 128) / 110) ** 2 + (x / 230) ** 2 < 1] = 50
    image[(y - 128) ** 2 + (x - 100) ** 2 < 40**2] = 250
    mask = find_breast(image)
    assert mask is not None
    assert (mask[image > 0] > 0).mean() > 0.99


def test_film_borders_do_not_widen_the_crop() -> None:
    image = breast("L", height=200, width=160)
    image[:15] = 0
    image[:2], image[-2:] = 4095, 4095
    _, geometry = prepare(image, 1000)
    assert geometry.crop[1] > 10
    assert geometry.crop[3] < 190


def test_an_image_without_a_breast_is_kept_whole() -> None:
    image = np.zeros((100, 80), dtype=np.uint8)
    image[40:43, 40:43] = 255
    stored, geometry = prepare(image, 1000)
    assert geometry.crop == (0, 0, 80, 100)
    np.testing.assert_array_equal(stored, image)


def test_a_box_outside_of_the_crop_is_none_and_one_across_the_edge_is_cut() -> None:
    _, geometry = prepare(breast("L"), 1000)
    assert geometry.box_to_stored((150, 190, 159, 199)) is None
    cut = geometry.box_to_stored((-10, 90, 20, 110))
    assert cut is not None
    assert cut[0] == 0


def test_sixteen_bits_become_eight_by_rounding() -> None:
    image = (np.arange(65536, dtype=np.uint32).reshape(256, 256)).astype(np.uint16)
    stored, geometry = prepare(image, 256, crop=False)
    original = image[:, ::-1] if geometry.flipped else image
    np.testing.assert_array_equal(stored, np.round(original / 257).astype(np.uint8))

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from shards.image.crop import SEARCH_SIDE, Geometry, Outline, chest_wall_is_right, find_breast, small
from shards.image.film import unpadded, without_bright_edges
from tests.support.archives import BOX, breast

LARGE = np.kron(breast("L"), np.ones((4, 4), dtype=np.uint16))


def outline(image: NDArray[Any]) -> Outline:
    return Outline(find_breast(small(image)), image.shape)


# --- the breast


def test_letters_outside_of_the_breast_go_and_tissue_stays() -> None:
    image = breast("L")
    bounds = outline(image).bounds
    x0, y0, x1, y1 = bounds
    kept = np.zeros(image.shape, dtype=bool)
    kept[y0:y1, x0:x1] = outline(image).inside(bounds, (y1 - y0, x1 - x0))
    tissue = image > 1200
    tissue[:20, 120:] = False
    assert not kept[5:15, 130:155].any()
    assert (kept & tissue).sum() >= 0.995 * tissue.sum()


def test_the_margin_keeps_the_skin_line() -> None:
    x0, y0, x1, y1 = outline(LARGE).bounds
    assert (x0, y0) == (0, pytest.approx(4 * 30 - 0.02 * 800, abs=8))
    assert x1 == pytest.approx(4 * 90 + 0.02 * 800, abs=8)
    assert y1 == pytest.approx(4 * 170 + 0.02 * 800, abs=8)


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
    _, y0, _, y1 = outline(image).bounds
    assert y0 > 10
    assert y1 < 190


def test_without_a_breast_all_of_the_image_is_taken() -> None:
    image = np.zeros((100, 80), dtype=np.uint8)
    image[40:43, 40:43] = 255
    assert find_breast(image) is None
    assert outline(image).bounds == (0, 0, 80, 100)
    assert outline(image).inside((0, 0, 80, 100), (10, 8)).all()


def test_dark_tissue_inside_of_the_outline_is_tissue() -> None:
    image = breast("L")
    image[70:80, 10:30] = 0
    bounds = outline(image).bounds
    x0, y0, x1, y1 = bounds
    assert outline(image).inside(bounds, (y1 - y0, x1 - x0))[70 - y0 : 80 - y0, 10 - x0 : 30 - x0].all()


@pytest.mark.parametrize("side", ["L", "R"])
def test_the_chest_wall_is_where_the_breast_is_tall(side: str) -> None:
    mask = find_breast(small(breast(side)))
    assert mask is not None
    assert chest_wall_is_right(mask) == (side == "R")


@pytest.mark.parametrize("shape", [(200, 160), (1024, 700), (3000, 2000), (5355, 4915), (90, 400)])
def test_the_small_image_is_small_and_of_the_same_kind(shape: tuple[int, int]) -> None:
    image = np.zeros(shape, dtype=np.uint16)
    image[: shape[0] // 2] = 9
    little = small(image)
    assert max(little.shape) == min(SEARCH_SIDE, max(shape))
    assert little.shape[0] / little.shape[1] == pytest.approx(shape[0] / shape[1], rel=0.02)
    assert (little.dtype, little.max()) == (np.uint16, 9)


@pytest.mark.parametrize(
    ("shape", "mask_shape"), [((200, 160), (200, 160)), ((801, 643), (200, 160)), ((77, 63), (20, 16))]
)
def test_bounds_and_inside_agree_with_the_mask_laid_over_the_image(
    shape: tuple[int, int], mask_shape: tuple[int, int]
) -> None:
    mask = np.zeros(mask_shape, dtype=np.uint8)
    height, width = mask_shape
    mask[height // 5 : height // 2, width // 4 : width // 2 + 1] = 255
    whole = mask[np.ix_(np.arange(shape[0]) * height // shape[0], np.arange(shape[1]) * width // shape[1])] > 0
    rows, columns = np.nonzero(whole)
    bounds = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    assert Outline(mask, shape).bounds == bounds
    np.testing.assert_array_equal(Outline(mask, shape).inside((0, 0, shape[1], shape[0]), shape), whole)
    assert Outline(mask, shape).inside(bounds, (7, 5)).all()


# --- scanned film


def film(base: int = 20, letters: bool = False, strip: int = 0, top: bool = False) -> NDArray[np.uint8]:
    """A left breast on a film of 200 x 130 pixels, its background of the grey `base`."""
    y, x = np.mgrid[:200, :130]
    image = np.random.default_rng(0).normal(base, 1.0, (200, 130)) * (base > 0)
    distance = ((y - 100) / 70) ** 2 + (x / 80) ** 2
    muscle = top & (x < 60 - y / 2)
    image = np.where((distance < 1) | muscle, 120 + 60 * (1 - distance).clip(0, 1), image)
    if letters:
        text = np.zeros((40, 50), np.uint8)
        cv2.putText(text, "RCC", (2, 22), cv2.FONT_HERSHEY_SIMPLEX, 0.6, 255, 2)
        image[88:128, 74:124] = np.maximum(image[88:128, 74:124], text)
    image[:strip, : 110 if strip else 0] = 250
    return image.clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("base", [0, 3, 20])
@pytest.mark.parametrize("border", [0, 30])
@pytest.mark.parametrize("turn", [1, -1])
def test_no_padding_is_left_at_the_chest_wall(base: int, border: int, turn: int) -> None:
    width = 3 if border else 0
    scan = np.pad(np.pad(film(base), ((0, 0), (width, width)), constant_values=border), ((0, 0), (37, 33)))
    x0, _, x1, _ = outline(np.ascontiguousarray(scan[:, ::turn])).bounds
    wall, nipple = (x0, x1) if turn == 1 else (203 + 2 * width - 3 - x1, 203 + 2 * width - 3 - x0)
    assert wall == pytest.approx(37 + width, abs=1)
    assert nipple == pytest.approx(37 + width + 80 + 0.02 * 200, abs=3)


def test_a_leaning_film_keeps_half_of_the_wedge_beside_it() -> None:
    scan = np.pad(film(), ((0, 0), (37, 33)))
    leaning = cv2.warpAffine(scan, cv2.getRotationMatrix2D((100, 100), 1.5, 1), scan.shape[::-1])
    x0, _, x1, _ = outline(leaning).bounds
    assert x0 == pytest.approx(37, abs=3)
    assert x1 < 37 + 80 + 10


@pytest.mark.parametrize("padding", [0, 6])
def test_a_bright_line_at_the_top_goes(padding: int) -> None:
    scan = np.pad(film(strip=5, top=True), ((padding, 0), (37, 33)))
    x0, y0, x1, _ = outline(scan).bounds
    assert (x0, y0) == (pytest.approx(37, abs=1), pytest.approx(5 + padding, abs=1))
    assert x1 < 37 + 80 + 10


def test_letters_that_touch_the_breast_do_not_widen_the_crop() -> None:
    scans = [np.pad(film(letters=letters), ((0, 0), (37, 33))) for letters in (False, True)]
    without, touched = (outline(scan).bounds for scan in scans)
    assert touched[2] == pytest.approx(without[2], abs=8)
    assert touched[:2] + touched[3:] == pytest.approx(without[:2] + without[3:], abs=2)


def test_a_digital_image_is_all_film() -> None:
    for side in "LR":
        image = breast(side)
        for grey in (image, np.where(image < 100, 0, image)):  # noise or nothing in the background
            eight = (grey // 16).astype(np.uint8)
            assert unpadded(eight) == (0, 0, 160, 200)
            assert without_bright_edges(eight, np.where(eight > 40, 255, 0).astype(np.uint8), 8) == (0, 0, 160, 200)


def test_a_nipple_beyond_the_edge_of_a_paddle_is_no_end_of_the_film() -> None:
    """What lies beyond the paddle is even, and a little darker."""
    image = np.maximum(film(12), 12)
    image[:, 70:] = 8
    image[92:108, :88] = 140
    assert unpadded(image)[2] == 130
    image[92:108, 70:] = 8
    assert unpadded(image)[2] == 70


@pytest.mark.filterwarnings("error")
def test_no_shape_and_no_noise_is_an_error() -> None:
    rng = np.random.default_rng(0)
    for n in range(200):
        height, width = rng.integers(1, (3, 12, 60)[n % 3] + 1, 2)
        image = rng.integers(0, 256, (height, width)).astype(np.uint8)
        image[:, : width // 2] *= n % 2
        image[height // 3 :] *= n % 5 != 0
        mask = find_breast(image)
        assert mask is None or (mask.shape == image.shape and mask.any())


def test_the_side_decides_only_where_the_breast_fills_the_picture() -> None:
    full = np.full((100, 80), 255, np.uint8)
    assert [chest_wall_is_right(full, side) for side in ("L", "R", None)] == [False, True, False]
    for side in "LR":
        mask = find_breast(small(breast(side)))
        assert mask is not None
        assert [chest_wall_is_right(mask, told) for told in ("L", "R", None)] == [side == "R"] * 3


# --- the affine


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("level", [0, 1, 3])
def test_the_affine_and_the_boxes_are_inverse(flipped: bool, level: int) -> None:
    geometry = Geometry((7, 11, 107, 61), flipped, (31, 53), level)
    a, b, tx, c, d, ty = geometry.to_original
    box = tuple(2**level * side for side in (20.0, 15.0, 60.0, 40.0))
    mapped = geometry.box_to_stored((box[0], box[1], box[2], box[3]))
    assert mapped is not None
    back = np.array([[a, b], [c, d]]) @ np.array(mapped).reshape(2, 2).T + np.array([[tx], [ty]])
    np.testing.assert_allclose(np.sort(back, axis=1).T.ravel(), box, atol=1e-9)
    assert (b, c) == (0, 0)
    assert (a < 0) == flipped


def test_the_affine_by_hand() -> None:
    assert Geometry((10, 20, 110, 70), False, (25, 50)).to_original == (2, 0, 10, 0, 2, 20)
    assert Geometry((10, 20, 110, 70), True, (25, 50)).to_original == (-2, 0, 110, 0, 2, 20)
    # At level 1, the middle of decoded pixel 0 is that of original pixel 0: 0.5 decoded is 0.5 original.
    a, _, tx, _, d, ty = Geometry((0, 0, 100, 50), False, (50, 100), 1).to_original
    assert (0.5 * a + tx, 0.5 * d + ty) == (0.5, 0.5)
    assert (1.5 * a + tx, 1.5 * d + ty) == (2.5, 2.5)


def test_the_crop_in_pixels_of_the_original_stays_inside_of_it() -> None:
    assert Geometry((1, 2, 52, 34), False, (8, 8), 1).original_crop((67, 103)) == (2, 4, 103, 67)
    assert Geometry((1, 2, 52, 34), False, (8, 8)).original_crop((100, 100)) == (1, 2, 52, 34)


def test_a_box_outside_of_the_crop_is_none_and_one_across_the_edge_is_cut() -> None:
    geometry = Geometry((0, 10, 100, 190), False, (180, 100))
    assert geometry.box_to_stored((150, 190, 159, 199)) is None
    assert geometry.box_to_stored((100, 20, 120, 40)) is None  # touches it
    assert geometry.box_to_stored((-10, 90, 20, 110)) == (0, 80, 20, 100)
    assert geometry.box_to_stored(BOX) == (BOX[0], BOX[1] - 10, BOX[2], BOX[3] - 10)
    mirrored = Geometry((0, 10, 100, 190), True, (180, 100))
    assert mirrored.box_to_stored((-10, 90, 20, 110)) == (80, 80, 100, 100)

"""Random changes of an image against OpenCV, slices of arrays and sampling by hand in float64."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mama.data.augment import IDENTITY, _blur, _sample, apply, draw, normalise
from mama.settings.schema import AugmentConfig

Array = NDArray[Any]

SIZE = (48, 24)  # (height, width): what turns the stretched square does not turn these pixels
OFF = AugmentConfig(
    crop_scale=(1.0, 1.0),
    crop_ratio=(1.0, 1.0),
    min_tissue=0.0,
    horizontal_flip=0.0,
    vertical_flip=0.0,
    rotation=0.0,
    jitter=0.0,
    jitter_strength=0.0,
    blur=0.0,
)
ALL = AugmentConfig(crop_scale=(0.3, 0.9), rotation=25.0, jitter=1.0, blur=1.0)
A, B, X, C, D, Y, GAIN, BIAS, CONTRAST, BLUR = range(len(IDENTITY))


def noise(seed: int = 0, size: tuple[int, int] = SIZE) -> Array:
    return np.random.default_rng(seed).integers(1, 256, size).astype(np.uint8)


def smooth(size: tuple[int, int] = SIZE) -> Array:
    """Changes so slowly that OpenCV's steps of 1/32 pixel do not show."""
    y, x = np.mgrid[: size[0], : size[1]]
    return (128 + 60 * np.sin(x / 7 + 0.4) + 50 * np.cos(y / 9)).astype(np.uint8)


def applied(image: Array, row: Array) -> Array:
    """One image through `apply`, [H, W] in [0, 1]."""
    out = apply(torch.from_numpy(image.copy())[None, None], torch.from_numpy(row.astype(np.float32))[None])
    return (out[0, 0].double().numpy() + 1) / 2


def row(**changes: float) -> Array:
    """The identity with some parameters changed, by their names in the docstring of `mama.data.augment`."""
    names = ("a", "b", "c", "d", "e", "f", "gain", "bias", "contrast", "blur")
    values = IDENTITY.copy()
    for name, value in changes.items():
        values[names.index(name)] = value
    return values


def drawn(config: AugmentConfig, count: int, size: tuple[int, int] = SIZE) -> Array:
    rng = np.random.default_rng(5)
    return np.stack([draw(config, np.full(size, 255, np.uint8), rng) for _ in range(count)]).astype(np.float64)


def in_pixels(parameters: Array, size: tuple[int, int] = SIZE) -> tuple[Array, Array]:
    """Matrix and shift that take (x, y), in pixels from the centre, of the output to those of the input."""
    half = np.array([size[1], size[0]]) / 2
    linear = np.array([[parameters[A], parameters[B]], [parameters[C], parameters[D]]])
    return half[:, None] * linear / half[None, :], half * parameters[[X, Y]]


def sampled(image: Array, linear: Array, shift: Array) -> Array:
    """Bilinear sampling in float64, a pixel at a time; background lies around the image."""
    height, width = image.shape
    out = np.zeros(image.shape)
    for i in range(height):
        for j in range(width):
            from_centre = np.array([j - (width - 1) / 2, i - (height - 1) / 2])
            x, y = linear @ from_centre + shift + [(width - 1) / 2, (height - 1) / 2]
            for m, n in ((0, 0), (0, 1), (1, 0), (1, 1)):
                p, q = math.floor(y) + m, math.floor(x) + n
                if 0 <= p < height and 0 <= q < width:
                    out[i, j] += image[p, q] / 255 * (1 - abs(y - p)) * (1 - abs(x - q))
    return out


def test_identity_leaves_the_image_as_it_is() -> None:
    image = noise()
    image[:, 15:] = 0
    np.testing.assert_allclose(applied(image, IDENTITY), image / 255, atol=1e-5)
    plain = normalise(torch.from_numpy(image)[None, None])
    np.testing.assert_allclose(plain[0, 0].numpy(), image.astype(np.float64) / 127.5 - 1, atol=1e-6)
    assert plain.dtype == torch.float32
    assert (plain.min(), plain.max()) == (-1, 1)


def test_with_everything_off_only_the_identity_is_drawn() -> None:
    np.testing.assert_array_equal(drawn(OFF, 100), np.tile(IDENTITY, (100, 1)))


ON: dict[str, tuple[dict[str, Any], set[int]]] = {
    "crop": ({"crop_scale": (0.2, 0.8)}, {A, X, D, Y}),
    "ratio": ({"crop_scale": (0.5, 0.5), "crop_ratio": (0.8, 1.2)}, {A, X, D, Y}),
    "horizontal flip": ({"horizontal_flip": 0.5}, {A}),
    "vertical flip": ({"vertical_flip": 0.5}, {D}),
    "rotation": ({"rotation": 10.0}, {A, B, C, D}),
    "jitter": ({"jitter": 0.5, "jitter_strength": 0.3}, {GAIN, BIAS}),
    "blur": ({"blur": 0.5}, {BLUR}),
}


@pytest.mark.parametrize("part", ON)
def test_each_part_alone_changes_its_own_parameters_only(part: str) -> None:
    changes, touched = ON[part]
    parameters = drawn(replace(OFF, **changes), 200)
    assert {n for n in range(len(IDENTITY)) if (parameters[:, n] != IDENTITY[n]).any()} == touched


def test_a_jitter_of_no_strength_is_none() -> None:
    np.testing.assert_array_equal(drawn(replace(OFF, jitter=1.0), 50), np.tile(IDENTITY, (50, 1)))


def test_probabilities_are_kept_and_parts_are_independent() -> None:
    count = 20000
    config = replace(OFF, horizontal_flip=0.3, vertical_flip=0.6, jitter=0.8, jitter_strength=0.2, blur=0.1)
    parameters = drawn(config, count)
    happened = np.stack(
        [parameters[:, A] < 0, parameters[:, D] < 0, parameters[:, GAIN] != 1, parameters[:, BLUR] > 0], 1
    )
    np.testing.assert_allclose(happened.mean(0), [0.3, 0.6, 0.8, 0.1], atol=5 * 0.5 / math.sqrt(count))
    correlations = np.corrcoef(happened.T) - np.eye(4)
    assert np.abs(correlations).max() < 5 / math.sqrt(count)
    assert np.abs(parameters[:, [A, D]]).min() == np.abs(parameters[:, [A, D]]).max() == 1


def assert_uniform(values: Array, low: float, high: float) -> None:
    """Within the range, and the tenths of it equally full."""
    assert low - 1e-6 <= values.min()
    assert values.max() <= high + 1e-6
    tenths = np.histogram(values, 10, (low, high))[0] / len(values)
    np.testing.assert_allclose(tenths, 0.1, atol=5 * 0.3 / math.sqrt(len(values)))


def test_gain_bias_and_blur_fill_their_ranges() -> None:
    parameters = drawn(replace(OFF, jitter=1.0, jitter_strength=0.3, blur=1.0), 8000)
    assert_uniform(parameters[:, GAIN], 0.7, 1.3)
    assert_uniform(parameters[:, BIAS], -0.15, 0.15)
    assert_uniform(parameters[:, BLUR], 0.1, 1.5)


def test_a_crop_keeps_the_share_and_the_aspect_that_were_asked_for() -> None:
    config = replace(OFF, crop_scale=(0.2, 0.6), crop_ratio=(0.8, 1.25))  # never as wide or high as the image
    parameters = drawn(config, 8000)
    assert_uniform(parameters[:, A] * parameters[:, D], 0.2, 0.6)
    assert_uniform(np.log(parameters[:, A] / parameters[:, D]), math.log(0.8), math.log(1.25))
    # where it lies, as a share of the room that there is
    assert_uniform(parameters[:, X] / (1 - parameters[:, A]), -1, 1)
    assert_uniform(parameters[:, Y] / (1 - parameters[:, D]), -1, 1)


@pytest.mark.parametrize("ratio", [(0.5, 2.0), (0.75, 1.3333), (0.25, 0.25), (4.0, 4.0)])
def test_a_crop_of_the_whole_area_is_the_whole_image_whatever_its_aspect(ratio: tuple[float, float]) -> None:
    np.testing.assert_array_equal(drawn(replace(OFF, crop_ratio=ratio), 100), np.tile(IDENTITY, (100, 1)))


def test_a_crop_keeps_its_share_where_the_aspect_has_to_give_way() -> None:
    parameters = drawn(replace(OFF, crop_scale=(0.6, 1.0), crop_ratio=(0.25, 4.0)), 8000)
    area, aspect = parameters[:, A] * parameters[:, D], parameters[:, A] / parameters[:, D]
    assert_uniform(area, 0.6, 1.0)
    limited = np.abs(np.log(aspect)) > np.abs(np.log(area)) - 1e-5  # as wide or as high as the image
    assert 0.5 < limited.mean() < 1
    np.testing.assert_allclose(np.maximum(parameters[limited, A], parameters[limited, D]), 1, atol=1e-5)
    assert (np.abs(np.log(aspect)) <= np.abs(np.log(area)) + 1e-5).all()


def test_a_crop_never_leaves_the_image() -> None:
    parameters = drawn(replace(OFF, crop_scale=(0.1, 1.0), crop_ratio=(0.25, 4.0)), 3000)
    for extent, centre in ((parameters[:, A], parameters[:, X]), (parameters[:, D], parameters[:, Y])):
        assert (extent > 0).all()
        assert (np.abs(centre) + extent).max() <= 1 + 1e-6


BREASTS = {"narrow": (4, 44, 0, 6), "wide": (16, 32, 0, 24), "in the middle": (10, 30, 7, 19), "whole": (0, 48, 0, 24)}


def canvas_with(breast: str) -> Array:
    """Even tissue in a rectangle of the canvas: top, bottom, left, right in pixels."""
    top, bottom, left, right = BREASTS[breast]
    image = np.zeros(SIZE, np.uint8)
    image[top:bottom, left:right] = 200
    return image


def windows(breast: str, config: AugmentConfig, count: int = 400) -> Array:
    """[n, 4]: left, top, right and bottom edge of what each of `count` views shows, in pixels of the canvas."""
    rng = np.random.default_rng(3)
    image = canvas_with(breast)
    p = np.stack([draw(config, image, rng) for _ in range(count)]).astype(np.float64)
    edges = [(1 + sign * p[:, [A, D]] + p[:, [X, Y]]) / 2 * [SIZE[1], SIZE[0]] for sign in (-1, 1)]
    return np.concatenate(edges, 1)


@pytest.mark.parametrize("breast", BREASTS)
def test_a_crop_takes_its_share_of_the_breast_and_a_window_around_it_keeps_proportions(breast: str) -> None:
    top, bottom, left, right = BREASTS[breast]
    w = windows(breast, replace(OFF, crop_scale=(0.2, 1.0), crop_ratio=(0.8, 1.25)))
    width = np.minimum(w[:, 2], right) - np.maximum(w[:, 0], left)
    height = np.minimum(w[:, 3], bottom) - np.maximum(w[:, 1], top)
    shares = width * height / ((bottom - top) * (right - left))
    assert 0.2 - 1e-5 <= shares.min() < 0.25
    assert 0.95 < shares.max() <= 1 + 1e-5
    assert abs(shares.mean() - 0.6) < 5 * 0.8 / math.sqrt(12 * 400)
    assert w.min() > -1e-5, "no window leaves the canvas"
    assert (w[:, 2:] <= np.array([SIZE[1], SIZE[0]]) + 1e-5).all()
    aspect = (w[:, 2] - w[:, 0]) / (w[:, 3] - w[:, 1]) * SIZE[0] / SIZE[1]
    free = (w[:, 2] - w[:, 0] < SIZE[1] - 1e-4) & (
        w[:, 3] - w[:, 1] < SIZE[0] - 1e-4
    )  # no side of the canvas in the way
    assert free.mean() > 0.1
    assert 0.8 - 1e-4 <= aspect[free].min() < 0.85
    assert 1.2 < aspect[free].max() <= 1.25 + 1e-4
    beside = (width < w[:, 2] - w[:, 0] - 1e-4) | (height < w[:, 3] - w[:, 1] - 1e-4)  # windows that show background
    across = width >= right - left - 1e-4
    down = height >= bottom - top - 1e-4
    assert (across | down)[beside].all(), "background only where the breast ends"
    np.testing.assert_allclose(w[across & ~down & (w[:, 0] + w[:, 2] < SIZE[1] - 1), 0], left, atol=1e-4)


def test_the_whole_breast_looks_as_in_evaluation() -> None:
    for breast, config in (("narrow", OFF), ("wide", replace(OFF, crop_ratio=(0.999999, 0.999999)))):
        top, bottom, left, right = BREASTS[breast]
        w = windows(breast, config, 1)[0]
        scale = min(SIZE[0] / (bottom - top), SIZE[1] / (right - left))  # of the breast alone, letterboxed
        np.testing.assert_allclose(w[2:] - w[:2], [SIZE[1] / scale, SIZE[0] / scale], rtol=1e-4)
        assert w[0] == pytest.approx(left, abs=1e-4)
        assert w[1] + w[3] == pytest.approx(top + bottom, abs=1e-3)


@pytest.mark.parametrize("rotation", [0.0, 60.0])
def test_a_crop_with_too_little_tissue_is_drawn_again(rotation: float) -> None:
    image = np.zeros(SIZE, np.uint8)
    image[:, 0] = image[0] = 200  # a breast's rectangle that is the whole canvas and nearly all background
    image[24:, 12:] = 200
    rng = np.random.default_rng(0)
    config = replace(OFF, crop_scale=(0.1, 0.2), rotation=rotation)
    shares = {}
    for least in (0.0, 0.4):
        rows = [draw(replace(config, min_tissue=least), image, rng) for _ in range(300)]
        views = apply(torch.from_numpy(image)[None, None].expand(300, 1, -1, -1), torch.from_numpy(np.stack(rows)))
        shares[least] = ((views + 1) / 2 > 100 / 255).double().mean((1, 2, 3)).numpy()
        whole = np.hypot(np.stack(rows)[:, A], np.stack(rows)[:, C] * SIZE[0] / SIZE[1]) > 0.99
        assert whole.mean() < 0.1, "seldom is the whole breast all that is left"
        shares[least] = shares[least][~whole]
    assert (shares[0.0] < 0.1).mean() > 0.2
    assert shares[0.4].min() > 0.4 - 0.08  # a grid of 32 x 32 positions against pixels with soft edges
    never = draw(replace(config, rotation=0.0, min_tissue=1.0), image, rng)
    np.testing.assert_array_equal(never, IDENTITY)


def test_an_image_without_tissue_is_cropped_from_its_canvas() -> None:
    config, rng, black = replace(OFF, crop_scale=(0.1, 0.5)), np.random.default_rng(0), np.zeros(SIZE, np.uint8)
    rows = np.stack([draw(config, black, rng) for _ in range(50)])
    assert np.ptp(rows[:, [X, Y]], axis=0).min() > 0.5
    np.testing.assert_array_equal(draw(replace(config, min_tissue=0.25), black, rng), IDENTITY)


@pytest.mark.parametrize(("top", "left"), [(0, 0), (24, 12), (7, 5)])
def test_a_crop_is_the_slice_enlarged(top: int, left: int) -> None:
    """Half the height and half the width; at the rim `apply` also looks at pixels outside of the slice."""
    height, width = SIZE
    image = noise(1)
    parameters = row(a=0.5, c=(left + width / 4) / (width / 2) - 1, e=0.5, f=(top + height / 4) / (height / 2) - 1)
    part = image[top : top + height // 2, left : left + width // 2].astype(np.float32) / 255
    expected = cv2.resize(part, (width, height), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_allclose(applied(image, parameters)[1:-1, 1:-1], expected[1:-1, 1:-1], atol=1e-5)


def test_flips_mirror_the_image() -> None:
    image = noise(2)
    both = drawn(replace(OFF, horizontal_flip=1.0, vertical_flip=1.0), 1)[0]
    sideways = drawn(replace(OFF, horizontal_flip=1.0), 1)[0]
    upside_down = drawn(replace(OFF, vertical_flip=1.0), 1)[0]
    np.testing.assert_allclose(applied(image, sideways), image[:, ::-1] / 255, atol=1e-5)
    np.testing.assert_allclose(applied(image, upside_down), image[::-1] / 255, atol=1e-5)
    np.testing.assert_allclose(applied(image, both), image[::-1, ::-1] / 255, atol=1e-5)


@pytest.mark.parametrize("size", [(48, 24), (24, 48), (32, 32)])
def test_a_rotation_turns_the_pixels_of_an_oblong_image_by_its_angle(size: tuple[int, int]) -> None:
    height, width = size
    image = smooth(size)
    parameters = drawn(replace(OFF, rotation=40.0), 300, size)
    matrices = [in_pixels(p, size)[0] for p in parameters]
    for matrix in matrices:  # neither stretched nor sheared nor mirrored
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(2), atol=1e-6)
        assert np.linalg.det(matrix) > 0
    angles = np.array([math.degrees(math.atan2(m[1, 0], m[0, 0])) for m in matrices])
    assert -40 <= angles.min() < -35
    assert 35 < angles.max() <= 40
    assert abs(angles.mean()) < 5 * 40 / math.sqrt(3 * 300)
    for p, angle in zip(parameters[:5], angles[:5], strict=True):
        turn = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), angle, 1.0)
        inside = cv2.warpAffine(np.full(size, 255, np.uint8), turn, (width, height)) == 255
        inside = cv2.erode(inside.astype(np.uint8), np.ones((3, 3))) > 0
        assert inside.mean() > 0.3
        expected = cv2.warpAffine(image.astype(np.float32), turn, (width, height), flags=cv2.INTER_LINEAR) / 255
        np.testing.assert_allclose(applied(image, p)[inside], expected[inside], atol=4e-3)


def test_crop_rotation_and_flips_together_are_a_crop_that_is_turned_and_mirrored() -> None:
    """In pixels: diag(width, height) @ rotation @ diag(+-1, +-1), so the rows stay at right angles."""
    parameters = drawn(replace(ALL, jitter=0.0, blur=0.0), 500)
    mirrored = 0
    for p in parameters:
        matrix, _ = in_pixels(p)
        assert abs(matrix[0] @ matrix[1]) < 1e-6
        extent = np.linalg.norm(matrix, axis=1)
        assert (extent <= 1 + 1e-6).all()
        assert (np.abs(p[[X, Y]]) + extent).max() <= 1 + 1e-6
        assert 0.3 * 0.75 - 1e-6 <= extent.prod() <= 0.9 + 1e-6
        angle = np.abs(np.arctan2(matrix[0, 1], matrix[0, 0]))
        assert min(angle, math.pi - angle) <= math.radians(25) + 1e-6
        mirrored += np.linalg.det(matrix) < 0
    assert 150 < mirrored < 350


@pytest.mark.parametrize("seed", range(4))
def test_what_is_drawn_is_what_is_sampled(seed: int) -> None:
    image = noise(seed)
    config = replace(ALL, crop_scale=(0.4, 1.0), jitter=0.0, blur=0.0)
    parameters = draw(config, image, np.random.default_rng(seed)).astype(np.float64)
    np.testing.assert_allclose(applied(image, parameters), sampled(image, *in_pixels(parameters)), atol=2e-5)


def test_around_the_image_lies_air() -> None:
    image = np.full(SIZE, 255, np.uint8)
    out = applied(image, row(a=2.0, e=2.0, bias=0.2))
    height, width = SIZE
    assert (out[: height // 4 - 1] == 0).all()
    assert (out[:, -(width // 4) + 1 :] == 0).all()
    np.testing.assert_allclose(out[height // 4 + 1 : -height // 4 - 1, width // 4 + 1 : -width // 4 - 1], 1, atol=1e-5)


@pytest.mark.parametrize(("gain", "bias"), [(1.3, 0.0), (0.6, 0.0), (1.0, 0.2), (1.0, -0.2), (1.4, 0.2), (0.6, -0.2)])
def test_gain_and_bias_change_the_breast_and_leave_the_air_black(gain: float, bias: float) -> None:
    image = noise(3)
    image[:, 14:] = 0
    expected = np.clip(image / 255 * gain + bias, 0, 1)
    expected[image == 0] = 0
    out = applied(image, row(gain=gain, bias=bias))
    # A pixel beside background may mix with it by the rounding of a position: compare it by its own tolerance.
    np.testing.assert_allclose(out[:, :13], expected[:, :13], atol=1e-5)
    np.testing.assert_allclose(out[:, 13], expected[:, 13], atol=1e-4)
    assert (out[:, 15:] == 0).all()


@pytest.mark.parametrize(("gain", "contrast"), [(1.0, 0.2), (1.0, 1.8), (1.8, 1.8), (0.2, 1.8), (1.8, 0.2)])
def test_contrast_is_about_the_mean_of_the_view(gain: float, contrast: float) -> None:
    image = noise(3)
    image[:, 14:] = 0
    bright = np.clip(image / 255 * gain, 0, 1)
    expected = np.clip(bright.mean() + contrast * (bright - bright.mean()), 0, 1)
    expected[image == 0] = 0
    out = applied(image, row(gain=gain, contrast=contrast))
    np.testing.assert_allclose(out[:, :13], expected[:, :13], atol=1e-4)
    assert (out[:, 15:] == 0).all()


def test_factors_are_of_brightness_and_contrast_and_fill_their_range() -> None:
    config = replace(OFF, jitter=1.0, jitter_strength=0.8, jitter_kind="factors", blur=1.0, blur_sigma=(0.1, 2.0))
    parameters = drawn(config, 4000)
    assert_uniform(parameters[:, GAIN], 0.2, 1.8)
    assert_uniform(parameters[:, CONTRAST], 0.2, 1.8)
    assert_uniform(parameters[:, BLUR], 0.1, 2.0)
    assert abs(np.corrcoef(parameters[:, GAIN], parameters[:, CONTRAST])[0, 1]) < 5 / math.sqrt(4000)
    assert not parameters[:, BIAS].any()


def test_air_stays_black_whatever_is_drawn() -> None:
    empty = torch.zeros(64, 1, *SIZE, dtype=torch.uint8)
    rows = torch.from_numpy(drawn(ALL, 64)).float()
    assert (apply(empty, rows) == -1).all()


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 1.5])
def test_a_blur_is_gaussian(sigma: float) -> None:
    image = noise(4)
    expected = cv2.GaussianBlur(image.astype(np.float64) / 255, (7, 7), sigma)
    out = applied(image, row(blur=sigma))
    np.testing.assert_allclose(out[3:-3, 3:-3], expected[3:-3, 3:-3], atol=1e-5)
    if sigma >= 0.5:
        assert np.abs(out - image / 255)[3:-3, 3:-3].max() > 0.05


def test_the_blur_comes_after_brightness_is_cut_to_its_range() -> None:
    image = noise(5)
    cut = np.clip(image / 255 * 1.4 + 0.2, 0, 1)
    out = applied(image, row(gain=1.4, bias=0.2, blur=1.2))
    np.testing.assert_allclose(out[3:-3, 3:-3], cv2.GaussianBlur(cut, (7, 7), 1.2)[3:-3, 3:-3], atol=1e-5)


def test_a_blur_leaves_even_tissue_even_up_to_the_chest_wall() -> None:
    out = applied(np.full(SIZE, 200, np.uint8), row(blur=1.5))
    np.testing.assert_allclose(out, 200 / 255, atol=1e-4)


@pytest.mark.parametrize("sigma", [0.5, 1.5])
def test_a_blur_repeats_the_edge_outwards(sigma: float) -> None:
    image = noise(6)
    expected = cv2.GaussianBlur(image.astype(np.float64) / 255, (7, 7), sigma, borderType=cv2.BORDER_REPLICATE)
    np.testing.assert_allclose(applied(image, row(blur=sigma)), expected, atol=1e-5)


def test_bfloat16_gives_float32_within_three_grey_levels() -> None:
    """2.5 of 255 levels, 0.02 in [-1, 1]: so many roundings of 1/256 the blur's seven weights add up to."""
    images = torch.from_numpy(np.stack([noise(n) for n in range(64)]))[:, None]
    rows = torch.from_numpy(drawn(replace(ALL, jitter_strength=0.9), 64)).float()
    exact, short = apply(images, rows), apply(images, rows, torch.bfloat16)
    assert short.dtype == torch.bfloat16
    difference = short.double() - exact
    assert difference.abs().max() <= 0.02
    assert difference.abs().mean() <= 0.004
    assert difference.mean().abs() <= 0.001, "neither darker nor brighter"
    unblurred = rows.clone()
    unblurred[:, BLUR] = 0  # then only the value itself is rounded, to 8 bits of [0, 1] and of [-1, 1]
    difference = apply(images, unblurred, torch.bfloat16).double() - apply(images, unblurred)
    assert difference.abs().max() <= 2**-8 + 2**-9 + 1e-6


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_a_gpu_computes_all_images_at_once_to_the_same_values(dtype: torch.dtype, tolerance: float) -> None:
    images = torch.from_numpy(np.stack([noise(n) for n in range(16)]))[:, None]
    rows = torch.from_numpy(drawn(replace(ALL, blur=0.5, jitter_kind="factors"), 16)).float()
    together = _blur(_sample(images, rows).to(dtype), rows[:, BLUR]) * 2 - 1  # as `apply` does on a GPU
    assert (together.float() - apply(images, rows, dtype).float()).abs().max() <= tolerance


def test_every_image_of_a_batch_gets_its_own_parameters() -> None:
    images = torch.from_numpy(np.stack([noise(n) for n in range(5)]))[:, None]
    rows = torch.from_numpy(np.stack([draw(ALL, noise(), np.random.default_rng(n)) for n in range(4)] + [IDENTITY]))
    together = apply(images, rows)
    for n in range(5):
        alone = apply(images[n : n + 1], rows[n : n + 1])
        np.testing.assert_allclose(together[n].numpy(), alone[0].numpy(), atol=1e-6)
    swapped = apply(images, rows.flip(0))
    assert (together - swapped).abs().amax((1, 2, 3)).gt(0.1).tolist() == [True, True, False, True, True]
    np.testing.assert_array_equal(apply(images.flip(0), rows.flip(0)).flip(0).numpy(), together.numpy())


def test_the_result_is_float32_in_minus_1_to_1_and_the_input_is_left_alone() -> None:
    images = torch.from_numpy(np.stack([noise(n) for n in range(64)]))[:, None]
    before = images.clone()
    rows = torch.from_numpy(drawn(replace(ALL, jitter_strength=0.9), 64)).float()
    out = apply(images, rows)
    assert out.dtype == torch.float32
    assert out.shape == images.shape
    assert torch.isfinite(out).all()
    assert out.min() >= -1
    assert out.max() <= 1 + 1e-6
    assert out.max() > 0.9
    assert torch.equal(images, before)


def test_the_same_random_numbers_give_the_same_parameters() -> None:
    one, two, other = (draw(ALL, noise(), np.random.default_rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, two)
    assert np.flatnonzero(one == other).tolist() == [CONTRAST]  # which only jitter_kind=factors draws
    assert one.dtype == np.float32
    assert one.shape == IDENTITY.shape
    rng = np.random.default_rng(1)
    views = draw(ALL, noise(), rng), draw(ALL, noise(), rng)
    assert np.flatnonzero(views[0] == views[1]).tolist() == [CONTRAST], "two views of one image differ"

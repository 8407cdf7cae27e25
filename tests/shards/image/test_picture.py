from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from pydicom.uid import JPEG2000Lossless

from shards.image.decode import decode, open_image
from shards.image.picture import Picture, PictureConfig, read_picture
from shards.schema import Box, Finding, SourceView
from tests.support.archives import BOX, breast, compressed, mammograms, plain, sample_of, write_dicom, write_png

WINDOW = {"WindowCenter": 2048, "WindowWidth": 4096}


def marked(side: str, scale: int) -> tuple[NDArray[np.uint16], Box]:
    """A breast of even tissue with a marker of full brightness, as large as `scale` says, and the marker's box."""
    image: NDArray[np.uint16] = np.minimum(breast("L"), np.uint16(1500))
    image[5:15, 130:155] = 1500
    image = np.kron(image, np.ones((scale, scale), dtype=np.uint16))
    x0, y0, x1, y1 = (int(scale * value) + odd for value, odd in zip(BOX, (1, 0, 0, 1), strict=True))
    image[y0:y1, x0:x1] = 4095
    if side == "L":
        return image, (x0, y0, x1, y1)
    width = image.shape[1]
    return np.ascontiguousarray(image[:, ::-1]), (width - x1, y0, width - x0, y1)


def seen(pixels: NDArray[np.uint8]) -> Box:
    """The marker's box in a stored picture, to a fraction of a pixel: its edge pixels are grey by their share of it."""
    tissue, marker = 93.5, 255.0
    share = np.clip((pixels.astype(float) - tissue) / (marker - tissue), 0, 1)
    (x0, x1), (y0, y1) = (_extent(share.max(axis=axis)) for axis in (0, 1))
    return x0, y0, x1, y1


def _extent(shares: NDArray[np.float64]) -> tuple[float, float]:
    full = np.flatnonzero(shares > 0.98)
    return full[0] - shares[: full[0]].sum(), full[-1] + 1 + shares[full[-1] + 1 :].sum()


def half_way(pixels: NDArray[np.uint8]) -> Box:
    """The marker's box where the grey is half way between tissue and marker: no symmetric filter moves that."""
    tissue, marker = 93.5, 255.0
    above = pixels.astype(float) - (tissue + marker) / 2
    rows, columns = np.nonzero(above > 0)
    middle = int(np.median(rows)), int(np.median(columns))
    ends = []
    for profile, at in ((above[middle[0]], middle[1]), (above[:, middle[1]], middle[0])):
        first = at - int(np.argmax(profile[at::-1] < 0))
        last = at + int(np.argmax(profile[at:] < 0))
        begin = first + 0.5 + profile[first] / (profile[first] - profile[first + 1])
        end = last - 0.5 + profile[last - 1] / (profile[last - 1] - profile[last])
        ends.append((begin, end))
    return ends[0][0], ends[1][0], ends[0][1], ends[1][1]


def back(picture: Picture, box: Box) -> Box:
    """A stored box in pixels of the original."""
    a, b, tx, c, d, ty = picture.geometry.to_original
    ends = [(a * x + b * y + tx, c * x + d * y + ty) for x, y in (box[:2], box[2:])]
    (x0, x1), (y0, y1) = (sorted(values) for values in zip(*ends, strict=True))
    return x0, y0, x1, y1


@pytest.mark.parametrize("side", ["L", "R"])
@pytest.mark.parametrize("crop", [True, False])
@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("long_side", [2000, 333, 121])
def test_a_box_stays_on_its_marker_and_the_affine_leads_back(
    side: str, crop: bool, flip: bool, long_side: int, tmp_path: Path
) -> None:
    image, box = marked(side, 3)
    path = write_dicom(tmp_path / "a.dcm", image, ImageLaterality=side, **WINDOW)
    picture = read_picture(path, PictureConfig(long_side=long_side, crop=crop, flip=flip))
    assert picture.pixels.shape == picture.geometry.size
    assert max(picture.pixels.shape) <= long_side
    assert picture.geometry.flipped == (flip and side == "R")
    mapped = picture.geometry.box_to_stored(box)
    assert mapped is not None
    np.testing.assert_allclose(mapped, seen(picture.pixels), atol=0.15)
    np.testing.assert_allclose(back(picture, mapped), box, atol=1e-9)
    scale = picture.geometry.to_original[4]
    np.testing.assert_allclose(back(picture, seen(picture.pixels)), box, atol=0.15 * scale)


@pytest.mark.parametrize("side", ["L", "R"])
@pytest.mark.parametrize("crop", [True, False])
@pytest.mark.parametrize(("long_side", "level"), [(370, 1), (301, 1), (180, 2), (90, 3)])
def test_a_box_stays_on_its_marker_at_reduced_resolution(
    side: str, crop: bool, long_side: int, level: int, tmp_path: Path
) -> None:
    """Without the shift of half a pixel of the decoded image, a box would lie 0.5, 1.5 or 3.5 original pixels off."""
    image, box = marked(side, 5)
    image[(image > 1000) & (image < 4095)] = 1500
    path = compressed(write_dicom(tmp_path / "a.dcm", image, **WINDOW), JPEG2000Lossless)
    picture = read_picture(path, PictureConfig(long_side=long_side, crop=crop))
    assert picture.geometry.level == level
    assert picture.geometry.flipped == (side == "R")
    assert picture.original_size == image.shape
    mapped = picture.geometry.box_to_stored(box)
    assert mapped is not None
    np.testing.assert_allclose(back(picture, mapped), box, atol=1e-9)
    np.testing.assert_allclose(mapped, half_way(picture.pixels), atol=0.3)
    np.testing.assert_allclose(back(picture, half_way(picture.pixels)), box, atol=0.3 * 2**level)


def test_the_shift_of_half_a_pixel(tmp_path: Path) -> None:
    """The centre of mass of a smooth blob, which no filter moves, through every level."""
    y, x = np.mgrid[:1024, :768] + 0.5
    blob = 4000 * np.exp(-((x - 300.3) ** 2 + (y - 500.8) ** 2) / (2 * 60**2))
    path = compressed(write_dicom(tmp_path / "a.dcm", blob.astype(np.uint16), **WINDOW), JPEG2000Lossless)
    for level in (0, 1, 2, 3):
        picture = read_picture(path, PictureConfig(long_side=1024 >> level, bits=16, crop=False, flip=False))
        assert picture.geometry.level == level
        weights = picture.pixels.astype(float)
        rows, columns = (np.arange(side) + 0.5 for side in weights.shape)
        centre = (weights.sum(0) @ columns / weights.sum(), weights.sum(1) @ rows / weights.sum())
        found = back(picture, (*centre, *centre))[:2]
        np.testing.assert_allclose(found, (300.3, 500.8), atol=0.1)


def test_findings_reach_the_sample_in_stored_pixels(tmp_path: Path) -> None:
    image, box = marked("R", 3)
    path = write_dicom(tmp_path / "a.dcm", image, ImageLaterality="R", **WINDOW)
    findings = (Finding(1, "mass", box), Finding(2, "mass", (0, 0, 2, 2)), Finding(3, "asymmetry"))
    sample = sample_of(tmp_path, SourceView(path, findings=findings), picture=PictureConfig(long_side=300))
    (view,) = sample.study.views
    pixels = cv2.imdecode(np.frombuffer(sample.images[0], np.uint8), cv2.IMREAD_UNCHANGED)
    assert pixels is not None
    assert view.findings[0].box is not None
    np.testing.assert_allclose(view.findings[0].box, seen(pixels.astype(np.uint8)), atol=0.15)
    assert [finding.box for finding in view.findings[1:]] == [None, None]
    assert view.crop[2] == image.shape[1]


# --- size


@pytest.mark.parametrize("height", [201, 400, 401, 403])
@pytest.mark.parametrize("width", [160, 321])
@pytest.mark.parametrize("long_side", [100, 200])
def test_odd_sizes(height: int, width: int, long_side: int, tmp_path: Path) -> None:
    """When shrinking by two or more, one odd row or column is given up, and the geometry knows it."""
    image = np.random.default_rng(0).integers(0, 4096, (height, width)).astype(np.uint16)
    path = write_dicom(tmp_path / "a.dcm", image, **WINDOW)
    picture = read_picture(path, PictureConfig(long_side=long_side, crop=False, flip=False))
    x0, y0, x1, y1 = picture.geometry.crop
    halved = long_side / max(height, width) <= 0.5
    assert (x0, y0, x1, y1) == (0, 0, width - width % 2 * halved, height - height % 2 * halved)
    assert max(picture.pixels.shape) == long_side
    assert picture.original_size == (height, width)
    sy, sx = (y1 / picture.pixels.shape[0], x1 / picture.pixels.shape[1])
    assert sy / sx == pytest.approx(1, abs=0.02)
    assert picture.geometry.to_original == (sx, 0, 0, 0, sy, 0)


def test_nothing_is_enlarged(tmp_path: Path) -> None:
    picture = plain(write_dicom(tmp_path / "a.dcm", breast("L"), **WINDOW), long_side=4000)
    assert picture.pixels.shape == (200, 160)
    cropped = read_picture(tmp_path / "a.dcm", PictureConfig(long_side=4000))
    x0, y0, x1, y1 = cropped.geometry.crop
    assert cropped.pixels.shape == (y1 - y0, x1 - x0)


def test_shrinking_by_a_whole_number_is_the_mean(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 4096, (400, 320)).astype(np.uint16)
    path = write_dicom(tmp_path / "a.dcm", image, **WINDOW)
    for factor in (2, 4, 8):
        mean = image.reshape(400 // factor, factor, 320 // factor, factor).mean(axis=(1, 3))
        pixels = plain(path, long_side=400 // factor, bits=8).pixels
        assert np.abs(pixels - mean / 4095 * 255).max() <= 0.6


# --- crop, mirror, background


def test_a_breast_that_fills_the_picture_is_mirrored_by_its_side(tmp_path: Path) -> None:
    """Of an image that is all tissue the pixels do not tell the side; the table comes before the header."""
    tissue = np.random.default_rng(0).integers(1500, 2500, (100, 80)).astype(np.uint16)
    for header, table, flipped in (("L", None, False), ("R", None, True), ("R", "L", False), (None, "R", True)):
        path = write_dicom(tmp_path / "a.dcm", tissue, ImageLaterality=header, **WINDOW)
        (view,) = sample_of(tmp_path, SourceView(path, table)).study.views
        assert view.flipped == flipped


@pytest.mark.parametrize("side", ["L", "R"])
def test_letters_become_black_and_the_chest_wall_is_left(side: str, tmp_path: Path) -> None:
    path = write_dicom(tmp_path / "a.dcm", breast(side), **WINDOW)
    whole = read_picture(path, PictureConfig(crop=False))
    assert whole.pixels[5:15, 130:155].min() == 255  # mirrored, and not cropped
    cropped = read_picture(path, PictureConfig())
    assert cropped.geometry.flipped == (side == "R")
    assert cropped.pixels.shape[0] < 160
    x0, y0, x1, y1 = map(int, BOX)
    top = cropped.geometry.crop[1]
    assert cropped.pixels[y0 - top : y1 - top, x0:x1].min() > 240
    assert (cropped.pixels == 255).sum() == 0  # of the letters nothing is left: the marker itself is 249
    assert cropped.pixels[:2, -10:].max() == 0


def test_an_inverted_image_is_found_and_its_background_is_black(tmp_path: Path) -> None:
    upright = read_picture(write_dicom(tmp_path / "a.dcm", breast("L"), **WINDOW), PictureConfig())
    inverted = write_dicom(
        tmp_path / "b.dcm", (4095 - breast("L")).astype(np.uint16), PhotometricInterpretation="MONOCHROME1", **WINDOW
    )
    again = read_picture(inverted, PictureConfig())
    assert again.geometry == upright.geometry
    assert np.abs(again.pixels.astype(int) - upright.pixels).max() <= 1


def test_an_image_without_a_breast_is_kept_whole(tmp_path: Path) -> None:
    image = np.zeros((100, 80), dtype=np.uint8)
    image[40:43, 40:43] = 255
    picture = read_picture(write_png(tmp_path / "a.png", image), PictureConfig())
    assert (picture.geometry.crop, picture.geometry.flipped) == ((0, 0, 80, 100), False)
    np.testing.assert_array_equal(picture.pixels, image)
    assert picture.header is None


def test_sixteen_bits_and_eight_are_the_same_picture(tmp_path: Path) -> None:
    path = write_dicom(tmp_path / "a.dcm", breast("R"), **WINDOW)
    eight, sixteen = (read_picture(path, PictureConfig(long_side=90, bits=bits)) for bits in (8, 16))
    assert (eight.pixels.dtype, sixteen.pixels.dtype) == (np.uint8, np.uint16)
    assert eight.geometry == sixteen.geometry
    assert np.abs(eight.pixels - sixteen.pixels / 257).max() < 0.51


def test_a_line_of_pixels_is_refused_and_not_an_error(tmp_path: Path) -> None:
    for shape in ((1, 5000), (5000, 1), (1, 1), (2, 3)):
        pixels = np.arange(np.prod(shape), dtype=np.uint16).reshape(shape)
        sample = sample_of(tmp_path, SourceView(write_dicom(tmp_path / "a.dcm", pixels)))
        assert len(sample.images) + len(sample.refusals) == 1


# --- JPEG 2000 at reduced resolution, on a real mammogram

# In 8-bit grey levels, in the mean over the breast: low-pass filter against area averages.
REDUCED_TOLERANCE = 1.5


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real mammogram of about 1,400 x 900 pixels, of the odd sizes that cameras have, with a window."""
    dataset = pydicom.dcmread(mammograms()[3])
    pixels = cv2.resize(dataset.pixel_array, None, fx=0.31, fy=0.31, interpolation=cv2.INTER_AREA)[:-1]
    path = tmp_path_factory.mktemp("real") / "a.dcm"
    write_dicom(path, pixels, BitsStored=16, HighBit=15, WindowCenter=32768, WindowWidth=65536, ImageLaterality="R")
    return compressed(path, JPEG2000Lossless)


def on_the_original(picture: Picture) -> NDArray[np.float64]:
    """The stored picture, laid back over the original."""
    affine = np.array(picture.geometry.to_original).reshape(2, 3)
    affine[:, 2] += affine[:, :2].sum(axis=1) / 2 - 0.5  # from edges to centres of pixels
    size = picture.original_size[::-1]
    return np.asarray(cv2.warpAffine(picture.pixels.astype(np.float64), affine, size, flags=cv2.INTER_LINEAR))


@pytest.mark.parametrize(("long_side", "level"), [(660, 1), (600, 1), (330, 2), (300, 2)])
def test_a_reduced_picture_is_nearly_that_of_the_full_image(real: Path, long_side: int, level: int) -> None:
    config = PictureConfig(long_side=long_side)
    part, full = read_picture(real, config), read_picture(real, replace(config, reduced=False))
    assert (part.geometry.level, full.geometry.level) == (level, 0)
    assert part.geometry.flipped == full.geometry.flipped
    assert part.original_size == full.original_size
    assert max(part.pixels.shape) == max(full.pixels.shape) == long_side
    crops = [np.array(picture.geometry.original_crop(picture.original_size)) for picture in (part, full)]
    assert np.abs(crops[0] - crops[1]).max() <= 0.01 * 1400
    np.testing.assert_allclose(part.geometry.to_original, full.geometry.to_original, rtol=0.02, atol=0.01 * 1400)
    one, two = on_the_original(part), on_the_original(full)
    both = (one > 0) & (two > 0)
    assert np.abs(one - two)[both].mean() < REDUCED_TOLERANCE


def test_without_crop_a_reduced_picture_lies_on_the_full_one(real: Path) -> None:
    config = PictureConfig(long_side=330, crop=False, flip=False)
    part, full = read_picture(real, config), read_picture(real, replace(config, reduced=False))
    assert part.geometry.level == 2
    assert np.abs(np.subtract(part.pixels.shape, full.pixels.shape)).max() <= 1  # decoded sizes are rounded up
    one, two = (on_the_original(picture)[40:-40, 40:-40] for picture in (part, full))
    apart = np.abs(one - two).mean()
    assert apart < REDUCED_TOLERANCE
    for shift in (-2, 2):  # a wrong offset by two original pixels would be seen
        assert np.abs(np.roll(one, shift, axis=1) - two).mean() > 1.1 * apart


def test_a_small_crop_of_a_large_image_gets_the_level_that_it_needs(tmp_path: Path) -> None:
    image = np.zeros((1024, 1024), dtype=np.uint16)
    image[300:700, :300] = np.kron(np.minimum(breast("L"), 3000), np.ones((2, 2), np.uint16))[:400, :300]
    path = compressed(write_dicom(tmp_path / "a.dcm", image, **WINDOW), JPEG2000Lossless)
    opened = open_image(path)
    assert isinstance(opened, pydicom.Dataset)
    assert decode(opened, 200).level == 2
    picture = read_picture(path, PictureConfig(long_side=200))
    assert picture.geometry.level < 2
    assert max(picture.pixels.shape) == 200

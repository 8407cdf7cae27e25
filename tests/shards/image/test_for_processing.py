"""Raw (FOR PROCESSING) images rendered as pictures: attenuation, tissue bright, whatever the detector's values mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from shards.errors import Refused
from shards.image.picture import Picture, PictureConfig, read_picture
from shards.schema import SourceView, Study
from tests.support.archives import breast, sample_of, write_dicom

TOP = 2**14 - 1
LIN: dict[str, Any] = {"PixelIntensityRelationship": "LIN", "PixelIntensityRelationshipSign": 1}
LOG: dict[str, Any] = {"PixelIntensityRelationship": "LOG"}
FALLS = {"PixelIntensityRelationshipSign": -1}
M1, M2 = {"PhotometricInterpretation": "MONOCHROME1"}, {"PhotometricInterpretation": "MONOCHROME2"}
# Attenuations of five bands of a breast, from its lower to its upper end.
BANDS = np.array([2.0, 2.4, 2.6, 3.0, 3.5])


def exposure() -> NDArray[np.uint16]:
    """Detector counts behind a half disc of bands on the left: 12,000 in the background."""
    y, x = np.mgrid[:200, :160]
    attenuation = BANDS[np.clip((y - 30) * 5 // 140, 0, 4)]
    inside = ((y - 100) / 70) ** 2 + (x / 90) ** 2 < 1
    counted = 12000 * np.exp(-np.where(inside, attenuation, 0))
    return np.rint(counted + np.random.default_rng(0).normal(0, 2, counted.shape)).astype(np.uint16)


def framed(value: int) -> NDArray[np.uint16]:
    counted = exposure()
    counted[:8], counted[:, -12:] = value, value
    return counted


def logarithm(of: NDArray[np.uint16]) -> NDArray[np.uint16]:
    return np.rint(np.log(of) / np.log(TOP) * TOP).astype(np.uint16)


def raw(folder: Path, pixels: NDArray[np.uint16], **tags: Any) -> Path:
    bits = {"BitsStored": 14, "HighBit": 13, "PresentationIntentType": "FOR PROCESSING"}
    return write_dicom(folder / "raw.dcm", pixels, **{**bits, **tags})


def rendered(path: Path, **options: Any) -> Picture:
    return read_picture(path, PictureConfig(long_side=400, process_raw=True, **options))


def bands(picture: Picture) -> NDArray[np.float64]:
    """The grey in the middle of each band, found through the picture's own way back to the original."""
    a, _, tx, _, d, ty = picture.geometry.to_original
    places = [(round((20 - tx) / a), round((y - ty) / d)) for y in (44, 72, 100, 128, 156)]
    return np.array([np.median(picture.pixels[y - 3 : y + 4, x - 3 : x + 4]) for x, y in places])


@pytest.mark.parametrize("bits", [8, 16])
def test_greys_are_attenuation_between_the_ends_of_the_tissue(tmp_path: Path, bits: Any) -> None:
    """The least attenuation of the breast is black, the most white, the background black too: computed by hand."""
    picture = rendered(raw(tmp_path, exposure(), **LIN, **M1), bits=bits)
    assert picture.processed
    expected = (BANDS - BANDS[0]) / (BANDS[-1] - BANDS[0]) * (2**bits - 1)
    np.testing.assert_allclose(bands(picture), expected, atol=0.02 * 2**bits)
    assert np.median(picture.pixels[:, -3:]) == 0


@pytest.mark.parametrize(
    ("pixels", "tags"),
    [
        (exposure(), {**LIN, **M2}),  # the sign tells
        (exposure(), {**LIN, **FALLS, **M1}),  # a wrong sign: MONOCHROME1 shows what is exposed dark
        (exposure(), M2),  # neither: a detector counts
        (TOP - exposure(), {**LIN, **FALLS, **M2}),
        (exposure(), {**LIN, **M1, "WindowCenter": 100, "WindowWidth": 50}),
        (exposure(), {**LIN, **M1, "RescaleSlope": 0.001, "RescaleIntercept": 0}),
        (framed(0), {**LIN, **M1}),  # a frame that was not exposed
        (framed(TOP), {**LIN, **M1, "PixelPaddingValue": TOP}),
        (logarithm(exposure()), {**LOG, **M1}),  # logarithms are not taken again
        (TOP - logarithm(exposure()), {**LOG, **FALLS, **M2}),
        (TOP - logarithm(exposure()), {**LOG, **M2}),
    ],
)
def test_the_same_picture_whatever_the_values_mean(
    tmp_path: Path, pixels: NDArray[np.uint16], tags: dict[str, Any]
) -> None:
    one = rendered(raw(tmp_path, exposure(), **LIN, **M1))
    other = rendered(raw(tmp_path, pixels, **tags))
    assert other.geometry == one.geometry
    assert np.abs(other.pixels.astype(int) - one.pixels).max() <= 3


def test_an_image_without_any_exposure_is_blank(tmp_path: Path) -> None:
    with pytest.raises(Refused) as caught:
        rendered(raw(tmp_path, np.zeros((50, 40), np.uint16), **LIN, **M1))
    assert caught.value.reason == "blank"


def test_only_a_raw_image_is_rendered_and_its_facts_say_so(tmp_path: Path) -> None:
    shown = {**LIN, **M1, "PresentationIntentType": "FOR PRESENTATION"}
    for tags, process, expected in ((shown, True, False), (LIN | M1, False, False), (LIN | M1, True, True)):
        picture = PictureConfig(long_side=64, process_raw=process)
        sample = sample_of(tmp_path, SourceView(raw(tmp_path, exposure(), **tags)), picture=picture)
        document = sample.study.to_json()
        assert (b'"processed": true' in document, b'"processed"' in document) == (expected, expected)
        assert Study.from_json(document) == sample.study
        assert sample.study.views[0].processed == expected


def test_in_a_raw_image_stored_unchanged_the_bright_background_is_not_the_breast(tmp_path: Path) -> None:
    """An MLO view has most background at the foot of the chest wall; that decided about mirroring once."""
    for side in "LR":
        exposure = np.where(breast(side) > 1000, 3000, 12000).astype(np.uint16)
        exposure += np.random.default_rng(0).integers(0, 60, exposure.shape, dtype=np.uint16)
        path = write_dicom(
            tmp_path / f"{side}.dcm", exposure, PresentationIntentType="FOR PROCESSING", BitsStored=14, HighBit=13,
            PixelIntensityRelationship="LIN", PixelIntensityRelationshipSign=1,
        )  # fmt: skip
        stored = read_picture(path, PictureConfig())
        rendered = read_picture(path, PictureConfig(process_raw=True))
        assert stored.geometry == rendered.geometry
        assert stored.geometry.flipped == (side == "R")
        assert stored.geometry.size[1] < 0.8 * exposure.shape[1]

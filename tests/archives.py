"""Small archives of DICOM files for the tests of the shard room."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import DigitalMammographyXRayImageStorageForPresentation, ExplicitVRLittleEndian, generate_uid

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


def write_png(path: Path, image: NDArray[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image)
    return path

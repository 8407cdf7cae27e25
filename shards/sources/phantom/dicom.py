"""Write a synthetic mammogram as a DICOM file (PS3.3 A.26, Digital Mammography X-Ray Image IOD)."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom import uid
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence

# One is drawn for each exam, all equally likely; JPEG 2000 is rare as encoding an image takes longer than drawing it.
TRANSFER_SYNTAXES = (*(uid.ExplicitVRLittleEndian,) * 5, *(uid.RLELossless,) * 2, uid.JPEG2000Lossless)
BITS = 12
WHITE = 2**BITS - 1

# PS3.16 CID 4014, View for Mammography
VIEW_CODES = {"CC": ("399162004", "cranio-caudal"), "MLO": ("399368009", "medio-lateral oblique")}
# PatientOrientation (PS3.3 C.7.6.1.1.1): rows run to the nipple in a left breast and to the chest wall in a right one;
# columns run down the hanging image: to the medial side in CC, to the foot in MLO.
ORIENTATIONS = {
    ("L", "CC"): ["A", "R"],
    ("R", "CC"): ["P", "L"],
    ("L", "MLO"): ["A", "FR"],
    ("R", "MLO"): ["P", "FL"],
}


@dataclass(frozen=True)
class Exam:
    """The facts that the four files of a study share; `age` in years, `inverted` for MONOCHROME1."""

    patient: str
    study: str
    age: int
    inverted: bool
    transfer_syntax: uid.UID


def write_mammogram(
    path: Path, pixels: NDArray[np.uint16], spacing: float, laterality: str, view: str, exam: Exam
) -> None:
    """Write `pixels` ([H, W], 12 bits, tissue bright; `spacing` in mm) to `path`; equal arguments give equal bytes."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    dataset = FileDataset(path, {}, file_meta=meta, preamble=b"\0" * 128)
    meta.MediaStorageSOPClassUID = uid.DigitalMammographyXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = uid.UID(_uid(exam.study, laterality, view))
    dataset.SOPClassUID = meta.MediaStorageSOPClassUID
    dataset.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    _describe_study(dataset, exam)
    _describe_projection(dataset, laterality, view)
    _describe_pixels(dataset, WHITE - pixels if exam.inverted else pixels, spacing, exam.inverted)
    if exam.transfer_syntax.is_compressed:
        # Named explicitly: pydicom would choose its own RLE encoder, which is slow.
        dataset.compress(exam.transfer_syntax, encoding_plugin="pylibjpeg", generate_instance_uid=False)
    dataset.save_as(path, enforce_file_format=True)


def _describe_study(dataset: Dataset, exam: Exam) -> None:
    """Patient, Study, Series and Equipment modules (PS3.3 C.7), all invented."""
    dataset.PatientName = f"{exam.patient}^Synthetic"
    dataset.PatientID = exam.patient
    dataset.PatientBirthDate = ""
    dataset.PatientSex = "F"
    dataset.PatientAge = f"{exam.age:03d}Y"
    dataset.StudyInstanceUID = _uid(exam.study)
    dataset.SeriesInstanceUID = _uid(exam.study, "series")
    dataset.StudyID, dataset.SeriesNumber = "1", 1
    dataset.StudyDate, dataset.StudyTime = "20240101", "120000"
    dataset.AccessionNumber = dataset.ReferringPhysicianName = ""
    dataset.Modality = "MG"
    dataset.PresentationIntentType = "FOR PRESENTATION"
    dataset.Manufacturer, dataset.ManufacturerModelName = "mama", "phantom"
    dataset.DetectorType = "DIRECT"


def _describe_projection(dataset: Dataset, laterality: str, view: str) -> None:
    """DX Anatomy Imaged and Mammography Image modules (PS3.3 C.8.11.2 and C.8.11.7)."""
    dataset.ImageLaterality = laterality
    dataset.InstanceNumber = list(ORIENTATIONS).index((laterality, view)) + 1
    dataset.PatientOrientation = ORIENTATIONS[laterality, view]
    dataset.BodyPartExamined = dataset.OrganExposed = "BREAST"
    dataset.AnatomicRegionSequence = Sequence([_code("76752008", "Breast")])
    dataset.PositionerType = "MAMMOGRAPHIC"
    dataset.ViewPosition = view
    code = _code(*VIEW_CODES[view])
    code.ViewModifierCodeSequence = Sequence([])
    dataset.ViewCodeSequence = Sequence([code])
    dataset.BreastImplantPresent = "NO"
    dataset.AcquisitionContextSequence = Sequence([])


def _describe_pixels(dataset: Dataset, stored: NDArray[np.uint16], spacing: float, inverted: bool) -> None:
    """Image Pixel, DX Image, DX Detector and VOI LUT modules (PS3.3 C.7.6.3, C.8.11.3, C.8.11.4, C.11.2)."""
    dataset.ImageType = ["DERIVED", "PRIMARY"]
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME1" if inverted else "MONOCHROME2"
    dataset.Rows, dataset.Columns = stored.shape
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, BITS, BITS - 1
    dataset.PixelRepresentation = 0
    dataset.ImagerPixelSpacing = [spacing, spacing]
    dataset.PixelIntensityRelationship = "LOG"
    dataset.PixelIntensityRelationshipSign = 1 if inverted else -1  # +1: more X-rays, larger values
    dataset.RescaleIntercept, dataset.RescaleSlope, dataset.RescaleType = 0, 1, "US"
    dataset.PresentationLUTShape = "INVERSE" if inverted else "IDENTITY"
    dataset.WindowCenter, dataset.WindowWidth = 2 ** (BITS - 1), 2**BITS
    dataset.LossyImageCompression = "00"
    dataset.BurnedInAnnotation = "NO"  # the view label does not identify anybody
    dataset.PixelData = stored.astype("<u2").tobytes()


def _uid(*names: str) -> str:
    """A UID derived from `names`: 2.25 and a UUID as a decimal number (PS3.5 B.2)."""
    return f"2.25.{uuid.uuid5(uuid.NAMESPACE_URL, '/'.join(('phantom', *names))).int}"


def _code(value: str, meaning: str) -> Dataset:
    """An item of a code sequence, in SNOMED CT."""
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, "SCT", meaning
    return item

"""One image file -> one grey image as a radiologist would see it, and the facts of its header."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.pixels import apply_modality_lut, apply_windowing, pixel_array

from shards.schema import LATERALITIES, VIEWS, Refused

PLAIN_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
# MG, and what film scans and old archives call a mammogram; RSNA files carry no Modality at all.
MODALITIES = ("MG", "CR", "DX", "RG", "")
# CID 4014 "View for Mammography", as SNOMED RT (SRT) and as SNOMED CT codes.
VIEW_CODES = {"R-10242": "CC", "399162004": "CC", "R-10226": "MLO", "399368009": "MLO"}
WHITE = 65535


@dataclass(frozen=True)
class Pixels:
    """`array` is [H, W]: uint16 spanning 0 (black) to 65535 (white), or uint8 spanning 0 to 255."""

    array: NDArray[Any]
    laterality: str | None = None  # L | R
    view: str | None = None  # CC | MLO
    spacing: tuple[float, float] | None = None  # (row, column) in mm; at the detector where only that is known
    intent: str | None = None  # FOR PRESENTATION | FOR PROCESSING


def read_image(path: Path) -> Pixels:
    """Read a DICOM, PNG, JPEG or TIFF file (by suffix; anything unknown is taken for DICOM) for display.

    DICOM pixels go through the grayscale transformations of PS3.4 N.2 in their order: modality LUT
    or rescale, VOI LUT (the first item of a sequence, else the first window), presentation. The
    output range of the VOI step becomes 0..65535, so that one scanner's images stay comparable; a file
    without any VOI has no such range and is stretched between its own darkest and brightest pixel.
    Eight-bit PNG and JPEG are taken as ready for display, 16-bit ones as files without a VOI.

    Raises `Refused` with a reason code: unreadable, modality, multi-frame, colour, blank.
    """
    if path.suffix.lower() in PLAIN_SUFFIXES:
        return _read_plain(path)
    try:
        dataset = pydicom.dcmread(path)
    except FileNotFoundError:
        raise Refused("missing", "no such file") from None
    except (InvalidDicomError, OSError, EOFError) as error:
        raise Refused("unreadable", f"not a readable DICOM file: {_first_line(error)}") from None
    _refuse_other_objects(dataset)
    try:
        stored = pixel_array(dataset)  # [H, W]
    except Exception as error:  # decoders raise whatever they like on damaged streams
        raise Refused("unreadable", f"pixel data: {_first_line(error)}") from None
    return Pixels(
        array=render(stored, dataset),
        laterality=find_laterality(dataset),
        view=find_view(dataset),
        spacing=_spacing(dataset),
        intent=dataset.get("PresentationIntentType") or None,
    )


def _refuse_other_objects(dataset: Dataset) -> None:
    modality = dataset.get("Modality") or ""
    if modality not in MODALITIES:
        raise Refused("modality", f"Modality is {modality!r}, not a mammogram")
    if int(dataset.get("NumberOfFrames") or 1) > 1:
        raise Refused("multi-frame", f"{dataset.NumberOfFrames} frames: tomosynthesis volumes are not read")
    photometric = dataset.get("PhotometricInterpretation") or ""
    if photometric not in ("MONOCHROME1", "MONOCHROME2"):
        raise Refused("colour", f"PhotometricInterpretation is {photometric!r}, not MONOCHROME1 or MONOCHROME2")


def render(stored: NDArray[Any], dataset: Dataset) -> NDArray[np.uint16]:
    """Stored values [H, W] (8 or 16 bits) to display values [H, W], uint16, 0 black to 65535 white.

    Every step works on single values, so the steps are applied to a table of all values that can be
    stored and the image is looked up in it once: no floating-point copy of a 26-megapixel image.
    """
    if stored.dtype.itemsize > 2:
        raise Refused("unreadable", f"{stored.dtype.itemsize * 8} bits per pixel, 8 or 16 can be read")
    unsigned = np.dtype(f"u{stored.dtype.itemsize}")
    codes = np.arange(np.iinfo(unsigned).max + 1, dtype=unsigned)
    values = codes.view(stored.dtype).astype(np.int64)  # what each bit pattern stands for
    modality = np.asarray(apply_modality_lut(values, dataset), dtype=np.float64)
    padding = _padding(values, dataset)
    display, low, high = _voi(modality, dataset)
    index = stored.view(unsigned)
    if display is None:
        used = modality[(np.bincount(index.ravel(), minlength=len(codes)) > 0) & ~padding]
        display, low, high = modality, used.min(initial=np.inf), used.max(initial=-np.inf)
    if not high > low:
        raise Refused("blank", "all pixels have the same value")
    unit = ((display - low) / (high - low)).clip(0, 1)
    # MONOCHROME1 and an INVERSE presentation LUT say the same thing (PS3.3 C.11.6.1): invert once for both.
    if dataset.PhotometricInterpretation == "MONOCHROME1" or dataset.get("PresentationLUTShape") == "INVERSE":
        unit = 1 - unit
    table = np.round(unit * WHITE).astype(np.uint16)
    table[padding] = 0
    return table[index]


def _voi(modality: NDArray[np.float64], dataset: Dataset) -> tuple[NDArray[np.float64] | None, float, float]:
    """Values after the VOI step with the range that they can take; (None, 0, 0) where the file has none."""
    if dataset.get("VOILUTSequence"):
        return _voi_lut(modality, dataset.VOILUTSequence[0])
    if dataset.get("WindowWidth") is None or dataset.get("WindowCenter") is None:
        return None, 0.0, 0.0
    # The last two values lie far outside of any window: they come back as the ends of its output range.
    with np.errstate(over="ignore"):
        windowed = apply_windowing(np.append(modality, (-1e9, 1e9)), dataset, index=0)
    return windowed[:-2], float(windowed[-2]), float(windowed[-1])


def _voi_lut(modality: NDArray[np.float64], item: Dataset) -> tuple[NDArray[np.float64], float, float]:
    """PS3.3 C.11.2.1.1. Not pydicom's `apply_voi`, which wraps the index of 8-bit LUTs at 256 entries."""
    entries, first, bits = (int(v) for v in item.LUTDescriptor)
    entries = entries or 65536
    data = item.LUTData
    if isinstance(data, bytes):
        data = np.frombuffer(data, dtype=np.uint8 if len(data) == entries else "<u2")
    lut = np.asarray(data, dtype=np.float64)[:entries]
    return lut[np.clip(modality - first, 0, len(lut) - 1).astype(np.int64)], 0.0, float(2**bits - 1)


def _padding(values: NDArray[np.int64], dataset: Dataset) -> NDArray[np.bool_]:
    """Which stored values are padding and not tissue (PS3.3 C.7.5.1.1.2)."""
    value = dataset.get("PixelPaddingValue")
    if value is None:
        return np.zeros(len(values), dtype=bool)
    limit = dataset.get("PixelPaddingRangeLimit")
    ends = int(value), int(value if limit is None else limit)
    return (values >= min(ends)) & (values <= max(ends))


def find_laterality(dataset: Dataset) -> str | None:
    """L or R from the first of: ImageLaterality, Laterality, FrameLaterality of the shared functional groups."""
    places: tuple[Callable[[], Any], ...] = (
        lambda: dataset.ImageLaterality,
        lambda: dataset.Laterality,
        lambda: dataset.SharedFunctionalGroupsSequence[0].FrameAnatomySequence[0].FrameLaterality,
    )
    return next((side for side in map(_or_none, places) if side in LATERALITIES), None)


def find_view(dataset: Dataset) -> str | None:
    """CC or MLO from the first filled one of: ViewPosition, ViewCodeSequence, PatientOrientation.

    The last is where CBIS-DDSM keeps it. A first filled place that names another view (ML, XCCL ...)
    gives None: the other places are vaguer about the same image and do not overrule it.
    """
    position = _or_none(lambda: dataset.ViewPosition)
    if position:
        return position if position in VIEWS else None
    code = _or_none(lambda: dataset.ViewCodeSequence[0].CodeValue)
    if code:
        return VIEW_CODES.get(code)
    orientation = _or_none(lambda: dataset.PatientOrientation)
    return orientation if orientation in VIEWS else None


def _or_none(place: Callable[[], Any]) -> str | None:
    """The text at a place of the header; None where an attribute or sequence item on the way is missing."""
    try:
        value = place()
    except (AttributeError, IndexError, TypeError):
        return None
    return value.strip().upper() if isinstance(value, str) else None


def _spacing(dataset: Dataset) -> tuple[float, float] | None:
    spacing = dataset.get("PixelSpacing") or dataset.get("ImagerPixelSpacing")
    return (float(spacing[0]), float(spacing[1])) if spacing else None


def _read_plain(path: Path) -> Pixels:
    try:
        data = np.fromfile(path, dtype=np.uint8)
    except FileNotFoundError:
        raise Refused("missing", "no such file") from None
    array = cv2.imdecode(data, cv2.IMREAD_GRAYSCALE | cv2.IMREAD_ANYDEPTH) if len(data) else None
    if array is None or array.dtype not in (np.uint8, np.uint16):
        raise Refused("unreadable", f"not a readable {path.suffix.lower()} image of 8 or 16 bits")
    low, high = int(array.min()), int(array.max())
    if low == high:
        raise Refused("blank", "all pixels have the same value")
    if array.dtype == np.uint16:
        array = np.round((array.astype(np.float32) - low) * (WHITE / (high - low))).astype(np.uint16)
    return Pixels(array)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}".rstrip(": ")

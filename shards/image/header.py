"""Facts from a DICOM header: side, view, implant, vendor, spacing, intent, and whether it is a plain mammogram."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from shards.errors import Refused
from shards.schema import LATERALITIES, RAW, VIEWS
from shards.spellings import SIDES, UNKNOWN, is_implant_displaced, read_view

# MG, and the modalities of film scans and old archives; RSNA files have no Modality at all.
MODALITIES = ("MG", "CR", "DX", "RG", "")
# Grey, and the colour spaces in which a scanner may have stored grey; the pixels decide.
PHOTOMETRIC = ("MONOCHROME1", "MONOCHROME2", "RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT", "PALETTE COLOR")
TOMOSYNTHESIS = "1.2.840.10008.5.1.4.1.1.13.1.3"  # Breast Tomosynthesis Image Storage, PS3.4 B.5
RAW_CLASSES = (
    uid.DigitalMammographyXRayImageStorageForProcessing,
    uid.DigitalXRayImageStorageForProcessing,
    uid.BreastProjectionXRayImageStorageForProcessing,
)
# PS3.16 CID 4014 "View for Mammography", SNOMED RT (SRT) and SNOMED CT codes; any other code is another view.
VIEW_CODES = {"R-10242": "CC", "399162004": "CC", "R-10226": "MLO", "399368009": "MLO"}
# PS3.16 CID 4015 "View Modifier for Mammography": magnification and spot compression; implant displaced.
SPOT_CODES = ("R-102D6", "399163009", "R-102D7", "399055006")
DISPLACED_CODES = ("R-102D5", "399209000")
# Closed vocabulary: Manufacturer is free text, and free text does not enter a shard.
VENDORS = {
    "hologic": ("HOLOGIC", "LORAD"),
    "ge": ("GE MEDICAL", "GE HEALTHCARE", "GEMS"),
    "siemens": ("SIEMENS",),
    "fujifilm": ("FUJI",),
    "philips": ("PHILIPS", "SECTRA"),
    "planmed": ("PLANMED",),
    "ims": ("IMS", "GIOTTO"),
    "carestream": ("CARESTREAM", "KODAK"),
    "agfa": ("AGFA",),
    "konica minolta": ("KONICA",),
}
OTHER_VENDOR = "other"
# Attributes used here that functional groups may hold, in any macro; each set is replaced as a whole.
OF_FRAMES = (
    {"WindowCenter", "WindowWidth", "VOILUTFunction", "VOILUTSequence"},
    {"RescaleSlope", "RescaleIntercept", "ModalityLUTSequence"},
    {"PixelSpacing", "ImagerPixelSpacing"},
    *({name} for name in ("PresentationLUTShape", "PatientOrientation")),
    *({name} for name in ("ImageLaterality", "Laterality", "FrameLaterality")),
    *({name} for name in ("ViewPosition", "ViewCodeSequence", "ViewModifierCodeSequence")),
)
NOT_A_BREAST = re.compile(r"\b(phantom|flat[ -]?field|calibration|quality control)\b", re.IGNORECASE)
SYNTHETIC = re.compile(r"\b(c-?view|intelligent 2d|insight 2d|v-?preview|s-?view)\b|generated_2d", re.IGNORECASE)


def merge_functional_groups(dataset: Dataset, number: int) -> None:
    """Copy the functional groups of frame `number` (from 0) to the data set, where a single-frame image has them.

    Enhanced multi-frame objects keep window, VOI LUT, rescale, spacing and side in functional groups (PS3.3 C.7.6.16).
    The frame's own group wins over the shared one, and that over the data set, which should not have these attributes
    (PS3.3 A.55.3.1).
    """
    for name, place in (("SharedFunctionalGroupsSequence", 0), ("PerFrameFunctionalGroupsSequence", number)):
        groups = dataset.get(name)
        if not isinstance(groups, Sequence) or place >= len(groups):
            continue
        for macro in groups[place]:
            if isinstance(macro.value, Sequence) and macro.value:
                _replace_attributes(dataset, macro.value[0])


def _replace_attributes(dataset: Dataset, item: Dataset) -> None:
    for names in OF_FRAMES:
        given = [element for element in item if element.keyword in names]
        if any(not element.is_empty for element in given):
            for name in names & set(dataset.dir()):
                delattr(dataset, name)
            for element in given:
                dataset[element.tag] = element


def refuse_other_objects(dataset: Dataset) -> None:
    """Raise `Refused` for all but plain mammograms: modality, not-a-breast, specimen, 2d-synthetic, spot, colour."""
    modality = str(dataset.get("Modality") or "")
    if modality not in MODALITIES:
        raise Refused("modality", f"Modality is {modality[:40]!r}, not a mammogram")
    body = str(dataset.get("BodyPartExamined") or "BREAST").upper()
    if body != "BREAST":
        raise Refused("not-a-breast", f"BodyPartExamined is {body[:40]!r}")
    words = " ".join(str(dataset.get(name) or "") for name in ("SeriesDescription", "ProtocolName", "ImageType"))
    if dataset.get("SpecimenDescriptionSequence") or re.search(r"\bspecimen\b", words, re.IGNORECASE):
        raise Refused("specimen", "an image of a specimen")
    if named := NOT_A_BREAST.search(words):
        raise Refused("not-a-breast", f"its description contains {named[0]!r}")
    if SYNTHETIC.search(words):
        raise Refused("2d-synthetic", "a 2D image computed from tomosynthesis")
    if any(_code(item) in SPOT_CODES or _meaning(item) == "spot" for item in _modifiers(dataset)):
        raise Refused("spot", "a spot compression or magnification view")
    photometric = dataset.get("PhotometricInterpretation")
    if photometric and photometric not in PHOTOMETRIC:
        raise Refused("colour", f"PhotometricInterpretation is {str(photometric)[:40]!r}, which is not read")


def find_laterality(dataset: Dataset) -> str | None:
    """L or R, from every attribute in which vendors store it; None if none states it.

    1. ImageLaterality, Laterality, FrameLaterality of the functional groups, and the side in a ViewPosition such as
       LCC. Raises `Refused` ("laterality-conflict") if two of them disagree.
    2. The column direction of PatientOrientation (PS3.3 C.7.6.1.1.1): in a left breast it points to the patient's
       right. This assumes an upright image.
    """
    places: tuple[Callable[[], Any], ...] = (
        lambda: dataset.ImageLaterality,
        lambda: dataset.Laterality,
        lambda: dataset.FrameLaterality,
        lambda: dataset.SharedFunctionalGroupsSequence[0].FrameAnatomySequence[0].FrameLaterality,
    )
    stated = {SIDES.get((text or "").lower()) for text in map(_or_none, places)} | {_position(dataset)[0]}
    stated.discard(None)
    if len(stated) > 1:
        raise Refused(
            "laterality-conflict", "ImageLaterality, Laterality, FrameLaterality and the side in ViewPosition disagree"
        )
    if stated:
        return stated.pop()
    down = _or_none(lambda: dataset.PatientOrientation[1] if len(dataset.PatientOrientation) == 2 else None) or ""
    sides = {"L" if letter == "R" else "R" for letter in down if letter in LATERALITIES}
    return sides.pop() if len(sides) == 1 else None


def find_view(dataset: Dataset) -> str | None:
    """CC or MLO, or the name of another view in lower case; None if no attribute states it.

    From ViewPosition, ViewCodeSequence (its code, else its meaning), then PatientOrientation (CBIS-DDSM) and
    AcquisitionDeviceProcessingDescription (FUJIFILM), in the spellings of `shards.spellings`. Raises `Refused`
    ("view-conflict") if ViewPosition and ViewCodeSequence disagree.
    """
    _, position = _position(dataset)
    coded = _coded_view(dataset)
    if position in VIEWS and coded in VIEWS and position != coded:
        raise Refused("view-conflict", f"ViewPosition is {position}, ViewCodeSequence is {coded}")
    if position or coded:
        return position or coded
    places = (lambda: dataset.PatientOrientation, lambda: dataset.AcquisitionDeviceProcessingDescription)
    for text in filter(None, map(_or_none, places)):
        named = {word for word in re.split(r"[^A-Z]+", text) if word in VIEWS}
        if len(named) == 1:
            return named.pop()
    return None


def find_implant(dataset: Dataset) -> bool | None:
    """Whether the breast has an implant; None if not stated.

    1. A view with the implant displaced, by ViewPosition, ViewCodeSequence or a modifier, shows that it has one.
    2. BreastImplantPresent (0028,1300).
    """
    items = [*(dataset.get("ViewCodeSequence") or [])[:1], *_modifiers(dataset)]
    names = [_or_none(lambda: dataset.ViewPosition) or "", *(str(item.get("CodeMeaning") or "") for item in items)]
    if any(_code(item) in DISPLACED_CODES for item in items) or any(map(is_implant_displaced, names)):
        return True
    return {"YES": True, "NO": False}.get(_or_none(lambda: dataset.BreastImplantPresent) or "")


def find_vendor(dataset: Dataset) -> str:
    """The vendor by Manufacturer: a name in `VENDORS`, or "other"."""
    maker = str(dataset.get("Manufacturer") or "").upper()
    return next((name for name, words in VENDORS.items() if any(maker.startswith(w) for w in words)), OTHER_VENDOR)


def find_spacing(dataset: Dataset) -> tuple[float, float] | None:
    """(row, column) spacing in mm, at the detector if no other is known; None if missing or implausible."""
    spacing = dataset.get("PixelSpacing") or dataset.get("ImagerPixelSpacing")
    try:
        row, column = (float(value) for value in spacing or ())
    except (TypeError, ValueError):
        return None
    return (row, column) if 0 < row < 10 and 0 < column < 10 else None


def find_intent(dataset: Dataset) -> str | None:
    """FOR PRESENTATION or FOR PROCESSING by PresentationIntentType, else FOR PROCESSING by SOP class, else None.

    ImageType does not help: a raw image and the one derived from it may both be ORIGINAL.
    """
    intent = _or_none(lambda: dataset.PresentationIntentType)
    if intent in ("FOR PRESENTATION", RAW):
        return intent
    kind = dataset.get("SOPClassUID") or getattr(dataset, "file_meta", {}).get("MediaStorageSOPClassUID")
    return RAW if kind in RAW_CLASSES else None


def is_volume(dataset: Dataset) -> bool:
    """Whether it is tomosynthesis: several frames, or the SOP class."""
    return int(dataset.get("NumberOfFrames") or 1) > 1 or dataset.get("SOPClassUID") == TOMOSYNTHESIS


def _position(dataset: Dataset) -> tuple[str | None, str | None]:
    """Side and view in ViewPosition; an unknown text counts as the name of another view."""
    text = _or_none(lambda: dataset.ViewPosition) or ""
    try:
        return read_view("" if text.lower() in UNKNOWN else text)
    except ValueError:
        return None, text.lower()


def _coded_view(dataset: Dataset) -> str | None:
    item = (dataset.get("ViewCodeSequence") or [Dataset()])[0]
    code = _code(item)
    return VIEW_CODES.get(code) or _meaning(item) or (f"code {code.lower()}" if code else None)


def _code(item: Dataset) -> str:
    return str(item.get("CodeValue") or "").strip().upper()


def _meaning(item: Dataset) -> str | None:
    """The view that the CodeMeaning of a code sequence's item names."""
    try:
        return read_view(str(item.get("CodeMeaning") or ""))[1]
    except ValueError:
        return None


def _modifiers(dataset: Dataset) -> list[Dataset]:
    views = dataset.get("ViewCodeSequence") or [Dataset()]
    return [*(views[0].get("ViewModifierCodeSequence") or []), *(dataset.get("ViewModifierCodeSequence") or [])]


def _or_none(place: Callable[[], Any]) -> str | None:
    """The text that `place` reads from the header; None if an attribute or sequence item on the way is missing."""
    try:
        value = place()
    except (AttributeError, IndexError, TypeError):
        return None
    return value.strip().upper() if isinstance(value, str) else None

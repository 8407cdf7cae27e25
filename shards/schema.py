"""The data model: a study as a source yields it (`SourceStudy`) and as a shard holds it (`Study`).

Labels belong to images, because the image is the unit of training and evaluation: a label of a breast is repeated on
each of its views, a label of the exam on all of them.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from shards.errors import ShardError
from shards.from_json import parse_json

SCHEMA_VERSION = 2

LATERALITIES = ("L", "R")
VIEWS = ("CC", "MLO")
DENSITIES = ("A", "B", "C", "D")
SPLITS = ("train", "val", "test")
RAW = "FOR PROCESSING"  # Presentation Intent Type (0008,0068) of detector data; radiologists read FOR PRESENTATION

# Reason codes of images that are not stored because they are bad -> explanation.
REFUSED_REASONS = {
    "blank": "all pixels have the same value",
    "colour": "a colour image",
    "crash": "the decoder crashed or ran out of memory",
    "duplicate": "a second copy of the same image",
    "encode": "could not be encoded",
    "hostile": "a text that is too long or has control characters, or an impossible age",
    "identifier": "no patient, study or image identifier, or contradictory ones",
    "label": "a label that is not in the source's documentation",
    "label-conflict": "contradictory labels",
    "laterality": "laterality is in neither table nor header",
    "laterality-conflict": "the header names both left and right",
    "missing": "no file where the table names one",
    "modality": "not a mammogram",
    "not-a-breast": "another body part, or a phantom",
    "outside": "a path that leaves the archive",
    "path": "a path without the documented prefix",
    "too-large": "too many pixels or bytes",
    "unreadable": "damaged, or not an image",
    "view": "view is in neither table nor header",
    "view-conflict": "the header names two views",
}
# The same for images that are good but not wanted; they do not count against `pack.max_refused`.
EXCLUDED_REASONS = {
    "2d-synthetic": "a 2D image computed from tomosynthesis",
    "lesion-crop": "the crop of a lesion",
    "other-intent": "raw beside a presentation image of the same view, or the reverse",
    "other-view": "neither CC nor MLO",
    "post-processed": "CAD marks, contrast subtraction and the like",
    "roi-mask": "a mask of a lesion",
    "specimen": "a specimen radiograph",
    "spot": "spot compression or magnification",
    "tomosynthesis": "a tomosynthesis volume",
}
EXCLUDED = frozenset(EXCLUDED_REASONS)

# Grayscale transformations used where the header's own is unusable or shows a blank picture: word -> explanation, which
# follows "rendered by".
FALLBACKS = {
    "modality": "the stored values: the modality LUT or rescale is unusable",
    "function": "a linear window: VOILUTFunction is empty or unknown",
    "lut-bits": "a VOI LUT with the bit depth of its entries, which its LUTDescriptor contradicts",
    "next": "a later VOI LUT or window of the header: the ones before it are unusable",
    "stretch": "a stretch from their minimum to their maximum: no VOI LUT and no window is usable",
}

# Contradictions between the label table and the header or pixels of a stored image: word -> explanation.
CONFLICTS = {
    "laterality": "table and header disagree about the laterality; the table wins",
    "view": "table and header disagree about the view; the table wins",
    "box": "the box of a finding lies outside the image; the finding is stored without it",
    "mask": "the mask of a finding is unreadable, empty or of another size; the finding is stored without a box",
    "implant": "table and header disagree about an implant; the table wins",
}

# Why patients are in another split than the archive's own says: word -> explanation, which follows their number.
SPLIT_MOVES = {
    "divided": "are in both training and test set of the archive: all their images are in test",
    "unnamed": "are not in the archive's split: they count as training",
    "val": "of its training set are in val, which the archive does not have: the hash chose them",
}

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Finding:
    """One lesion in one image.

    Views of a breast that show the same lesion share `number`. `box` is (x0, y0, x1, y1) in pixels: of the original
    image in a `SourceView`, of the stored image in a `View`. Descriptors are terms of the ACR BI-RADS lexicon in
    lower case.
    """

    number: int
    kind: str  # mass | calcification | asymmetry | distortion
    box: Box | None = None
    shape: str | None = None
    margin: str | None = None
    density: str | None = None
    calcification_type: str | None = None
    distribution: str | None = None
    pathology: str | None = None  # benign | malignant


@dataclass(frozen=True)
class Labels:
    """Labels of the breast in an image; `None`: unknown. Raises `ShardError` for a BI-RADS or density out of range."""

    birads: int | None = None  # 0-6
    density: str | None = None  # A-D
    cancer: bool | None = None
    pathology: str | None = None  # normal | benign | malignant

    def __post_init__(self) -> None:
        if self.birads is not None and self.birads not in range(7):
            raise ShardError(f"birads: {self.birads!r} is not one of 0..6")
        if self.density is not None and self.density not in DENSITIES:
            raise ShardError(f"density: {self.density!r} is not one of A, B, C, D")


@dataclass(frozen=True)
class SourceView:
    """One image file of an archive. If laterality, view or implant is None, the DICOM header decides.

    A source also yields the images that its tables rule out, with `refused` = (reason code, message), so that the
    counts of a build add up to the archive.
    """

    path: Path
    laterality: str | None = None
    view: str | None = None
    labels: Labels = Labels()
    findings: tuple[Finding, ...] = ()
    report: str | None = None  # report text of this image
    refused: tuple[str, str] | None = None
    masks: tuple[tuple[int, Path], ...] = ()  # (number of a finding, image that is white inside of it): gives its box
    implant: bool | None = None  # in this breast


@dataclass(frozen=True)
class SourceStudy:
    """One exam as a source yields it, with the archive's identifiers, which never reach a shard."""

    patient_id: str
    study_id: str
    views: tuple[SourceView, ...]
    age: int | None = None  # years
    race: str | None = None
    ethnicity: str | None = None
    reason: str | None = None  # screening | diagnostic
    # None: the hash of the patient decides. The builder sets it; not in `repr`, by which a changed study is noticed.
    split: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class View:
    """One stored image.

    Sizes are (height, width) in pixels, `crop` is (x0, y0, x1, y1) in original pixels, and `to_original` is the
    row-major 2 x 3 affine that maps stored (x, y) to original (x, y).
    """

    member: str  # name of the tar member without the key, e.g. "0.jpg"
    laterality: str
    view: str
    size: tuple[int, int]
    original_size: tuple[int, int]
    pixel_spacing: tuple[float, float] | None  # original (row, column) spacing in mm
    crop: tuple[int, int, int, int]
    flipped: bool
    to_original: tuple[float, float, float, float, float, float]
    labels: Labels
    findings: tuple[Finding, ...] = ()
    report: str | None = None
    presentation_intent: str | None = None  # FOR PRESENTATION | FOR PROCESSING
    vendor: str | None = None  # a key of shards.image.header.VENDORS; None without a DICOM header
    instance: str | None = None  # keyed hash of the SOP Instance UID, to find an image stored twice
    processed: bool = False  # raw, rendered by shards.image.for_processing; in the JSON only if true
    conflicts: tuple[str, ...] = ()  # words of CONFLICTS
    fallbacks: tuple[str, ...] = ()  # words of FALLBACKS; in the JSON only if there are any
    implant: bool | None = None  # in this breast; in the JSON only if known


@dataclass(frozen=True)
class Study:
    """One sample of a shard. `key` and `patient` are keyed hashes of the archive's identifiers."""

    key: str
    patient: str
    source: str
    split: str
    views: tuple[View, ...]
    age: int | None = None
    race: str | None = None
    ethnicity: str | None = None
    reason: str | None = None

    def to_json(self) -> bytes:
        """The content of the tar member `<key>.json`: UTF-8 with sorted keys, so that equal studies are equal bytes."""
        document = {"schema": SCHEMA_VERSION, **asdict(self)}
        for view in document["views"]:
            for name in ("processed", "fallbacks"):
                if not view[name]:
                    del view[name]
            if view["implant"] is None:
                del view["implant"]
        return json.dumps(document, sort_keys=True, ensure_ascii=False).encode()

    @staticmethod
    def from_json(data: bytes) -> Study:
        """Inverse of `to_json`. Raises `ShardError` for another schema version, and what a damaged document causes."""
        document = parse_json(data)
        version = document.pop("schema", None)
        if version != SCHEMA_VERSION:
            raise ShardError(
                f"schema: version {version!r}, this release reads {SCHEMA_VERSION}; pack the archive again"
            )
        document["views"] = tuple(_view(v) for v in document["views"])
        return Study(**document)


def _view(document: dict[str, Any]) -> View:
    tuples = {k: tuple(v) for k, v in document.items() if isinstance(v, list) and k != "findings"}
    findings = tuple(_finding(f) for f in document["findings"])
    return View(**{**document, **tuples, "labels": Labels(**document["labels"]), "findings": findings})


def _finding(document: dict[str, Any]) -> Finding:
    finding = Finding(**document)
    return replace(finding, box=cast(Box, tuple(finding.box))) if finding.box else finding

"""What a study is, before packing (`SourceStudy`) and in the shards (`Study`).

Everything that a label table says is said per image, because that is the unit of training and of
evaluation: a fact of a breast is repeated on each of its views, a fact of the exam on all of them.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

from shards.from_json import parse_json

SCHEMA_VERSION = 2

LATERALITIES = ("L", "R")
VIEWS = ("CC", "MLO")
DENSITIES = ("A", "B", "C", "D")
SPLITS = ("train", "val", "test")
RAW = "FOR PROCESSING"  # the intent of what a detector counted; FOR PRESENTATION is what a radiologist is shown

# Reasons for which an image is left out because it is something else than was asked for, and not because it is bad.
EXCLUDED = frozenset(
    {
        "2d-synthetic",  # a C-view or other 2D image computed from tomosynthesis
        "lesion-crop",
        "other-intent",  # raw beside the presentation image of the same view, or the other way round
        "other-view",  # neither CC nor MLO
        "post-processed",  # CAD marks, contrast subtraction and the like, where the source wants plain images
        "roi-mask",
        "specimen",
        "spot",  # spot compression and magnification
        "tomosynthesis",
    }
)

# What a picture was rendered by where the header's own grayscale transformation cannot be used, or shows nothing of it.
FALLBACKS = {
    "modality": "the stored values: their modality LUT or rescale cannot be used",
    "function": "a linear window: VOILUTFunction is empty or unknown",
    "lut-bits": "a VOI LUT of other bits than its LUTDescriptor says: those that its entries fill",
    "next": "a later VOI LUT or window: those before it cannot be used",
    "stretch": "a stretch to their own darkest and brightest: no VOI LUT and no window can be used",
}

# What the table says of an image against its header or its pixels.
CONFLICTS = {
    "laterality": "table and header disagree about the laterality; the table counts",
    "view": "table and header disagree about the view; the table counts",
    "box": "the box of a finding lies outside of the image; the finding is stored without it",
}

Box = tuple[float, float, float, float]


class ShardError(ValueError):
    """A user's mistake or a damaged file, told in one line: what, where, and how to mend it."""


class FetchError(ShardError):
    """A shard that could not be brought here; it may be well where it is."""


class Refused(ShardError):
    """One image that does not go into a shard: `reason` is a short code for `refused.jsonl`, the text for a person."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Finding:
    """One lesion as seen in one image.

    `number` is shared by the views of a breast that show the same lesion. `box` is (x0, y0, x1, y1)
    in pixels of the image that the finding hangs on: the original image in a `SourceView`, the
    stored image in a `View`. Descriptors use the words of the ACR BI-RADS lexicon in lower case.
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
    """What is known of the breast in this image; `None` where the archive does not say."""

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
    """One image file of an archive. Laterality and view may be left to the file's own header.

    An image that the tables tell to leave out is yielded all the same, with `refused` = (reason, message):
    so the counts of a build add up to the archive. The reasons in `EXCLUDED` do not count as bad images.
    """

    path: Path
    laterality: str | None = None
    view: str | None = None
    labels: Labels = Labels()
    findings: tuple[Finding, ...] = ()
    report: str | None = None  # a radiologist's own words about this image
    refused: tuple[str, str] | None = None


@dataclass(frozen=True)
class SourceStudy:
    """One exam as a source yields it, with the archive's own identifiers: they never reach a shard."""

    patient_id: str
    study_id: str
    views: tuple[SourceView, ...]
    age: int | None = None  # years
    race: str | None = None
    ethnicity: str | None = None
    reason: str | None = None  # screening | diagnostic


@dataclass(frozen=True)
class View:
    """One stored image.

    Sizes are (height, width) in pixels, `crop` is (x0, y0, x1, y1) in original pixels, and
    `to_original` is the row-major 2 x 3 affine that takes stored (x, y) to original (x, y).
    """

    member: str  # the tar member without the key, e.g. "0.jpg"
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
    vendor: str | None = None  # a name in shards.image.header.VENDORS; None where there is no DICOM header
    instance: str | None = None  # keyed hash of the SOP Instance UID: tells the same image in two places
    processed: bool = (
        False  # a raw image that was rendered here, see shards.image.for_processing; only then in the JSON
    )
    conflicts: tuple[str, ...] = ()  # words of CONFLICTS
    fallbacks: tuple[str, ...] = ()  # words of FALLBACKS; written only where there are some


@dataclass(frozen=True)
class Study:
    """One sample of a shard. `key` and `patient` are keyed hashes, never the archive's identifiers."""

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
        """The `<key>.json` member: UTF-8, sorted keys, so that equal studies are equal bytes."""
        document = {"schema": SCHEMA_VERSION, **asdict(self)}
        for view in document["views"]:
            if not view["processed"]:
                del view["processed"]
            if not view["fallbacks"]:
                del view["fallbacks"]
        return json.dumps(document, sort_keys=True, ensure_ascii=False).encode()

    @staticmethod
    def from_json(data: bytes) -> Study:
        """Inverse of `to_json`; raises `ShardError` for another schema version."""
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

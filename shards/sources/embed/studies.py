"""EMBED, the Emory Breast Imaging Dataset (Jeong et al., Radiology: Artificial Intelligence 5:e220047, 2023).

The open fifth of it, with tables and images as github.com/Emory-HITI/EMBED_Open_Data documents them. Its licence
forbids passing on models, weights or embeddings that were trained on it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from shards.schema import VIEWS, ShardError, SourceStudy, SourceView
from shards.sources.embed.codes import Breast, breast_of
from shards.sources.embed.regions import Orientation, regions_of
from shards.sources.embed.tables import IDENTIFIERS, PREFIXES, clinical_rows, image_rows, log_regions, log_unmatched
from shards.sources.tables import groups, rows

PLAIN = "2d"
TYPES = {  # FinalImageType in small letters without "-" -> why such an image is left out
    "cview": ("2d-synthetic", "a C-view, computed from tomosynthesis"),
    "3d": ("tomosynthesis", "a tomosynthesis volume"),
    "roi_ss": ("post-processed", "a screenshot with a radiologist's marks"),
    "roi_ssc": ("post-processed", "a screenshot with a radiologist's marks"),
}
NOT_STATED = re.compile(r"unknown|unavailable|unreported|not recorded|declines?\b", re.IGNORECASE)


def embed(
    root: Path, images: str = "images", prefix: str | None = None, roi_orientation: Orientation = "png"
) -> Iterator[SourceStudy]:
    """Yields the exams of EMBED (`acc_anon`), sorted by patient (`empi_anon`) and exam.

    `root` or `root/tables` holds EMBED_OpenData_clinical and _metadata, .csv or _reduced.csv; the full ones go first,
    because the reduced ones lack what boxes need. The files lie in `root/images`, which replaces the leading part of
    `anon_dicom_path`: one of `PREFIXES`, or `prefix` where that is given. A row of the clinical table is one finding,
    and a negative breast beside a positive one has no row.

    BI-RADS of an image comes from the first of these that states one:
    1. the clinical rows of the image's side; 2. those of both sides or none; 3. all rows of the exam.
    Of several the highest counts, but 0 (additional evaluation) where the highest is 1 or 2. X is none. Density
    (`tissueden`) comes from the same levels; None where the rows of the level disagree, and for a man.

    Cancer and pathology come from `path_severity` alone; a negative reading proves nothing, and the result may be
    noted with a later exam only, which is not searched. A specimen is of the breast on which `side` and `bside`
    agree, where one does not say of the other; if both do not, or contradict, it belongs to no breast. The first
    that holds:
    1. malignant: a specimen of this breast has severity 0 or 1;
    2. not known: there is none of this breast, one is a cancer from elsewhere (6), or one of no breast is a cancer;
    3. normal: all have severity 5; 4. benign: the others (2 high-risk, 3 borderline, 4 benign).

    Findings are the rows of the image's side, of both sides or of none that say what kind of lesion they are, and
    hang on every view of that breast: the table does not say in which view a lesion was seen. A region of interest
    becomes the box of a finding only where the image has one region and the breast one lesion; otherwise nobody
    knows which is which, and the findings stay without boxes. `match_level` is not looked at. Boxes need the full
    metadata table, unless `roi_orientation` is "dicom": see `embed_regions`.

    Race is RACE_DESC, else ETHNICITY_DESC, which holds races in the open release. The reason is screening or
    diagnostic where `desc` says one of them. An exam without clinical rows has images without labels.

    An image is refused or left out for the first of these that holds:
    1. identifier: patient or exam is empty or has lost digits; 2. path: another prefix, or none;
    3. duplicate: a row before it has the same file; 4. 2d-synthetic, tomosynthesis, post-processed, by
    `FinalImageType`; 5. spot: `spot_mag`; 6. other-view; 7. laterality: neither L nor R, so that no label can be
    joined; 8. label: a code of BI-RADS, density, severity or image type that the data set does not document.
    """
    if roi_orientation not in ("png", "dicom"):
        raise ShardError(f"pack.options.roi_orientation: {roi_orientation!r} is neither png nor dicom")
    clinical, files = clinical_rows(root), image_rows(root, (prefix,) if prefix else PREFIXES)
    exams = {_key(exam[0]): exam for exam in groups(clinical, IDENTIFIERS)}
    log_unmatched(clinical, files)
    nameless = files["patient"].isna() | files["study"].isna()
    boxed = 0
    for images_of_exam in groups(files[~nameless], IDENTIFIERS):
        study = _study(images_of_exam, exams, root / images, roi_orientation)
        boxed += sum(any(finding.box for finding in view.findings) for view in study.views)
        yield study
    if nameless.any():
        yield _nameless(files[nameless], root / images)
    log_regions(files, boxed)


def _study(files: Sequence[Any], exams: Mapping[Any, Any], folder: Path, orientation: Orientation) -> SourceStudy:
    exam = exams.get(_key(files[0]), ())
    breasts = {side: breast_of(exam, side) for side in {row.side for row in files} & {"L", "R"}}
    views = tuple(_view(row, breasts, folder, orientation) for row in files)
    return SourceStudy(*_key(files[0]), views, **_facts(exam))


def _key(row: Any) -> tuple[str, str]:
    return row.patient, row.study


def _view(row: Any, breasts: Mapping[str, Breast], folder: Path, orientation: Orientation) -> SourceView:
    refused = _refused(row) or breasts[row.side].refused
    if refused:
        return SourceView(_path(row, folder), refused=refused)
    breast, findings = breasts[row.side], breasts[row.side].findings
    boxes = regions_of(row, orientation) if breast.single else None
    if boxes and len(boxes) == 1:
        findings = (replace(findings[0], box=boxes[0]),)
    return SourceView(_path(row, folder), row.side, row.view, breast.labels, findings)


def _path(row: Any, folder: Path) -> Path:
    return folder / (row.inside or f"metadata row {row.row}")


def _refused(row: Any) -> tuple[str, str] | None:
    """Why the row of the metadata table alone forbids the image; the order is told in `embed`."""
    if row.inside is None:
        return "path", f"anon_dicom_path: {(row.file or '')[:80]!r} starts with no known prefix; give options.prefix"
    if row.again:
        return "duplicate", "anon_dicom_path: a row before this one has the same file"
    if row.type in TYPES:
        return TYPES[row.type]
    if row.spot not in (None, "0"):
        return "spot", f"spot_mag: {row.spot!r}, a spot compression or magnification view"
    if row.view is not None and row.view not in VIEWS:
        return "other-view", f"ViewPosition: {row.view!r} is not one of {', '.join(VIEWS)}"
    if row.side not in ("L", "R"):
        return "laterality", f"ImageLateralityFinal: {row.side!r} is neither L nor R"
    if row.type not in (None, PLAIN):
        return "label", f"FinalImageType: {row.type!r} is not known"
    return None


def _facts(exam: Sequence[Any]) -> dict[str, Any]:
    """Of the patient and the exam; they are repeated in its rows, and the first row that says something counts."""

    def first(column: str, read: Callable[[str | None], Any]) -> Any:
        return next((told for row in exam if (told := read(getattr(row, column))) is not None), None)

    return {
        "age": first("age", _age),
        "race": first("race", _words) or first("origin", _words),
        "ethnicity": first("ethnicity", _words),
        "reason": first("desc", _reason),
    }


def _words(text: str | None) -> str | None:
    return None if text is None or NOT_STATED.search(text) else " ".join(text.split())


def _reason(text: str | None) -> str | None:
    told = (text or "").lower()
    reasons = [reason for reason, word in (("screening", "screen"), ("diagnostic", "diag")) if word in told]
    return reasons[0] if len(reasons) == 1 else None


def _age(text: str | None) -> int | None:
    found = re.fullmatch(r"(\d{1,3})(?:\.\d*)?", text or "")
    return int(found[1]) if found and 0 < int(found[1]) <= 130 else None


def _nameless(files: pd.DataFrame, folder: Path) -> SourceStudy:
    """One study, of which nothing will be left, for the images that belong to no patient or exam."""
    message = "empi_anon or acc_anon: is empty or has lost digits, as 4.9E+15 has; export them as text"
    views = (SourceView(_path(row, folder), refused=("identifier", message)) for row in rows(files))
    return SourceStudy("", "", tuple(views))

"""EMBED, the Emory Breast Imaging Dataset (Jeong et al., Radiology: Artificial Intelligence 5:e220047, 2023).

The open 20 %, with tables and images as documented in github.com/Emory-HITI/EMBED_Open_Data. The licence forbids
sharing models, weights or embeddings trained on it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from shards.errors import ShardError
from shards.schema import VIEWS, SourceStudy, SourceView
from shards.sources.common import agreed, unidentified
from shards.sources.embed.codes import Breast, breast_of
from shards.sources.embed.regions import Orientation, regions_of
from shards.sources.embed.tables import IDENTIFIERS, PREFIXES, clinical_rows, image_rows, log_regions, log_unmatched
from shards.sources.tables import groups, rows

PLAIN = "2d"
TYPES = {  # FinalImageType in lower case without "-" -> the reason to leave such an image out
    "cview": ("2d-synthetic", "a C-view, computed from tomosynthesis"),
    "3d": ("tomosynthesis", "a tomosynthesis volume"),
    "roi_ss": ("post-processed", "a screenshot with a radiologist's marks"),
    "roi_ssc": ("post-processed", "a screenshot with a radiologist's marks"),
}
NOT_STATED = re.compile(r"unknown|unavailable|unreported|not recorded|declines?\b", re.IGNORECASE)


def embed(
    root: Path, images: str = "images", prefix: str | None = None, roi_orientation: Orientation = "png"
) -> Iterator[SourceStudy]:
    """Yield one study per exam (`acc_anon`), sorted by patient (`empi_anon`) and exam.

    Files. `<root>` or its folder tables holds EMBED_OpenData_clinical and EMBED_OpenData_metadata, as .csv or
    _reduced.csv; the full tables win, because the reduced ones lack columns that boxes need. The image folder
    `<root>/images` replaces the prefix of `anon_dicom_path`: one of `PREFIXES`, or the option `prefix`.

    Labels.
    - A row of the clinical table is one finding; a negative breast beside a positive one has no row. The rows of an
      image are, in this order of precedence: those of its side; those of both sides or none; all rows of the exam.
    - BI-RADS: the highest category of the first level that has one, but 0 (additional imaging) if one is 0 and none is
      above 2. X is none.
    - Density (`tissueden`): by the same levels; None if the rows of the level disagree, and for a man.
    - Cancer and pathology: from `path_severity` alone. A negative assessment proves nothing, and a result that is only
      recorded with a later exam is not searched. A specimen belongs to the breast on which `side` and `bside` agree;
      one of them may be missing. If both are, or if they contradict, it belongs to no breast. In this order: malignant
      if a specimen of the breast has severity 0 or 1; unknown if it has no specimen, if one is a cancer from elsewhere
      (6), or if one of no breast is a cancer; normal if all have severity 5; else benign (2 high-risk, 3 borderline, 4
      benign).
    - Findings: the rows of the image's side, of both sides or of none that state a kind of lesion, on every view of the
      breast: the table does not link them to views. A region of interest is the box of a finding only if the image has
      one region and the breast one lesion. `match_level` is not used. Boxes need the full metadata table, unless
      `roi_orientation` is "dicom": see `regions_of`.
    - Race is RACE_DESC, else ETHNICITY_DESC, which has races in the open release. The reason is screening or diagnostic
      if `desc` has one of these words. The images of an exam without clinical rows have no labels.
    - Implants: a row of the image's side, of both sides or of none with an implant finding (`implanfind`) says that
      there is one. Without such a row the DICOM header decides.

    Refused or left out, by the first that applies:
    1. identifier: patient or exam is empty or has lost digits; 2. path: an unknown prefix, or none;
    3. duplicate: an earlier row has the same file; 4. 2d-synthetic, tomosynthesis, post-processed, by `FinalImageType`;
    5. spot: `spot_mag`; 6. other-view; 7. laterality: neither L nor R, so that no label can be joined;
    8. label: an undocumented code of BI-RADS, density, severity or image type.
    Raises `ShardError` for a wrong `roi_orientation`, and if a table or one of its columns is missing.
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
    yield from unidentified(_without_identifier(row, root / images) for row in rows(files[nameless]))
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
    return SourceView(_path(row, folder), row.side, row.view, breast.labels, findings, implant=breast.implant)


def _path(row: Any, folder: Path) -> Path:
    return folder / (row.inside or f"metadata row {row.row}")


def _refused(row: Any) -> tuple[str, str] | None:
    """The first reason in the metadata row to refuse the image; `embed` documents the order."""
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
    """Age, race, ethnicity and reason, each from the first row of the exam that states it."""

    def first(column: str, read: Callable[[str | None], Any]) -> Any:
        return next((value for row in exam if (value := read(getattr(row, column))) is not None), None)

    return {
        "age": first("age", _age),
        "race": first("race", _words) or first("origin", _words),
        "ethnicity": first("ethnicity", _words),
        "reason": first("desc", _reason),
    }


def _words(text: str | None) -> str | None:
    return None if text is None or NOT_STATED.search(text) else " ".join(text.split())


def _reason(text: str | None) -> str | None:
    lower = (text or "").lower()
    return agreed(reason for reason, word in (("screening", "screen"), ("diagnostic", "diag")) if word in lower)


def _age(text: str | None) -> int | None:
    years = re.fullmatch(r"(\d{1,3})(?:\.\d*)?", text or "")
    return int(years[1]) if years and 0 < int(years[1]) <= 130 else None


def _without_identifier(row: Any, folder: Path) -> SourceView:
    message = "empi_anon or acc_anon: is empty or has lost digits, as 4.9E+15 has; export them as text"
    return SourceView(_path(row, folder), refused=("identifier", message))

"""The two tables of EMBED as text: the wanted columns, whole numbers without point, paths below the image folder."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence, Set
from pathlib import Path
from typing import Any

import pandas as pd

from shards.errors import ShardError
from shards.sources.embed.codes import CODES
from shards.sources.tables import blank_unknown, read_table

log = logging.getLogger(__name__)

# Prefixes of `anon_dicom_path` in the releases of the tables; the image folder replaces them.
PREFIXES = ("/mnt/NAS2/mammo/anon_dicom", "/mnt/NAS3/mammo/anon_dicom", "./images", "images")
IDENTIFIERS = ["patient", "study"]
CLINICAL = {
    "empi_anon": "patient",
    "acc_anon": "study",
    **{name: name for name in CODES},
    "numfind": "numfind",
    "calcnumber": "calcnumber",
    "desc": "desc",
    "age_at_study": "age",
    "RACE_DESC": "race",
    "ETHNICITY_DESC": "origin",
    "ETHNIC_GROUP_DESC": "ethnicity",
}
FILES = {
    "empi_anon": "patient",
    "acc_anon": "study",
    "anon_dicom_path": "file",
    "FinalImageType": "type",
    "ImageLateralityFinal": "side",
    "ViewPosition": "view",
    "spot_mag": "spot",
    "num_roi": "regions_counted",
    "ROI_coords": "regions",
    "DCM_ROI_coords": "dicom_regions",
    "PatientOrientation": "orientation",
    "Rows": "height",
    "Columns": "width",
}
OPTIONAL = ("bside", "calcnumber", "implanfind", "age", "race", "origin", "ethnicity")
OPTIONAL_OF_FILES = ("regions_counted", "regions", "dicom_regions", "orientation", "height", "width")
# Columns of whole numbers: pandas writes 1.0 if the column has empty cells.
WHOLE = {*IDENTIFIERS, "tissueden", "path_severity", "numfind", "calcnumber"}
WHOLE_OF_FILES = {*IDENTIFIERS, "spot", "regions_counted", "height", "width"}
ROUNDED = re.compile(r"\d(?:\.\d+)?[eE]\+\d+")  # a spreadsheet has dropped the last digits of this number


def clinical_rows(root: Path) -> pd.DataFrame:
    """The clinical table, one row per finding, without rows that lack patient or exam. Logs undocumented codes."""
    table = _read(root, "clinical", CLINICAL, OPTIONAL, WHOLE)
    for column, codes in CODES.items():
        unknown = table.loc[table[column].notna() & ~table[column].isin(list(codes)), column]
        if len(unknown):
            examples = ", ".join(sorted(unknown.unique())[:5])
            log.warning("EMBED: column %s: %d rows have undocumented codes: %s", column, len(unknown), examples)
    named = table.dropna(subset=IDENTIFIERS)
    if len(named) < len(table):
        log.warning("EMBED: %d clinical rows without patient or exam are left out", len(table) - len(named))
    return named


def image_rows(root: Path, prefixes: Sequence[str]) -> pd.DataFrame:
    """The metadata table, one row per file: `inside` is its path below the image folder, `again` marks repetitions."""
    table = _read(root, "metadata", FILES, OPTIONAL_OF_FILES, WHOLE_OF_FILES)
    table["row"] = (table.index + 2).astype(str)
    table["inside"] = _each(table["file"], lambda text: _inside(text, prefixes))
    table["again"] = table["inside"].notna() & table["inside"].duplicated()
    table["type"] = _each(table["type"], lambda text: text.lower().replace("-", ""))
    table["view"] = _each(table["view"], str.upper)
    return table


def _read(root: Path, kind: str, columns: dict[str, str], optional: Sequence[str], whole: Set[str]) -> pd.DataFrame:
    names = [f"EMBED_OpenData_{kind}{suffix}.csv" for suffix in ("", "_reduced")]
    paths = [folder / name for name in names for folder in (root / "tables", root)]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise ShardError(f"pack.root: {root} holds neither {names[0]} nor {names[1]}, nor does its folder tables")
    table = blank_unknown(read_table(path, columns, optional), CODES)
    for column in whole:
        table[column] = _each(table[column], lambda text: text.removesuffix(".0"))
    for column in IDENTIFIERS:
        table[column] = _each(table[column], lambda text: None if ROUNDED.fullmatch(text) else text)
    return table


def _each(column: pd.Series[Any], change: Callable[[str], str | None]) -> pd.Series[Any]:
    return column.map(change, na_action="ignore").astype(object)


def _inside(text: str, prefixes: Sequence[str]) -> str | None:
    """The path below the image folder; None if it has no known prefix."""
    for prefix in prefixes:
        start = prefix.rstrip("/") + "/"
        if text.startswith(start) and len(text) > len(start):
            return text[len(start) :]
    return None


def log_unmatched(clinical: pd.DataFrame, files: pd.DataFrame) -> None:
    """Log how many rows of each table have no exam in the other."""
    keys = [pd.MultiIndex.from_frame(table[IDENTIFIERS].dropna().astype(str)) for table in (clinical, files)]
    for number, what in (
        ((~keys[1].isin(keys[0])).sum(), "images belong to exams without clinical rows: they have no labels"),
        ((~keys[0].isin(keys[1])).sum(), "clinical rows belong to exams without images"),
    ):
        if number:
            log.warning("EMBED: %d %s", number, what)


def log_regions(files: pd.DataFrame, boxed: int) -> None:
    """Log how many images have regions, and on how many of them (`boxed`) a finding got a box."""
    regions = files["dicom_regions"].where(files["dicom_regions"].notna(), files["regions"])
    marked = int((regions.notna() & _each(regions, lambda text: text.strip("[](), ")).astype(bool)).sum())
    if marked:
        log.info("EMBED: %d images have regions of interest; on %d of them a finding has a box", marked, boxed)

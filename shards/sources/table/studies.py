"""Any archive with one table: the configuration names its columns, its files are DICOM or another kind of image.

configs/table.yaml is a recipe to copy; shards/sources/table/cell_words.py lists the spellings that are understood.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from shards.schema import Refused, ShardError, SourceStudy, SourceView
from shards.sources.table.cell_words import READERS, plain, read_cell, whole
from shards.sources.table.options import FINDING_FACTS, IDENTIFIERS, column_names, own_spellings
from shards.sources.table.rows import CONTROL, study_of
from shards.sources.tables import groups, read_table, rows
from shards.spellings import UNKNOWN, read_view

AS_WRITTEN = (*IDENTIFIERS, "report", "race", "ethnicity")  # patient 1,5 is not patient 1.5

# How spreadsheets and data frames write a number whose last digits they have dropped.
ROUNDED = re.compile(r"\d(\.\d+)?[eE]\+\d+")


def table(
    root: Path,
    file: str = "",
    columns: Mapping[str, str | None] | None = None,
    values: Mapping[str, Mapping[Any, Any]] | None = None,
    separator: str | None = None,
) -> Iterator[SourceStudy]:
    """Yields the studies of `<root>/<file>` (CSV, Parquet or Excel), sorted by patient and study.

    What separates the cells of a CSV file is found in its header, where `separator` does not say it.

    `columns` names the column of each field in `table_options.FIELDS` that the table has: patient and
    image at least. Without `study` each patient is one study; laterality and view may be left to DICOM
    headers, and a view such as LCC tells both. `values` (field -> cell -> meaning) adds to the spellings that are
    understood; two that are one cell (1 and 1.0, Yes and yes) must not have different meanings.

    There is one row per image, or several: each is then one of its findings, boxes in pixels of the
    original image, by two corners or by the upper left one with width and height. An empty cell agrees
    with the other rows of its image. A finding without `number` gets one of its own within the study, so
    that no two views are said to show the same lesion; a box that stands twice is one finding. `cancer`
    follows from `pathology` where that is stated. A patient or study 12.0 is 12, but leading zeros count.
    Reports are stored as they are, but for the ends of their lines: the user must have de-identified them.

    An image is refused for the first of these that holds:
    1. identifier: patient, study or image is empty, or a number such as 1.2E+15 that lost its last digits;
    2. outside: its path leads out of `root` (backslashes separate folders, too) or holds control characters;
    3. duplicate: a study before this one has the same file;
    4. label: a cell is not understood, or a finding lacks its kind or has no proper box;
    5. label-conflict: rows disagree about the image or the study, cancer about pathology, laterality about the side
    in the view.
    A view that is not understood is taken for another one than CC and MLO, and its image left out as such.
    Raises `ShardError` for a mistake in the options and for a table that cannot be read.
    """
    names = column_names(columns)
    spellings = own_spellings(values, names)
    if not root.is_dir():
        raise ShardError(f"pack.root: {root} is no folder")
    if not file:
        raise ShardError("pack.options.file: is empty; name the table, relative to root")
    if not (root / file).is_file():
        raise ShardError(f"pack.options.file: {root / file} is not there; the file is looked for in pack.root")
    cells = _cells(root, file, names, separator)
    _identify(cells, names, root)
    named = cells[list(IDENTIFIERS)].notna().all(axis=1)
    nameless, cells = cells[~named], cells[named].copy()
    apart = "view" in names and names["view"] != names.get("laterality")
    sides = _sides_of_views(cells, spellings.get("view", {})) if apart else None
    for field in [field for field in READERS if field in names]:
        _convert(cells, field, partial(_fact, field, names[field], spellings.get(field, {})))
    if sides is not None and sides.notna().any():
        names = _with_sides(cells, sides, names)
    cells["described"] = cells[[field for field in FINDING_FACTS if field in names]].notna().any(axis=1)
    owners: dict[str, int] = {}
    for study in groups(cells, ["patient", "study"]):
        yield study_of(study, root, names, owners)
    if len(nameless):
        yield _nameless(root, file, nameless, names)


def _cells(root: Path, file: str, names: Mapping[str, str], separator: str | None) -> pd.DataFrame:
    """The texts of the table by field, with the row's number and a place for its refusal; no wholly empty rows."""
    as_written = {name for field, name in names.items() if field in AS_WRITTEN}
    texts = read_table(root / file, {name: name for name in names.values()}, (), separator, as_written)
    texts = texts.dropna(how="all")
    # One column may serve two fields: "RCC" tells laterality and view.
    cells = pd.DataFrame({field: texts[name] for field, name in names.items()})
    cells["row"] = cells.index + 2  # as a spreadsheet counts: its first row is the header
    cells["refused"] = None
    return cells


def _identify(cells: pd.DataFrame, names: Mapping[str, str], root: Path) -> None:
    """Make `image` a path below the root; patient and study one text each; all of them None where not stated."""
    inside = os.path.join(os.path.abspath(root), "")
    _convert(cells, "image", partial(_relative, inside))
    for field in [field for field in ("patient", "study") if field in names]:
        _convert(cells, field, partial(_identifier, names[field]))
        if cells[field].isna().any():
            of_image = cells.groupby("image", sort=False)[field].transform("first")
            cells[field] = cells[field].where(cells[field].notna(), of_image)
    if "study" not in names:
        cells["study"] = cells["patient"]


def _convert(cells: pd.DataFrame, field: str, read: Callable[[str], Any]) -> None:
    """Put what `read` makes of each text in its place, once per different text; a row keeps its first refusal."""
    codes, texts = pd.factorize(cells[field])  # an empty cell has the code -1: the last place of the lists below
    values: list[Any] = [None] * (len(texts) + 1)
    refused: list[tuple[str, str] | None] = [None] * (len(texts) + 1)
    for place, text in enumerate(texts.tolist()):
        try:
            values[place] = read(text)
        except Refused as error:
            refused[place] = (error.reason, str(error))
    cells[field] = pd.Series([values[code] for code in codes], index=cells.index, dtype="object")
    if any(refused):
        cells["refused"] = [known or refused[code] for known, code in zip(cells["refused"], codes, strict=True)]


def _identifier(name: str, text: str) -> str | None:
    if ROUNDED.fullmatch(text):
        raise Refused("identifier", f"column {name}: {text!r} has lost its last digits; export the column as text")
    return None if text.casefold() in UNKNOWN else whole(text)


def _relative(inside: str, text: str) -> str | None:
    """The path below the folder `inside` in its shortest form; what leads out of it keeps its "/" or ".."."""
    if text.casefold() in UNKNOWN:
        return None
    if CONTROL.search(text):
        return text
    text = text.replace("\\", "/")
    path = os.path.normpath(os.path.join(inside, text))
    return path.removeprefix(inside) if path.startswith(inside) else os.path.normpath(text)


def _fact(field: str, name: str, spellings: Mapping[str, str], text: str) -> Any:
    try:
        return read_cell(field, text, spellings)
    except ValueError:
        if field == "view" and re.search(r"[^\W\d_]", text):
            return plain(text)
        message = f"column {name}: {text[:40]!r} is not understood; map it in pack.options.values.{field}"
        raise Refused("label", message) from None


def _sides_of_views(cells: pd.DataFrame, spellings: Mapping[str, str]) -> pd.Series[Any]:
    """L or R for each cell of the view that names a side too, as LCC does."""

    def side(text: str) -> str | None:
        try:
            return read_view(spellings.get(plain(text), text))[0]
        except ValueError:
            return None

    return cells["view"].map({text: side(text) for text in cells["view"].dropna().unique()})


def _with_sides(cells: pd.DataFrame, sides: pd.Series[Any], names: Mapping[str, str]) -> dict[str, str]:
    """Fill laterality where only the view tells it, refuse where the two differ; returns `names` with laterality."""
    if "laterality" not in names:
        cells["laterality"] = sides.where(sides.notna(), None)
        return {**names, "laterality": names["view"]}
    told = cells["laterality"]
    differ = told.notna() & sides.notna() & (told != sides)
    conflict = ("label-conflict", f"columns {names['laterality']} and {names['view']}: name different sides")
    cells["refused"] = [
        known or (conflict if bad else None) for known, bad in zip(cells["refused"], differ, strict=True)
    ]
    filled = told.where(told.notna(), sides)
    cells["laterality"] = filled.where(filled.notna(), None)
    return dict(names)


def _nameless(root: Path, file: str, cells: pd.DataFrame, names: Mapping[str, str]) -> SourceStudy:
    """One study, of which nothing will be left, for the rows that belong to no patient, study or image."""
    views: dict[Path, SourceView] = {}
    row: Any
    for row in rows(cells):
        path = root / (row.image or f"{file} row {row.row}")
        empty = next(name for name in IDENTIFIERS if getattr(row, name) is None)
        refused = row.refused or ("identifier", f"column {names[empty]}: is empty in row {row.row}")
        views.setdefault(path, SourceView(path, refused=refused))
    return SourceStudy("", "", tuple(views.values()))

"""Any archive with one label table: the config names its columns; its files are DICOM or other images.

configs/table.yaml is a recipe to copy; shards/sources/table/cell_words.py lists the known spellings.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from shards.errors import Refused, ShardError
from shards.schema import SourceStudy, SourceView
from shards.sources.common import unidentified
from shards.sources.table.cell_words import READERS, plain, read_cell, whole
from shards.sources.table.options import FINDING_FACTS, IDENTIFIERS, column_names, own_spellings
from shards.sources.table.rows import CONTROL, study_of
from shards.sources.tables import groups, read_table, rows
from shards.spellings import UNKNOWN, is_implant_displaced, read_view

AS_WRITTEN = (*IDENTIFIERS, "report", "race", "ethnicity")  # patient 1,5 is not patient 1.5

# A number whose last digits a spreadsheet or data frame has dropped.
ROUNDED = re.compile(r"\d(\.\d+)?[eE]\+\d+")


def table(
    root: Path,
    file: str = "",
    columns: Mapping[str, str | None] | None = None,
    values: Mapping[str, Mapping[Any, Any]] | None = None,
    separator: str | None = None,
) -> Iterator[SourceStudy]:
    """Yield the studies of a table, sorted by patient and study.

    Files. `<root>/<file>` is CSV, Parquet or Excel; without `separator`, that of a CSV file is found in its header.
    `columns` names the column of each field in `options.FIELDS` that the table has: at least patient, and image, a path
    below `root`. Without `study`, each patient is one study. Laterality and view may be read from DICOM headers; a view
    such as LCC states both. `values` (field -> cell -> meaning) adds to the known spellings; two spellings of the
    same cell (1 and 1.0, Yes and yes) must not differ in meaning. A patient or study 12.0 is 12; leading zeros count.

    Labels.
    - There is one row per image, or one per finding. An empty cell agrees with the other rows of its image.
    - Boxes are in pixels of the original image: two corners, or the upper left one with width and height. A box that
      occurs twice is one finding. A finding without `number` gets one of its own in the study, so that no two views
      are taken to show the same lesion.
    - `cancer` follows from `pathology`, if that is stated. A view such as MLO-ID (implant displaced) states an implant;
      where neither it nor `implant` does, the DICOM header decides.
    - Reports are stored unchanged but for line ends: the user must have de-identified them.

    Refused, by the first that applies:
    1. identifier: patient, study or image is empty, or is a number such as 1.2E+15 that has lost its last digits;
    2. outside: the path leads out of `root` (backslashes also separate folders) or has control characters;
    3. duplicate: an earlier study has the same file;
    4. label: a cell is unknown, or a finding lacks its kind or has no proper box;
    5. label-conflict: rows of the image or study differ, cancer contradicts pathology, laterality the view's side, or
    implant an implant-displaced view.
    An unknown view counts as other than CC and MLO, and its image is left out.
    Raises `ShardError` for wrong options and for a table that cannot be read.
    """
    names = column_names(columns)
    spellings = own_spellings(values, names)
    if not root.is_dir():
        raise ShardError(f"pack.root: {root} is no folder")
    if not file:
        raise ShardError("pack.options.file: is empty; name the table, relative to root")
    if not (root / file).is_file():
        raise ShardError(f"pack.options.file: {root / file} does not exist; name a file relative to pack.root")
    cells = _cells(root, file, names, separator)
    _identify(cells, names, root)
    named = cells[list(IDENTIFIERS)].notna().all(axis=1)
    nameless, cells = cells[~named], cells[named].copy()
    apart = "view" in names and names["view"] != names.get("laterality")
    of_views = partial(_of_views, cells, spellings.get("view", {}))
    sides = of_views(_side) if apart else None
    cells["displaced"] = of_views(is_implant_displaced) if "view" in names else None
    for field in [field for field in READERS if field in names]:
        _convert(cells, field, partial(_fact, field, names[field], spellings.get(field, {})))
    if sides is not None and sides.notna().any():
        names = _with_sides(cells, sides, names)
    cells["described"] = cells[[field for field in FINDING_FACTS if field in names]].notna().any(axis=1)
    owners: dict[str, int] = {}
    for study in groups(cells, ["patient", "study"]):
        yield study_of(study, root, names, owners)
    yield from unidentified(_without_identifier(root, file, nameless, names))


def _cells(root: Path, file: str, names: Mapping[str, str], separator: str | None) -> pd.DataFrame:
    """The texts of the table by field, with the row's number and an empty refusal; without empty rows."""
    as_written = {name for field, name in names.items() if field in AS_WRITTEN}
    texts = read_table(root / file, {name: name for name in names.values()}, (), separator, as_written)
    texts = texts.dropna(how="all")
    # One column may serve two fields: "RCC" states laterality and view.
    cells = pd.DataFrame({field: texts[name] for field, name in names.items()})
    cells["row"] = cells.index + 2  # as a spreadsheet counts: its first row is the header
    cells["refused"] = None
    return cells


def _identify(cells: pd.DataFrame, names: Mapping[str, str], root: Path) -> None:
    """Make `image` a path below the root, and patient and study texts; None if not stated."""
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
    """Replace each text by its value: `read` is called once per distinct text. A row keeps its first refusal."""
    codes, texts = pd.factorize(cells[field])  # an empty cell has the code -1: the last place of the lists below
    values: list[Any] = [None] * (len(texts) + 1)
    refused: list[tuple[str, str] | None] = [None] * (len(texts) + 1)
    for place, text in enumerate(texts.tolist()):
        try:
            values[place] = read(text)
        except Refused as error:
            refused[place] = error.pair
    cells[field] = pd.Series([values[code] for code in codes], index=cells.index, dtype="object")
    if any(refused):
        cells["refused"] = [known or refused[code] for known, code in zip(cells["refused"], codes, strict=True)]


def _identifier(name: str, text: str) -> str | None:
    if ROUNDED.fullmatch(text):
        raise Refused("identifier", f"column {name}: {text!r} has lost its last digits; export the column as text")
    return None if text.casefold() in UNKNOWN else whole(text)


def _relative(inside: str, text: str) -> str | None:
    """The normalised path below the folder `inside`; one that leads out of it keeps its "/" or ".."."""
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


def _of_views(cells: pd.DataFrame, spellings: Mapping[str, str], read: Callable[[str], Any]) -> pd.Series[Any]:
    """What `read` finds in the text of each view, besides the view."""
    meant = {text: spellings.get(plain(text), text) for text in cells["view"].dropna().unique()}
    return cells["view"].map({text: read(spelling) for text, spelling in meant.items()})


def _side(text: str) -> str | None:
    """L or R for a view that also names a side, as LCC does."""
    try:
        return read_view(text)[0]
    except ValueError:
        return None


def _with_sides(cells: pd.DataFrame, sides: pd.Series[Any], names: Mapping[str, str]) -> dict[str, str]:
    """Fill laterality from the view's side, refuse rows in which the two differ; return `names` with laterality."""
    if "laterality" not in names:
        cells["laterality"] = sides.where(sides.notna(), None)
        return {**names, "laterality": names["view"]}
    stated = cells["laterality"]
    differ = stated.notna() & sides.notna() & (stated != sides)
    conflict = ("label-conflict", f"columns {names['laterality']} and {names['view']}: name different sides")
    cells["refused"] = [
        known or (conflict if bad else None) for known, bad in zip(cells["refused"], differ, strict=True)
    ]
    filled = stated.where(stated.notna(), sides)
    cells["laterality"] = filled.where(filled.notna(), None)
    return dict(names)


def _without_identifier(root: Path, file: str, cells: pd.DataFrame, names: Mapping[str, str]) -> Iterable[SourceView]:
    """One refused image for each image, or row without one, that lacks patient, study or image."""
    views: dict[Path, SourceView] = {}
    row: Any
    for row in rows(cells):
        path = root / (row.image or f"{file} row {row.row}")
        empty = next(name for name in IDENTIFIERS if getattr(row, name) is None)
        refused = row.refused or ("identifier", f"column {names[empty]}: is empty in row {row.row}")
        views.setdefault(path, SourceView(path, refused=refused))
    return views.values()

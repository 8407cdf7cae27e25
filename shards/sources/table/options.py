"""The options of the source `table`: the columns of its fields, and the user's own spellings."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from shards.errors import ShardError, did_you_mean
from shards.sources.table.cell_words import READERS, plain, read_cell

IDENTIFIERS = ("patient", "study", "image")
IMAGE_FACTS = ("laterality", "view", "birads", "density", "cancer", "pathology", "report", "implant")
STUDY_FACTS = ("age", "race", "ethnicity", "reason")
# A box is CORNER and one of the others.
CORNER, OPPOSITE, SIZE = ("x0", "y0"), ("x1", "y1"), ("box_width", "box_height")
DESCRIPTORS = {  # column -> attribute of a Finding
    "shape": "shape",
    "margin": "margin",
    "finding_density": "density",
    "calcification_type": "calcification_type",
    "distribution": "distribution",
    "finding_pathology": "pathology",
}
FINDING_FACTS = ("kind", *CORNER, *OPPOSITE, *SIZE, *DESCRIPTORS)
FIELDS = (*IDENTIFIERS, *IMAGE_FACTS, *STUDY_FACTS, *FINDING_FACTS, "number")


def column_names(columns: Any) -> dict[str, str]:
    """Field -> name of its column, for the fields that have one.

    Raises `ShardError` for an unknown or missing field, and for a name that is no text.
    """
    given = _mapping("columns", columns)
    for field in given:
        if field == "split":
            raise ShardError("pack.options.columns.split: there is no such field; name the column in pack.split")
        if field not in FIELDS:
            raise ShardError(f"pack.options.columns.{field}: there is no such field{_nearest(field, FIELDS)}")
        if isinstance(given[field], bool | float):
            raise ShardError(f"pack.options.columns.{field}: {given[field]} is no column name; write it in quotes")
    names = {field: str(name).strip() for field, name in given.items() if name is not None}
    box = box_fields(names)
    kind = ("kind",) if names.keys() & {"number", *FINDING_FACTS} else ()
    for field in ("patient", "image", *box, *kind):
        if field not in names:
            raise ShardError(f"pack.options.columns.{field}: is missing; name the column that holds it")
    return names


def box_fields(names: Collection[str]) -> tuple[str, ...]:
    """The four fields of a box, if one of them has a column. Raises `ShardError` for both corners and size."""
    given, size = set(names), set(names) & set(SIZE)
    if size and given & set(OPPOSITE):
        raise ShardError("pack.options.columns: a box is x0, y0, x1, y1 or x0, y0, box_width, box_height; take two out")
    return (*CORNER, *(SIZE if size else OPPOSITE)) if size or given & {*CORNER, *OPPOSITE} else ()


def own_spellings(values: Any, names: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Field -> plain text of a cell -> a known spelling. YAML's null is "", not stated. Raises `ShardError`."""
    given = _mapping("values", values)
    known = [field for field in READERS if field in names]
    for field in given:
        if field not in known:
            raise ShardError(f"pack.options.values.{field}: pack.options.columns lacks it{_nearest(field, known)}")
    return {field: _spellings(field, _mapping(f"values.{field}", words)) for field, words in given.items()}


def _spellings(field: str, words: Mapping[str, Any]) -> dict[str, str]:
    """Plain text of a cell -> spelling. Two spellings of the same cell must not differ in meaning."""
    spellings: dict[str, str] = {}
    for cell, meant in words.items():
        spelling = "" if meant is None else str(meant)
        try:
            read_cell(field, spelling, {})
        except ValueError:
            raise ShardError(f"pack.options.values.{field}.{cell}: {meant!r} is not understood") from None
        if spellings.setdefault(plain(cell), spelling) != spelling:
            raise ShardError(
                f"pack.options.values.{field}.{cell}: {meant!r}, but another line maps the same cell to "
                f"{spellings[plain(cell)]!r}; remove one"
            )
    return spellings


def _mapping(name: str, option: Any) -> Mapping[Any, Any]:
    if option is not None and not isinstance(option, Mapping):
        raise ShardError(f"pack.options.{name}: {option!r} is no mapping; write {{key: value}}")
    return option or {}


def _nearest(word: Any, known: Iterable[str]) -> str:
    return did_you_mean(str(word), known) or f"; it is one of {', '.join(known)}"

"""Label tables of any size: read as text, checked for their columns, joined column by column and never row by row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from shards.schema import ShardError

# The packages with which pandas reads a format.
ENGINES = {".parquet": "pyarrow", ".xlsx": "openpyxl", ".xls": "xlrd"}
LARGEST_EXACT = 2**53  # above it a float has lost digits of a whole number


def read_table(path: Path, columns: Mapping[str, str], optional: Iterable[str] = (), **options: Any) -> pd.DataFrame:
    """The `columns` (name in the file -> name here) of a CSV, Parquet or Excel file, by its suffix.

    Every value comes back as stripped text, or NaN where the cell is empty: "NA" and "None" are texts, and a
    whole number is written without a point, also where Parquet holds it as a float because its column has
    empty cells. Names in the file are compared without regard to surrounding blanks, and a byte order mark
    is no part of the first one. A column in `optional` (by its name here) that the file does not have is
    filled with NaN. `options` reach the reader of pandas. Raises `ShardError` with the path and the first
    missing column.
    """
    raw = _read(path, options)
    raw.columns = [str(name).strip() for name in raw.columns]
    table = pd.DataFrame(index=raw.index)
    for name, here in columns.items():
        if name in raw.columns:
            if isinstance(raw[name], pd.DataFrame):
                raise ShardError(f"{path}: has two columns {name!r}; rename one of them")
            table[here] = _text(raw[name])
        elif here in optional:
            table[here] = pd.Series(pd.NA, index=raw.index, dtype="object")
        else:
            raise ShardError(f"{path}: has no column {name!r}; it has {', '.join(map(str, raw.columns[:12]))}")
    return table


def _read(path: Path, options: Mapping[str, Any]) -> pd.DataFrame:
    suffix = path.suffix.lower()
    as_text: dict[str, Any] = {"dtype": str, "keep_default_na": False, "na_values": [""]}
    try:
        if suffix == ".parquet":
            raw = pd.read_parquet(path, **options)
            # An identifier that its writer had made the index is a column like any other.
            raw = raw.reset_index(drop=raw.index.names == [None])
        elif suffix in (".xlsx", ".xls"):
            raw = pd.read_excel(path, **as_text, **options)
        else:
            raw = pd.read_csv(path, encoding="utf-8-sig", **as_text, **options)
    except FileNotFoundError:
        raise ShardError(f"{path}: no such table") from None
    except ImportError:
        raise ShardError(f"{path}: to read {suffix} files run `pip install {ENGINES[suffix]}`") from None
    except Exception as error:  # the readers' errors have no common type
        raise ShardError(f"{path}: cannot be read as a table ({' '.join(str(error).split())})") from None
    if not isinstance(raw.index, pd.RangeIndex):  # pandas took the first column for row names: all names are one off
        raise ShardError(f"{path}: its rows have more cells than its header has names; quote cells that hold a comma")
    return raw


def _text(column: pd.Series[Any]) -> pd.Series[Any]:
    if pd.api.types.is_float_dtype(column):
        known = column.dropna()
        if (known.abs().lt(LARGEST_EXACT) & known.mod(1).eq(0)).all():
            column = column.astype("Int64")
    text = column.astype(str).str.strip()
    return text.where(column.notna() & text.ne(""))


def rows(table: pd.DataFrame) -> Iterator[NamedTuple]:
    """The rows as named tuples with None for every empty cell."""
    clean = table.astype(object).where(table.notna(), None)
    yield from clean.itertuples(index=False, name="Row")


def groups(table: pd.DataFrame, by: list[str]) -> Iterator[list[NamedTuple]]:
    """Consecutive rows with equal `by`, after a stable sort by it: one pass over any number of rows."""
    ordered = table.sort_values(by, kind="stable")
    changed = (ordered[by].fillna("") != ordered[by].fillna("").shift()).any(axis=1).to_numpy()
    group: list[NamedTuple] = []
    for row, first in zip(rows(ordered), changed, strict=True):
        if first and group:
            yield group
            group = []
        group.append(row)
    if group:
        yield group

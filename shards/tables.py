"""Label tables of any size: read as text, checked for their columns, joined column by column and never row by row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from shards.schema import ShardError


def read_table(path: Path, columns: Mapping[str, str], optional: Iterable[str] = (), **options: Any) -> pd.DataFrame:
    """The `columns` (name in the file -> name here) of a CSV, Parquet or Excel file, by its suffix.

    Every value comes back as stripped text, or NaN where the cell is empty; names in the file are
    compared without regard to surrounding blanks, and a byte order mark is no part of the first one.
    A column in `optional` (by its name here) that the file does not have is filled with NaN. `options`
    reach the reader of pandas. Raises `ShardError` with the path and the first missing column.
    """
    try:
        if path.suffix.lower() == ".parquet":
            raw = pd.read_parquet(path, **options)
        elif path.suffix.lower() in (".xlsx", ".xls"):
            raw = pd.read_excel(path, dtype=str, **options)
        else:
            raw = pd.read_csv(path, dtype=str, encoding="utf-8-sig", keep_default_na=False, na_values=[""], **options)
    except FileNotFoundError:
        raise ShardError(f"{path}: no such table") from None
    except Exception as error:  # the readers' errors have no common type
        raise ShardError(f"{path}: cannot be read as a table ({' '.join(str(error).split())})") from None
    raw.columns = [str(name).strip() for name in raw.columns]
    table = pd.DataFrame(index=raw.index)
    for name, here in columns.items():
        if name in raw.columns:
            column = raw[name]
            text = column.where(column.isna(), column.astype(str).str.strip())
            table[here] = text.where(text != "")
        elif here in optional:
            table[here] = pd.Series(pd.NA, index=raw.index, dtype="object")
        else:
            raise ShardError(f"{path}: has no column {name!r}; it has {', '.join(map(str, raw.columns[:12]))}")
    return table


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

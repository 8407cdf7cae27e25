"""Label tables of any size: read as text, checked for their columns, processed by column, never row by row."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from shards.errors import ShardError, one_line
from shards.sources.csv_dialect import Dialect, check_western, clean_name, find_dialect, open_packed
from shards.spellings import UNKNOWN

# Suffix -> the package with which pandas reads it.
ENGINES = {".parquet": "pyarrow", ".xlsx": "openpyxl", ".xls": "xlrd"}
LARGEST_EXACT = 2**53  # a larger whole number loses digits as a float
ROWS = 20_000  # of a CSV file per chunk, held with all columns
# The header is read as a row: pandas would rename the second of two equal column names.
AS_TEXT: dict[str, Any] = {"header": None, "dtype": str, "keep_default_na": False, "na_values": [""]}
CARRIAGE_RETURN = "_x000D_"  # in Excel's file format
# Between semicolons, commas are decimal; between tabs and bars, 1,234 may be one thousand.
DECIMAL_COMMA, THOUSANDS = r"([-+]?\d+),(\d+(?:[eE][-+]?\d+)?)\Z", r"(?![-+]?[1-9]\d{0,2}(?:,\d{3})+\Z)"
DECIMAL_COMMAS = {
    ";": re.compile(rf"\A{DECIMAL_COMMA}"),
    "\t": re.compile(rf"\A{THOUSANDS}{DECIMAL_COMMA}"),
    "|": re.compile(rf"\A{THOUSANDS}{DECIMAL_COMMA}"),
}


def read_table(
    path: Path,
    columns: Mapping[str, str],
    optional: Iterable[str] = (),
    separator: str | None = None,
    as_written: Collection[str] = (),
    sheet: str | int = 0,
) -> pd.DataFrame:
    """Read the `columns` (name in the file -> name here) of a CSV, Parquet or Excel file, by its suffix.

    Every value is stripped text, or NaN for an empty cell: "NA" and "None" are texts, leading zeros stay, and a whole
    number has no point, even if Parquet stores it as a float because its column has empty cells. Column names are
    compared without surrounding spaces and byte order mark. A missing column in `optional` (names here) is filled with
    NaN. Empty rows are left out; `index + 2` is the number of the row in a spreadsheet. Of an Excel file, `sheet` is
    read, by its name or its number from 0.

    A CSV file may be compressed, in UTF-8, UTF-16 or Windows-1252, and separated by commas, semicolons, tabs or bars:
    see `csv_dialect`. Without `separator`, it is detected. If it is no comma, numbers with a decimal comma come back
    with a point, except in columns in `as_written` (names here). Other columns are not kept in memory.

    Raises `ShardError` with the path and the first column that is missing or duplicated.
    """
    names, raw, comma = _read(path, columns, separator, sheet)
    table = pd.DataFrame(index=raw.index)
    for name, here in columns.items():
        places = [place for place, other in enumerate(names) if other == name]
        if len(places) > 1:
            raise ShardError(f"{path}: has {len(places)} columns {name!r}; remove or rename all but one")
        if places:
            text = _text(raw[places[0]])
            table[here] = _with_points(text, comma) if comma and here not in as_written else text
        elif here in optional:
            table[here] = pd.Series(pd.NA, index=raw.index, dtype="object")
        else:
            listed = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
            raise ShardError(f"{path}: has no column {name!r}; it has {listed}")
    return table


def column_names(path: Path, wanted: Collection[str]) -> tuple[str, ...]:
    """The header of a CSV file; `wanted` columns help to detect the separator."""
    with _one_line(path):
        return find_dialect(path, wanted).header


def blank_unknown(table: pd.DataFrame, codes: Mapping[str, Collection[str]]) -> pd.DataFrame:
    """The table with NaN for cells that spell "unknown", unless that is a code of their column.

    For published tables with documented codes: in a user's own table, "none" and "-" may be answers.
    """
    for column in table.columns:
        words = {text for text in table[column].dropna().unique() if text.casefold() in UNKNOWN}
        table[column] = table[column].mask(table[column].isin(words - set(codes.get(column, ()))))
    return table


def _read(
    path: Path, columns: Collection[str], separator: str | None, sheet: str | int
) -> tuple[list[str], pd.DataFrame, re.Pattern[str] | None]:
    """All column names, the cells by position of their column, and the pattern of numbers with a decimal comma, if any.

    The index is the number of the row in a spreadsheet less 2.
    """
    with _one_line(path):
        if path.suffix.lower() == ".parquet":
            raw = pd.read_parquet(path)
            # Identifiers that were made the index become columns again.
            raw = raw.reset_index(drop=raw.index.names == [None]).dropna(how="all")
            names = [clean_name(str(name)) for name in raw.columns]
            return names, raw.set_axis(range(len(names)), axis=1), None
        if path.suffix.lower() in (".xlsx", ".xls"):
            raw = (
                pd.read_excel(path, sheet_name=sheet, **AS_TEXT)
                .replace(CARRIAGE_RETURN, "\r", regex=True)
                .dropna(how="all")
            )
            names, raw = _without_header(raw)
            return names, raw.set_axis(raw.index - 1), None
        dialect = find_dialect(path, columns, separator)
        try:
            names, raw = _read_csv(path, columns, dialect, dialect.encoding)
        except UnicodeDecodeError:
            if dialect.encoding != "utf-8":
                raise
            check_western(path)
            names, raw = _read_csv(path, columns, dialect, "cp1252")
        return names, raw.set_axis(raw.index + dialect.skipped - 1), DECIMAL_COMMAS.get(dialect.separator)


def _read_csv(path: Path, columns: Collection[str], dialect: Dialect, encoding: str) -> tuple[list[str], pd.DataFrame]:
    """Read in chunks: a table may have a hundred columns of which few are wanted."""
    options = {"sep": dialect.separator, "skiprows": dialect.skipped, "skip_blank_lines": False}
    names: list[str] = []
    parts = []
    with (
        open_packed(path) as file,
        pd.read_csv(file, encoding=encoding, chunksize=ROWS, **options, **AS_TEXT) as pieces,
    ):
        for piece in pieces:
            cells = piece.dropna(how="all")
            if not names:
                names, cells = _without_header(cells)
            parts.append(cells[[place for place, name in enumerate(names) if name in columns]])
    return names, pd.concat(parts)


def _without_header(raw: pd.DataFrame) -> tuple[list[str], pd.DataFrame]:
    """The names in the first row, and the rows below it."""
    names = [clean_name(name) for name in raw.iloc[0].fillna("")] if len(raw) else []
    return names, raw.iloc[1:]


@contextmanager
def _one_line(path: Path) -> Iterator[None]:
    """Turn the readers' errors, which have no common type, into a `ShardError` of one line."""
    try:
        yield
    except ShardError:
        raise
    except FileNotFoundError:
        raise ShardError(f"{path}: no such table") from None
    except UnicodeDecodeError as error:
        raise ShardError(f"{path}: {error}; save the table as UTF-8") from None
    except ImportError:
        suffix = path.suffix.lower()
        raise ShardError(f"{path}: to read {suffix} files run `pip install {ENGINES[suffix]}`") from None
    except Exception as error:
        why = one_line(error)
        if surplus := re.search(r"Expected (\d+) fields in line (\d+), saw (\d+)", why):
            expected, line, found = surplus.groups()
            why = f"line {line} has {found} cells for {expected} columns; quote cells that hold the separator"
        if unclosed := re.search(r"EOF inside string starting at row (\d+)", why):
            why = f"the quote that opens in row {int(unclosed[1]) + 1} is not closed"
        raise ShardError(f"{path}: cannot be read as a table ({why})") from None


def _text(column: pd.Series[Any]) -> pd.Series[Any]:
    if pd.api.types.is_float_dtype(column):
        known = column.dropna()
        if (known.abs().lt(LARGEST_EXACT) & known.mod(1).eq(0)).all():
            column = column.astype("Int64")
    text = column.astype(str).str.strip()
    return text.where(column.notna() & text.ne(""))


def _with_points(text: pd.Series[Any], comma: re.Pattern[str]) -> pd.Series[Any]:
    """The texts with a decimal point instead of the decimal `comma`."""
    has_comma = text.str.contains(",", regex=False).fillna(False).astype(bool)
    return text.mask(has_comma, text[has_comma].str.replace(comma, r"\1.\2", regex=True))


def rows(table: pd.DataFrame) -> Iterator[NamedTuple]:
    """The rows as named tuples, with None for every empty cell."""
    clean = table.astype(object).where(table.notna(), None)
    yield from clean.itertuples(index=False, name="Row")


def groups(table: pd.DataFrame, by: list[str]) -> Iterator[list[NamedTuple]]:
    """Lists of rows with equal `by`, sorted by it (stable), in one pass over any number of rows."""
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

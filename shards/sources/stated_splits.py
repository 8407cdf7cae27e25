"""What tables state about the split of patients, word by word; `shards.pack.splits` decides what follows from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from shards.errors import ShardError
from shards.sources.table.cell_words import whole
from shards.sources.tables import read_table
from shards.spellings import UNKNOWN

FILES = frozenset({".csv", ".tsv", ".txt", ".parquet", ".xlsx", ".xls"})  # suffixes of a file of patients
PATIENT, SPLIT = ("patient", "patient_id"), ("split", "fold")  # its columns, by the first name that has cells


@dataclass(frozen=True)
class Stated:
    """The split of a patient, as one row spells it; `where` is that row, for messages."""

    patient: str
    word: str
    where: str


def is_file(text: str) -> bool:
    """Whether a text names a file rather than a column: by its suffix, also before .gz."""
    return not FILES.isdisjoint(suffix.lower() for suffix in Path(text).suffixes)


def in_file(path: Path) -> list[Stated]:
    """The splits in a file of patients with a column of `PATIENT` and one of `SPLIT`; rows of a patient may repeat.

    Raises `ShardError` if the file cannot be read, or lacks one of the two.
    """
    names = (*PATIENT, *SPLIT)
    table = read_table(path, {name: name for name in names}, optional=names, as_written=names)
    filled = [name for name in names if table[name].notna().any()]
    patient = next((name for name in PATIENT if name in filled), None)
    split = next((name for name in SPLIT if name in filled), None)
    if patient is None or split is None:
        raise ShardError(f"{path}: needs a column patient, and a column split or fold")
    return stated(table.rename(columns={patient: "who", split: "word"}), path.name)


def in_column(
    path: Path, patient: str, column: str, optional: bool = False, separator: str | None = None
) -> list[Stated]:
    """The splits in a column of a label table; with `optional` none if it has no such column.

    Raises `ShardError` if the table cannot be read or lacks the column.
    """
    if column == patient:
        raise ShardError(f"{path}: {column!r} is the column of the patients; name that of the splits")
    columns = {patient: "who", column: "word"}
    table = read_table(path, columns, ("word",) if optional else (), separator, as_written=("who", "word"))
    return stated(table, path.name)


def stated(table: pd.DataFrame, name: str) -> list[Stated]:
    """The distinct (`who`, `word`) of the table `name`, whose index is that of `read_table`, without empty cells."""
    cells = table[["who", "word"]].assign(number=table.index + 2).dropna()
    for column in ("who", "word"):
        cells[column] = cells[column].map(whole)
    cells = cells.drop_duplicates(["who", "word"])
    unstated = cells["who"].str.casefold().isin(UNKNOWN) | cells["word"].str.casefold().isin(UNKNOWN)
    cells = cells[~unstated]
    found = zip(cells["who"], cells["word"], cells["number"], strict=True)
    return [Stated(who, word, f"row {number} of {name}") for who, word, number in found]


def by_patient(found: Iterable[Stated], meanings: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Patient -> split -> the first row that states it. `meanings` has the split of every word."""
    splits: dict[str, dict[str, str]] = {}
    for one in found:
        splits.setdefault(one.patient, {}).setdefault(meanings[one.word], one.where)
    return splits

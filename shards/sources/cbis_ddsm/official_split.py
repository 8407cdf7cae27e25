"""The official split of CBIS-DDSM: whether the tables' paths begin with Mass-Training, Calc-Test and so on.

Masses and calcifications were divided apart, so a patient with both may be in training and test.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from shards.sources.cbis_ddsm.cases import CSV, TABLES
from shards.sources.stated_splits import Stated, stated
from shards.sources.tables import read_table

FOLDER = r"^(?:Mass|Calc)-(?P<word>Training|Test)_(?P<who>P_\d+)_"


def cbis_ddsm_split(root: Path) -> list[Stated]:
    """The split of each patient in the tables, in both where the tables say so; nothing without tables.

    Raises `ShardError` if a table that is there cannot be read.
    """
    folder = root if (root / next(iter(TABLES))).is_file() else root / CSV
    return [one for name in TABLES if (folder / name).is_file() for one in _in_table(folder / name)]


def _in_table(path: Path) -> list[Stated]:
    table = read_table(path, {"image file path": "path"})
    parts: pd.DataFrame = table["path"].astype("string").str.extract(FOLDER).astype(object)
    return stated(parts, path.name)

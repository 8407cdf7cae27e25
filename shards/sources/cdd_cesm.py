"""CDD-CESM: contrast-enhanced mammograms with radiologists' findings (Khaled et al., Scientific Data 9:122, 2022).

The Cancer Imaging Archive, DOI 10.7937/29kw-ae92, CC BY 4.0: cite it with results.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from shards.errors import ShardError
from shards.schema import DENSITIES, Labels, SourceStudy, SourceView
from shards.sources.tables import blank_unknown, read_table

log = logging.getLogger(__name__)

TABLE = "Radiology-manual-annotations.xlsx"
IMAGES = "subtracted"
SHEET = "all"
# Columns of the sheet -> their names here.
COLUMNS = {
    "Image_name": "image",
    "Patient_ID": "patient",
    "Side": "side",
    "Type": "type",
    "Age": "age",
    "Breast density (ACR)": "density",
    "BIRADS": "birads",
    "Findings": "findings",
    "View": "view",
    "Pathology Classification/ Follow up": "pathology",
}
PATHOLOGIES = ("normal", "benign", "malignant")


def cdd_cesm(root: Path) -> Iterator[SourceStudy]:
    """Yield one study per patient, sorted by number.

    Files. `<root>` holds Radiology-manual-annotations.xlsx, and the subtracted images in subtracted/.

    Labels.
    - The highest of several BI-RADS categories of an image (`3$2`) counts.
    - Density is given for low-energy images only: see `_fill_density`.
    - `report` is the radiologist's findings about the image, one sentence a line.

    Left out: images without a row; the log counts them. Raises `ShardError` if the table, one of its columns, or all
    images are missing.
    """
    images = {path.stem: path for path in sorted((root / IMAGES).glob("[!.]*")) if path.is_file()}
    if not (root / TABLE).is_file() or not images:
        raise ShardError(f"pack.root: {root} must hold {TABLE} and the images of CDD-CESM in {IMAGES}")
    table = _annotations(root / TABLE)
    without = sorted(images.keys() - set(table["image"]))
    if without:
        log.warning("CDD-CESM: %d images without a row in the table are left out, e.g. %s", len(without), without[0])
    table = table[table["image"].isin(list(images))]
    order = table["patient"].astype(int)
    for patient, rows in table.assign(order=order).sort_values(["order", "image"]).groupby("patient", sort=False):
        records: list[dict[str, Any]] = rows.to_dict("records")
        views = tuple(_view(images[record["image"]], record) for record in records)
        ages = rows["age"].dropna()
        yield SourceStudy(str(patient), str(patient), views, age=int(ages.iloc[0]) if len(ages) else None)


def _annotations(path: Path) -> pd.DataFrame:
    """One row per image: text columns as strings or NaN, birads and age as numbers or NaN."""
    table = blank_unknown(read_table(path, COLUMNS, sheet=SHEET), {})
    table = table.dropna(subset=["image", "patient"]).drop_duplicates("image").reset_index(drop=True)
    table["density"] = _fill_density(table)
    categories = pd.to_numeric(table["birads"].str.split("$").explode(), errors="coerce")
    table["birads"] = categories.where(categories.between(0, 6)).groupby(level=0).max()
    table["age"] = pd.to_numeric(table["age"], errors="coerce")
    table["pathology"] = table["pathology"].str.lower()
    sentences = table["findings"].str.split("$").explode().str.strip()
    table["findings"] = sentences[sentences.fillna("") != ""].groupby(level=0).agg("\n".join)
    return table


def _fill_density(table: pd.DataFrame) -> pd.Series[Any]:
    """The density of every row, from the first of these that is given:

    1. the low-energy image (DM) of the same view; 2. the row itself; 3. another view of the same breast; 4. the other
    breast: both breasts agree wherever both are given.
    """
    known = table["density"].str.upper().where(lambda density: density.isin(DENSITIES))
    of_dm = known.where(table["type"] == "DM")
    patient, side, view = table["patient"], table["side"], table["view"]
    density = of_dm.groupby([patient, side, view]).transform("first")
    density = density.fillna(known)
    density = density.fillna(density.groupby([patient, side]).transform("first"))
    return density.fillna(density.groupby(patient).transform("first"))


def _view(path: Path, record: dict[str, Any]) -> SourceView:
    facts = {name: None if pd.isna(value) else value for name, value in record.items()}
    pathology = facts["pathology"] if facts["pathology"] in PATHOLOGIES else None
    labels = Labels(
        birads=None if facts["birads"] is None else int(facts["birads"]),
        density=facts["density"],
        cancer=None if pathology is None else pathology == "malignant",
        pathology=pathology,
    )
    return SourceView(path, facts["side"], facts["view"], labels, report=facts["findings"])

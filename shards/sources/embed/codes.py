"""Labels and findings of a breast from the clinical rows of an EMBED exam (AWS_Open_Data_Clinical_Legend.csv).

Codes without descriptor in the ACR BI-RADS lexicon ("generic", "benign", a lymph node) yield a kind alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Any

from shards.errors import Refused
from shards.schema import Finding, Labels
from shards.sources.common import agreed, breast_birads, read_code

ASSESSMENTS = {"A": 0, "N": 1, "B": 2, "P": 3, "S": 4, "M": 5, "K": 6, "X": None}
TISSUE = {"1": "A", "2": "B", "3": "C", "4": "D", "5": None}  # 5 is a male breast
SIDES = {"L": frozenset("L"), "R": frozenset("R"), "B": frozenset("LR")}
# path_severity: 0 invasive and 1 non-invasive cancer, 2 high-risk and 3 borderline lesion, 4 benign, 5 normal tissue,
# 6 a cancer that does not come from the breast.
SEVERITIES = {str(severity): severity for severity in range(7)}
CANCER, OTHER_CANCER, NORMAL_TISSUE = frozenset({0, 1}), 6, 5

# massshape: code -> (kind, shape). D and L are in the authors' notebook, but in no legend.
SHAPES: dict[str, tuple[str, str | None]] = {
    "R": ("mass", "round"),
    "O": ("mass", "oval"),
    "X": ("mass", "irregular"),
    **dict.fromkeys("GNYDL", ("mass", None)),
    "A": ("distortion", None),
    "Q": ("distortion", None),
    "S": ("asymmetry", None),
    "T": ("asymmetry", None),  # a solitary dilated duct
    "B": ("asymmetry", "global"),
    "F": ("asymmetry", "focal"),
    "V": ("asymmetry", "developing"),
}
MARGINS = {"D": "circumscribed", "U": "obscured", "M": "microlobulated", "I": "indistinct", "S": "spiculated"}
MASS_DENSITIES = {"+": "high", "=": "equal", "-": "low", "0": "fat-containing"}
CALCIFICATIONS = {
    "A": "amorphous",
    "B": "fine linear branching",
    "C": "coarse popcorn-like",
    "D": "dystrophic",
    "E": "rim",
    "F": "fine linear",
    "G": None,
    "H": "coarse heterogeneous",
    "I": "fine pleomorphic",
    "J": "oil cyst",
    "K": "pleomorphic",
    "L": "large rod-like",
    "M": "milk of calcium",
    "O": "lucent-centered",
    "P": "punctate",
    "Q": "coarse",
    "R": "round",
    "S": "skin",
    "U": "suture",
    "V": "vascular",
    "9": None,
}
IMPLANTS = dict.fromkeys("ACDFHKNRST", True)  # N: normal implants
DISTRIBUTIONS = {"G": "grouped", "C": "grouped", "S": "segmental", "R": "regional", "D": "diffuse", "L": "linear"}

# Column here -> its codes. The log reports any other text in these columns.
CODES: dict[str, dict[str, Any]] = {
    "side": SIDES,
    "bside": SIDES,
    "asses": ASSESSMENTS,
    "tissueden": TISSUE,
    "path_severity": SEVERITIES,
    "massshape": SHAPES,
    "massmargin": MARGINS,
    "massdens": MASS_DENSITIES,
    "calcfind": CALCIFICATIONS,
    "calcdistri": DISTRIBUTIONS,
    "implanfind": IMPLANTS,
}
UNDOCUMENTED = "column {column}: {text!r} is no code of the legend"
DESCRIPTORS = ("massshape", "massmargin", "massdens", "calcfind", "calcdistri", "calcnumber")


@dataclass(frozen=True)
class Breast:
    """The facts that all views of a breast share. `single`: a region can only mean its one finding."""

    labels: Labels
    findings: tuple[Finding, ...] = ()
    single: bool = False
    refused: tuple[str, str] | None = None
    implant: bool | None = None


def breast_of(rows: Sequence[Any], side: str) -> Breast:
    """The breast on `side` (L or R) from the clinical rows of its exam; `refused` for an undocumented code."""
    try:
        cancer, pathology = _pathology(rows, side)
        labels = Labels(_birads(rows, side), _density(rows, side), cancer, pathology)
    except Refused as error:
        return Breast(Labels(), refused=error.pair)
    lesions = [(number, lesion) for number, lesion in _lesions(rows) if _concerns(lesion[0], side)]
    findings = [_finding(number, lesion, side) for number, lesion in lesions]
    known = tuple(finding for finding in findings if finding)
    # A row without descriptors may still be the lesion that a region marks, unless its assessment is negative.
    candidates = sum(bool(_kind(lesion[0])) or any(row.asses != "N" for row in lesion) for _, lesion in lesions)
    implant = any(row.implanfind in IMPLANTS and _concerns(row, side) for row in rows) or None
    return Breast(labels, known, single=len(known) == candidates == 1, implant=implant)


def _levels(rows: Sequence[Any], side: str) -> Iterator[list[Any]]:
    """The rows in order of precedence: of this side; of both sides or none; of the exam."""
    yield [row for row in rows if row.side == side]
    yield [row for row in rows if row.side not in ("L", "R")]
    yield list(rows)


def _birads(rows: Sequence[Any], side: str) -> int | None:
    """BI-RADS by the rows of the first level that has one."""
    categories = (breast_birads(_code(row, "asses") for row in level) for level in _levels(rows, side))
    return next((category for category in categories if category is not None), None)


def _density(rows: Sequence[Any], side: str) -> str | None:
    """The density of the first level that has one; None if its rows disagree."""
    for level in _levels(rows, side):
        if densities := {_code(row, "tissueden") for row in level} - {None}:
            return agreed(densities)
    return None


def _pathology(rows: Sequence[Any], side: str) -> tuple[bool | None, str | None]:
    """(cancer, pathology) from the specimens of this breast; `embed` documents the rules."""
    sides = [(row, _specimen_sides(row)) for row in rows]
    mine = {_code(row, "path_severity") for row, of in sides if side in of} - {None}
    perhaps = {_code(row, "path_severity") for row, of in sides if not of} - {None}
    if mine & CANCER:
        return True, "malignant"
    if not mine or perhaps & CANCER or OTHER_CANCER in mine | perhaps:
        return None, None
    return False, "normal" if mine == {NORMAL_TISSUE} else "benign"


def _specimen_sides(row: Any) -> frozenset[str]:
    """The breasts to which a row's pathology belongs; empty if `side` and `bside` are unknown or contradict."""
    both: frozenset[str] = SIDES["B"]
    if row.bside is not None:
        return SIDES.get(row.bside, frozenset()) & SIDES.get(row.side, both)
    return SIDES[row.side] if row.side in ("L", "R") else frozenset()


def _lesions(rows: Sequence[Any]) -> Iterator[tuple[int, list[Any]]]:
    """The rows of each lesion with its number in the exam. Equal rows with the same `numfind` are its specimens."""
    lesions: dict[Any, list[Any]] = {}
    for place, row in enumerate(rows):
        facts = tuple(getattr(row, column) for column in ("side", "numfind", *DESCRIPTORS))
        lesions.setdefault(facts if row.numfind else place, []).append(row)
    return enumerate(lesions.values(), 1)


def _concerns(row: Any, side: str) -> bool:
    return row.side == side or row.side not in ("L", "R")


def _finding(number: int, rows: Sequence[Any], side: str) -> Finding | None:
    """The lesion of these equal rows; None if its kind is unknown."""
    row = rows[0]
    kind = _kind(row)
    if kind is None:
        return None
    severities = {_code(row, "path_severity") for row in rows if side in _specimen_sides(row)} - {None}
    return Finding(
        number,
        kind,
        shape=SHAPES[row.massshape][1] if row.massshape in SHAPES else None,
        margin=MARGINS.get(row.massmargin),
        density=MASS_DENSITIES.get(row.massdens),
        calcification_type=CALCIFICATIONS.get(row.calcfind),
        distribution=DISTRIBUTIONS.get(row.calcdistri),
        pathology=_worst(severities),
    )


def _worst(severities: Set[int]) -> str | None:
    if severities & CANCER:
        return "malignant"
    return "benign" if severities and OTHER_CANCER not in severities else None


def _kind(row: Any) -> str | None:
    """The kind of finding by the rules of the authors' notebook; a mass with calcifications is a mass."""
    if row.massshape in SHAPES:
        return SHAPES[row.massshape][0]
    if row.massmargin in MARGINS or row.massdens in MASS_DENSITIES:
        return "mass"
    calcified = row.calcfind in CALCIFICATIONS or row.calcdistri in DISTRIBUTIONS or row.calcnumber not in (None, "0")
    return "calcification" if calcified else None


def _code(row: Any, column: str) -> Any:
    return read_code(row, column, CODES, UNDOCUMENTED)

"""The cells of a user's own table -> values: the spellings that the source `table` understands.

Case and spaces are ignored, and a whole number may be written as 4.0. In all fields but reports and identifiers, an
empty cell and na, n/a, n.a., #n/a, <na>, nan, null and unknown mean "not stated". So do none and - in identifiers;
elsewhere they may be answers.

laterality   l, left; r, right; or a text that names a view too, such as LCC
view         see `shards.spellings`: cc, cranio-caudal; mlo, medio-lateral oblique; LCC, MLO-ID; other views are left
             out of a build, and so are unknown texts
birads       0 to 6, 4a, 4b, 4c; "BI-RADS", "BIRADS" or "BI-RADS category" may precede it
density      a to d, 1 to 4; "ACR" or "density" may precede it
cancer       1, true, yes, y; 0, false, no, n
implant      the same
pathology    normal, benign, malignant
age          a number from 0 to 130, rounded down, or DICOM's 054Y
reason       screening, diagnostic
kind         mass, masses; calcification, microcalcification, with or without s; asymmetry, focal asymmetry;
             distortion, architectural distortion; none and no finding for a row without one
finding_pathology                       benign, malignant
number                                  a whole number
x0, y0, x1, y1, box_width, box_height   numbers with a decimal point; or a comma, in a CSV file not separated by commas
race, ethnicity                         any text, unchanged
shape, margin, finding_density,
calcification_type, distribution        any text of at most `LONGEST` characters, in lower case
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from shards.spellings import NOT_STATED, read_view

LONGEST = 64  # characters of a descriptor
KINDS = {
    **dict.fromkeys(("mass", "masses"), "mass"),
    **dict.fromkeys(("calcification", "calcifications", "microcalcification", "microcalcifications"), "calcification"),
    **dict.fromkeys(("asymmetry", "focal asymmetry"), "asymmetry"),
    **dict.fromkeys(("distortion", "architectural distortion"), "distortion"),
    **dict.fromkeys(("none", "no finding"), None),
}
YES_NO = {**dict.fromkeys(("1", "true", "yes", "y"), True), **dict.fromkeys(("0", "false", "no", "n"), False)}

BIRADS = re.compile(r"(?:bi-?rads[ :_-]*(?:category )?)?(?:([0-6])|(4)[abc])")
DENSITY = re.compile(r"(?:(?:acr|density)[ :_-]*)?([a-d1-4])")
AGE = re.compile(r"(\d{1,3})(?:\.\d+)?|(\d{3})y")
WHOLE = re.compile(r"(\d{1,9})")
NUMBER = re.compile(r"(-?\d+(?:\.\d*)?(?:e[-+]?\d+)?)")


def plain(text: str) -> str:
    """The form in which spellings are compared: lower case, single spaces, 4 for 4.0."""
    return whole(" ".join(text.casefold().split()))


def whole(text: str) -> str:
    """12 for 12.0; any other text unchanged."""
    digits, _, zeros = text.partition(".")
    return digits if zeros and digits.isdigit() and not zeros.strip("0") else text


def read_cell(field: str, text: str, meanings: Mapping[str, str]) -> Any:
    """The value of a cell, None for "not stated". `meanings` (plain spelling -> known spelling) is applied first.

    Raises `ValueError` for an unknown text.
    """
    meant = meanings.get(plain(text), text)
    return None if plain(meant) in NOT_STATED else READERS[field](meant)


def _stated(word: str | None, text: str) -> str:
    """The side or view that `read_view` found in a text."""
    if word is None:
        raise ValueError(text)
    return word


def _one_of(words: Mapping[str, Any]) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        if plain(text) not in words:
            raise ValueError(text)
        return words[plain(text)]

    return read


def _match(pattern: re.Pattern[str], text: str) -> str:
    match = pattern.fullmatch(plain(text))
    if not match:
        raise ValueError(text)
    return next(group for group in match.groups() if group)


def _density(text: str) -> str:
    letter = _match(DENSITY, text)
    return dict(zip("1234", "ABCD", strict=True)).get(letter, letter.upper())


def _age(text: str) -> int:
    years = int(_match(AGE, text))
    if years > 130:
        raise ValueError(text)
    return years


def _number(text: str) -> float:
    number = float(_match(NUMBER, text))
    if not math.isfinite(number):
        raise ValueError(text)
    return number


def _descriptor(text: str) -> str:
    if len(text) > LONGEST or not text.isprintable():
        raise ValueError(text)
    return " ".join(text.lower().split())


READERS: dict[str, Callable[[str], Any]] = {
    "laterality": lambda text: _stated(read_view(text)[0], text),
    "view": lambda text: _stated(read_view(text)[1], text),
    "birads": lambda text: int(_match(BIRADS, text)),
    "density": _density,
    "cancer": _one_of(YES_NO),
    "implant": _one_of(YES_NO),
    "pathology": _one_of({word: word for word in ("normal", "benign", "malignant")}),
    "age": _age,
    "race": str,
    "ethnicity": str,
    "reason": _one_of({word: word for word in ("screening", "diagnostic")}),
    "kind": _one_of(KINDS),
    "finding_pathology": _one_of({word: word for word in ("benign", "malignant")}),
    "number": lambda text: int(_match(WHOLE, text)),
    **dict.fromkeys(("x0", "y0", "x1", "y1", "box_width", "box_height"), _number),
    **dict.fromkeys(("shape", "margin", "finding_density", "calcification_type", "distribution"), _descriptor),
}

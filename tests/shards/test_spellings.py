"""Sides and views: one vocabulary for tables and headers."""

from __future__ import annotations

import re

import pytest

from shards.spellings import OTHER_VIEWS, is_implant_displaced, read_view

UNDERSTOOD = {
    (None, "CC"): ["CC", " cc ", "CRANIO-CAUDAL", "craniocaudal", "Cranio caudal", "CC-ID", "CC 2", "CC view", "CCID"],
    (None, "MLO"): ["MLO", "MLO-ID", "mloid", "medio-lateral oblique", "MEDIOLATERAL-OBLIQUE", "Implant displaced MLO"],
    ("L", "CC"): ["LCC", "L CC", "left cc", "L_CC", "CC, Left", "leftcc", "Routine L CC screening", "MAMMO,CC,LT"],
    ("R", "MLO"): ["RMLO", "R-MLO", "rt mlo", "RMLOID", "R MLO Implant Displaced", "right mediolateral oblique view"],
    ("L", None): ["L", "left", "LEFT BREAST"],
    (None, None): ["", "unknown", "N/A", "Mammogram"],
    # Letters that could be a side or a modifier are those of a view by that name.
    (None, "lm"): ["LM", "latero-medial"],
    (None, "lmo"): ["LMO", "latero-medial oblique"],
    (None, "rl"): ["RL", "CC RL", "CCRL", "rolled lateral", "CC rolled laterally"],
    ("L", "ml"): ["LML", "L ML", "left medio-lateral"],
    ("L", "lm"): ["LLM"],
    ("R", "rm"): ["RRM", "R CC RM"],
    (None, "xcc"): ["XCC", "cranio-caudal exaggerated laterally", "exaggerated cranio-caudal"],
    (None, "xccl"): ["XCCL"],
    (None, "fb"): ["caudo-cranial (from below)", "caudocranial"],
    (None, "sio"): ["superolateral to inferomedial oblique"],
    (None, "iso"): ["inferomedial to superolateral oblique"],
    (None, "at"): ["AT", "axillary tail"],
    (None, "spot"): ["spot", "MCC", "CC-M", "CC S", "MLO MAG", "Magnification", "spot compression MLO", "MLOS"],
    ("L", "spot"): ["LMCC", "L CC spot magnification", "LSMLO"],
}
NOT_UNDERSTOOD = [
    "CC MLO",
    "CC ML",
    "L R CC",
    "LCC RCC",
    "C C",
    "CCL",
    "oblique",
    "lateral",
    "LAT",
    "XYZ",
    "AP",
    "1",
    "?",
]


def test_spellings_that_are_understood() -> None:
    found = {text: read_view(text) for texts in UNDERSTOOD.values() for text in texts}
    assert found == {text: told for told, texts in UNDERSTOOD.items() for text in texts}
    assert {name: read_view(name.upper())[1] for name in OTHER_VIEWS} == {name: name for name in OTHER_VIEWS}


def test_an_implant_is_displaced_where_the_text_says_so() -> None:
    displaced = [
        "CC-ID",
        "CCID",
        "mloid",
        "MLO-ID",
        "RMLOID",
        "Implant displaced MLO",
        "R MLO Implants Displaced",
        "ID",
    ]
    displaced += ["MLOIDMAG", "CC s id"]
    others = [text for texts in UNDERSTOOD.values() for text in texts if text not in displaced and "Displ" not in text]
    others += [*NOT_UNDERSTOOD, "MLO nipple in profile", "mid MLO", "CCI D"]
    assert [text for text in (*displaced, *others) if is_implant_displaced(text)] == displaced
    assert read_view("MLO nipple in profile") == (None, "MLO")


@pytest.mark.parametrize("text", NOT_UNDERSTOOD)
def test_what_is_not_understood_is_not_guessed(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        read_view(text)

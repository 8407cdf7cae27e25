"""Spellings of "not known", of a breast's side and of a view: one vocabulary for tables and DICOM headers.

Case, digits and signs do not count. A text may name the side, one view and what changes it, in any order: "LCC",
"l mlo", "MLO-ID", "Routine CC, right". Views have the short names of DICOM PS3.16 CID 4014, or are spelled out as
there ("medio-lateral oblique"); what changes a view has those of CID 4015.
"""

from __future__ import annotations

import re

# How people and programs write that nothing is known: pandas, R, Excel, and by hand.
UNKNOWN = frozenset({"-", "--", "n.a.", "n/a", "#n/a", "na", "<na>", "nan", "none", "null", "unknown"})
NOT_STATED = UNKNOWN - {"none", "-", "--"} | {""}  # of a user's own table, where those may be answers
SIDES = {**dict.fromkeys(("l", "lt", "left"), "L"), **dict.fromkeys(("r", "rt", "right"), "R")}
PROJECTIONS = ("fb", "iso", "lm", "lmo", "ml", "sio")
CHANGES = ("at", "cv", "ri", "rl", "rm", "rs", "spot", "tan", "xcc", "xccl", "xccm")  # make another view of CC or MLO
OTHER_VIEWS = tuple(sorted((*PROJECTIONS, *CHANGES)))
# Letter M or S beside a view: magnification, spot compression.
NAMES = {"cc": "CC", "mlo": "MLO", **{name: name for name in OTHER_VIEWS}, "m": "spot", "mag": "spot", "s": "spot"}
# Say nothing of side or view. ID: the implant is pushed back, the view is the same.
IDLE = {"breast", "diagnostic", "digital", "id", "image", "mammo", "mammogram", "mammography", "projection", "routine"}
IDLE |= {"screening", "standard", "view"}
SPELLED_OUT = {
    r"exaggerated( lateral(ly)?| medial(ly)?)?": "xcc",
    r"rolled lateral(ly)?": "rl",
    r"rolled medial(ly)?": "rm",
    r"rolled inferior": "ri",
    r"rolled superior": "rs",
    r"supero ?lateral to infero ?medial oblique": "sio",
    r"infero ?medial to supero ?lateral oblique": "iso",
    r"medi(o|al) ?lateral oblique": "mlo",
    r"later(o|al) ?medial oblique": "lmo",
    r"medi(o|al) ?lateral": "ml",
    r"later(o|al) ?medial": "lm",
    r"crani(o|al) ?caudal": "cc",
    r"caudo ?cranial( from below)?|from below": "fb",
    r"axillary tail": "at",
    r"cleavage": "cv",
    r"tangential": "tan",
    r"spot compression|magnification|magnified": "spot",
    r"implants? displaced|nipple in profile": "id",
}
_VIEW = "|".join(sorted({"cc", "mlo", *OTHER_VIEWS} - {"at"}, key=len, reverse=True))  # LAT is a lateral view
# In one word: LCC, RMLOID, LMCC (a magnified one), CCRL.
IN_ONE_WORD = re.compile(
    rf"(?P<side>left|right|lt|rt|l|r)?(?P<before>m|s)?(?P<view>{_VIEW})"
    rf"(id|(?P<after>mag|m|s|{'|'.join(CHANGES)}))*(?P<behind>left|right)?"
)


def read_view(text: str) -> tuple[str | None, str | None]:
    """Side (L, R) and view (CC, MLO or one of `OTHER_VIEWS`) that a text names, None for what it does not name.

    Raises `ValueError` for a text of which a word is not understood, and for one that names two sides or two views.
    """
    if " ".join(text.casefold().split()) in NOT_STATED:
        return None, None
    plain = " ".join(re.findall(r"[^\W\d_]+", text.casefold()))
    for spelling, name in SPELLED_OUT.items():
        plain = re.sub(rf"\b(?:{spelling})\b", name, plain)
    sides: set[str] = set()
    views: set[str] = set()
    for word in plain.split():
        side, view = _read_word(word, text)
        sides |= side
        views |= view
    changes = sorted(views & set(CHANGES))
    if len(sides) > 1 or len(views - set(CHANGES)) > 1 or not plain:
        raise ValueError(text)
    return next(iter(sides), None), next(iter(changes or views), None)


def _read_word(word: str, text: str) -> tuple[set[str], set[str]]:
    """The sides and views in one word. A whole name goes first: LM is latero-medial, and RL a rolled view."""
    if word in NAMES:
        return set(), {NAMES[word]}
    if word in SIDES or word in IDLE:
        return {SIDES[word]} if word in SIDES else set(), set()
    found = IN_ONE_WORD.fullmatch(word)
    if not found:
        raise ValueError(text)
    sides = {SIDES[found[part]] for part in ("side", "behind") if found[part]}
    return sides, {NAMES[found[part]] for part in ("before", "view", "after") if found[part]}

"""Spellings of "unknown", of laterality and of views: one vocabulary for tables and DICOM headers.

Case, digits and punctuation are ignored. A text may name the side, one view and its modifiers, in any order: "LCC",
"l mlo", "MLO-ID", "Routine CC, right". Views have the short names of DICOM PS3.16 CID 4014, or its full names
("medio-lateral oblique"); view modifiers those of CID 4015.
"""

from __future__ import annotations

import re

# Spellings of "unknown" in pandas, R, Excel, and by hand.
UNKNOWN = frozenset({"-", "--", "n.a.", "n/a", "#n/a", "na", "<na>", "nan", "none", "null", "unknown"})
NOT_STATED = UNKNOWN - {"none", "-", "--"} | {""}  # for a user's own table, in which the three may be answers
SIDES = {**dict.fromkeys(("l", "lt", "left"), "L"), **dict.fromkeys(("r", "rt", "right"), "R")}
PROJECTIONS = ("fb", "iso", "lm", "lmo", "ml", "sio")
MODIFIERS = ("at", "cv", "ri", "rl", "rm", "rs", "spot", "tan", "xcc", "xccl", "xccm")  # of CC or MLO
OTHER_VIEWS = tuple(sorted((*PROJECTIONS, *MODIFIERS)))
# The letters M and S beside a view mean magnification and spot compression.
NAMES = {"cc": "CC", "mlo": "MLO", **{name: name for name in OTHER_VIEWS}, "m": "spot", "mag": "spot", "s": "spot"}
DISPLACED = "id"  # implant displaced, which does not change the view
# Words without side or view.
IGNORED = {"breast", "diagnostic", "digital", DISPLACED, "image", "mammo", "mammogram", "mammography", "projection"}
IGNORED |= {"routine", "screening", "standard", "view"}
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
    r"implants? displaced": DISPLACED,
    r"nipple in profile": "view",
}
_VIEW = "|".join(sorted({"cc", "mlo", *OTHER_VIEWS} - {"at"}, key=len, reverse=True))  # LAT is a lateral view
# In one word: LCC, RMLOID, LMCC (magnified), CCRL.
IN_ONE_WORD = re.compile(
    rf"(?P<side>left|right|lt|rt|l|r)?(?P<before>m|s)?(?P<view>{_VIEW})"
    rf"((?P<displaced>{DISPLACED})|(?P<after>mag|m|s|{'|'.join(MODIFIERS)}))*(?P<behind>left|right)?"
)


def read_view(text: str) -> tuple[str | None, str | None]:
    """The side (L, R) and the view (CC, MLO or one of `OTHER_VIEWS`) that a text names; None for each that it does not.

    Raises `ValueError` for an unknown word, and for two sides or two views.
    """
    if " ".join(text.casefold().split()) in NOT_STATED:
        return None, None
    words = _words(text)
    sides: set[str] = set()
    views: set[str] = set()
    for word in words:
        side, view = _read_word(word, text)
        sides |= side
        views |= view
    modifiers = sorted(views & set(MODIFIERS))
    if len(sides) > 1 or len(views - set(MODIFIERS)) > 1 or not words:
        raise ValueError(text)
    return next(iter(sides), None), next(iter(modifiers or views), None)


def is_implant_displaced(text: str) -> bool:
    """Whether a text names a view for which an implant was pushed back: MLO-ID, LCCID, "Implant Displaced"."""
    found = ((word, IN_ONE_WORD.fullmatch(word)) for word in _words(text))
    return any(word == DISPLACED or (match and match["displaced"]) for word, match in found)


def _words(text: str) -> list[str]:
    """The words of a text in lower case, with the short names of what is spelled out."""
    plain = " ".join(re.findall(r"[^\W\d_]+", text.casefold()))
    for spelling, name in SPELLED_OUT.items():
        plain = re.sub(rf"\b(?:{spelling})\b", name, plain)
    return plain.split()


def _read_word(word: str, text: str) -> tuple[set[str], set[str]]:
    """The sides and views in one word. A whole name wins: LM is latero-medial, RL a rolled view."""
    if word in NAMES:
        return set(), {NAMES[word]}
    if word in SIDES or word in IGNORED:
        return {SIDES[word]} if word in SIDES else set(), set()
    found = IN_ONE_WORD.fullmatch(word)
    if not found:
        raise ValueError(text)
    sides = {SIDES[found[part]] for part in ("side", "behind") if found[part]}
    return sides, {NAMES[found[part]] for part in ("before", "view", "after") if found[part]}

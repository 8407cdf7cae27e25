"""The texts and numbers of a study: normalise their spelling, and refuse what must not be stored."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import replace
from typing import Any

from shards.errors import Refused
from shards.schema import SourceStudy

FACTS = ("race", "ethnicity", "reason")
LONGEST_FACT, LONGEST_REPORT = 64, 20_000  # characters
# Everything that Unicode and old systems use to end a line, paragraph or page: Windows, Mac, mainframe, form feed.
LINE_END = re.compile("\r\n|[\r\v\f\x85\u2028\u2029]")


def normalise_texts(study: SourceStudy) -> SourceStudy:
    """The study with normalised texts: "\\n" ends a line of a report, and other facts are one line."""
    texts = {name: _plain(getattr(study, name)) for name in FACTS}
    facts: dict[str, Any] = {name: text and " ".join(re.split("[\n\t]+", text)) for name, text in texts.items()}
    return replace(study, views=tuple(replace(view, report=_plain(view.report)) for view in study.views), **facts)


def _plain(text: str | None) -> str | None:
    """The text with "\\n" for any line end, spaces for no-break spaces, and without byte order marks."""
    plain = text and LINE_END.sub("\n", text).replace("\xa0", " ").replace("\ufeff", "")
    return text if plain == text else plain


def check_facts(study: SourceStudy) -> None:
    """Raise `Refused` for an impossible age, and for a fact that is too long or has control characters."""
    for name in FACTS:
        check_text(name, getattr(study, name), LONGEST_FACT)
    if study.age is not None and not 0 <= study.age <= 130:
        raise Refused("hostile", f"age: {study.age} is not an age in years")


def check_text(name: str, text: str | None, longest: int, allowed: str = "") -> None:
    """Raise `Refused` for more than `longest` characters, and for control characters that are not `allowed`."""
    if text is None:
        return
    if len(text) > longest:
        raise Refused("hostile", f"{name}: {len(text)} characters, at most {longest} are stored")
    if any(unicodedata.category(letter) in ("Cc", "Cs") and letter not in allowed for letter in text):
        raise Refused("hostile", f"{name}: contains control characters")

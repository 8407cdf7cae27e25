"""Shared by several sources: coded cells, values on which rows agree, BI-RADS of a breast, rows without identifiers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from shards.errors import Refused
from shards.schema import SourceStudy, SourceView

T = TypeVar("T")

AGE = re.compile(r"[1-9]\d?|1[0-2]\d")  # years


def read_code(row: Any, column: str, codes: Mapping[str, Mapping[str, Any]], message: str) -> Any:
    """The value of a coded cell by `codes[column]`; None for an empty cell.

    Raises `Refused` ("label") with the `message` of the source, which may have the format fields {row}, {column} and
    {text}, for a code that the data set does not document.
    """
    text = getattr(row, column)
    if text is not None and text not in codes[column]:
        raise Refused("label", message.format(row=row, column=column, text=text[:40]))
    return codes[column].get(text)


def agreed(values: Iterable[T | None]) -> T | None:
    """The one value among `values`; None if there is none, or if there are several."""
    stated = {value for value in values if value is not None}
    return stated.pop() if len(stated) == 1 else None


def agreed_age(texts: Iterable[str | None]) -> int | None:
    """The age in years (1 to 129) if all rows that state one agree."""
    return agreed(int(text) for text in texts if text and AGE.fullmatch(text))


def breast_birads(categories: Iterable[int | None]) -> int | None:
    """BI-RADS of a breast from its findings: the highest category, but 0 if one is 0 and none is above 2.

    0 (needs additional imaging) outranks 1 (negative) and 2 (benign). None if no finding has a category.
    """
    stated = {category for category in categories if category is not None}
    highest = max(stated, default=None)
    return 0 if highest is not None and highest <= 2 and 0 in stated else highest


def unidentified(refused: Iterable[SourceView]) -> Iterator[SourceStudy]:
    """One study without identifiers that reports the `refused` rows without any; nothing if there are none."""
    if views := tuple(refused):
        yield SourceStudy("", "", views)

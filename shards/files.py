"""Files that somebody else may have written: read only where reading them ends, and JSON only in plain numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from shards.schema import ShardError

LARGEST_JSON = 2**30  # bytes; the manifest of a million studies has some 2**27
LARGEST_INT = 2**53  # what every reader of JSON holds exactly (RFC 8259, section 6); a tar of 9 PB


def read_plain(path: Path, largest: int) -> bytes:
    """The bytes of a plain file. Raises `OSError`; `ShardError`, without the file's name, for what is none or larger.

    A pipe or a device is refused before it is opened: reading it might never end.
    """
    if path.exists() and not path.is_file():
        raise ShardError("is a folder" if path.is_dir() else "is no plain file")
    with path.open("rb") as file:
        data = file.read(largest + 1)
    if len(data) > largest:
        raise ShardError(f"holds more than {largest} bytes")
    return data


def read_json(path: Path) -> Any:
    """The document in a plain file. Raises `OSError`, and `ValueError` for what `parse_json` or `read_plain` refuse."""
    return parse_json(read_plain(path, LARGEST_JSON))


def parse_json(data: bytes) -> Any:
    """A JSON document. Raises `ValueError` also for NaN, infinities, integers beyond 2**53, and endless nesting."""
    try:
        return json.loads(data, parse_constant=_no_number, parse_int=_integer, parse_float=_finite)
    except RecursionError:
        raise ValueError("is nested too deeply") from None


def _no_number(word: str) -> float:
    raise ValueError(f"{word} is no number of JSON")


def _integer(text: str) -> int:
    if len(text) > 17 or abs(int(text)) > LARGEST_INT:
        raise ValueError(f"{text[:20]} is no integer between -2**53 and 2**53")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is too large a number")
    return value

"""Settings by their dotted keys, such as `train.steps`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def flat(document: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested dictionaries to dotted keys; an empty dictionary stays a value."""
    found: dict[str, Any] = {}
    for key, value in document.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def is_among(key: str, names: Iterable[str]) -> bool:
    """Is `key` one of `names`, or within a section that is: `pack.root` within `pack`?"""
    return any(key == name or key.startswith(f"{name}.") for name in names)

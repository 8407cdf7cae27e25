"""Names of points: readable, made of what differs, and the same whatever other points there are.

`clip_lr-0.001_seed-1`: the recipe's name, then each axis with its value. Letters, digits and `.+_-` only, so that a
name needs no quotes in a shell and is a folder on every file system.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from mama.settings.schema import Config
from mama.settings.values import known_keys
from mama.sweep.sweep import OWN

LONGEST = 100  # bytes of a name
LONGEST_VALUE = 40
UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")


def name_of(differs: dict[str, Any], recipe: str) -> str:
    """The name of the point that `differs` (axis -> value); `recipe` is for one in which only the seed does."""
    parts = [] if differs.keys() - {"seed"} else [_text(recipe)]
    parts += [_text(value) if axis == "recipe" else f"{short(axis)}-{token(value)}" for axis, value in differs.items()]
    name = "_".join(parts)
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 9]}-{digest(differs)[:8]}"


def unique(names: Sequence[str], differs: Sequence[dict[str, Any]], taken: Iterable[str] = ()) -> list[str]:
    """The names, with a digest of what differs for those that are equal, `taken`, or the name of the sweep's files."""
    count = Counter(name.lower() for name in (*names, *taken, OWN))  # some file systems do not tell case
    pairs = zip(names, differs, strict=True)
    return [name if count[name.lower()] == 1 else f"{name}-{digest(of)[:8]}" for name, of in pairs]


def short(axis: str) -> str:
    """The last part of a dotted setting where no other setting ends in it, whether the sweep has that one or not.

    Settings of fine-tuning, which has a learning rate and steps of its own, are always whole.
    """
    last = axis.rpartition(".")[2]
    keys = (key for key in known_keys(Config) if not key.startswith("finetune."))
    same = [key for key in keys if key.rpartition(".")[2] == last]
    return last if same == [axis] else UNSAFE.sub("-", axis)


def token(value: Any) -> str:
    """A value in a name: as short as it is safe, with a digest where something is left out."""
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, int | float):
        return repr(value).removesuffix(".0").replace("e+", "e")
    if isinstance(value, dict):
        return _cut("+".join(f"{key}-{token(of)}" for key, of in value.items()), value)
    if isinstance(value, list | tuple):
        return _cut("+".join(map(token, value)) or "none", value)
    return _text(str(value))


def digest(value: Any) -> str:
    """A digest of a value, the same for lists and tuples."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _text(text: str) -> str:
    """A text itself if it is safe; of a path or hub name the last part, with a digest of the whole."""
    safe = UNSAFE.sub("-", text.rstrip("/").rpartition("/")[2])
    return _cut(safe, text, whole=safe == text != "")


def _cut(name: str, value: Any, whole: bool = True) -> str:
    """`name`, at most `LONGEST_VALUE` and a digest of `value` where it is not the whole value."""
    return name if whole and len(name) <= LONGEST_VALUE else f"{name[:LONGEST_VALUE]}-{digest(value)[:6]}"

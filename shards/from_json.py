"""Typed reading of untrusted JSON: a document becomes a dataclass if it has all fields, each of the declared type."""

from __future__ import annotations

import json
import math
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")
LARGEST_INT = 2**53  # the largest exact integer in every JSON reader (RFC 8259, section 6)
WORDS = {int: "a count", float: "a number", str: "a text", bool: "true or false", dict: "a mapping", tuple: "a list"}


def parse_json(data: bytes) -> Any:
    """Parse JSON. Raises `ValueError`, also for NaN, infinities, integers beyond 2**53 and too deep nesting."""
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


def from_json(made: type[T], document: Any) -> T:
    """The dataclass `made` from a parsed document; lists become tuples.

    Integers are counts, sizes and positions in all classes read here: none may be negative. Raises `ValueError` that
    names the first field that is missing, unknown or of another type.
    """
    value: T = _value(made, document, "")
    return value


def _value(hint: Any, value: Any, where: str) -> Any:
    if hint is Any:
        return value
    kind, arguments = get_origin(hint) or hint, get_args(hint)
    if kind is UnionType:  # X | None
        (some,) = (argument for argument in arguments if argument is not NoneType)
        return None if value is None else _value(some, value, where)
    if is_dataclass(kind):
        return _made(kind, value, where)
    if kind is Literal:
        if not any(type(value) is type(one) and value == one for one in arguments):
            raise ValueError(f"{where}: {value!r:.40} is not one of {', '.join(map(str, arguments))}")
        return value
    given = float if kind is float and type(value) is int else tuple if type(value) is list else type(value)
    if given is not kind or (kind is int and value < 0):
        raise ValueError(f"{where}: {value!r:.40} is not {WORDS[kind]}")
    if kind is dict:
        return {name: _value(arguments[1], item, f"{where}.{name}") for name, item in value.items()}
    if kind is not tuple:
        return value
    plain = arguments in ((str, ...), (int, ...)) and {*map(type, value)} <= {arguments[0]}  # a manifest has millions
    if plain and (arguments[0] is str or min(value, default=0) >= 0):
        return tuple(value)
    if arguments[1:] == (...,):
        return tuple([_value(arguments[0], item, where) for item in value])
    if len(value) != len(arguments):
        raise ValueError(f"{where}: holds {len(value)} values, expected {len(arguments)}")
    return tuple(_value(part, item, where) for part, item in zip(arguments, value, strict=True))


def _made(made: Any, document: Any, where: str) -> Any:
    if not isinstance(document, dict):
        raise ValueError(f"{where or 'the document'}: {document!r:.40} is not {WORDS[dict]}")
    hints, needed = _fields(made)
    if strange := sorted(document.keys() - hints.keys()) + sorted(needed - document.keys()):
        raise ValueError(f"{where}.{strange[0]}: is missing, or there is no such field".removeprefix("."))
    return made(
        **{name: _value(hints[name], item, f"{where}.{name}".removeprefix(".")) for name, item in document.items()}
    )


@cache
def _fields(made: Any) -> tuple[dict[str, Any], frozenset[str]]:
    needed = [f.name for f in fields(made) if f.default is MISSING and f.default_factory is MISSING]
    return get_type_hints(made), frozenset(needed)

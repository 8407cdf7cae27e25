"""Do the values of a dataclass that was read from JSON have the types that it declares?"""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints


def require_types(instance: Any) -> None:
    """Raises `ValueError`, which names the field, where a value has another type; a bool is no number."""
    hints = get_type_hints(type(instance))
    for field in fields(instance):
        if not _fits(getattr(instance, field.name), hints[field.name]):
            raise ValueError(field.name)


def _fits(value: Any, hint: Any) -> bool:
    kind, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if kind is UnionType:
        return any(_fits(value, choice) for choice in arguments)
    if kind is tuple and arguments[-1] is Ellipsis:
        return isinstance(value, tuple) and all(_fits(each, arguments[0]) for each in value)
    if kind is tuple:
        return isinstance(value, tuple) and len(value) == len(arguments) and all(map(_fits, value, arguments))
    if kind is dict:
        key, content = arguments
        return isinstance(value, dict) and all(_fits(k, key) and _fits(v, content) for k, v in value.items())
    if type(value) is not hint:
        return False
    hints = get_type_hints(hint) if is_dataclass(hint) else {}
    return all(_fits(getattr(value, name), hints[name]) for name in hints)

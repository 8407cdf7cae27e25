"""Convert YAML nodes and `key=value` texts to values of their setting's type.

Texts are kept as written: `1.10`, `007`, `yes` and `12:30` are texts if the setting is a text. A whole number has
decimal digits without a leading 0 or `_`; a number may have a point and an exponent (1.0e-3, 1e-3, .5); a truth value
is `true` or `false`. The free dictionaries (`vision.config`, `text.config`, `pack.options`, sbatch's options) have no
types: a value that is written like one of those, or as `null`, is one unless it is quoted; all else is text. Their
keys are always texts.
"""

from __future__ import annotations

import math
import re
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin

import yaml

from mama.errors import ConfigError
from mama.settings.yaml_text import NULL, is_null, items, listed, parse, reason, shown

INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
NUMBER = re.compile(r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
NOT_FINITE = re.compile(r"[-+]?\.?(inf|nan)", re.IGNORECASE)
DIGITS = re.compile(r"[-+]?[0-9_]{1,30}")
TRUTH = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
LARGEST_INT = 2**63 - 1
WORDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}


def value_of(hint: Any, node: yaml.Node, key: str) -> Any:
    """The value of `node` as the type `hint`. Raises `ConfigError`: `key`, the value as written, the fix."""
    kind, arguments = get_origin(hint) or hint, get_args(hint)
    if kind is UnionType:  # X | None
        (some,) = (argument for argument in arguments if argument is not NoneType)
        return None if is_null(node) else value_of(some, node, key)
    if kind is list:
        return _list(arguments[0], node, key)
    if kind is tuple:
        return _tuple(arguments, node, key)
    if kind is dict:
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{key}: {shown(node)} is not a mapping; write {{key: value}}, or {{}} for an empty one")
        return free_value(node, key)
    if kind is Literal:
        return _choice(arguments, node, key)
    if not isinstance(node, yaml.ScalarNode):
        raise ConfigError(f"{key}: {shown(node)} is not {WORDS[kind]}")
    return _text(node, key) if kind is str else _scalar(kind, node, key)


def free_value(node: yaml.Node, key: str) -> Any:
    """The value of `node` in a free dictionary, see the head of this file. Raises `ConfigError`, as `value_of`."""
    if isinstance(node, yaml.MappingNode):
        return {name: free_value(value, f"{key}.{name}") for name, value in items(node)}
    if isinstance(node, yaml.SequenceNode):
        return [free_value(value, key) for value in node.value]
    text: str = node.value
    if is_text(text) or (isinstance(node, yaml.ScalarNode) and node.style):
        return text
    if is_null(node):
        return None
    if text in TRUTH:
        return TRUTH[text]
    return _integer(text, key) if INTEGER.fullmatch(text) else _number(text, key)


def is_text(text: str) -> bool:
    """Whether an unquoted `text` in a free dictionary is a text: not null, a truth value or a number."""
    number = NUMBER.fullmatch(text) or (NOT_FINITE.fullmatch(text) and "." in text)
    return not number and text not in TRUTH and text not in NULL


def typed_node(hint: Any, text: str, key: str) -> yaml.Node:
    """The YAML node of the value in `key=text`: lists, mappings and quotes are parsed, all else is kept as written.

    There are no comments: ` #3` belongs to the value. Raises `ConfigError` for a list or mapping that is no YAML.
    """
    of_text = hint in (str, str | None)
    plain = yaml.ScalarNode("", text)
    if not text.lstrip().startswith(("'", '"') if of_text else ("'", '"', "[", "{")):
        return plain
    try:
        node = parse(text)
        if node is not None and node.end_mark.index == len(text.rstrip()):
            return plain if of_text and not isinstance(node, yaml.ScalarNode) else node
        why = "more follows its end"
    except yaml.YAMLError as error:
        why = reason(error)
    if of_text:
        return plain
    raise ConfigError(f"{key}: {shown(plain)} cannot be read: {why}; put a text with brackets or commas in quotes")


def _list(of: Any, node: yaml.Node, key: str) -> list[Any]:
    if is_null(node):
        raise ConfigError(f"{key}: {shown(node)} is not a list; write [] for an empty one")
    if not isinstance(node, yaml.SequenceNode):
        raise ConfigError(f"{key}: {shown(node)} is not a list; {listed(node)}")
    return [value_of(of, item, key) for item in node.value]


def _tuple(of: tuple[Any, ...], node: yaml.Node, key: str) -> tuple[Any, ...]:
    given = node.value if isinstance(node, yaml.SequenceNode) else []
    if len(given) != len(of):
        example = ", ".join(str(number) for number in range(1, len(of) + 1))
        raise ConfigError(f"{key}: {shown(node)} is not a list of {len(of)} values; write for example [{example}]")
    return tuple(value_of(hint, item, key) for hint, item in zip(of, given, strict=True))


def _choice(known: tuple[Any, ...], node: yaml.Node, key: str) -> Any:
    text = node.value.strip() if isinstance(node, yaml.ScalarNode) else None
    for choice in known:
        if text == str(choice) or (text in TRUTH and TRUTH[text] is choice):
            return choice
    choices = ", ".join(str(choice).lower() if isinstance(choice, bool) else repr(choice) for choice in known)
    raise ConfigError(f"{key}: {shown(node)} is not one of {choices}")


def _text(node: yaml.ScalarNode, key: str) -> str:
    text: str = node.value
    if text == "null" and not node.style:
        raise ConfigError(f"{key}: null, but this is a text; leave the line out, or write '\"null\"' for the word")
    if bad := next((c for c in text if ord(c) < 32 or 127 <= ord(c) < 160 or 0xD800 <= ord(c) < 0xE000), None):
        raise ConfigError(f"{key}: {shown(node)} holds {bad!a}, a control character or none of UTF-8; take it out")
    return text


def _scalar(kind: type, node: yaml.ScalarNode, key: str) -> Any:
    text: str = node.value.strip()
    if kind is bool and text in TRUTH:
        return TRUTH[text]
    if kind is int and INTEGER.fullmatch(text):
        return _integer(text, key)
    if kind is float and (NUMBER.fullmatch(text) or NOT_FINITE.fullmatch(text)):
        return _number(text, key)
    fix = ""
    if kind is not bool and DIGITS.fullmatch(text) and text.strip("+-_"):
        fix = f"; write {int(text.replace('_', ''))}"
    raise ConfigError(f"{key}: {shown(node)} is not {WORDS[kind]}{fix}")


def _integer(text: str, key: str) -> int:
    if len(text) > 20 or abs(int(text)) > LARGEST_INT:
        raise ConfigError(f"{key}: {text[:30]} is too large; whole numbers end at {LARGEST_INT}")
    return int(text)


def _number(text: str, key: str) -> float:
    if NOT_FINITE.fullmatch(text):
        return float(text.replace(".", ""))
    value = float(text)
    if not math.isfinite(value):
        raise ConfigError(f"{key}: {text[:30]} is too large a number")
    return value

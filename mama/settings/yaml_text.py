"""Parse YAML from untrusted files to a tree in which every scalar keeps its text as written.

`mama.settings.typed_values` converts the scalars to the types of their settings. Refused at once, in one line: anchors
and aliases (a few lines of them can expand to gigabytes), tags, merge keys, duplicate keys, deep nesting, pipes and
devices.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from mama.errors import ConfigError
from shards.errors import ShardError, one_line
from shards.files import read_plain

Node = yaml.Node  # for those who do not know YAML
LARGEST = 2**20  # bytes; a configuration has about 2**12
NULL = ("null", "Null", "NULL", "~", "")
DEEPEST = 32  # nested mappings and lists


def read(file: Path, largest: int = LARGEST) -> yaml.Node | None:
    """Parse a file; None if it is empty. Raises `OSError`, and `ConfigError` with the file's name."""
    try:
        return parse(read_plain(file, largest).decode())
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: is not a text file in UTF-8 ({error.reason} at byte {error.start})") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: not YAML: {reason(error)}") from error
    except ShardError as error:
        raise ConfigError(f"{file}: {error}") from error


def parse(text: str) -> yaml.Node | None:
    """Parse `text`; None if it is empty. Raises `yaml.YAMLError`."""
    loader = _Loader(text)
    try:
        return loader.get_single_node()
    finally:
        loader.dispose()


def reason(error: yaml.YAMLError) -> str:
    """The problem, with its line and column."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return one_line(error)
    return f"{error.problem} (line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1})"


def items(node: yaml.MappingNode) -> list[tuple[str, yaml.Node]]:
    """The keys of a mapping as written, and their values."""
    return [(key.value, value) for key, value in node.value]


def mapping(node: yaml.Node, key: str, may_be_empty: bool = False) -> yaml.MappingNode:
    """`node`, which must be a mapping. Raises `ConfigError` that names `key`."""
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{key}: {shown(node)} is not a mapping; write {{key: value}}")
    if not node.value and not may_be_empty:
        raise ConfigError(f"{key}: is empty; name at least one entry, or leave it out")
    return node


def sequence(node: yaml.Node, key: str) -> list[yaml.Node]:
    """The nodes of a list that must not be empty. Raises `ConfigError` that names `key`."""
    if not is_list(node):
        raise ConfigError(f"{key}: {shown(node)} is not a list; {listed(node)}")
    if not node.value:
        raise ConfigError(f"{key}: is empty; name at least one value, or leave it out")
    return list(node.value)


def shown(node: yaml.Node) -> str:
    """The value as error messages show it, cut to 80 characters."""
    if isinstance(node, yaml.MappingNode):
        text = "{" + ", ".join(f"{key}: {shown(value)}" for key, value in items(node)) + "}"
    elif isinstance(node, yaml.SequenceNode):
        text = "[" + ", ".join(shown(value) for value in node.value) + "]"
    else:
        text = "null" if is_null(node) else repr(node.value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def listed(node: yaml.Node) -> str:
    """How to write a list of what was given in place of one."""
    return f"write [{node.value if isinstance(node, yaml.ScalarNode) else '...'}]"


def is_list(node: yaml.Node) -> bool:
    """Whether a node is a list."""
    return isinstance(node, yaml.SequenceNode)


def is_null(node: yaml.Node) -> bool:
    """Whether a scalar is null: unquoted `null`, `~` or nothing (YAML 1.2.2, section 10.3.2)."""
    return isinstance(node, yaml.ScalarNode) and not node.style and node.value in NULL


class _Loader(yaml.BaseLoader):
    """PyYAML's parser, which alone would expand aliases and keep the last of two equal keys."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        if event.anchor is not None:
            raise _refused("anchors and aliases are not supported; write the value out, or *x and &x in quotes", event)
        if event.tag is not None:
            raise _refused(f"the tag {event.tag} is not supported; leave it out, or write the value in quotes", event)
        if self.depth == DEEPEST:
            raise _refused(f"nested deeper than {DEEPEST} levels", event)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _refused("a list or mapping cannot be a key", key)
            if key.value == "<<" and not key.style:
                raise _refused("merge keys are not supported; write the values out", key)
            if key.value in seen:
                raise _refused(f"the key {key.value} is given twice", key)
            seen.add(key.value)
        return node


def _refused(why: str, where: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=why, problem_mark=where.start_mark)

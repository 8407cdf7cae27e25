"""Settings by their dotted names: the values that YAML and `key=value` give them, and the configuration of values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_origin, get_type_hints

import yaml

from mama.errors import ConfigError
from mama.settings.schema import Config
from mama.settings.typed_values import free_value, typed_node, value_of
from mama.settings.yaml_text import LARGEST, Node, items, read, shown
from shards.errors import did_you_mean

T = TypeVar("T")

# The name of a setting in other frameworks -> its name here.
SYNONYMS = {
    "learning_rate": "optim.lr", "warmup": "optim.warmup_steps", "grad_clip": "optim.clip_norm",
    "max_grad_norm": "optim.clip_norm", "max_steps": "train.steps", "num_steps": "train.steps", "epochs": "train.steps",
    "max_epochs": "train.steps", "num_epochs": "train.steps", "batch_size": "train.global_batch",
    "gpus": "train.ranks", "devices": "train.ranks", "world_size": "train.ranks", "fp16": "train.precision",
    "bf16": "train.precision", "dtype": "train.precision", "gradient_checkpointing": "train.activation_checkpointing",
    "num_workers": "data.workers", "temperature": "loss.initial_scale", "img_size": "data.image_size",
}  # fmt: skip


def root(file: Path, largest: int = LARGEST) -> yaml.MappingNode:
    """The mapping that a file of at most `largest` bytes holds. Raises `ConfigError` if it holds something else."""
    node = read(file, largest)
    if node is None:
        raise ConfigError(f"{file}: holds no setting; name at least one, or give a shipped file")
    if not isinstance(node, yaml.MappingNode):
        kind = "list" if isinstance(node, yaml.SequenceNode) else "text"
        raise ConfigError(f"{file}: holds a {kind}, expected `key: value` lines")
    return node


def document(section: Any, file: Path) -> dict[str, Any]:
    """Dotted key -> value, for the settings of the dataclass `section` in a file, where they are nested."""
    node = root(file)
    try:
        return dict(_values(section, section, node))
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error


def flat(pairs: Iterable[tuple[str, Node]], prefix: str = "") -> dict[str, Node]:
    """Dotted key -> node, for the settings of a run in the (key, node) `pairs` of a mapping, nested or dotted."""
    found: dict[str, Node] = {}
    for name, value in pairs:
        key = prefix + name
        hint = hint_of(key)
        new = flat(items(section_of(hint, value, key)), f"{key}.") if is_dataclass(hint) else {key: value}
        if twice := next(iter(found.keys() & new.keys()), None):
            raise ConfigError(f"{twice}: is given twice, nested and dotted")
        found |= new
    return found


def assigned(pairs: Iterable[tuple[str, Node]]) -> dict[str, Any]:
    """Dotted key -> value, for the settings of a run in the (key, node) `pairs` of a mapping, nested or dotted."""
    return {key: typed(key, value) for key, value in flat(pairs).items()}


def override(text: str) -> dict[str, Any]:
    """Dotted key -> value, for a `key=value`; several for a whole section (`train={steps: 3, ranks: 1}`)."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"{text}: expected key=value, for example train.steps=100")
    return assigned([(key, typed_node(hint_of(key), value, key))])


def typed(key: str, node: Node) -> Any:
    """The value of one setting of a run, or of a key inside of a free dictionary."""
    hint = hint_of(key)
    return free_value(node, key) if hint is Any else value_of(hint, node, key)


def put(values: dict[str, Any], new: dict[str, Any]) -> None:
    """Set the settings `new` in `values`: both dotted key -> value."""
    for key, value in new.items():
        free = _free_part(key)
        values[free or key] = _with(values.get(free, {}), key.removeprefix(f"{free}."), value, key) if free else value


def build(section: type[T], values: dict[str, Any], prefix: str = "") -> T:
    """The dataclass `section` with `values` (dotted key -> value). Raises what it raises."""
    hints = _hints(section)
    given = {name: values[prefix + name] for name in hints if prefix + name in values}
    sections = [(name, hint) for name, hint in hints.items() if isinstance(hint, type) and is_dataclass(hint)]
    parts = {name: build(hint, values, f"{prefix}{name}.") for name, hint in sections}
    return section(**given, **parts)


def values_of(section: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value of every setting of a dataclass, such as a `Config`: what `build` makes it of."""
    found: dict[str, Any] = {}
    for name in _hints(type(section)):
        value = getattr(section, name)
        found |= values_of(value, f"{prefix}{name}.") if is_dataclass(value) else {prefix + name: value}
    return found


def with_settings(config: Config, new: dict[str, Any]) -> Config:
    """A copy of `config` with other values (dotted key -> value)."""
    values = values_of(config)
    put(values, new)
    return build(Config, values)


def hint_of(key: str) -> Any:
    """The type of a setting of a run, or a dataclass for a section; `Any` inside of a free dictionary."""
    known = known_keys(Config)
    if key in known:
        return known[key]
    if _free_part(key):
        return Any
    raise ConfigError(f"{key}: unknown key{suggestion(key, Config)}")


def section_of(hint: Any, node: Node, key: str) -> yaml.MappingNode:
    """`node` as the mapping of a section, the dataclass `hint`."""
    if not isinstance(node, yaml.MappingNode):
        first = fields(hint)[0].name
        raise ConfigError(f"{key}: {shown(node)}, but this is a section; its first key is {key}.{first}")
    return node


@cache
def known_keys(section: Any, prefix: str = "") -> dict[str, Any]:
    """Every dotted key of a configuration -> its type."""
    known: dict[str, Any] = {}
    for name, hint in _hints(section).items():
        known[prefix + name] = hint
        if isinstance(hint, type) and is_dataclass(hint):
            known |= known_keys(hint, f"{prefix}{name}.")
    return known


def suggestion(key: str, whole: Any) -> str:
    """`; did you mean ...?` with the keys of the same name in other sections, else with the most similar key."""
    known, name = known_keys(whole), key.rpartition(".")[2]
    same = [k for k in known if k == SYNONYMS.get(name) or k.endswith(f".{name}")]
    return f"; did you mean {' or '.join(same)}?" if same else did_you_mean(key, known)


def _values(whole: Any, section: Any, node: yaml.MappingNode, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) for each setting in the mapping `node` of `section`, a part of `whole`."""
    hints = _hints(section)
    for name, value in items(node):
        key = prefix + name
        if name not in hints:
            nested = f"; in a file it is nested: {key.replace('.', ': {', 1)}: ...}}"
            raise ConfigError(f"unknown key {key}{nested if key in known_keys(whole) else suggestion(key, whole)}")
        hint = hints[name]
        if not is_dataclass(hint):
            yield key, value_of(hint, value, key)
        else:
            yield from _values(whole, hint, section_of(hint, value, key), f"{key}.")


def _free_part(key: str) -> str:
    """The free dictionary inside of which a key is: "vision.config" for "vision.config.hidden_size"; else ""."""
    known = known_keys(Config)
    return next((name for name in known if key.startswith(f"{name}.") and get_origin(known[name]) is dict), "")


def _with(dictionary: Any, inside: str, value: Any, key: str) -> dict[str, Any]:
    """A copy of `dictionary` with `value` at the dotted key `inside`."""
    first, _, rest = inside.partition(".")
    if not isinstance(dictionary, dict) or not first or inside.endswith("."):
        raise ConfigError(f"{key}: there is no mapping that could hold this key")
    return {**dictionary, first: _with(dictionary.get(first, {}), rest, value, key) if rest else value}


def _hints(section: Any) -> dict[str, Any]:
    return _cached_hints(section)


_cached_hints = cache(get_type_hints)

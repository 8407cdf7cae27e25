"""Load settings from YAML and `key=value`, and save them. A mistake is one line: setting, value, fix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_origin, get_type_hints

import yaml

from mama.errors import ConfigError
from mama.settings.schema import Config
from mama.settings.typed_values import free_value, is_text, typed_node, value_of
from mama.settings.yaml_text import items, read, shown
from shards.errors import did_you_mean
from shards.files import atomic_write
from slurm.profile import Profile, SlurmError

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


def shipped_configs() -> Path:
    """The folder of the shipped recipes and profiles, in a wheel or in a checkout."""
    package = Path(__file__).parent.parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Load the dataclass defaults, then the YAML at `path`, then the `key=value` overrides in their order.

    `path` is a file, or the name of a shipped recipe such as `quickstart`. A value replaces the one before it; lists
    and free dictionaries (`vision.config={...}`) are replaced as a whole. A key inside such a dictionary
    (`vision.config.hidden_size=48`) changes that key alone. Raises `ConfigError`.
    """
    file = find(path)
    values = _document(Config, file)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"{override}: expected key=value, for example train.steps=100")
        _change(values, key, text)
    return _build(Config, values)


def with_settings(config: Config, settings: dict[str, Any]) -> Config:
    """A copy of `config` with other values of some settings, by dotted key. Raises `ConfigError`."""
    if unknown := next((key for key in settings if key not in _known(Config)), None):
        raise ConfigError(f"{unknown}: unknown key{_hint(unknown, Config)}")
    return _build(Config, _dotted(config) | settings)


def load_profile(path: str | Path) -> Profile:
    """Load the resources of a job from a YAML file, or from a shipped one by its name, such as `local`.

    Raises `ConfigError` or `SlurmError` with the file and the key.
    """
    file = find(path, "slurm")
    try:
        return _build(Profile, _document(Profile, file))
    except SlurmError as error:
        raise SlurmError(f"{file}: {error}") from error


def find(path: str | Path, kind: str = "") -> Path:
    """The file at `path`, or the shipped recipe (or profile, for `kind` "slurm") of that name.

    Raises `ConfigError` if there is neither.
    """
    shipped = shipped_configs() / kind
    for candidate in (Path(path), shipped_configs() / path, shipped / f"{path}.yaml"):
        if candidate.exists() and not candidate.is_dir():
            return candidate
    wanted = "profile" if kind else "run folder or configuration file"
    names = ", ".join(sorted(p.stem for p in shipped.glob("*.yaml")))
    raise ConfigError(f"{path}: no such {wanted}, nor a shipped one ({names})")


def is_shipped(name: str) -> bool:
    """Whether a recipe of this name is shipped."""
    return (shipped_configs() / f"{name}.yaml").is_file()


def setting_for(option: str) -> str:
    """How to write the setting that a user mistook for an `option` such as --steps."""
    suggestion = _suggestion(option.lstrip("-").replace("-", "_"), Config)
    return f"Settings follow CONFIG as key=value, for example train.steps=100{suggestion}"


def save(config: Config, path: Path) -> None:
    """Write the resolved config, so that `load(path)` returns it."""
    atomic_write(path, as_yaml(config).encode())


def load_run(run: Path, overrides: Sequence[str] = ()) -> Config:
    """Load the resolved config of a run folder.

    Raises `ConfigError` if it is missing or empty: defaults in its place would be another run's.
    """
    file = run / "config.yaml"
    if not file.exists():
        raise ConfigError(f"{file}: no such configuration file; if {run} was trained, restore it from a copy")
    if file.is_file() and not file.read_bytes().strip(b"\0 \n"):
        raise ConfigError(f"{file}: is empty; restore it from a copy")
    return load(file, overrides)


def missing_settings(run: Path) -> list[str]:
    """The settings that the resolved config of a run lacks, as the release that wrote it did not have them."""
    given = _document(Config, run / "config.yaml")
    return [key for key, hint in _known(Config).items() if key not in given and not is_dataclass(hint)]


def as_yaml(config: Config) -> str:
    """The resolved config as YAML, as `load` reads it."""
    return yaml.dump(_plain(asdict(config)), Dumper=_Dumper, sort_keys=False)


def _document(section: Any, file: Path) -> dict[str, Any]:
    """Dotted key -> value, for the settings in a file."""
    root = read(file)
    if root is None:
        raise ConfigError(f"{file}: holds no setting; name at least one, or give a shipped file")
    if not isinstance(root, yaml.MappingNode):
        kind = "list" if isinstance(root, yaml.SequenceNode) else "text"
        raise ConfigError(f"{file}: holds a {kind}, expected `key: value` lines")
    try:
        return dict(_values(section, section, root))
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error


def _values(whole: Any, section: Any, node: yaml.MappingNode, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) for each setting in the mapping `node` of `section`, a part of `whole`."""
    hints = get_type_hints(section)
    for name, value in items(node):
        key = prefix + name
        if name not in hints:
            raise ConfigError(f"unknown key {key}{_hint(key, whole)}")
        hint = hints[name]
        if not is_dataclass(hint):
            yield key, value_of(hint, value, key)
        else:
            yield from _values(whole, hint, _section(hint, value, key), f"{key}.")


def _section(hint: Any, node: yaml.Node, key: str) -> yaml.MappingNode:
    if not isinstance(node, yaml.MappingNode):
        first = fields(hint)[0].name
        raise ConfigError(f"{key}: {shown(node)}, but this is a section; its first key is {key}.{first}")
    return node


def _change(values: dict[str, Any], key: str, text: str) -> None:
    """Apply the override `key=text` to `values`."""
    known = _known(Config)
    free = next((name for name in known if key.startswith(f"{name}.") and get_origin(known[name]) is dict), None)
    if free:
        inside = key.removeprefix(f"{free}.").split(".")
        value = free_value(typed_node(None, text, key), key)
        values[free] = _with(values.get(free, {}), inside, value, key)
    elif key not in known:
        raise ConfigError(f"{key}: unknown key{_hint(key, Config)}")
    elif is_dataclass(known[key]):
        node = _section(known[key], typed_node(None, text, key), key)
        values.update(_values(Config, known[key], node, f"{key}."))
    else:
        values[key] = value_of(known[key], typed_node(known[key], text, key), key)


def _with(dictionary: Any, inside: list[str], value: Any, key: str) -> dict[str, Any]:
    """A copy of `dictionary` with `value` at the nested keys `inside`."""
    if not isinstance(dictionary, dict) or "" in inside:
        raise ConfigError(f"{key}: there is no mapping that could hold this key")
    first, *rest = inside
    return {**dictionary, first: _with(dictionary.get(first, {}), rest, value, key) if rest else value}


def _build(section: type[T], values: dict[str, Any], prefix: str = "") -> T:
    hints = get_type_hints(section)
    given = {name: values[prefix + name] for name in hints if prefix + name in values}
    sections = [(name, hint) for name, hint in hints.items() if isinstance(hint, type) and is_dataclass(hint)]
    parts = {name: _build(hint, values, f"{prefix}{name}.") for name, hint in sections}
    return section(**given, **parts)


def _dotted(section: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value, for every setting of a configuration."""
    found: dict[str, Any] = {}
    for item in fields(section):
        value = getattr(section, item.name)
        found |= _dotted(value, f"{prefix}{item.name}.") if is_dataclass(value) else {prefix + item.name: value}
    return found


@cache
def _known(section: Any, prefix: str = "") -> dict[str, Any]:
    """Every dotted key of a configuration -> its type."""
    known: dict[str, Any] = {}
    for name, hint in get_type_hints(section).items():
        known[prefix + name] = hint
        if isinstance(hint, type) and is_dataclass(hint):
            known |= _known(hint, f"{prefix}{name}.")
    return known


def _hint(key: str, whole: Any) -> str:
    """The end of the message about an unknown `key`: how to nest it, or which keys may be meant."""
    if key in _known(whole):
        return f"; in a file it is nested: {key.replace('.', ': {', 1)}: ...}}"
    return _suggestion(key, whole)


def _suggestion(key: str, whole: Any) -> str:
    """`; did you mean ...?` with the keys of the same name in other sections, else with the most similar key."""
    known, name = _known(whole), key.rpartition(".")[2]
    same = [k for k in known if k == SYNONYMS.get(name) or k.endswith(f".{name}")]
    return f"; did you mean {' or '.join(same)}?" if same else did_you_mean(key, known)


class _Dumper(yaml.SafeDumper):
    """Write YAML as `typed_values` reads it: quote also texts that look like its numbers, such as 1e-3."""


def _quoted_where_needed(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if is_text(text) else "'")


_Dumper.add_representer(str, _quoted_where_needed)


def _plain(value: Any) -> Any:
    """`value` in YAML's own types: tuples become lists."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value

"""Settings from YAML and `key=value`, and back: the only place that knows OmegaConf.

Mistakes become one line that names the field, its value and the fix.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mama.config import Config, ConfigError
from shards.manifest import write_aside


def shipped_configs() -> Path:
    """The folder of the recipes that come with the distribution, in a wheel or in a checkout."""
    package = Path(__file__).parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Dataclass defaults, then the YAML at `path`, then `key=value` overrides.

    `path` may be a file, or the name of a shipped recipe such as `quickstart`. Raises `ConfigError`.
    """
    file = find(path)
    try:
        document = yaml.load(file.read_text(), _Loader) or {}
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: is not a text file in UTF-8 ({error.reason} at byte {error.start})") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(document, dict):
        raise ConfigError(f"{file}: holds a {type(document).__name__}, expected `key: value` lines")
    config = _merge(OmegaConf.structured(Config), document, str(file))
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals:
            raise ConfigError(f"{override}: expected key=value, for example train.steps=100")
        config = _merge(config, override, key)
    return _build(config, str(file))


class _Loader(yaml.SafeLoader):
    """YAML that refuses a key given twice: PyYAML would let the last one win without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key.value} stands twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def find(path: str | Path) -> Path:
    """The configuration file that `path` names."""
    file = Path(path)
    candidates = [file, shipped_configs() / file, shipped_configs() / f"{file}.yaml"]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    shipped = ", ".join(sorted(p.stem for p in shipped_configs().glob("*.yaml")))
    raise ConfigError(f"{path}: no such configuration file, nor a shipped one ({shipped})")


def save(config: Config, path: Path) -> None:
    """Write the resolved configuration, so that `load(path)` gives it back."""
    text = yaml.safe_dump(_plain(asdict(config)), sort_keys=False)
    write_aside(path, text.encode())


def load_run(run: Path, overrides: Sequence[str] = ()) -> Config:
    """The resolved configuration in a run folder. An empty file is an error: its defaults would be another run's."""
    file = run / "config.yaml"
    if file.is_file() and not file.read_bytes().strip(b"\0 \n"):
        raise ConfigError(f"{file}: is empty; restore it from a copy")
    return load(file, overrides)


def _merge(base: DictConfig, more: dict[str, Any] | str, where: str) -> DictConfig:
    """`base` changed by a document, or by one `key=value`."""
    try:
        changes = OmegaConf.from_dotlist([more]) if isinstance(more, str) else OmegaConf.create(more)
        if misplaced := _misplaced(Config, OmegaConf.to_container(changes)):
            raise ConfigError(f"{where}: {misplaced.removeprefix(f'{where}: ')}")
        merged = OmegaConf.merge(base, changes)
    except (OmegaConfBaseException, yaml.YAMLError, TypeError, KeyError) as error:
        raise ConfigError(_one_line(error, where)) from error
    assert isinstance(merged, DictConfig)
    return merged


def _build(config: DictConfig, where: str) -> Config:
    try:
        built = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise ConfigError(_one_line(error, where)) from error
    assert isinstance(built, Config)
    return built


def _misplaced(section: Any, document: Any, prefix: str = "") -> str | None:
    """The first section, list or pair of `document` that is none, in words: OmegaConf's do not name the field."""
    for name, hint in get_type_hints(section).items():
        if not isinstance(document, dict) or name not in document:
            continue
        key, value = prefix + name, document[name]
        if is_dataclass(hint):
            if not isinstance(value, dict):
                return f"{key}: {value!r}, but this is a section; its first key is {key}.{fields(hint)[0].name}"
            if found := _misplaced(hint, value, f"{key}."):
                return found
        elif get_origin(hint) is list and not isinstance(value, list):
            return f"{key}: {value!r} is not a list; write [{value}]"
        elif get_origin(hint) is tuple and not _is_pair(value, get_args(hint)[0]):
            return f"{key}: {value!r} is not a pair of {get_args(hint)[0].__name__}; write for example [1, 2]"
    return None


def _is_pair(value: Any, number: type) -> bool:
    """Can `value` become two numbers? YAML reads 1e-1 as text, which is meant as a number all the same."""
    if not isinstance(value, list) or len(value) != 2 or any(isinstance(v, bool) for v in value):
        return False
    try:
        return all(number(v) == float(v) for v in value)
    except (TypeError, ValueError, OverflowError):
        return False


def _one_line(error: Exception, where: str) -> str:
    key = getattr(error, "full_key", None) or ""
    reason = str(error).splitlines()[0]
    known = _known_keys(Config)
    if key and key not in known and reason.startswith("Key "):
        close = [k for k in known if k.endswith(f".{key}")] or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]}?" if close else ""
        return f"{where}: unknown key {key}{hint}" if key != where else f"{where}: unknown key{hint}"
    return f"{where}: {key}: {reason}" if key and key != where else f"{where}: {reason}"


def _known_keys(section: Any, prefix: str = "") -> list[str]:
    """Every dotted key that a configuration may hold."""
    keys = []
    for f in fields(section):
        keys.append(prefix + f.name)
        factory = f.default_factory
        if isinstance(factory, type) and is_dataclass(factory):
            keys += _known_keys(factory, f"{prefix}{f.name}.")
    return keys


def _plain(value: Any) -> Any:
    """The same value in YAML's own types."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value

"""Load settings from YAML and `key=value`, and save them. A mistake is one line: setting, value, fix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from mama.errors import ConfigError
from mama.settings.schema import Config
from mama.settings.typed_values import is_text
from mama.settings.values import build, document, known_keys, override, put, suggestion
from shards.files import atomic_write
from slurm.profile import Profile, SlurmError


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
    values = document(Config, file)
    for change in overrides:
        put(values, override(change))
    return build(Config, values)


def load_profile(path: str | Path) -> Profile:
    """Load the resources of a job from a YAML file, or from a shipped one by its name, such as `local`.

    Raises `ConfigError` or `SlurmError` with the file and the key.
    """
    file = find(path, "slurm")
    try:
        return build(Profile, document(Profile, file))
    except SlurmError as error:
        raise SlurmError(f"{file}: {error}") from error


def find(path: str | Path, kind: str = "") -> Path:
    """The file at `path`, or the shipped recipe of that name.

    For `kind` "slurm" it is a profile, for "sweeps" a sweep, for "tasks" a task of an evaluation. Raises `ConfigError`
    if there is neither.
    """
    shipped = shipped_configs() / kind
    for candidate in (Path(path), shipped / path, shipped_configs() / path, shipped / f"{path}.yaml"):
        if candidate.exists() and not candidate.is_dir():
            return candidate
    wanted = {"slurm": "profile", "sweeps": "sweep", "tasks": "task", "": "run folder or configuration file"}[kind]
    names = ", ".join(sorted(p.stem for p in shipped.glob("*.yaml")))
    raise ConfigError(f"{path}: no such {wanted}, nor a shipped one ({names})")


def is_shipped(name: str) -> bool:
    """Whether a recipe of this name is shipped."""
    return (shipped_configs() / f"{name}.yaml").is_file()


def setting_for(option: str) -> str:
    """How to write the setting that a user mistook for an `option` such as --steps."""
    meant = suggestion(option.lstrip("-").replace("-", "_"), Config)
    return f"Settings follow CONFIG as key=value, for example train.steps=100{meant}"


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
    given = document(Config, run / "config.yaml")
    return [key for key, hint in known_keys(Config).items() if key not in given and not is_dataclass(hint)]


def as_yaml(config: Config) -> str:
    """The resolved config as YAML, as `load` reads it."""
    return yaml_of(asdict(config))


def yaml_of(values: dict[str, Any]) -> str:
    """A document of nested dictionaries as YAML, of which reading makes the same values."""
    return yaml.dump(_plain(values), Dumper=_Dumper, sort_keys=False)


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

"""Which settings of a run must stay when it is resumed. Without PyTorch, which is slow to import."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mama.errors import ConfigError
from mama.settings.load import load, load_run
from mama.settings.schema import Config

log = logging.getLogger(__name__)

# Settings, and whole sections of them, that may change when a run is resumed. Ranks and micro-batches decide how many
# negatives a pair has, unless train.grad_cache takes them from the whole step: a change is logged.
MAY_CHANGE = (
    *("pack", "eval", "finetune", "runs", "data.workers", "data.cache", "data.max_corrupt"),
    *("train.log_every", "train.save_every", "train.keep_checkpoints", "train.validate_every", "train.max_skips"),
    *("train.ranks", "train.micro_batch", "train.zero_stage", "train.offload"),
    *("train.attention", "train.activation_checkpointing", "train.compile", "train.timeout", "train.patience"),
    *("train.oversubscribe", "text.packing"),
)

# Settings that say where a run and what it was made of lie now.
PLACES = ("runs", "name", "data.shards", "data.cache", "text.model", "vision.model")
# Sections that describe a model; they are those of its training, whatever it is used for.
OF_MODEL = ("vision", "text", "heads", "loss")
# On how many ranks and the like it trained.
HOW = [key for key in MAY_CHANGE if key.startswith(("train.", "data.", "text."))]


def recorded(config: Config, changes: Sequence[str]) -> Config:
    """The settings that the run of `config` was trained with, of which the `key=value` changes may move `PLACES`.

    A recipe may have changed since: the run folder's record holds, where there is one. Raises `ConfigError` for another
    change that differs from it.
    """
    run = config.run_folder
    if not (run / "config.yaml").exists():
        return config
    made = load_run(run, changes)
    _require_same(run, load_run(run), made)
    made = replace(made, runs=config.runs, name=config.name)
    if other := changed_setting(flat(asdict(made)), flat(asdict(config))):
        log.warning("%s: was trained with another %s than this configuration has; its own settings hold", run, other)
    return made


def require_own_model(place: Path, changes: Sequence[str]) -> None:
    """Raise `ConfigError` if one of the `key=value` changes describes another model than that of `place`.

    `place`: a run folder, or a model folder by itself; nothing is compared where it has no config.yaml.
    """
    file = place / "config.yaml"
    if changes and file.is_file():
        _require_same(place, load(file), load(file, changes), OF_MODEL)


def _require_same(place: Path, before: Config, after: Config, sections: Sequence[str] | None = None) -> None:
    """Raise `ConfigError` for a setting of `sections`, or of all, that differs and is neither a place nor a `HOW`."""
    old, new = flat(asdict(before)), flat(asdict(after))
    for key in (*new, *old):
        counts = (sections is None or is_among(key, sections)) and not is_among(key, (*PLACES, *HOW))
        if counts and old.get(key) != new.get(key):
            now, then = (repr(values[key]) if key in values else "not set" for values in (new, old))
            raise ConfigError(
                f"{key}: {now}, but {place} was trained with {then}, which describes its model; leave it out"
            )


def changed_setting(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """Return the first dotted key that differs and is not in `MAY_CHANGE`; both arguments are flat settings."""
    keys = sorted(before.keys() | now.keys())
    return next((key for key in keys if before.get(key) != now.get(key) and not is_among(key, MAY_CHANGE)), None)


def flat(document: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings to dotted keys such as `train.steps`; an empty dictionary stays a value."""
    found: dict[str, Any] = {}
    for key, value in document.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def is_among(key: str, names: Iterable[str]) -> bool:
    """Whether the dotted `key` is one of `names` or within a section that is, as `pack.root` is within `pack`."""
    return any(key == name or key.startswith(f"{name}.") for name in names)

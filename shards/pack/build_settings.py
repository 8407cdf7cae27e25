"""The settings of a build: validation, those that determine the bytes, and those that the plan recorded.

It imports all sources, unlike `shards.pack.settings`, which the command line and every worker import.
"""

from __future__ import annotations

import inspect
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from shards.errors import ShardError
from shards.pack.identity import keyed_hash
from shards.pack.settings import BEFORE, PackConfig
from shards.pack.splits import check_meanings
from shards.sources.all_sources import OFFICIAL_SPLITS, SOURCES, resolve_root

log = logging.getLogger(__name__)


def validate(config: PackConfig) -> None:
    """Raise `ShardError` for the first value out of range."""
    if config.source not in SOURCES:
        raise ShardError(f"pack.source: {config.source!r} is not one of {', '.join(sorted(SOURCES))}")
    for name in ("root", "out"):
        if not getattr(config, name):
            raise ShardError(f"pack.{name}: is empty; name a folder")
    for name, least in (("long_side", 1), ("samples_per_shard", 1), ("workers", 0)):
        if getattr(config, name) < least:
            raise ShardError(f"pack.{name}: {getattr(config, name)} is less than {least}")
    if not 1 <= config.quality <= 100:
        raise ShardError(f"pack.quality: {config.quality} is not in 1..100")
    if config.codec == "jpeg" and config.bits == 16:
        raise ShardError("pack.bits: JPEG holds 8; write codec=png for 16")
    if not 0 <= config.max_refused <= 1:
        raise ShardError(f"pack.max_refused: {config.max_refused} is not a share in 0..1")
    check_meanings(config.split_values)


def folders(config: PackConfig) -> tuple[Path, Path]:
    """The folders of `root` and `out` of a valid configuration.

    Raises `ShardError` as `validate`, and if `out` contains the archive: removing it would remove both.
    """
    validate(config)
    root, out = resolve_root(config.root), Path(os.path.expanduser(config.out))
    if root.resolve().is_relative_to(out.resolve()):
        raise ShardError(f"pack.out: {out} is or contains the archive {root}; give a new folder beside or inside it")
    return root, out


def source_options(config: PackConfig) -> dict[str, Any]:
    """`options` with the defaults of the source. Raises `ShardError` for one that is unknown, missing or mistyped."""
    _, *parameters = inspect.signature(SOURCES[config.source]).parameters.values()
    known = {parameter.name: parameter.default for parameter in parameters}
    for name in config.options:
        if name not in known:
            names = f"has {', '.join(known)}" if known else "has no options"
            raise ShardError(f"pack.options.{name}: source {config.source!r} {names}")
    options = {**known, **config.options}
    for name, value in options.items():
        if value is inspect.Parameter.empty:
            raise ShardError(f"pack.options.{name}: required by source {config.source!r}")
        _check_option(name, value, known[name])
    return options


def _check_option(name: str, value: Any, default: Any) -> None:
    """Raise `ShardError` for another type than the default's: YAML reads an unquoted 1.10 as a number."""
    kinds = {int: "a whole number", str: "a text; write it in quotes"}
    expected = str if default is None and isinstance(value, bool | int | float) else type(default)
    if expected in kinds and type(value) is not expected:
        raise ShardError(f"pack.options.{name}: {value!r} is not {kinds[expected]}")


def settings_of(config: PackConfig, options: dict[str, Any], key: bytes) -> dict[str, Any]:
    """The settings that determine the bytes; root and key as keyed hashes, which can be compared but not read.

    Without `split`, which is what `shards.pack.splits` finds.
    """
    plain = ("source", "long_side", "codec", "bits", "quality", "crop", "flip", "reduced_jpeg2000", "tomosynthesis")
    return {
        **{name: getattr(config, name) for name in (*plain, "intent", "raw")},
        "implants": True,
        "options": json.loads(json.dumps(options)),  # as the plan will return them: keys are strings
        "samples_per_shard": config.samples_per_shard,
        "key_file": keyed_hash(key, "key"),
        "root": keyed_hash(key, "root", config.root),
    }


def as_begun(config: PackConfig, earlier: Mapping[str, Any]) -> PackConfig:
    """The config, where it has defaults, as the build was begun: with both intents by an early release, by the hash."""
    if "intent" not in earlier and config.intent == PackConfig.intent:
        log.info("pack.intent: %s was started by a release that kept both intents, and still keeps both", config.out)
        config = replace(config, intent="both")
    if config.split is None and earlier.get("split", BEFORE["split"]) == "hash":
        if "split" not in earlier and config.source in OFFICIAL_SPLITS:
            log.info("pack.split: %s was started by a release that split by the hash, and still does", config.out)
        config = replace(config, split="hash")
    if "implants" not in earlier:
        told = "was started by a release that did not record implants, and still does not; another `out` will have them"
        log.info("pack.out: %s %s", config.out, told)
    return config


def compare_settings(settings: Mapping[str, Any], earlier: Mapping[str, Any], out: Path, planned: bool) -> str:
    """Raise `ShardError` for a setting that differs from the plan's; return a sentence about a tolerated one, or "".

    Root and options may differ, as the studies themselves are compared: an archive may move, and a table may need
    another spelling. They may not while a finished plan is carried out (`planned`).
    """
    because = ""
    for name in settings:
        found = _difference(name, settings[name], earlier.get(name))
        if found is None:
            continue
        path, now, before = found
        difference = f"{out} was packed with {before!r}, now it is {now!r}"
        if name not in earlier:
            raise ShardError(f"pack.{name}: {out} was packed by a release that had no such setting; give another `out`")
        if name in ("root", "key_file"):  # their values are hashes
            difference = f"{out} was packed with another one"
        if planned or name not in ("root", "options"):
            raise ShardError(f"pack.{path}: {difference}; set it back, or give another `out`")
        because = f"pack.{path}: {difference}"
    return because


def _difference(name: str, now: Any, before: Any) -> tuple[str, Any, Any] | None:
    """(dotted name, now, before) of the first value that differs."""
    if isinstance(now, dict) and isinstance(before, dict):
        inside = (_difference(f"{name}.{key}", now.get(key), before.get(key)) for key in {**now, **before})
        return next(filter(None, inside), None)
    return None if now == before else (name, now, before)

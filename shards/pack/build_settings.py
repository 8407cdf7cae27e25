"""The settings of a build: whether they can be, which of them decide the bytes, and those that it was begun with."""

from __future__ import annotations

import inspect
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from shards.pack.identity import keyed_hash
from shards.pack.settings import PackConfig
from shards.schema import ShardError
from shards.sources.all_sources import SOURCES, resolve_root

log = logging.getLogger(__name__)

BEFORE = {"intent": "both", "raw": "stored"}  # what builds did that were begun before there were these settings


def validate(config: PackConfig) -> None:
    """Raises `ShardError` for the first value that cannot be."""
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


def folders(config: PackConfig) -> tuple[Path, Path]:
    """Root and out. Raises `ShardError` for an `out` that holds the archive: who removes it would remove both."""
    root, out = resolve_root(config.root), Path(os.path.expanduser(config.out))
    if root.resolve().is_relative_to(out.resolve()):
        raise ShardError(
            f"pack.out: {out} is or holds the archive {root}; give a folder beside it, or a new one inside of it"
        )
    return root, out


def source_options(config: PackConfig) -> dict[str, Any]:
    """The source's keywords with its defaults filled in."""
    _, *parameters = inspect.signature(SOURCES[config.source]).parameters.values()
    known = {parameter.name: parameter.default for parameter in parameters}
    for name in config.options:
        if name not in known:
            names = f"knows {', '.join(known)}" if known else "has none"
            raise ShardError(f"pack.options.{name}: source {config.source!r} {names}")
    options = {**known, **config.options}
    for name, value in options.items():
        if value is inspect.Parameter.empty:
            raise ShardError(f"pack.options.{name}: source {config.source!r} needs it")
        _check_option(name, value, known[name])
    return options


def _check_option(name: str, value: Any, default: Any) -> None:
    """A whole number where the source has one, and no number in the place of a text, which 1.10 may have become."""
    kinds = {int: "a whole number", str: "a text; write it in quotes"}
    wanted = str if default is None and isinstance(value, bool | int | float) else type(default)
    if wanted in kinds and type(value) is not wanted:
        raise ShardError(f"pack.options.{name}: {value!r} is not {kinds[wanted]}")


def settings_of(config: PackConfig, options: dict[str, Any], key: bytes) -> dict[str, Any]:
    """What decides the bytes. Root and key enter as keyed hashes: enough to tell others apart, not to read them."""
    plain = ("source", "long_side", "codec", "bits", "quality", "crop", "flip", "reduced_jpeg2000", "tomosynthesis")
    return {
        **{name: getattr(config, name) for name in (*plain, *BEFORE)},
        "options": json.loads(json.dumps(options)),  # as the plan gives them back: keys are texts
        "samples_per_shard": config.samples_per_shard,
        "key_file": keyed_hash(key, "key"),
        "root": keyed_hash(key, "root", config.root),
    }


def as_begun(config: PackConfig, earlier: Mapping[str, Any]) -> PackConfig:
    """A build that was begun before there was `intent` ends as it was begun, whatever today's default is."""
    if "intent" in earlier or config.intent != PackConfig.intent:
        return config
    log.info("pack.intent: %s was begun when raw images were kept beside others, and still keeps both", config.out)
    return replace(config, intent="both")


def compare_settings(settings: Mapping[str, Any], earlier: Mapping[str, Any], out: Path, planned: bool) -> str:
    """Raises `ShardError` for the first setting that decides the bytes and differs; names another that does, or "".

    Root and options decide what the source says of the studies, and that is compared for itself: an archive may move,
    and a table may need another spelling. While a plan is carried out they are not to change.
    """
    because = ""
    for name in settings:
        found = _difference(name, settings[name], earlier.get(name))
        if found is None:
            continue
        path, now, before = found
        told = f"{out} was packed with {before!r}, now it is {now!r}"
        if name not in earlier:
            raise ShardError(f"pack.{name}: {out} was packed by a release that had no such setting; give another `out`")
        if name in ("root", "key_file"):  # their values are hashes
            told = f"{out} was packed with another one"
        if planned or name not in ("root", "options"):
            raise ShardError(f"pack.{path}: {told}; set it back, or give another `out`")
        because = f"pack.{path}: {told}"
    return because


def _difference(name: str, now: Any, before: Any) -> tuple[str, Any, Any] | None:
    """(name, now, before) of the first value that differs, in dictionaries by its dotted name."""
    if isinstance(now, dict) and isinstance(before, dict):
        inside = (_difference(f"{name}.{key}", now.get(key), before.get(key)) for key in {**now, **before})
        return next(filter(None, inside), None)
    return None if now == before else (name, now, before)

"""The run folder: `runs/<name>/` holds everything that a run was told and everything it wrote."""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import subprocess
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mama.data import report_text, tokenizer
from mama.data.images import Images
from mama.data.tokenizer import Tokenizer
from mama.run import checkpoints
from mama.run.digests import check_digests, make_folder, read_object, remove, replace_folder, write_digests, write_json
from mama.runtime.collectives import world_size
from mama.settings.load import load_run, save, unnamed
from mama.settings.pretrained import locate
from mama.settings.schema import Config, ConfigError
from shards.read.manifest import Manifest
from shards.read.reader import load_manifest
from shards.read.remote import local_folder

log = logging.getLogger(__name__)

DATA = "data.json"
STACK = ("mama-clip", "torch", "deepspeed", "transformers", "peft", "xformers", "webdataset", "pydicom", "numpy")
# What may differ between the first start of a run and its resume. Ranks and micro-batches decide how many
# negatives a pair has, unless train.grad_cache takes them from the whole step: that is told.
MAY_CHANGE = (
    *("pack", "eval", "runs", "data.workers", "data.cache", "data.max_corrupt"),
    *("train.log_every", "train.save_every", "train.keep_checkpoints", "train.validate_every", "train.max_skips"),
    *("train.ranks", "train.micro_batch", "train.zero_stage", "train.offload"),
    *("train.attention", "train.activation_checkpointing", "train.compile", "train.timeout", "train.oversubscribe"),
)


def prepare(config: Config) -> Path | None:
    """Write into the run folder what a run is told; where it has a checkpoint, check that it was told the same.

    Returns the checkpoint to resume from. A run that failed before its first one begins anew, with a configuration
    that may be mended.
    """
    run = config.run_folder
    make_folder(run / "checkpoints")
    resumed = checkpoints.newest(run)
    if resumed:
        _refuse_other(config, run)
        _compare_batch(config, resumed)
    else:
        aside = run / "tokenizer.partial"
        remove(aside)
        make_tokenizer(config).save(aside)
        write_digests(aside)
        replace_folder(aside, run / "tokenizer")
        write_json(run / DATA, _training_shards(config))
        save(config, run / "config.yaml")
    write_json(run / "environment.json", environment())
    return resumed


def make_tokenizer(config: Config) -> Tokenizer:
    """The language model's own, or for a random language model one learned from the training reports."""
    if config.text.model is not None:
        name, arguments = locate("text.model", config.text.model)
        return tokenizer.pretrained(name, arguments)
    images, style, tell = Images(config.data, "train"), config.data.style, config.data.tell_pathology
    studies = (images.study(n) for n in range(len(images.studies)))
    nothing: frozenset[str] = frozenset()
    texts = (
        s for study in studies for view in study.views for s in report_text.text(study, view, style, nothing, tell)
    )
    return tokenizer.learn(texts, int(config.text.config.get("vocab_size", 2048)))


def load_tokenizer(run: Path) -> Tokenizer:
    """The run's tokenizer. Raises `ConfigError` where it is gone, or not what was written."""
    check_digests(run / "tokenizer", "restore it from a copy")
    return Tokenizer.load(run / "tokenizer")


def environment() -> dict[str, Any]:
    """Versions of the stack and, in a checkout, the git commit."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "commit": _commit(Path(__file__).parent.parent.parent),
        "versions": {name: _version(name) for name in STACK},
    }


def _commit(root: Path) -> str | None:
    """None where `root` is no checkout, or where git is not installed."""
    try:
        git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return git.stdout.strip() if git.returncode == 0 and (root / "pyproject.toml").exists() else None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _refuse_other(config: Config, run: Path) -> None:
    known = load_run(run)
    before, now = flat(asdict(known)), flat(asdict(config))
    for key in sorted(before.keys() | now.keys()):
        if key.startswith(MAY_CHANGE) or before.get(key) == now.get(key):
            continue
        raise ConfigError(
            f"{key}: {now.get(key)!r}, but {run} was started with {before.get(key)!r}; "
            f"give the run another name=... or the value it had"
        )
    if new := [key for key in unnamed(run) if not key.startswith(MAY_CHANGE)]:
        log.warning(
            "%s: an earlier release started it, without %s; its samples may be drawn in another way from here on",
            *(run, ", ".join(new)),
        )
    started, present = read_object(run / DATA), _training_shards(config)
    for folder, digest in present.items():
        if started.get(folder) != digest:
            raise ConfigError(
                f"data.shards: {folder} has other training shards than when {run} was started, and with them the order "
                "of its samples would be another; give the run another name=..."
            )


def _compare_batch(config: Config, resumed: Path) -> None:
    now = config.contrastive_batch(world_size())
    before = checkpoints.facts_of(resumed).get("contrastive_batch", now)
    if before != now:
        log.warning(
            "%s: its contrastive batches had %d pairs, those of this start have %d: another number of negatives",
            *(resumed, before, now),
        )


def _training_shards(config: Config) -> dict[str, str]:
    """By folder, a digest of the names and contents of its training shards: the order of a run depends on them."""
    found = {}
    for folder in config.data.shards:
        found[folder] = shards_digest(load_manifest(local_folder(folder, config.data.cache_folder)), {"train"})
    return found


def shards_digest(manifest: Manifest, splits: set[str]) -> str:
    """Of the names and contents of the shards of these splits."""
    shards = [(shard.name, shard.sha256) for shard in manifest.shards if shard.split in splits]
    return hashlib.sha256(json.dumps(shards).encode()).hexdigest()


def flat(document: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by their dotted names."""
    found: dict[str, Any] = {}
    for key, value in document.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found

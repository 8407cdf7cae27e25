"""The run folder: `runs/<name>/` holds the settings of a run and everything it writes."""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mama.errors import ConfigError
from mama.run import checkpoints
from mama.run.checkpoint_marker import read_marker
from mama.run.files import make_folder, read_object, write_json
from mama.run.run_tokenizer import save_tokenizer
from mama.runtime.collectives import world_size
from mama.settings.load import load_run, missing_settings, save
from mama.settings.schema import Config
from shards.files import atomic_write
from shards.read.manifest import Manifest, load_manifest
from shards.read.remote import local_folder
from slurm.snapshot import code_digest, snapshot

log = logging.getLogger(__name__)

DATA = "data.json"
COMMIT = "commit"  # file in a copy of the code: the commit of the checkout that was copied
STACK = ("mama-clip", "torch", "deepspeed", "transformers", "peft", "xformers", "webdataset", "pydicom", "numpy")
# Settings, and whole sections of them, that may change when a run is resumed. Ranks and micro-batches decide how many
# negatives a pair has, unless train.grad_cache takes them from the whole step: a change is logged.
MAY_CHANGE = (
    *("pack", "eval", "runs", "data.workers", "data.cache", "data.max_corrupt"),
    *("train.log_every", "train.save_every", "train.keep_checkpoints", "train.validate_every", "train.max_skips"),
    *("train.ranks", "train.micro_batch", "train.zero_stage", "train.offload"),
    *("train.attention", "train.activation_checkpointing", "train.compile", "train.timeout", "train.patience"),
    *("train.oversubscribe",),
)


def prepare(config: Config) -> Path | None:
    """Prepare the run folder, and return the checkpoint to resume from, if there is one.

    A run without a checkpoint is started anew, even with corrected settings. One with a checkpoint is compared: raises
    `ConfigError` if it was started with other settings, or other training shards, than these.
    """
    run = config.run_folder
    make_folder(run / "checkpoints")
    resumed = checkpoints.newest(run)
    if resumed:
        _require_same_settings(config, run)
        _require_same_shards(config, run)
        _warn_of_other_batch(config, resumed)
    else:
        save_tokenizer(config)
        write_json(run / DATA, _training_shards(config))
        save(config, run / "config.yaml")
    write_json(run / "environment.json", environment())
    return resumed


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


def environment() -> dict[str, Any]:
    """Return the contents of `environment.json`: versions, the platform, a digest of our code, and its git commit.

    The commit is that of a checkout, also if what runs is a copy that `mama sweep` made of it; else None.
    """
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "code": code_digest(),
        "commit": commit(Path(__file__).parent.parent.parent),
        "versions": versions(),
    }


def versions() -> dict[str, str | None]:
    """Return the version of each distribution that a run's numbers depend on; None if it is not installed."""
    return {name: _version(name) for name in STACK}


def copy_code(folder: Path) -> Path:
    """Copy the code that runs now to `folder`/<digest>/, for jobs that start later; returns the copy."""
    place = snapshot(folder)
    if not (place / COMMIT).exists() and (found := commit(Path(__file__).parents[2])):
        atomic_write(place / COMMIT, f"{found}\n".encode())
    return place


def commit(root: Path) -> str | None:
    """The commit of the checkout `root`, or of the one that `root` is a copy of; None if it is neither."""
    if (root / COMMIT).exists():
        return (root / COMMIT).read_text().strip()
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


def _require_same_settings(config: Config, run: Path) -> None:
    before, now = flat(asdict(load_run(run))), flat(asdict(config))
    if key := changed_setting(before, now):
        raise ConfigError(
            f"{key}: {now.get(key)!r}, but {run} was started with {before.get(key)!r}; "
            f"give the run another name=... or the value it had"
        )
    if new := [key for key in missing_settings(run) if not is_among(key, MAY_CHANGE)]:
        log.warning(
            "%s: an earlier release started it, without %s; its samples may be drawn differently from here on",
            *(run, ", ".join(new)),
        )


def _require_same_shards(config: Config, run: Path) -> None:
    """The order of samples depends on them."""
    started = read_object(run / DATA)
    for folder, digest in _training_shards(config).items():
        if started.get(folder) != digest:
            raise ConfigError(
                f"data.shards: {folder} has other training shards than when {run} was started, which changes the order "
                "of its samples; give the run another name=..."
            )


def _warn_of_other_batch(config: Config, resumed: Path) -> None:
    now = config.contrastive_batch(world_size())
    before = read_marker(resumed).facts.get("contrastive_batch", now)
    if before != now:
        log.warning(
            "%s: its contrastive batches had %d pairs, from here on they have %d: another number of negatives",
            *(resumed, before, now),
        )


def _training_shards(config: Config) -> dict[str, str]:
    """The digest of the training shards of each folder in `data.shards`."""
    found = {}
    for folder in config.data.shards:
        found[folder] = shards_digest(load_manifest(local_folder(folder, config.data.cache_folder)), {"train"})
    return found


def shards_digest(manifest: Manifest, splits: set[str]) -> str:
    """Return the SHA-256 of the names and contents of the shards of these splits."""
    shards = [(shard.name, shard.sha256) for shard in manifest.shards if shard.split in splits]
    return hashlib.sha256(json.dumps(shards).encode()).hexdigest()

"""The run folder: `runs/<name>/` holds the settings of a run and everything it writes."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict
from pathlib import Path

from mama.errors import ConfigError
from mama.run import checkpoints
from mama.run.checkpoint_marker import RUN, read_marker
from mama.run.environment import environment
from mama.run.files import make_folder, read_object, write_json
from mama.run.kept_settings import MAY_CHANGE, changed_setting, flat, is_among
from mama.run.portable import portable
from mama.run.run_tokenizer import save_tokenizer
from mama.runtime.collectives import world_size
from mama.settings.load import load_run, missing_settings, save
from mama.settings.schema import Config
from shards.read.manifest import Manifest, load_manifest
from shards.read.remote import local_folder

log = logging.getLogger(__name__)

DATA = "data.json"


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
        shards = _training_shards(config)
        write_json(run / DATA, shards)
        write_json(run / RUN, {"sha256": _identity(config, shards)})
        save(config, run / "config.yaml")
    write_json(run / "environment.json", environment())
    return resumed


def _identity(config: Config, shards: dict[str, str]) -> str:
    """A digest of what may not change when a run is resumed: settings, wherever its files lie, and training shards.

    Written once: a later release has settings that this one does not know.
    """
    kept = {key: value for key, value in flat(asdict(portable(config))).items() if not is_among(key, MAY_CHANGE)}
    return hashlib.sha256(json.dumps([kept, list(shards.values())], sort_keys=True).encode()).hexdigest()


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


def warn_of_other_shards(config: Config) -> None:
    """Log the folders whose training shards are not those that the run was trained on, wherever they lie now."""
    run = config.run_folder
    if not (run / DATA).exists():
        return
    before, now = read_object(run / DATA), _training_shards(config)
    changed = [folder for folder, digest in now.items() if digest not in before.values()]
    left_out = [folder for folder, digest in before.items() if digest not in now.values() and folder not in changed]
    for folder in changed:
        log.warning(
            "%s: its training shards have changed since %s was trained; what the model says of its training images, "
            "texts and patients is of the shards as they are now",
            *(folder, run),
        )
    for folder in left_out if len(now) < len(before) else []:
        log.warning("%s: %s was trained on it, and data.shards does not name it", folder, run)


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

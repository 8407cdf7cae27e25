"""Provenance of results: the shards, weights and settings that an evaluation measured."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mama.errors import ConfigError
from mama.evaluate import intervals
from mama.export.model_folder import model_folder, read_model, weights_digest
from mama.run.files import read_object, sha256_or_reason
from mama.run.portable import folder_name
from mama.run.run_folder import DATA, shards_digest
from mama.settings.schema import Config
from shards.read.manifest import Manifest, load_manifest
from shards.read.remote import local_folder
from shards.schema import SPLITS

Document = dict[str, Any]

IDENTITY = ("shards", "model", "settings")  # figures are comparable if these are equal


def identity(config: Config, run: Path) -> Document:
    """The `shards`, `model` and `settings` that `evaluate(config, run)` measures; `run` may be a model folder."""
    return {"shards": shard_set(config), "model": model_of(run), "settings": settings_of(config)}


def settings_of(config: Config) -> Document:
    """The settings that an evaluation depends on."""
    return {
        "image_size": list(config.data.image_size),
        "fit": config.data.fit,
        "style": config.data.style,
        "tell_pathology": config.data.tell_pathology,
        "max_tokens": config.data.max_tokens,
        "intensity_baseline": config.eval.intensity_baseline,
        "resamples": config.eval.bootstrap,
        "prevalence": config.eval.prevalence,
        "seed": config.seed,
        "pool": config.eval.pool,
        "interval": intervals.METHOD,
        "protocol": config.eval.protocol,
        "protocols": config.eval.protocols,
        "fractions": config.eval.fractions,
        "draws": config.eval.draws,
        "boxes": {Path(entry).stem: sha256_or_reason(Path(entry).expanduser()) for entry in config.eval.boxes},
        "finetune": asdict(config.finetune) if "finetune" in config.eval.protocols else None,
    }


def shard_set(config: Config) -> Document:
    """Digest, split and folders of the images of `config.data.shards`; folders are named without their paths.

    Digests cover the names and contents of the shards that are read: those of the split, the training shards, which
    the probe is fitted on, and those of val, on which thresholds are chosen.
    """
    folders = []
    for address in config.data.shards:
        manifest = load_manifest(local_folder(address, config.data.cache_folder))
        folders.append(
            {
                "name": folder_name(address),
                "source": manifest.source,
                "digest": shards_digest(manifest, {"train", "val", config.eval.split}),
                "train_digest": shards_digest(manifest, {"train"}),
                "splits": counts(manifest),
                "split_by": asdict(manifest.split_by) if manifest.split_by else None,
            }
        )
    parts = sorted(str(folder["digest"]) for folder in folders)
    return {
        "digest": hashlib.sha256(json.dumps(parts).encode()).hexdigest(),
        "split": config.eval.split,
        "folders": folders,
    }


def counts(manifest: Manifest) -> list[Document]:
    """Numbers of patients, studies, images and labels of each split that has shards."""
    rows = []
    for split in SPLITS:
        shards = [shard for shard in manifest.shards if shard.split == split]
        if shards:
            rows.append(
                {
                    "split": split,
                    "patients": len({patient for shard in shards for patient in shard.patients}),
                    "studies": sum(shard.samples for shard in shards),
                    "images": sum(sum(shard.view_counts) for shard in shards),
                    "labels": manifest.labels.get(split, {}),
                }
            )
    return rows


def model_of(run: Path) -> Document | None:
    """Training step and digest of the weights of the model of `run`; None without one that can be read."""
    folder = model_folder(run)
    try:
        return {"step": read_model(folder).step, "sha256": weights_digest(folder)}
    except ConfigError:
        return None


def is_own(shards: Document, run: Path) -> bool:
    """Whether the run was trained on exactly these folders, wherever they are now."""
    trained = _trained_on(run)
    return trained is not None and sorted(folder["train_digest"] for folder in shards["folders"]) == sorted(trained)


def training(shards: Document, run: Path, known: Document | None = None) -> str:
    """A sentence: which of these shards the model was trained on.

    `known` is what `mama.evaluate.known_patients` found: {"patients": ..., "images": ...}; None if it was not checked.
    """
    trained = _trained_on(run)
    if known is not None and (trained is None or not _seen(shards, trained)):
        if known["patients"] or known["images"]:
            return (
                "The model was trained on other shards, which include "
                f"{known['patients']} of these patients and {known['images']} of these images."
            )
        return "The model was trained on other shards, and on none of these patients, as far as their hashes tell."
    if trained is None:
        return f"The training shards of the model are not recorded: {DATA} is missing or damaged."
    seen = _seen(shards, trained)
    if not seen:
        return "The model was trained on other shards; whether those include some of these patients was not checked."
    if len(seen) < len(_with_training(shards)):
        return f"The model was trained on the train split of {', '.join(seen)} only."
    also = ", on which these figures were measured" if shards["split"] == "train" else ""
    return f"The model was trained on the train split{also}."


def measured_digest(measured: Document) -> str:
    """SHA-256 of the images and settings of an evaluation: figures of equal ones, and of the same weights, compare."""
    found = measured["shards"]["digest"], measured["shards"]["split"], measured["settings"]
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def same(one: Document, other: Document) -> bool:
    """Whether both were measured on the same images, in whatever place, with the same weights and settings."""
    if any(key not in one for key in IDENTITY):
        return False
    images = [(document["shards"]["digest"], document["shards"]["split"]) for document in (one, other)]
    return images[0] == images[1] and all(one[key] == other[key] for key in ("model", "settings"))


def object_in(path: Path) -> Document | None:
    """The JSON object in a file; None if the file is missing, damaged or holds something else."""
    try:
        return read_object(path)
    except ConfigError:
        return None


def _with_training(shards: Document) -> list[Document]:
    return [f for f in shards["folders"] if any(row["split"] == "train" for row in f["splits"])]


def _seen(shards: Document, trained: list[str]) -> list[str]:
    """The names of the folders whose training shards are among those with the digests `trained`."""
    return [folder["name"] for folder in _with_training(shards) if folder["train_digest"] in trained]


def _trained_on(run: Path) -> list[str] | None:
    """Digests of the training shards, one per folder."""
    recorded = object_in(run / DATA)
    return None if recorded is None else [str(digest) for digest in recorded.values()]

"""What an evaluation was measured on: which shards, which weights, which settings; and where its results lie.

`runs/<name>/eval/` is for the test split of the shards that the run was trained on; any other set of images has a
folder of its own below `runs/<name>/eval-on/`. A folder is of one evaluation, and replaced as a whole; `complete.json`
in it says what it was measured on.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import EEXIST, ENOTDIR, ENOTEMPTY
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from mama.evaluate import intervals
from mama.export.consolidate import WEIGHTS
from mama.run.digests import read_object, sha256, write_json
from mama.run.folders import standing
from mama.run.portable import folder_name
from mama.run.run_folder import DATA, shards_digest
from mama.settings.schema import Config, ConfigError
from shards.read.manifest import Manifest
from shards.read.reader import load_manifest
from shards.read.remote import local_folder
from shards.schema import SPLITS

log = logging.getLogger(__name__)

Document = dict[str, Any]

MARKER, METRICS = "complete.json", "metrics.json"
IDENTITY = ("shards", "model", "settings")  # figures may stand side by side where these are equal


def identity(config: Config, run: Path) -> Document:
    """What `evaluate(config, run)` measures: `shards`, `model` and `settings`."""
    settings = {
        "image_size": list(config.data.image_size),
        "fit": config.data.fit,
        "style": config.data.style,
        "tell_pathology": config.data.tell_pathology,
        "max_tokens": config.data.max_tokens,
        "intensity_baseline": config.eval.intensity_baseline,
        "resamples": config.eval.bootstrap,
        "seed": config.seed,
        "interval": intervals.METHOD,
    }
    return {"shards": shard_set(config), "model": model_of(run), "settings": settings}


def shard_set(config: Config) -> Document:
    """Digest, split and folders of the images of `config.data.shards`; a folder by name, whatever its place.

    Digests are of the names and contents of the shards that are read: those of the split, and the training shards,
    to which the probe is fitted.
    """
    folders = []
    for address in config.data.shards:
        manifest = load_manifest(local_folder(address, config.data.cache_folder))
        folders.append(
            {
                "name": folder_name(address),
                "source": manifest.source,
                "digest": shards_digest(manifest, {"train", config.eval.split}),
                "train_digest": shards_digest(manifest, {"train"}),
                "splits": counts(manifest),
            }
        )
    parts = sorted(str(folder["digest"]) for folder in folders)
    return {
        "digest": hashlib.sha256(json.dumps(parts).encode()).hexdigest(),
        "split": config.eval.split,
        "folders": folders,
    }


def counts(manifest: Manifest) -> list[Document]:
    """Patients, studies, images and labels of each split that is there."""
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
    """Training steps (None where its file does not say) and SHA-256 of `<run>/model`; None without a model."""
    path = standing(run / "model") / WEIGHTS
    try:
        digest = sha256(path)
        with safe_open(path, framework="np") as tensors:
            step = (tensors.metadata() or {}).get("step")
    except (OSError, SafetensorError):
        return None
    return {"step": None if step is None else int(step), "sha256": digest}


def is_own(shards: Document, run: Path) -> bool:
    """Were these folders, all of them and no other, what the run was trained on, wherever they lie now?"""
    trained = _trained_on(run)
    return trained is not None and sorted(folder["train_digest"] for folder in shards["folders"]) == sorted(trained)


def training(shards: Document, run: Path) -> str:
    """A sentence: what of these shards the model has seen in training."""
    trained = _trained_on(run)
    with_training = [f for f in shards["folders"] if any(row["split"] == "train" for row in f["splits"])]
    if trained is None:
        return f"Which shards the model was trained on is not recorded: {DATA} is missing or damaged."
    seen = [folder["name"] for folder in with_training if folder["train_digest"] in trained]
    if not seen:
        return "The model was trained on other shards; whether they hold some of these patients was not checked."
    if len(seen) < len(with_training):
        return f"Of these folders the model saw the train split of {', '.join(seen)} only."
    also = ", on which these figures were measured" if shards["split"] == "train" else ""
    return f"The model saw the train split{also}."


def folder_of(shards: Document, run: Path) -> Path:
    """Where the results of these images belong; the first name of a set is kept when its folder is moved."""
    if is_own(shards, run) and shards["split"] == "test":
        return run / "eval"
    ending = f"-{shards['split']}-{shards['digest'][:8]}"
    if known := sorted((run / "eval-on").glob(f"*{ending}")):
        return known[0]
    names = re.sub(r"[^\w.+-]+", "_", "+".join(folder["name"] for folder in shards["folders"]))[:60]
    return run / "eval-on" / f"{names}{ending}"


def finish(config: Config, measured: Document, folder: Path, new: Path) -> None:
    """Complete the results in `new`, which are about to replace those in `folder`.

    Of the latter, tasks that were not measured again are kept where they were measured on the very same.
    """
    before = object_in(folder / MARKER) or {}
    tasks = list(dict.fromkeys(config.eval.tasks))
    if same(before, measured):
        for name in before.get("tasks", []):
            if name not in tasks and same(object_in(folder / name / METRICS) or {}, measured):
                shutil.copytree(folder / name, new / name)
                tasks.append(name)
    if dropped := [name for name in before.get("tasks", []) if name not in tasks]:
        log.warning(
            "%s: the earlier results of %s are gone, as they were measured with other settings or weights; "
            "measure all tasks together to have them side by side",
            *(folder, ", ".join(dropped)),
        )
    places = [a if "://" in a else str(Path(os.path.expanduser(a)).absolute()) for a in config.data.shards]
    write_json(new / MARKER, {**measured, "tasks": tasks, "places": places})


def same(one: Document, other: Document) -> bool:
    """Were both measured on the same images, wherever they lay, and weights, with the same settings?"""
    if any(key not in one for key in IDENTITY):
        return False
    images = [(document["shards"]["digest"], document["shards"]["split"]) for document in (one, other)]
    return images[0] == images[1] and all(one[key] == other[key] for key in ("model", "settings"))


def evaluations(run: Path) -> list[tuple[Path, Document]]:
    """The complete evaluations of a run and their markers, that of its own test split first."""
    folders = [run / "eval", *sorted(path for path in (run / "eval-on").glob("*") if path.suffix != ".partial")]
    found = [(folder, object_in(folder / MARKER) or {}) for folder in folders]
    return [(folder, marker) for folder, marker in found if {*IDENTITY, "tasks", "places"} <= marker.keys()]


def object_in(path: Path) -> Document | None:
    """The object that a JSON file holds; None where it is missing, damaged or holds something else."""
    try:
        return read_object(path)
    except ConfigError:
        return None


@contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`, which takes its place when the block ends without an error.

    Two at the same time do not mix: the last one stays.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.", suffix=".partial", dir=folder.parent) as aside:
        new, old = Path(aside) / "new", Path(aside) / "old"
        new.mkdir()
        yield new
        while new.exists():
            try:
                os.rename(new, folder)  # over an empty folder at most
            except OSError as error:
                if error.errno not in (ENOTEMPTY, EEXIST, ENOTDIR):
                    raise
                shutil.rmtree(old, ignore_errors=True)
                with suppress(FileNotFoundError):  # another evaluation was faster
                    os.rename(folder, old)


def _trained_on(run: Path) -> list[str] | None:
    """The digests of the training shards, one a folder."""
    recorded = object_in(run / DATA)
    return None if recorded is None else [str(digest) for digest in recorded.values()]

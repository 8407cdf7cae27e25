"""Predictions of fine-tuned classifiers, which `mama.finetune` leaves below `<run>/finetune/`.

Letters: n images, K classes.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mama.data.augment import normalise
from mama.data.held_out import CollateRows, Split
from mama.data.loader import load, to_device
from mama.evaluate import fractions
from mama.evaluate.arrays import Float64s, Ints
from mama.evaluate.provenance import Document, is_own, object_in
from mama.evaluate.result_folders import on_others
from mama.evaluate.task_data import Predictions, TaskData
from mama.export.classifier_folder import Named, load_classifier
from mama.model.classifier import log_probabilities
from mama.runtime.collectives import local_device
from mama.runtime.sharing import over_ranks
from mama.settings.schema import Config
from shards.progress import progress

log = logging.getLogger(__name__)

MARKER, CLASSIFIER = "complete.json", "classifier"


@dataclass(frozen=True)
class Tuning:
    """One fine-tuning of a run: its task, and the draw of a fraction of the training labels that it gets."""

    task: str
    fraction: float
    draw: int

    @property
    def name(self) -> str:
        """That of its folder."""
        return f"{self.task}-{100 * self.fraction:g}-{self.draw}"


def folder_of(shards: Document, run: Path) -> Path:
    """The folder of the fine-tunings on the training images of these shards: the run's own, or others."""
    if is_own(shards, run):
        return run / "finetune"
    return on_others(run / "finetune-on", shards, digest_of(shards)[:8])


def digest_of(shards: Document) -> str:
    """The digest of the training images of a set of shards."""
    parts = sorted(str(folder["train_digest"]) for folder in shards["folders"])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def is_complete(folder: Path) -> bool:
    """Whether a fine-tuning is done."""
    return (folder / MARKER).exists()


def add_predictions(
    tasks: list[TaskData], held_out: Split, val: Split | None, shards: Document, config: Config, run: Path
) -> None:
    """Append the predictions of every complete fine-tuning to those of its task, on rank 0; every rank must call it."""
    device, folder = local_device(), folder_of(shards, run)
    for data in tasks:
        for fraction, draw in fractions.draws(config.eval):
            tuning = Tuning(data.task.name, fraction, draw)
            if not len(data.rows):
                continue
            if not (folder / tuning.name / CLASSIFIER).exists():
                reason = (object_in(folder / tuning.name / MARKER) or {}).get("reason", "it was not fine-tuned")
                log.warning("%s: not in the results: %s", folder / tuning.name, reason)
                continue
            named = load_classifier(folder / tuning.name / CLASSIFIER, device, config.train.attention)
            scores = _probabilities(named, data, held_out, data.rows, config, device)
            of_val = None
            if val is not None and len(data.val_rows):
                of_val = _probabilities(named, data, val, data.val_rows, config, device)
            data.predictions.append(Predictions("fine-tune", "trained", scores, of_val, fraction, draw))


def _probabilities(
    named: Named, data: TaskData, split: Split, rows: Ints, config: Config, device: torch.device
) -> Float64s:
    """[n, K] of the images `rows` of `split`; a class that the training labels lack has probability 0."""
    size = config.eval.batch

    def predict(batches: list[range]) -> Iterator[Tensor]:
        own = [int(rows[i]) for batch in batches for i in batch]
        title = f"fine-tuned, {data.task.name}: {split.name} images"
        batches_of = load(split, config, CollateRows(None, config.data.max_tokens), sampler=own, batch_size=size)
        with closing(batches_of) as loaded:
            for pixels, _, _ in progress(loaded, len(batches), title, "batches"):
                yield log_probabilities(named.model, normalise(to_device(pixels, device))).cpu()

    found = torch.cat(over_ranks(len(rows), size, predict)).double().exp().numpy()
    shares = np.zeros((len(found), len(data.classes)))
    shares[:, [data.classes.index(name) for name in named.classes]] = found
    return shares

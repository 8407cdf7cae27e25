"""The labelled images of a task, and the draw of them that a fine-tuning gets."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from mama.data.held_out import Item, Split
from mama.data.wording import Wording
from mama.errors import ConfigError
from mama.evaluate import fractions
from mama.evaluate.arrays import Ints
from mama.evaluate.fine_tuned import Tuning
from mama.evaluate.task_data import task_data
from mama.evaluate.tasks import load_tasks
from mama.settings.schema import Config


@dataclass(frozen=True)
class Labels:
    """The labelled images of a fine-tuning: numbers in their split, and classes, as indices of `classes`."""

    classes: list[str]  # those of the training images
    rows: Ints  # [n] of the split train
    labels: Ints  # [n]
    patients: int
    val_rows: Ints  # [m] of the split val; none if it is not to be looked at
    val_labels: Ints  # [m]

    def counts(self) -> dict[str, Any]:
        """How many patients, and images of each class, it is trained on, as a JSON object."""
        found = Counter(self.labels.tolist())
        return {"patients": self.patients, "images": {name: found[k] for k, name in enumerate(self.classes)}}


def items_of(config: Config, split: str) -> list[Item]:
    """The facts of all images of a split. Raises `ConfigError` if there are none."""
    try:
        return Split(config, split).items
    except ConfigError as error:
        if split == "val":
            raise ConfigError(f"finetune.validate_every: {config.finetune.validate_every}, but {error}") from error
        raise


def labels_of(tuning: Tuning, train: list[Item], val: list[Item], config: Config) -> Labels | None:
    """The draw of `tuning` from the labelled images of `train`, and those of `val`, both whole splits.

    Of `val` only the images of classes that the draw has. None if the training images are of one class, or have no
    label: there is nothing to learn. Raises `ConfigError` if no image of `val` is left, where there must be one.
    """
    (task,) = [task for task in load_tasks(config.eval.tasks) if task.name == tuning.task]
    data = task_data(task, [], train, val, Wording())
    patients = [train[row].study.patient for row in data.train_rows]
    seed = fractions.seed_of(config.seed, tuning.draw)
    drawn = fractions.drawn(patients, data.train_labels, tuning.fraction, seed)
    kinds, labels = np.unique(data.train_labels[drawn], return_inverse=True)
    if len(kinds) < 2:
        return None
    known = np.isin(data.val_labels, kinds)
    if config.finetune.validate_every and not known.any():
        raise ConfigError(
            f"finetune.validate_every: {config.finetune.validate_every}, but no image of the split 'val' has a label "
            f"of {tuning.task}; set it to 0"
        )
    return Labels(
        classes=[data.classes[k] for k in kinds],
        rows=data.train_rows[drawn],
        labels=labels.astype(np.int64),
        patients=len({patients[n] for n in drawn}),
        val_rows=data.val_rows[known],
        val_labels=np.searchsorted(kinds, data.val_labels[known]),
    )

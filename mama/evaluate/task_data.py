"""A task on one data set: the labelled images, the classes that occur, and the predictions for them.

Letters: n images, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from mama.data.held_out import Item
from mama.evaluate.arrays import Float64s, Ints
from mama.evaluate.class_prompts import Sentences, Wording, prompt_ensembles
from mama.evaluate.tasks import Task
from mama.evaluate.training_vocabulary import unmentioned


@dataclass(frozen=True)
class Predictions:
    """Probabilities [n, K] by one protocol with one model."""

    protocol: str
    model: str
    scores: Float64s
    val_scores: Float64s | None = None  # [m, K] of the labelled images of the split val
    fraction: float | None = None  # of the training labels; None: the protocol uses none
    draw: int = 0  # number of the draw of that fraction


@dataclass
class TaskData:
    """A task on a split: `rows` [n] are its labelled images, `labels` [n] their classes.

    The classes are renumbered, as only those that occur in the data set are kept; a binary task keeps both.
    """

    task: Task
    classes: list[str]
    ensembles: list[list[Sentences]]  # class prompts of each class
    rows: Ints
    labels: Ints
    train_rows: Ints
    train_labels: Ints
    val_rows: Ints
    val_labels: Ints
    absent: list[str]  # classes without a held-out image
    unmentioned: list[str] | None  # classes that the training texts never mention; None if those texts are unknown
    predictions: list[Predictions] = field(default_factory=list)


def task_data(
    task: Task,
    held_out: list[Item],
    train: list[Item],
    val: list[Item],
    wording: Wording,
    mentioned: set[str] | None = None,
) -> TaskData:
    """Find the labelled images and the classes that occur; `mentioned` are the statements of the training texts.

    `val` is empty if there is no such split.
    """
    labels = [[task.label(item.view) for item in items] for items in (held_out, train, val)]
    occurring = {label for part in labels[:2] for label in part if label is not None}
    kept = [k for k in range(len(task.classes)) if task.binary or k in occurring]
    # An image of the split `val` whose class is in neither other split is left out.
    rows = [np.array([i for i, label in enumerate(part) if label in kept], dtype=np.int64) for part in labels]
    numbers = [np.array([kept.index(k) for k in part if k in kept], dtype=np.int64) for part in labels]
    ensembles = prompt_ensembles(task, wording)
    return TaskData(
        task=task,
        classes=[task.classes[k] for k in kept],
        ensembles=[ensembles[k] for k in kept],
        rows=rows[0],
        labels=numbers[0],
        train_rows=rows[1],
        train_labels=numbers[1],
        val_rows=rows[2],
        val_labels=numbers[2],
        absent=[name for k, name in enumerate(task.classes) if k not in labels[0]],
        unmentioned=None
        if mentioned is None
        else [task.classes[k] for k in unmentioned(ensembles, mentioned) if k in kept],
    )

"""A task on one data set: the labelled images, the classes that occur, and the predictions for them.

Letters: n images, K classes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mama.data.held_out import Item
from mama.data.wording import Sentences, Wording
from mama.evaluate.arrays import Flags, Float64s, Ints
from mama.evaluate.class_prompts import prompt_ensembles, prompt_templates
from mama.evaluate.tasks import Task, Unit
from mama.evaluate.training_vocabulary import unmentioned
from mama.evaluate.units import Units, units_of


@dataclass(frozen=True)
class Predictions:
    """Probabilities [n, K] of the held-out images by one protocol with one model.

    `val_scores` [m, K] are those of the labelled images of the split `val`; None if there are none.
    """

    protocol: str
    model: str
    scores: Float64s
    val_scores: Float64s | None = None
    fraction: float | None = None  # share of the training labels; None: the protocol uses none
    draw: int = 0  # number of the draw of that fraction

    @property
    def whole(self) -> bool:
        """Whether the protocol had all training labels that it uses."""
        return self.fraction in (None, 1.0) and self.draw == 0


@dataclass
class TaskData:
    """A task on a split: `rows` [n] are its labelled images, `labels` [n] their classes.

    The classes are renumbered, as only those that occur in the data set are kept; a binary task keeps both.
    """

    task: Task
    classes: list[str]
    ensembles: list[list[Sentences]]  # class prompts of each class
    templates: list[list[str]]  # what each of them is made after
    held_out: list[Item]  # all images of the split
    rows: Ints
    labels: Ints
    train_rows: Ints
    train_labels: Ints
    val: list[Item]  # all images of the split `val`
    val_rows: Ints
    val_labels: Ints
    absent: list[str]  # classes without a held-out image
    unmentioned: list[str] | None  # classes that the training texts never mention; None if those texts are unknown
    predictions: list[Predictions] = field(default_factory=list)
    sensitivity: list[dict[str, Any]] = field(default_factory=list)  # see `mama.evaluate.zero_shot.by_template`

    @property
    def items(self) -> list[Item]:
        """The labelled images [n]."""
        return [self.held_out[row] for row in self.rows]

    def units(self, kind: Unit, of: Flags | None = None) -> Units:
        """The units of a kind that the labelled images make up, or those of them flagged by `of` [n] alone."""
        return units_of(kind, self.task, self.items, self.labels, self.classes, of)

    def val_units(self, kind: Unit) -> Units:
        """Those of the split `val`."""
        items = [self.val[row] for row in self.val_rows]
        return units_of(kind, self.task, items, self.val_labels, self.classes)


def task_data(
    task: Task,
    held_out: list[Item],
    train: list[Item],
    val: list[Item],
    wording: Wording,
    mentioned: set[str] | None = None,
) -> TaskData:
    """Find the labelled images and the classes that occur; `mentioned` are the statements of the training texts.

    `val` is empty if there is no such split. Kinds of findings that an archive records are those that any of these
    images shows.
    """
    recorded = recorded_kinds([*held_out, *train, *val])
    labels = [
        [task.label_of(item.study, item.view, recorded[item.study.source]) for item in items]
        for items in (held_out, train, val)
    ]
    occurring = {label for part in labels[:2] for label in part if label is not None}
    kept = [k for k in range(len(task.names)) if task.binary or k in occurring]
    # An image of the split `val` whose class is in neither other split is left out.
    rows = [np.array([i for i, label in enumerate(part) if label in kept], dtype=np.int64) for part in labels]
    numbers = [np.array([kept.index(k) for k in part if k in kept], dtype=np.int64) for part in labels]
    ensembles, templates = prompt_ensembles(task, wording), prompt_templates(task, wording)
    return TaskData(
        task=task,
        classes=[task.names[k] for k in kept],
        ensembles=[ensembles[k] for k in kept],
        templates=[templates[k] for k in kept],
        held_out=held_out,
        rows=rows[0],
        labels=numbers[0],
        train_rows=rows[1],
        train_labels=numbers[1],
        val=val,
        val_rows=rows[2],
        val_labels=numbers[2],
        absent=[name for k, name in enumerate(task.names) if k not in labels[0]],
        # One's own words are rarely those of a training text: that does not tell whether the model knows their meaning.
        unmentioned=None
        if mentioned is None or task.words
        else [task.names[k] for k in unmentioned(ensembles, mentioned) if k in kept],
    )


def recorded_kinds(items: Iterable[Item]) -> dict[str, set[str]]:
    """The kinds of findings that each source of these images records."""
    found: dict[str, set[str]] = defaultdict(set)
    for item in items:
        found[item.study.source] |= {finding.kind for finding in item.view.findings}
    return found

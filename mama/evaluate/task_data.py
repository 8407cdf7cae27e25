"""A task put to a data set: which images are asked about, which classes there are, what was answered."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from mama.evaluate.embeddings import Item
from mama.evaluate.metrics import Floats, Ints
from mama.evaluate.tasks import Sentences, Task, Wording, prompts
from mama.evaluate.training_vocabulary import untaught


@dataclass(frozen=True)
class Answer:
    """Probabilities [n, K] that one protocol gave with one model."""

    protocol: str
    model: str
    scores: Floats


@dataclass
class Question:
    """A task put to a split: `rows` are its labelled images, `labels` their classes.

    The classes are those that occur in the data set, numbered anew; the two of a binary task always.
    """

    task: Task
    classes: list[str]
    texts: list[list[Sentences]]
    rows: Ints
    labels: Ints
    train_rows: Ints
    train_labels: Ints
    absent: list[str]
    untaught: list[str] | None  # classes of which no training text speaks; None where the training texts are not known
    answers: list[Answer] = field(default_factory=list)


def ask(task: Task, held: list[Item], train: list[Item], wording: Wording, said: set[str] | None = None) -> Question:
    """Find the images that `task` is about, and the classes that the data set has.

    `said` are the statements of the texts that the model was trained on.
    """
    labels = [[task.label(item.view) for item in items] for items in (held, train)]
    occurring = {label for part in labels for label in part if label is not None}
    kept = [k for k in range(len(task.classes)) if task.binary or k in occurring]
    rows = [np.array([i for i, label in enumerate(part) if label is not None], dtype=np.int64) for part in labels]
    numbers = [np.array([kept.index(k) for k in part if k is not None], dtype=np.int64) for part in labels]
    texts = prompts(task, wording)
    unsaid = None if said is None else [task.classes[k] for k in untaught(texts, said) if k in kept]
    return Question(
        task=task,
        classes=[task.classes[k] for k in kept],
        texts=[texts[k] for k in kept],
        rows=rows[0],
        labels=numbers[0],
        train_rows=rows[1],
        train_labels=numbers[1],
        absent=[name for k, name in enumerate(task.classes) if k not in labels[0]],
        untaught=unsaid,
    )

"""The units that images make up: breasts, exams and patients, scored from the same pass as their images.

Letters: n images, u units, K classes.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np

from mama.data.held_out import Item
from mama.evaluate.arrays import Flags, Float64s, Ints
from mama.evaluate.tasks import Task, Unit, many
from shards.schema import LATERALITIES, VIEWS

Pool = Literal["mean", "max"]

KEYS: dict[Unit, Callable[[Item], str]] = {
    "image": lambda item: item.key,
    "breast": lambda item: f"{item.study.key}/{item.view.laterality}",
    "exam": lambda item: item.study.key,
    "patient": lambda item: item.study.patient,
}


@dataclass(frozen=True)
class Units:
    """The units of one kind that the labelled images of a task make up, in the order of their first images."""

    kind: Unit
    keys: list[str]  # [u]
    patients: list[str]  # [u]
    labels: Ints  # [u], class
    unit_of: Ints  # [n], unit of each image; -1 for one that is left out
    conflicts: int  # number of units whose images have several classes
    incomplete: int  # number of units that lack a view

    @property
    def images(self) -> Ints:
        """Number of images [u] of each unit."""
        return np.bincount(self.unit_of[self.unit_of >= 0], minlength=len(self.keys))

    def pooled(self, scores: Float64s, pool: Pool, binary: bool) -> Float64s:
        """Scores [n, K] of the images -> [u, K] of the units: the mean, or see `highest`. Of images as they are."""
        if self.kind == "image":
            return scores[self.unit_of >= 0]
        used, of_used = self.unit_of[self.unit_of >= 0], scores[self.unit_of >= 0]
        if pool == "max":
            return highest(used, of_used, len(self.keys), binary)
        sums = np.zeros((len(self.keys), scores.shape[1]))
        np.add.at(sums, used, of_used)
        return sums / self.images[:, None]


def highest(unit_of: Ints, scores: Float64s, count: int, binary: bool) -> Float64s:
    """[n, K] -> [u, K]: the highest score of the positive class; of several classes of each, divided by their sum."""
    best = np.zeros((count, scores.shape[1]))
    np.maximum.at(best, unit_of, scores)
    if binary:
        best[:, 0] = 1 - best[:, 1]
    return best / best.sum(1, keepdims=True)


def units_of(
    kind: Unit, task: Task, items: Sequence[Item], labels: Ints, classes: Sequence[str], of: Flags | None = None
) -> Units:
    """Group labelled images: `items` [n] of classes `labels` [n], numbers in `classes`; only those flagged by `of` [n].

    A unit's class is the highest of its images in the order of the task; with `unit_label: agree` units of several
    classes are left out, and counted all the same.
    """
    ranks = np.array([task.ranks[name] for name in classes], dtype=np.int64)
    members: dict[str | int, list[int]] = defaultdict(list)
    for row in range(len(items)) if of is None else np.flatnonzero(of).tolist():
        item = items[row]
        # An image that is there twice is two.
        members[row if kind == "image" else KEYS[kind](item)].append(row)
    conflicts = {key for key, rows in members.items() if len(set(labels[rows].tolist())) > 1}
    kept = [key for key in members if task.unit_label == "highest" or key not in conflicts]
    unit_of = np.full(len(items), -1, dtype=np.int64)
    for number, key in enumerate(kept):
        unit_of[members[key]] = number
    highest_of = [max(labels[members[key]].tolist(), key=lambda k: ranks[k]) for key in kept]
    return Units(
        kind,
        [KEYS[kind](items[members[key][0]]) for key in kept],
        [items[members[key][0]].study.patient for key in kept],
        np.array(highest_of, dtype=np.int64),
        unit_of,
        len(conflicts),
        sum(_lacks_a_view(kind, task, [items[row] for row in members[key]]) for key in kept),
    )


def facts(units: Units, classes: Sequence[str]) -> dict[str, object]:
    """The numbers of these units, for a metrics.json."""
    counts = Counter(units.labels.tolist())
    return {
        "n": len(units.keys),
        "counts": {name: counts[k] for k, name in enumerate(classes)},
        "patients": len(set(units.patients)),
        "incomplete": units.incomplete,
        "conflicts": units.conflicts,
    }


def _lacks_a_view(kind: Unit, task: Task, items: Sequence[Item]) -> bool:
    """Whether one of the exams (for a breast: the breast) lacks a view that the task's images would have."""
    if kind == "image":
        return False
    sides = _wanted(task, "laterality", LATERALITIES)
    if kind == "breast":
        sides = {items[0].view.laterality}
    wanted = set(product(sides, _wanted(task, "view", VIEWS)))
    seen: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for item in items:
        seen[item.study.key].add((item.view.laterality, item.view.view))
    return any(wanted - views for views in seen.values())


def _wanted(task: Task, fact: str, known: Collection[str]) -> set[str]:
    return set(many(task.images[fact])) if fact in task.images else set(known)

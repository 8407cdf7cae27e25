"""Classification tasks: their classes, and the true class of an image.

Adding one: an entry in `TASKS`, and in `mama.evaluate.class_prompts.DESCRIBES` the typical cases of its classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from shards.schema import DENSITIES, View


@dataclass(frozen=True)
class Task:
    """A classification of single images.

    `label` returns the number of the true class, or None if the archive does not record it or the task excludes the
    image. Of two classes the second is the positive one.
    """

    name: str
    title: str
    classes: tuple[str, ...]
    label: Callable[[View], int | None]

    @property
    def binary(self) -> bool:
        """Whether the task has two classes, and so a ROC curve and a decision."""
        return len(self.classes) == 2


def _cancer(view: View) -> int | None:
    return None if view.labels.cancer is None else int(view.labels.cancer)


def _malignancy(view: View) -> int | None:
    return {"normal": 0, "malignant": 1}.get(view.labels.pathology or "")


def _birads(view: View) -> int | None:
    return view.labels.birads


def _density(view: View) -> int | None:
    return None if view.labels.density is None else DENSITIES.index(view.labels.density)


TASKS = {
    task.name: task
    for task in (
        Task("cancer", "Cancer in the breast", ("no cancer", "cancer"), _cancer),
        Task("malignancy", "Malignant against normal (benign left out)", ("normal", "malignant"), _malignancy),
        Task("birads", "BI-RADS category", tuple(f"BI-RADS {n}" for n in range(7)), _birads),
        Task("density", "Breast density", DENSITIES, _density),
    )
}

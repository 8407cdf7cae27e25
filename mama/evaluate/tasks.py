"""Classification tasks: which images, the true class of each, and the words that describe the classes to the model.

A task is a YAML file with the keys of `Task`: a shipped one in configs/tasks, or a user's own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from mama.errors import ConfigError
from mama.settings.checks import folder_name, one_of
from mama.settings.load import find, shipped_configs
from mama.settings.schema import TASKS
from mama.settings.values import build, document
from shards.errors import did_you_mean
from shards.image.header import OTHER_VENDOR, VENDORS
from shards.schema import DENSITIES, LATERALITIES, VIEWS, Study, View

Unit = Literal["image", "breast", "exam", "patient"]

KINDS = ("mass", "calcification", "asymmetry", "distortion")  # of findings
PATHOLOGIES = ("normal", "benign", "malignant")
# What a task may ask for -> the values that it has.
LABELS: dict[str, tuple[Any, ...]] = {
    "birads": tuple(range(7)),
    "density": DENSITIES,
    "cancer": (False, True),
    "pathology": PATHOLOGIES,
    **dict.fromkeys(KINDS, (False, True)),
}
UNDESCRIBED = (0, 3, 4, 5, 6)  # BI-RADS categories of an image that shows something, whether or not it is described
# What `images` may ask for -> the values that an image has, and those that are known; () for any text.
Facts = Callable[[Study, View], Iterable[Any]]
FILTERS: dict[str, tuple[Facts, tuple[Any, ...]]] = {
    "view": (lambda study, view: [view.view], VIEWS),
    "laterality": (lambda study, view: [view.laterality], LATERALITIES),
    "vendor": (lambda study, view: [view.vendor], (*VENDORS, OTHER_VENDOR)),
    "reason": (lambda study, view: [study.reason], ("screening", "diagnostic")),
    "source": (lambda study, view: [study.source], ()),
    "race": (lambda study, view: [study.race], ()),
    "ethnicity": (lambda study, view: [study.ethnicity], ()),
    "finding": (lambda study, view: [finding.kind for finding in view.findings], KINDS),
    "birads": (lambda study, view: [view.labels.birads], LABELS["birads"]),
    "density": (lambda study, view: [view.labels.density], DENSITIES),
    "cancer": (lambda study, view: [view.labels.cancer], LABELS["cancer"]),
    "pathology": (lambda study, view: [view.labels.pathology], PATHOLOGIES),
    "implant": (lambda study, view: [view.implant], (False, True)),
}
AGE = "age"  # `images: {age: [40, 49]}`: from and to, in years
# Folders and columns of results that have another meaning.
RESERVED_TASKS = ("alignment", "retrieval")
RESERVED_CLASSES = ("protocol", "model", "image", "breast", "exam", "patient", "images", "label")


@dataclass(frozen=True)
class Task:
    """A classification of images, and of the breasts, exams or patients that they make up.

    Of two classes the second is the positive one. Raises `ConfigError` for a definition that means nothing.
    """

    title: str
    label: str  # what is asked for, of LABELS: a label of the archive, or whether there is a finding of a kind
    classes: dict[str, Any]  # name -> values of `label`; other values are in no class
    images: dict[str, Any] = field(default_factory=dict)  # which images: fact of FILTERS, or age -> values
    unit: Unit = "image"  # of the headline figures
    # The class of a unit whose images have several: the highest in `order` (of two classes the positive one), or none,
    # so that only units whose images agree are scored.
    unit_label: Literal["highest", "agree"] = "highest"
    order: list[str] = field(default_factory=list)  # the classes from the lowest to the highest; []: as in `classes`
    words: dict[str, Any] = field(default_factory=dict)  # class -> texts; {}: texts of the training template
    templates: list[str] = field(default_factory=list)  # sentences with {} for each of `words`; []: the words alone
    name: str = ""  # that of its file, and of the folder of its results

    def __post_init__(self) -> None:
        one_of("label", self.label, tuple(LABELS))
        _require_classes(self)
        _require_filters(self.images)
        _require_prompts(self)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the classes."""
        return tuple(self.classes)

    @property
    def binary(self) -> bool:
        """Whether the task has two classes, and so a ROC curve and a decision."""
        return len(self.classes) == 2

    @property
    def ranks(self) -> dict[str, int]:
        """Class -> its place from the lowest to the highest."""
        return {name: place for place, name in enumerate(self.order or self.classes)}

    def class_of(self, value: Any) -> int | None:
        """The number of the class with this value of `label`; None if it is in no class."""
        return next((k for k, values in enumerate(self.classes.values()) if value in many(values)), None)

    def label_of(self, study: Study, view: View, recorded: Collection[str] = KINDS) -> int | None:
        """The number of an image's true class; None if it is not known, in no class, or not of the task's images.

        `recorded` are the kinds of findings that its archive records: no other kind is known to be absent.
        """
        if not self.admits(study, view):
            return None
        value = has_finding(view, self.label, recorded) if self.label in KINDS else getattr(view.labels, self.label)
        return None if value is None else self.class_of(value)

    def admits(self, study: Study, view: View) -> bool:
        """Whether it is one of the task's images; one of which a fact is unknown is not."""
        low, high = self.images.get(AGE, (0, 200))
        if AGE in self.images and not (study.age is not None and low <= study.age <= high):
            return False
        wanted = {name: many(values) for name, values in self.images.items() if name != AGE}
        return all(any(v in values for v in FILTERS[name][0](study, view)) for name, values in wanted.items())


def why_none_of(task: Task, images: Iterable[tuple[Study, View]]) -> str:
    """Why none of these images has a class of the task."""
    images = list(images)
    if chosen := sum(task.admits(study, view) for study, view in images):
        return f"of the {chosen} images that it is about none has a value of {task.label} that is in one of its classes"
    for name, wanted in task.images.items():
        if any(replace(task, images={name: wanted}).admits(study, view) for study, view in images):
            continue
        values = ([study.age] if name == AGE else FILTERS[name][0](study, view) for study, view in images)
        found = sorted({_yaml(value) for of_image in values for value in of_image if value is not None})
        there = f"there are {', '.join(found[:12])}" + ", ..." * (len(found) > 12)
        asked = (" to " if name == AGE else ", ").join(map(_yaml, many(wanted)))
        return f"images.{name}: no image is {asked}; {there if found else 'it is known of none'}"
    return "none of these images meets all of the task's `images`"


def has_finding(view: View, kind: str, recorded: Collection[str]) -> bool | None:
    """Whether the image shows a finding of this kind; None if that is not known.

    It is not where the archive records none of this kind, nor in an image with no finding that is assessed as one that
    shows something (BI-RADS 0, 3 to 6) or is malignant: something is there, and nobody wrote down what.
    """
    if any(finding.kind == kind for finding in view.findings):
        return True
    labels = view.labels
    shows = labels.birads in UNDESCRIBED or labels.pathology == "malignant" or labels.cancer is True
    return None if kind not in recorded or (shows and not view.findings) else False


def task_name(entry: str) -> str:
    """The name of a task in `eval.tasks`, which is a name or the path of a YAML file."""
    return Path(entry).stem


def load_tasks(entries: Iterable[str], setting: str = "eval.tasks") -> list[Task]:
    """The tasks of `setting`. Raises `ConfigError` as `load_task`, and for two files of one name."""
    try:
        tasks = {entry: load_task(entry) for entry in dict.fromkeys(entries)}
    except ConfigError as error:
        raise ConfigError(f"{setting}: {error}") from error
    for entry, task in tasks.items():
        same = (e for e, t in tasks.items() if t.name.casefold() == task.name.casefold() and e != entry)
        if other := next(same, None):
            raise ConfigError(f"{setting}: {entry} and {other} have one name, {task.name}; rename one of the files")
    return list(tasks.values())


def load_task(entry: str) -> Task:
    """A shipped task by its name, or one's own by the path of its YAML file.

    Raises `ConfigError` with the file, the key, and the fix.
    """
    shipped = shipped_configs() / "tasks" / f"{entry}.yaml"
    file = shipped if entry in TASKS else find(os.path.expanduser(entry), "tasks")
    values = document(Task, file)
    name = task_name(entry)
    try:
        if "name" in values:
            raise ConfigError(f"name: {values['name']!r}, but a task has the name of its file; leave the line out")
        if missing := [key for key in ("title", "label", "classes") if key not in values]:
            raise ConfigError(f"{missing[0]}: is missing; a task has a title, a label and classes")
        if entry not in TASKS and name.casefold() in (*TASKS, *RESERVED_TASKS):
            raise ConfigError(f"{name} is the name of a shipped task or folder; rename the file")
        folder_name("the file's name", name)
        return replace(build(Task, values), name=name)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error


def many(value: Any) -> list[Any]:
    """A list as it is, and anything else as a list of one."""
    return value if isinstance(value, list) else [value]


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _require_classes(task: Task) -> None:
    if len(task.classes) < 2:
        raise ConfigError(f"classes: {list(task.classes)} are less than two; give each its values of {task.label}")
    given: dict[Any, str] = {}
    for name, values in task.classes.items():
        if name in RESERVED_CLASSES or not name:
            raise ConfigError(f"classes: {name!r} is the name of a column of predictions.csv; choose another one")
        if not many(values):
            raise ConfigError(f"classes.{name}: is empty; give it values of {task.label}")
        for value in many(values):
            _require_known(f"classes.{name}", value, LABELS[task.label])
            if value in given:
                raise ConfigError(f"classes.{name}: {value!r} is in the class {given[value]} too; take it out of one")
            given[value] = name
    if task.order and sorted(task.order) != sorted(task.classes):
        raise ConfigError(f"order: {task.order} does not name each class once; they are {', '.join(task.classes)}")


def _require_filters(images: dict[str, Any]) -> None:
    for name, values in images.items():
        if name == AGE:
            ages = values if isinstance(values, list) else []
            if len(ages) != 2 or any(type(age) is not int for age in ages) or ages[0] > ages[1]:
                raise ConfigError(f"images.age: {values!r} is not a smallest and a largest age; write [40, 49]")
        elif name not in FILTERS:
            known = (*FILTERS, AGE)
            raise ConfigError(f"images.{name}: is not one of {', '.join(known)}{did_you_mean(name, known)}")
        elif not many(values):
            raise ConfigError(f"images.{name}: is empty, which no image meets; give it values, or leave it out")
        else:
            for value in many(values):
                _require_known(f"images.{name}", value, FILTERS[name][1])


def _require_known(key: str, value: Any, known: tuple[Any, ...]) -> None:
    """A value among `known`, of the same type: `true` is not 1. Without `known` any text."""
    if not known and isinstance(value, str):
        return
    if not any(type(value) is type(one) and value == one for one in known):
        shown = ", ".join(map(_yaml, known))
        given = "null" if value is None else repr(value)
        raise ConfigError(f"{key}: {given} is not one of {shown}" if known else f"{key}: {given} is not a text")


def _require_prompts(task: Task) -> None:
    if task.templates and not task.words:
        raise ConfigError(f"templates: has nothing to put in; add words, a list for each of {list(task.classes)}")
    if task.words and sorted(task.words) != sorted(task.classes):
        raise ConfigError(f"words: {list(task.words)} are not the classes; these are {list(task.classes)}")
    for name, texts in task.words.items():
        if not many(texts) or not all(isinstance(text, str) and text.strip() for text in many(texts)):
            raise ConfigError(f"words.{name}: {texts!r} is not a list of texts; write [first, second]")
    texts = {name: sorted(text.strip() for text in many(texts)) for name, texts in task.words.items()}
    for name, own in texts.items():
        if same := next((other for other in texts if other != name and texts[other] == own), None):
            raise ConfigError(f"words.{name}: are those of {same} too, which tells nothing apart; write its own")
    for template in task.templates:
        if template.count("{}") != 1:
            raise ConfigError(f"templates: {template!r} does not hold one {{}}, the place of the words; add it")

"""Zero-shot probabilities of images, breasts and exams, calibrated where the evaluation of the model was.

Letters: n images, u units, K classes, D shared width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from mama.data.wording import Sentences
from mama.errors import ConfigError
from mama.evaluate.arrays import Float32s, Float64s
from mama.evaluate.calibration import by_steps, cooled
from mama.evaluate.class_prompts import prompt_ensembles, prompts_digest
from mama.evaluate.tasks import Task, Unit, load_task, load_tasks
from mama.evaluate.training_vocabulary import unmentioned
from mama.evaluate.units import Pool, Units
from mama.evaluate.zero_shot import class_embeddings, probabilities
from mama.export.figures import Calibration, UnitCalibration, read_calibration
from mama.export.training_texts import TrainingTexts
from mama.settings.schema import TASKS
from shards.files import legible

log = logging.getLogger(__name__)

OF_FILES = ("view", "laterality", "vendor", "implant")  # what a task may ask of an image that no shard describes
OTHER_WORDS = "it was fitted to scores by other class prompts: the words of the task have changed"
OTHER_PROMPTS = (
    "it was fitted to scores by other class prompts: `mama eval` words them after the reports of its images, "
    "`mama predict` after the training texts"
)
SCORED_UNITS: tuple[Unit, ...] = ("image", "breast", "exam")

Recalibrate = Callable[[Float64s], Float64s]  # [u, K] -> [u, K]


@dataclass(frozen=True)
class ScoredTask:
    """A task with the classes that are scored, and the way from scores to calibrated probabilities of each unit."""

    task: Task
    classes: list[str]
    ensembles: list[list[Sentences]]  # class prompts of each class
    not_taught: list[str]  # classes that the training texts never mention
    method: str | None = None  # isotonic or temperature
    reason: str | None = None  # why all or some units have no calibration
    recalibrate: dict[Unit, Recalibrate] = field(default_factory=dict)

    @property
    def left_out(self) -> list[str]:
        """Classes of the task that are not scored."""
        return [name for name in self.task.names if name not in self.classes]


def scored_tasks(names: Sequence[str] | None, texts: TrainingTexts, folder: Path, pool: Pool) -> list[ScoredTask]:
    """The tasks `names` (shipped ones, YAML files); None: all shipped ones that the training texts teach.

    A class that the training texts do not mention is left out of a task of more than two classes, unless the evaluation
    of the model in `folder` scored it. Raises `ConfigError` for an unknown task.
    """
    found = _calibration(folder)
    if names is not None:
        return [_scored(task, texts, found, pool) for task in load_tasks(names, "tasks")]
    shipped = (load_task(name) for name in TASKS)
    scored = (_scored(task, texts, found, pool) for task in shipped if not task.images)
    return [one for one in scored if one.classes[-1] not in one.not_taught]


def require_known_facts(tasks: Sequence[ScoredTask], all_in_shards: bool) -> None:
    """Raise `ConfigError` for a task that chooses its images by a fact that image files do not state."""
    for one in tasks:
        asked = [name for name in one.task.images if name not in OF_FILES]
        if asked and not all_in_shards:
            raise ConfigError(
                f"tasks: {one.task.name} is about images by their {asked[0]}, which a file does not state; give "
                "shards, or copy the task without it"
            )


def score(one: ScoredTask, images: Float32s, ensembles: list[Float32s], scale: float) -> Float64s:
    """Probabilities [n, K] of unit embeddings [n, D]; `ensembles` are those of each class's prompts, [t_k, D] each."""
    return probabilities(images, class_embeddings(ensembles), scale)


def pooled(kind: Unit, keys: Sequence[Hashable], scores: Float64s, pool: Pool, binary: bool) -> Float64s:
    """Scores [n, K] of images -> [u, K] of the units that their `keys` name, in the order of their first images."""
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    unit_of = np.array([numbers[key] for key in keys], dtype=np.int64)
    nobody = [""] * len(numbers)
    return Units(kind, nobody, nobody, np.zeros(len(numbers), np.int64), unit_of, 0, 0).pooled(scores, pool, binary)


def _scored(task: Task, texts: TrainingTexts, calibration: Calibration | str, pool: Pool) -> ScoredTask:
    ensembles = prompt_ensembles(task, texts.wording)
    missing = [] if task.words else [task.names[k] for k in unmentioned(ensembles, set(texts.statements))]
    fitted = None if isinstance(calibration, str) else calibration.tasks.get(task.name)
    taught = [name for name in task.names if name not in missing]
    if fitted and set(fitted.classes) <= set(task.names):
        classes = [name for name in task.names if name in fitted.classes]
    else:
        classes = list(task.names) if task.binary or len(taught) < 2 else taught
    kept = [texts for name, texts in zip(task.names, ensembles, strict=True) if name in classes]
    if isinstance(calibration, str):
        reason = calibration
    elif fitted is None:
        reason = "`mama eval` did not calibrate this task"
    elif fitted.prompts != prompts_digest(kept):
        reason = OTHER_WORDS if task.words else OTHER_PROMPTS
    else:
        return ScoredTask(task, classes, kept, missing, *_method(fitted.units, pool))
    return ScoredTask(task, classes, kept, missing, reason=reason)


def _method(units: dict[str, UnitCalibration], pool: Pool) -> tuple[str | None, str | None, dict[Unit, Recalibrate]]:
    """(method, why units have none, recalibration of each unit that has one): a single method for all units."""
    missing = {kind: reason for kind in SCORED_UNITS if (reason := _no_calibration(units.get(kind), pool))}
    fitted = {kind: units[kind] for kind in SCORED_UNITS if kind not in missing}
    reason = _together(missing)
    if not fitted:
        return None, reason, {}
    if all(one.isotonic for one in fitted.values()):
        steps = {kind: list(one.isotonic or ()) for kind, one in fitted.items()}
        return "isotonic", reason, {kind: partial(by_steps, steps=one) for kind, one in steps.items()}
    found = {kind: one.temperature or 1.0 for kind, one in fitted.items()}
    return "temperature", reason, {kind: partial(cooled, temperature=one) for kind, one in found.items()}


def _no_calibration(unit: UnitCalibration | None, pool: Pool) -> str | None:
    """Why the scores of units of one kind are not calibrated; None if they are."""
    if unit is None:
        return "`mama eval` did not calibrate them"
    if unit.pool not in (None, pool):
        return f"it was fitted to scores pooled by {unit.pool}, not {pool}"
    return None if unit.temperature else unit.reason or "nothing was fitted to its scores"


def _together(reasons: dict[Unit, str]) -> str | None:
    """The reasons by kind of unit, each once: 'breasts and exams: ...'; without the kinds if all have one reason."""
    kinds: dict[str, list[str]] = {}
    for kind, reason in reasons.items():
        kinds.setdefault(reason, []).append(f"{kind}s")
    if len(reasons) == len(SCORED_UNITS) and len(kinds) == 1:
        return next(iter(kinds))
    return "; ".join(f"{' and '.join(names)}: {reason}" for reason, names in kinds.items()) or None


def _calibration(folder: Path) -> Calibration | str:
    """What the evaluation of the model fitted to its scores, or the reason why there is nothing that can be used."""
    try:
        found = read_calibration(folder)
    except ConfigError as error:
        log.warning("the scores are not calibrated: %s", error)
        return legible(str(error))
    return "the model was not evaluated: run `mama eval`" if found is None else found

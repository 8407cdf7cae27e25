"""What `mama eval` measured of a model, as it travels with it: `metrics.json` and `calibration.json` in its folder.

Both are of the run's own split, and no part of the folder's digests. They belong to a checkpoint: a folder of the same
checkpoint with weights of another kind (`dtype`, LoRA merged or apart) takes them over, and says so.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from mama.errors import ConfigError
from mama.export.model_folder import read_model, weights_digest
from mama.run.files import document_digest, write_with_digest
from shards.errors import one_line
from shards.files import atomic_write, read_json
from shards.from_json import from_json

log = logging.getLogger(__name__)

METRICS, CALIBRATION = "metrics.json", "calibration.json"
EVALUATE = "run `mama eval` again, or remove the file"


@dataclass(frozen=True)
class Weights:
    """The weights of a model folder: digest of their files, and the checkpoint, dtype and kind that they are of."""

    model: str
    checkpoint: str
    dtype: str
    lora: str


@dataclass(frozen=True)
class Estimate:
    """A metric with its interval of 95 %; None where it cannot be computed."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Row:
    """One protocol on the units of one kind."""

    protocol: str
    unit: str
    n: int
    patients: int
    auc: Estimate
    balanced_accuracy: Estimate


@dataclass(frozen=True)
class Task:
    """A task's figures; `classes` are those that occur."""

    title: str
    classes: tuple[str, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Data:
    """What was measured on: folders of shards by name, their archives, the split and its size."""

    names: tuple[str, ...]
    sources: tuple[str, ...]
    split: str
    patients: int
    images: int
    known: int | None  # patients among them that the model was trained on; None if that was not checked


@dataclass(frozen=True)
class Pointing:
    """How often a map's highest patch was in the box of its finding or next to it: of the model, and by `chance`.

    `brightest` is the share of the brightest patch of the image, which reads no text.
    """

    hit_rate: Estimate
    brightest: float | None
    chance: float | None
    findings: int
    patients: int


@dataclass(frozen=True)
class Metrics(Weights):
    """The content of metrics.json: the weights that were measured, and tasks by their names.

    `measured` is the digest of the images and the settings of the evaluation. `pointing` is None where no finding has a
    box, or the model has no local term.
    """

    data: Data
    tasks: dict[str, Task]
    pointing: Pointing | None = None
    measured: str = ""


@dataclass(frozen=True)
class UnitCalibration:
    """What was fitted to the zero-shot scores of the units of one kind, `n` of them in `split`.

    Without a `temperature` there is none, and without `isotonic` steps (see `mama.evaluate.calibration`) neither:
    `reason` says why the steps are missing.
    """

    pool: str | None
    temperature: float | None
    isotonic: tuple[dict[str, Any], ...] | None
    reason: str | None
    n: int
    split: str

    def __post_init__(self) -> None:
        if self.temperature is not None and not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature: {self.temperature} is not above 0")
        for step in self.isotonic or ():
            if step.keys() != {"class", "x", "y"} or type(step["class"]) is not int or step["class"] < 0:
                raise ValueError("isotonic: a step has not class, x and y")
            points = [step["x"], step["y"]]
            if not all(isinstance(values, list) and values and all(map(_is_number, values)) for values in points):
                raise ValueError("isotonic: x and y are not lists of numbers")
            if len(step["x"]) != len(step["y"]) or any(sorted(values) != values for values in points):
                raise ValueError("isotonic: x and y do not rise together")


@dataclass(frozen=True)
class TaskCalibration:
    """Of scores by certain class prompts, see `mama.evaluate.class_prompts.prompts_digest`, for certain classes."""

    prompts: str
    classes: tuple[str, ...]
    units: dict[str, UnitCalibration]

    def __post_init__(self) -> None:
        steps = [step for unit in self.units.values() for step in unit.isotonic or ()]
        if any(step["class"] >= len(self.classes) for step in steps):
            raise ValueError("isotonic: a step is of a class that there is not")


@dataclass(frozen=True)
class Calibration(Weights):
    """The content of calibration.json: as in `Metrics`; tasks are zero-shot."""

    tasks: dict[str, TaskCalibration]
    measured: str = ""


T = TypeVar("T", Metrics, Calibration)


def weights_of(folder: Path) -> Weights:
    """The weights that lie in a model folder now."""
    facts = read_model(folder)
    return Weights(weights_digest(folder), facts.checkpoint, facts.dtype, facts.lora)


def write_figures(metrics: Metrics, calibration: Calibration, folder: Path) -> None:
    """Write both files of a model folder, each atomically."""
    write_with_digest(folder / METRICS, asdict(metrics))
    write_with_digest(folder / CALIBRATION, asdict(calibration))


def read_metrics(folder: Path) -> Metrics | None:
    """The figures of the model in `folder`; None if it was not evaluated.

    Raises `ConfigError` if the file is damaged, or of another checkpoint's weights.
    """
    return _read(Metrics, folder / METRICS)


def read_calibration(folder: Path) -> Calibration | None:
    """What recalibrates the model's zero-shot scores; None if it was not evaluated. Raises as `read_metrics`."""
    return _read(Calibration, folder / CALIBRATION)


def carry_figures(sources: Iterable[Path], folder: Path) -> None:
    """Copy to the model folder `folder` what was measured of the same checkpoint in the first of `sources` that has it.

    The weights in `folder` may be of another kind than those that were measured.
    """
    own = weights_of(folder)
    for source in sources:
        if not (source / METRICS).exists():
            continue
        try:
            metrics = _load(Metrics, source / METRICS)
            calibration = _load(Calibration, source / CALIBRATION)
        except ConfigError as error:
            log.warning("figures of an evaluation are left behind: %s", error)
            continue
        if all(belongs(found, own) for found in (metrics, calibration)):
            for name in (METRICS, CALIBRATION):
                atomic_write(folder / name, (source / name).read_bytes())
            return


def belongs(measured: Weights, own: Weights) -> bool:
    """Whether figures of the weights `measured` are those of the weights `own`, or of the same checkpoint."""
    return measured.model == own.model or measured.checkpoint == own.checkpoint


def _read(made: type[T], path: Path) -> T | None:
    if not path.exists():
        return None
    found = _load(made, path)
    if not belongs(found, weights_of(path.parent)):
        raise ConfigError(f"{path}: was measured with the weights of another checkpoint; {EVALUATE}")
    return found


def _load(made: type[T], path: Path) -> T:
    try:
        document = dict(read_json(path))
        if document.pop("digest", None) != document_digest(document):
            raise ValueError("its own digest")
        return from_json(made, document)
    except (OSError, ValueError, TypeError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or one_line(error)[:100]
        raise ConfigError(f"{path}: was edited or damaged ({reason}); {EVALUATE}") from None


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)

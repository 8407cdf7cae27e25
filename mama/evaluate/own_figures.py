"""The figures of a run's own split in its model folder: metrics.json, calibration.json, and a card that shows them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from mama.errors import ConfigError
from mama.evaluate.pointing import BRIGHTEST
from mama.evaluate.provenance import Document, measured_digest, object_in
from mama.evaluate.result_folders import MARKER, METRICS
from mama.evaluate.results import is_whole, shown_rows
from mama.export.figures import (
    Calibration,
    Data,
    Estimate,
    Metrics,
    Pointing,
    Row,
    Task,
    TaskCalibration,
    UnitCalibration,
    Weights,
    read_calibration,
    read_metrics,
    weights_of,
    write_figures,
)
from mama.export.model_card import write_card
from mama.export.model_folder import is_bare, model_folder
from mama.settings.schema import Config

log = logging.getLogger(__name__)

OF_TRAINING = ("image_size", "fit", "style", "tell_pathology", "max_tokens")  # settings that a model is used with


def record(config: Config, trained_with: Config, run: Path, folder: Path) -> None:
    """Take the results in `folder` over into the model folder of `run`, if they are those that a model travels with.

    That is what the run's own model does on the run's own split, by the standard protocol, with its own settings. The
    log says why if not. A model folder that cannot be written ends no evaluation.
    """
    if is_bare(run) or config.eval.on:
        return
    if reason := _not_own(config, trained_with, run, folder):
        log.info("the model card is left as it is: %s", reason)
        return
    model = model_folder(run)
    try:
        marker, documents = _results(folder)
        weights = weights_of(model)
        if marker["model"]["sha256"] != weights.model:
            raise ConfigError(f"{model}: holds other weights than those that were measured; run `mama eval` again")
        data, measured = _data(marker["shards"], marker.get("known")), measured_digest(marker)
        tasks, fitted = _earlier(model, weights, measured)
        tasks |= {name: _task(one) for name, one in documents.items()}
        fitted = {name: one for name, one in fitted.items() if name not in documents}
        fitted |= {name: found for name, one in documents.items() if (found := _calibration(one))}
        metrics = Metrics(**vars(weights), measured=measured, data=data, tasks=tasks, pointing=_pointing(folder))
        write_figures(metrics, Calibration(**vars(weights), measured=measured, tasks=fitted), model)
        write_card(model)
    except (ConfigError, OSError) as error:
        log.warning("the model card is left as it is: %s", error)


def _not_own(config: Config, trained_with: Config, run: Path, folder: Path) -> str | None:
    """Why these results are not those that travel with the model."""
    if folder != run / "eval":
        return "it shows the test split of the shards that the run was trained on"
    if config.eval.protocol != "standard":
        return f"its figures are those of eval.protocol=standard, and this is {config.eval.protocol}"
    for name in OF_TRAINING:
        now, before = getattr(config.data, name), getattr(trained_with.data, name)
        if now != before:
            return f"data.{name} is {now}, and the model was trained with {before}"
    return None


def _earlier(model: Path, weights: Weights, measured: str) -> tuple[dict[str, Task], dict[str, TaskCalibration]]:
    """The tasks that the folder has already of the same weights, images and settings: they stay, unless measured anew.

    Also those that are no more among the results of the run, where an evaluation with other settings replaced them.
    """
    try:
        metrics, calibration = read_metrics(model), read_calibration(model)
    except ConfigError:  # damaged, or of other weights: the new ones replace them
        return {}, {}
    if metrics is None or calibration is None:
        return {}, {}
    if any((one.model, one.measured) != (weights.model, measured) for one in (metrics, calibration)):
        return {}, {}
    return metrics.tasks, calibration.tasks


def _results(folder: Path) -> tuple[Document, dict[str, Document]]:
    """The marker of an evaluation, and the metrics.json of its tasks."""
    marker = object_in(folder / MARKER) or {}
    found = {name: object_in(folder / name / METRICS) for name in marker.get("tasks", [])}
    documents = {name: document for name, document in found.items() if document}
    if not documents or marker.get("model") is None:
        raise ConfigError(f"{folder}: its results cannot be read; run `mama eval` again")
    return marker, documents


def _data(shards: Document, known: Document | None) -> Data:
    rows = [row for one in shards["folders"] for row in one["splits"] if row["split"] == shards["split"]]
    return Data(
        names=tuple(one["name"] for one in shards["folders"]),
        sources=tuple(dict.fromkeys(one["source"] for one in shards["folders"])),
        split=shards["split"],
        patients=sum(row["patients"] for row in rows),
        images=sum(row["images"] for row in rows),
        known=None if known is None else known["patients"],
    )


def _pointing(folder: Path) -> Pointing | None:
    alignment = object_in(folder / "alignment" / METRICS) or {}
    rates = {row["model"]: _estimate(row["hit_rate"]) for row in alignment.get("rows", [])}
    if "trained" not in rates or not alignment["findings"]:
        return None
    brightest = rates[BRIGHTEST].value if BRIGHTEST in rates else None
    found = alignment["chance"], alignment["findings"], alignment["patients"]
    return Pointing(rates["trained"], brightest, *found)


def _task(document: Document) -> Task:
    rows = (row for row in shown_rows(document) if row["model"] == "trained" and is_whole(row))
    return Task(document["title"], _classes(document), tuple(map(_row, rows)))


def _row(row: dict[str, Any]) -> Row:
    auc, accuracy = (_estimate(row["metrics"][name]) for name in ("auc", "balanced_accuracy"))
    return Row(row["protocol"], row["unit"], row["n"], row["patients"], auc, accuracy)


def _estimate(found: dict[str, Any]) -> Estimate:
    return Estimate(found["value"], found["low"], found["high"])


def _classes(document: Document) -> tuple[str, ...]:
    return tuple(one["name"] for one in document["classes"])


def _calibration(document: Document) -> TaskCalibration | None:
    """What was fitted to the zero-shot scores; None if the task has none."""
    rows = [row for row in document["rows"] if row["model"] == "trained" and row["protocol"] == "zero-shot"]
    units = {row["unit"]: _fitted(row) for row in rows}
    if not units or "prompts_digest" not in document:  # an earlier release measured it
        return None
    return TaskCalibration(document["prompts_digest"], _classes(document), units)


def _fitted(row: dict[str, Any]) -> UnitCalibration:
    temperature, isotonic = row["calibration"]["temperature"], row["calibration"]["isotonic"]
    steps = isotonic.get("steps")
    return UnitCalibration(
        pool=row["pool"],
        temperature=temperature.get("temperature"),
        isotonic=None if steps is None else tuple(steps),
        reason=isotonic["reason"],
        n=temperature.get("fitted_on", 0),
        split="val",
    )

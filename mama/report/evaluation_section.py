"""The part of the page for one evaluation: figures from its folder, pictures from the shards if they are there.

A part that is missing or damaged is None, and the page reports it.
"""

from __future__ import annotations

from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from mama.evaluate import provenance
from mama.evaluate.provenance import Document
from mama.evaluate.result_folders import METRICS
from mama.evaluate.results import format_estimate, is_whole, rows_of, shown_rows
from mama.report import binary_task, figures
from mama.report.pictures import Pictures, open_pictures
from mama.settings.schema import Config


def evaluation(config: Config, run: Path, model_now: Document | None, folder: Path, marker: Document) -> Document:
    """The contents of the page for the results in `folder`, without those of another provenance than its `marker`.

    `model_now` is `provenance.model_of(run)`: the weights that the run has now.
    """
    shards, model, settings = (marker[key] for key in provenance.IDENTITY)
    read = {name: provenance.object_in(folder / name / METRICS) for name in marker["tasks"]}
    tasks = [_on_images(task) for task in read.values() if task and provenance.same(task, marker)]
    binary = [(task, binary_task.predictions(task, folder)) for task in tasks if task["binary"] and task["rows"]]
    pictures = open_pictures(config, marker)
    return {
        "own": shards["split"] == "test" and provenance.is_own(shards, run),
        "same_shards": provenance.is_own(shards, run),
        "name": ", ".join(one["name"] for one in shards["folders"]),
        "shards": shards,
        "training": provenance.training(shards, run, marker.get("known")),
        "phantoms": any(one["source"] == "phantom" for one in shards["folders"]),
        "model": model,
        "model_now": model_now,
        "settings": settings,
        "left_out": sorted(set(read) - {task["task"] for task in tasks}),
        "pictures": pictures is not None,
        "tasks": tasks,
        "curves": [binary_task.curves(task, found) for task, found in binary if not task["absent"]],
        "calibrations": [binary_task.calibrations(task) for task, _ in binary],
        "forests": [found for task in tasks if (found := _forest(task))],
        "confusions": [_confusions(task) for task in tasks if task["rows"]],
        "recall": _same(folder / "retrieval" / METRICS, marker),
        "errors": [binary_task.worst_errors(task, found, pictures) for task, found in binary],
        "retrieval": _retrieval(folder, marker, pictures),
        "alignment": _alignment(folder, marker, pictures),
    }


def _on_images(task: Document) -> Document:
    """A task whose `rows` are those on images that had all training labels, and `shown` those of the first table."""
    return {**task, "shown": shown_rows(task), "rows": list(filter(is_whole, rows_of(task, "image")))}


def _forest(task: Document) -> Document | None:
    """The subgroups of a task; None if there are none, as in results of an earlier release."""
    rows = task.get("subgroups", {}).get("rows")
    if not rows:
        return None
    of_unit = (row for row in task["shown"] if row["unit"] == task["unit"])
    overall = [row for row in of_unit if row["model"] == "trained" and is_whole(row)]
    return {"task": task, "figure": figures.forest_plot(rows, overall, task["unit"])}


def _confusions(task: Document) -> Document:
    classes = [entry["name"].removeprefix("BI-RADS ") for entry in task["classes"]]
    rows = [row for row in task["rows"] if row["model"] == "trained"]
    matrices = [figures.confusion_matrix(row["confusion"], classes, row["protocol"]) for row in rows]
    return {"task": task, "figures": matrices}


def _same(file: Path, marker: Document) -> Document | None:
    """The object in `file`; None if it is missing, damaged or of another provenance than `marker`."""
    document = provenance.object_in(file)
    return document if document and provenance.same(document, marker) else None


def _retrieval(folder: Path, marker: Document, pictures: Pictures | None) -> Document | None:
    document = _same(folder / "retrieval" / "examples.json", marker)
    if document is None:
        return None
    for query in document["texts"]:
        for result in query["results"]:
            result["picture"] = pictures.thumbnail(result["image"]) if pictures else None
    for query in document["images"]:
        query["picture"] = pictures.thumbnail(query["image"]) if pictures else None
    return document


def _alignment(folder: Path, marker: Document, pictures: Pictures | None) -> Document | None:
    document = _same(folder / "alignment" / METRICS, marker)
    if document is None:
        return None
    try:
        with np.load(folder / "alignment" / "maps.npz", allow_pickle=False) as file:
            maps = file["maps"]
    except (OSError, KeyError, ValueError, BadZipFile):
        maps = [None] * len(document["examples"])
    detected = document.get("detection", {"rows": []})["rows"]  # an earlier release measured the pointing game alone
    document["froc"] = figures.froc_curves([_froc(row) for row in detected]) if detected else None
    for example, values in zip(document["examples"], maps, strict=True):
        if pictures is None or values is None:
            example["picture"] = None
        else:
            example["picture"] = pictures.heat_map(example["image"], example["boxes"], values)
    return document


def _froc(row: Document) -> Document:
    at_one = next(one["sensitivity"] for one in row["froc"] if one["false_positives"] == 1)
    return row["curve"] | {"model": row["model"], "label": f"{row['model']}: {format_estimate(at_one)}"}

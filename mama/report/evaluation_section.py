"""What a page shows of one evaluation: its figures from the run folder, and pictures from the shards if they are there.

A part that is missing or damaged is None, and the page says so.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from zipfile import BadZipFile

import cv2
import numpy as np
from numpy.typing import NDArray

from mama.data.images import fit_geometry
from mama.evaluate import metrics, provenance
from mama.evaluate.embeddings import Split
from mama.evaluate.provenance import Document
from mama.evaluate.results import shown
from mama.report import figures
from mama.settings.schema import Config, ConfigError
from shards.schema import ShardError

HEAT_MAP_HEIGHT = 480  # pixels at least, of the fitted image
THUMBNAIL_HEIGHT = 200


def evaluation(config: Config, run: Path, model_now: Document | None, folder: Path, marker: Document) -> Document:
    """What a page shows of one folder of results. What was measured on something else than it says is left out.

    `model_now` are the weights that the run holds now, as `measured.model_of` says.
    """
    shards, model, settings = (marker[key] for key in provenance.IDENTITY)
    read = {name: provenance.object_in(folder / name / "metrics.json") for name in marker["tasks"]}
    tasks = [task for task in read.values() if task and provenance.same(task, marker)]
    pictures = _pictures(config, marker)
    return {
        "own": shards["split"] == "test" and provenance.is_own(shards, run),
        "same_shards": provenance.is_own(shards, run),
        "name": ", ".join(one["name"] for one in shards["folders"]),
        "shards": shards,
        "training": provenance.training(shards, run),
        "phantoms": any(one["source"] == "phantom" for one in shards["folders"]),
        "model": model,
        "model_now": model_now,
        "settings": settings,
        "left_out": sorted(set(read) - {task["task"] for task in tasks}),
        "pictures": pictures is not None,
        "tasks": tasks,
        "rocs": [_roc(task, folder) for task in tasks if task["binary"] and task["rows"] and not task["absent"]],
        "confusions": [_confusions(task) for task in tasks if task["rows"]],
        "retrieval": _retrieval(folder, marker, pictures),
        "alignment": _alignment(folder, marker, pictures),
    }


def _pictures(config: Config, marker: Document) -> Pictures | None:
    """The images that were measured, where `data.shards` says or else where they were; None if they are at neither."""
    settings = marker["settings"]
    for places in (config.data.shards, marker["places"]):
        seen = {"image_size": tuple(settings["image_size"]), "fit": settings.get("fit", config.data.fit)}
        data = replace(config.data, shards=places, shard_weights=[], **seen)
        there = replace(config, data=data, eval=replace(config.eval, split=marker["shards"]["split"]))
        try:
            if provenance.shard_set(there)["digest"] == marker["shards"]["digest"]:
                return Pictures(there)
        except (ConfigError, ShardError, OSError):
            continue
    return None


class Pictures:
    """Images of the evaluated split by key, read only when a page wants one."""

    def __init__(self, config: Config) -> None:
        self.split = Split(config, config.eval.split)
        self.by_key = {item.key: item for item in self.split.items}

    def stored(self, key: str) -> NDArray[np.uint8]:
        """uint8 [h, w]."""
        return self.split.stored(self.by_key[key])

    def thumbnail(self, key: str) -> str | None:
        """None where the image cannot be read any more."""
        try:
            pixels = self.stored(key)
        except (ShardError, OSError, KeyError):
            return None
        width = max(1, round(pixels.shape[1] * THUMBNAIL_HEIGHT / pixels.shape[0]))
        small = cv2.resize(pixels, (width, THUMBNAIL_HEIGHT), interpolation=cv2.INTER_AREA)
        return figures.picture(np.asarray(small, dtype=np.uint8))


def _roc(task: Document, folder: Path) -> Document:
    """Curves from predictions.csv, labelled with the measured AUC; `figure` is None where that file is gone."""
    scores: dict[tuple[str, str], list[tuple[bool, float]]] = defaultdict(list)
    positive = task["classes"][1]["name"]
    try:
        with (folder / task["task"] / "predictions.csv").open(newline="") as file:
            for line in csv.DictReader(file):
                scores[line["protocol"], line["model"]].append((line["label"] == positive, float(line[positive])))
        curves = [_curve(row, scores[row["protocol"], row["model"]]) for row in task["rows"]]
    except (OSError, KeyError, ValueError, TypeError):
        return {"task": task, "figure": None}
    return {"task": task, "figure": figures.roc_curves(curves)}


def _curve(row: Document, scores: list[tuple[bool, float]]) -> Document:
    truth, values = (np.array(column) for column in zip(*scores, strict=True))
    false_positive, true_positive = metrics.roc(truth.astype(np.int64), values)
    return {
        "protocol": row["protocol"],
        "model": row["model"],
        "false_positive": false_positive,
        "true_positive": true_positive,
        "label": f"{row['model']}: {shown(row['metrics']['auc'])}",
    }


def _confusions(task: Document) -> Document:
    classes = [entry["name"].removeprefix("BI-RADS ") for entry in task["classes"]]
    shown_rows = [row for row in task["rows"] if row["model"] == "trained"]
    drawn = [figures.confusion_matrix(row["confusion"], classes, row["protocol"]) for row in shown_rows]
    return {"task": task, "figures": drawn}


def _retrieval(folder: Path, marker: Document, pictures: Pictures | None) -> Document | None:
    document = provenance.object_in(folder / "retrieval" / "examples.json")
    if document is None or not provenance.same(document, marker):
        return None
    for query in document["texts"]:
        for result in query["results"]:
            result["picture"] = pictures.thumbnail(result["image"]) if pictures else None
    for query in document["images"]:
        query["picture"] = pictures.thumbnail(query["image"]) if pictures else None
    return document


def _alignment(folder: Path, marker: Document, pictures: Pictures | None) -> Document | None:
    document = provenance.object_in(folder / "alignment" / "metrics.json")
    if document is None or not provenance.same(document, marker):
        return None
    try:
        with np.load(folder / "alignment" / "maps.npz", allow_pickle=False) as file:
            maps = file["maps"]
    except (OSError, KeyError, ValueError, BadZipFile):
        maps = [None] * len(document["examples"])
    for example, values in zip(document["examples"], maps, strict=True):
        example["picture"] = None if pictures is None or values is None else _heat_map(pictures, example, values)
    return document


def _heat_map(pictures: Pictures, example: Document, values: NDArray[np.float32]) -> Document | None:
    """The image with its boxes, and the same under the map, both enlarged and without the air that fitting added.

    None where the image cannot be read any more.
    """
    height, width = pictures.split.size
    larger = max(1, -(-HEAT_MAP_HEIGHT // height))
    try:
        stored = pictures.stored(example["image"])
        fitted = pictures.split.pixels(pictures.by_key[example["image"]], larger)
    except (ShardError, OSError, KeyError):
        return None
    across, down, top = fit_geometry((stored.shape[0], stored.shape[1]), (height, width), pictures.split.images.fit)
    rows = slice(larger * top, larger * (top + round(stored.shape[0] * down)))
    columns = slice(0, larger * round(stored.shape[1] * across))
    boxes = [(larger * x0, larger * y0, larger * x1, larger * y1) for x0, y0, x1, y1 in example["boxes"]]
    plain, heated = figures.boxed(fitted, boxes), figures.boxed(figures.heat(fitted, values), boxes)
    return {
        "plain": figures.picture(plain[rows, columns]),
        "heat": figures.picture(heated[rows, columns]),
        "smallest": float(values.min()),
        "largest": float(values.max()),
    }

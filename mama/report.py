"""report.html: what a run was, how it learned and what was measured, in one file that asks nothing of the network.

It reads what the run folder holds (config, environment.json, log.jsonl, eval/) and takes pictures
from the shards; it computes no figure of its own. A part that is not there is said so in words.
"""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from datetime import datetime
from pathlib import Path
from typing import Any

import cv2
import jinja2
import numpy as np
from numpy.typing import NDArray

from mama import figures, metrics
from mama.config import Config
from mama.features import Split
from mama.images import fit_geometry
from mama.results import shown
from shards.manifest import write_aside
from shards.read import load_manifest
from shards.remote import local_folder
from shards.schema import SPLITS

Document = dict[str, Any]

HEAT_MAP_HEIGHT = 480  # pixels at least, of the fitted image
THUMBNAIL_HEIGHT = 200
METRICS = {
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "ppv": "PPV",
    "npv": "NPV",
    "f1": "F1",
    "probabilistic_f1": "probabilistic F1",
    "specificity_at_sensitivity": "specificity at 80 % sensitivity",
}


def write_report(config: Config, run: Path) -> Path:
    """Write `<run>/report.html` from what is there; returns its path."""
    pictures = Pictures(config)
    tasks = [task for name in config.eval.tasks if (task := _json(run / "eval" / name / "metrics.json"))]
    page = _template().render(
        name=config.name,
        date=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        config=config,
        environment=_json(run / "environment.json"),
        data=_data(config),
        tasks=tasks,
        metric_names=METRICS,
        curves=_curves(config, run),
        rocs=[_roc(task, run) for task in tasks if task["binary"] and len(task["rows"]) and not task["absent"]],
        confusions=[_confusions(task) for task in tasks if task["rows"]],
        retrieval=_retrieval(run, pictures),
        alignment=_alignment(run, pictures),
    )
    path = run / "report.html"
    write_aside(path, page.encode())
    return path


class Pictures:
    """Images of the evaluated split by key, read only when a page wants one."""

    def __init__(self, config: Config) -> None:
        self.split = Split(config, config.eval.split)
        self.by_key = {item.key: item for item in self.split.items}

    def stored(self, key: str) -> NDArray[np.uint8]:
        """uint8 [h, w]."""
        return self.split.stored(self.by_key[key])

    def thumbnail(self, key: str) -> str:
        pixels = self.stored(key)
        width = round(pixels.shape[1] * THUMBNAIL_HEIGHT / pixels.shape[0])
        small = cv2.resize(pixels, (width, THUMBNAIL_HEIGHT), interpolation=cv2.INTER_AREA)
        return figures.picture(np.asarray(small, dtype=np.uint8))


def _template() -> jinja2.Template:
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["estimate"] = shown
    return environment.get_template("report.html.j2")


def _json(path: Path) -> Document | None:
    return json.loads(path.read_text()) if path.exists() else None


def _data(config: Config) -> list[Document]:
    """One row per shard folder and split."""
    rows = []
    for folder in config.data.shards:
        manifest = load_manifest(local_folder(folder, config.data.cache_folder))
        for split in SPLITS:
            shards = [shard for shard in manifest.shards if shard.split == split]
            rows.append(
                {
                    "source": manifest.source,
                    "split": split,
                    "patients": len({patient for shard in shards for patient in shard.patients}),
                    "studies": sum(shard.samples for shard in shards),
                    "images": sum(sum(shard.view_counts) for shard in shards),
                    "labels": manifest.labels.get(split, {}),
                }
            )
    return rows


def _curves(config: Config, run: Path) -> Document | None:
    path = run / "log.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if not records:
        return None
    rates = [record["pairs_per_second"] for record in records if "pairs_per_second" in record]
    return {
        "figure": figures.training_curves(records, config.loss.local_start),
        "steps": records[-1]["step"] + 1,
        "pairs_per_second": float(np.median(rates)) if rates else None,
    }


def _roc(task: Document, run: Path) -> Document:
    """Curves from predictions.csv, labelled with the measured AUC."""
    scores: dict[tuple[str, str], list[tuple[bool, float]]] = defaultdict(list)
    positive = task["classes"][1]["name"]
    with (run / "eval" / task["task"] / "predictions.csv").open(newline="") as file:
        for line in csv.DictReader(file):
            scores[line["protocol"], line["model"]].append((line["label"] == positive, float(line[positive])))
    curves = []
    for row in task["rows"]:
        truth, values = (np.array(column) for column in zip(*scores[row["protocol"], row["model"]], strict=True))
        false_positive, true_positive = metrics.roc(truth.astype(np.int64), values)
        curves.append(
            {
                "protocol": row["protocol"],
                "model": row["model"],
                "false_positive": false_positive,
                "true_positive": true_positive,
                "label": f"{row['model']}: {shown(row['metrics']['auc'])}",
            }
        )
    return {"task": task, "figure": figures.roc_curves(curves)}


def _confusions(task: Document) -> Document:
    classes = [entry["name"].removeprefix("BI-RADS ") for entry in task["classes"]]
    shown_rows = [row for row in task["rows"] if row["model"] == "trained"]
    drawn = [figures.confusion_matrix(row["confusion"], classes, row["protocol"]) for row in shown_rows]
    return {"task": task, "figures": drawn}


def _retrieval(run: Path, pictures: Pictures) -> Document | None:
    document = _json(run / "eval" / "retrieval" / "examples.json")
    if document is None:
        return None
    for query in document["texts"]:
        for result in query["results"]:
            result["picture"] = pictures.thumbnail(result["image"])
    for query in document["images"]:
        query["picture"] = pictures.thumbnail(query["image"])
    return document


def _alignment(run: Path, pictures: Pictures) -> Document | None:
    folder = run / "eval" / "alignment"
    document = _json(folder / "metrics.json")
    if document is None:
        return None
    with np.load(folder / "maps.npz", allow_pickle=False) as file:
        maps = file["maps"]
    for example, values in zip(document["examples"], maps, strict=True):
        example |= _heat_map(pictures, example, values)
    return document


def _heat_map(pictures: Pictures, example: Document, values: NDArray[np.float32]) -> Document:
    """The image with its boxes, and the same under the map, both enlarged and without the air that fitting added."""
    height, width = pictures.split.size
    stored = pictures.stored(example["image"])
    larger = max(1, -(-HEAT_MAP_HEIGHT // height))
    scale, top, _ = fit_geometry((stored.shape[0], stored.shape[1]), (height, width))
    rows = slice(larger * top, larger * (top + round(stored.shape[0] * scale)))
    columns = slice(0, larger * round(stored.shape[1] * scale))
    fitted = pictures.split.pixels(pictures.by_key[example["image"]], larger)
    boxes = [(larger * x0, larger * y0, larger * x1, larger * y1) for x0, y0, x1, y1 in example["boxes"]]
    plain, heated = figures.boxed(fitted, boxes), figures.boxed(figures.heat(fitted, values), boxes)
    return {
        "plain": figures.picture(plain[rows, columns]),
        "heat": figures.picture(heated[rows, columns]),
        "smallest": float(values.min()),
        "largest": float(values.max()),
    }

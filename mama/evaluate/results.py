"""The results of an evaluation: its files, and the table that `mama eval` prints."""

from __future__ import annotations

import csv
import io
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mama.data.held_out import Item
from mama.errors import ConfigError
from mama.evaluate.arrays import Float32s, Float64s, Ints
from mama.evaluate.measured_row import measured_row
from mama.evaluate.result_folders import METRICS
from mama.evaluate.task_data import Predictions, TaskData
from mama.run.files import write_json
from mama.settings.schema import Config
from shards.files import atomic_write

FACTS = ("protocol", "model", "image", "patient", "label")  # before the classes, in a predictions.csv

Results = dict[str, dict[str, Any]]  # metrics.json by task, and that of "alignment"


def document(data: TaskData, items: list[Item], split: str, config: Config) -> dict[str, Any]:
    """The contents of a task's `metrics.json`; `items` are all images of `split`."""
    patients = [items[i].study.patient for i in data.rows]
    counts = Counter(data.labels.tolist())
    return {
        "task": data.task.name,
        "title": data.task.title,
        "binary": data.task.binary,
        "split": split,
        "images": len(data.rows),
        "patients": len(set(patients)),
        "unlabelled": len(items) - len(data.rows),
        "classes": [{"name": name, "images": counts[k]} for k, name in enumerate(data.classes)],
        "absent": data.absent,
        "untaught": data.unmentioned,
        "chance": 1 / len(counts) if counts else None,
        "bootstrap": {"resamples": config.eval.bootstrap, "unit": "patient", "seed": config.seed},
        "prompts": {name: texts[0] for name, texts in zip(data.classes, data.ensembles, strict=True)},
        "prompt_variants": [len(texts) for texts in data.ensembles],
        "rows": [
            {"protocol": one.protocol, "model": one.model}
            | measured_row(data.labels, one.scores, patients, data.task.binary, None, config)
            for one in data.predictions
        ],
    }


def write(
    results: Results, tasks: list[TaskData], items: list[Item], retrieved: dict[str, Any], maps: Float32s, folder: Path
) -> None:
    """Write every file of an evaluation; `maps` [e, gh, gw] are those of the local alignment examples."""
    for name, measured in results.items():
        (folder / name).mkdir()
        write_json(folder / name / METRICS, measured)
    for data in tasks:
        atomic_write(folder / data.task.name / "predictions.csv", _predictions_csv(data, items).encode())
    (folder / "retrieval").mkdir()
    write_json(folder / "retrieval" / "examples.json", retrieved)
    packed = io.BytesIO()
    np.savez(packed, maps=maps)
    atomic_write(folder / "alignment" / "maps.npz", packed.getvalue())


def _predictions_csv(data: TaskData, items: list[Item]) -> str:
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow([*FACTS, *data.classes])
    for one in data.predictions:
        for row, label, scores in zip(data.rows, data.labels, one.scores, strict=True):
            item = items[row]
            shares = [f"{score:.6g}" for score in scores]
            facts = [item.key, item.study.patient, data.classes[label]]
            writer.writerow([one.protocol, one.model, *facts, *shares])
    return file.getvalue()


@dataclass(frozen=True)
class Scored:
    """The predictions of one protocol with one model, sorted by image: n images, K classes."""

    images: list[str]
    patients: list[str]
    labels: Ints  # [n]
    classes: list[str]
    scores: Float64s  # [n, K]

    def same_images(self, other: Scored) -> bool:
        """Whether both are of the same images, patients and labels."""
        facts = [(one.images, one.patients, one.classes, one.labels.tolist()) for one in (self, other)]
        return facts[0] == facts[1]


def read_predictions(file: Path, protocol: str, model: str) -> Scored:
    """Read what `write` left in a predictions.csv. Raises `ConfigError` if that is missing or damaged."""
    try:
        with file.open(newline="", encoding="utf-8") as lines:
            reader = csv.reader(lines)
            classes = next(reader)[len(FACTS) :]
            rows = sorted(row[2:] for row in reader if row[:2] == [protocol, model])
        images, patients, labels = zip(*(row[:3] for row in rows), strict=True)
        scores = np.array([row[3:] for row in rows], dtype=np.float64)
        numbers = np.array([classes.index(label) for label in labels])
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror})") from None
    except (ValueError, StopIteration, csv.Error):
        raise ConfigError(f"{file}: is damaged, or lacks {protocol} of the {model} model; evaluate again") from None
    if scores.shape != (len(images), len(classes)) or not np.isfinite(scores).all():
        raise ConfigError(f"{file}: is damaged; evaluate again")
    return Scored(list(images), list(patients), numbers, classes, scores)


def results_table(results: Results) -> str:
    """The main figures as text: one line for each task, protocol and model."""
    head = ("task", "protocol", "model", "AUC [95 %]", "balanced accuracy [95 %]", "chance", "images", "patients")
    lines = [head]
    for name, document in results.items():
        if name == "alignment":
            continue
        for row in document["rows"]:
            auc, accuracy = (format_estimate(row["metrics"][key]) for key in ("auc", "balanced_accuracy"))
            chance = f"{document['chance']:.2f}" if document["chance"] else "n/a"
            sizes = (str(document["images"]), str(document["patients"]))
            mark = " *" if unmentioned_note(document) and row["protocol"] == "zero-shot" else ""
            lines.append((name, row["protocol"] + mark, row["model"], auc, accuracy, chance, *sizes))
        if not document["rows"]:
            lines.append((name, "no image with this label", "", "n/a", "n/a", "n/a", str(document["images"]), "0"))
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    notes = [f"* {name}: {note}" for name, document in results.items() if (note := unmentioned_note(document))]
    return "\n".join([table[0], "-" * len(table[0]), *table[1:], *notes])


def unmentioned_note(document: dict[str, Any]) -> str | None:
    """A caveat for zero-shot figures of classes that the training texts never mention; None if there are none."""
    if not document.get("untaught"):
        return None
    names = ", ".join(document["untaught"])
    return (
        f"the training texts never mention what the class prompts say of {names}, "
        "so the model was not trained for these zero-shot figures"
    )


def format_estimate(estimate: dict[str, Any]) -> str:
    """An estimate for readers: "0.912 [0.880, 0.940]", or "n/a"."""
    if estimate["value"] is None:
        return "n/a"
    interval = f" [{estimate['low']:.3f}, {estimate['high']:.3f}]" if estimate["low"] is not None else ""
    return f"{estimate['value']:.3f}{interval}"

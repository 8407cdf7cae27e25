"""The files of an evaluation: each task's `metrics.json` and `predictions.csv`, and the examples of the report."""

from __future__ import annotations

import csv
import io
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mama.data.held_out import Item
from mama.evaluate import metrics
from mama.evaluate.arrays import Float32s
from mama.evaluate.result_folders import METRICS
from mama.evaluate.results_table import Results
from mama.evaluate.task_data import Predictions, TaskData
from mama.run.digests import write_json
from mama.settings.schema import Config
from shards.files import atomic_write


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
        "rows": [_row(data, one, patients, config.eval.bootstrap, config.seed) for one in data.predictions],
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


def _row(data: TaskData, one: Predictions, patients: list[str], resamples: int, seed: int) -> dict[str, Any]:
    measured = metrics.measure(data.labels, one.scores, patients, data.task.binary, resamples, seed)
    return {
        "protocol": one.protocol,
        "model": one.model,
        "metrics": {name: asdict(estimate) for name, estimate in measured.items()},
        "confusion": metrics.confusion(data.labels, one.scores).tolist(),
    }


def _predictions_csv(data: TaskData, items: list[Item]) -> str:
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow(["protocol", "model", "image", "patient", "label", *data.classes])
    for one in data.predictions:
        for row, label, scores in zip(data.rows, data.labels, one.scores, strict=True):
            item = items[row]
            shares = [f"{score:.6g}" for score in scores]
            facts = [item.key, item.study.patient, data.classes[label]]
            writer.writerow([one.protocol, one.model, *facts, *shares])
    return file.getvalue()

"""What was measured, as files for a program and as a table for a person."""

from __future__ import annotations

import csv
import io
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mama import metrics
from mama.config import EvalConfig
from mama.features import Item
from mama.files import write_json
from mama.questions import Answer, Question
from shards.manifest import write_aside

Results = dict[str, dict[str, Any]]


def results_table(results: Results) -> str:
    """The main figures as text: one line for each task, protocol and model."""
    head = ("task", "protocol", "model", "AUC [95 %]", "balanced accuracy [95 %]", "chance", "images", "patients")
    lines = [head]
    for name, document in results.items():
        if name == "alignment":
            continue
        for row in document["rows"]:
            auc, accuracy = (shown(row["metrics"][key]) for key in ("auc", "balanced_accuracy"))
            chance = f"{document['chance']:.2f}" if document["chance"] else "n/a"
            sizes = (str(document["images"]), str(document["patients"]))
            lines.append((name, row["protocol"], row["model"], auc, accuracy, chance, *sizes))
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([table[0], "-" * len(table[0]), *table[1:]])


def shown(estimate: dict[str, Any]) -> str:
    """An estimate as read by a person: "0.912 [0.880, 0.940]", or "n/a"."""
    if estimate["value"] is None:
        return "n/a"
    interval = f" [{estimate['low']:.3f}, {estimate['high']:.3f}]" if estimate["low"] is not None else ""
    return f"{estimate['value']:.3f}{interval}"


def write(
    question: Question, items: list[Item], split: str, config: EvalConfig, seed: int, folder: Path
) -> dict[str, Any]:
    """Measure the answers; write `predictions.csv` and then `metrics.json`, and return the latter.

    `items` are all images of `split`; `seed` that of the bootstrap.
    """
    patients = [items[i].study.patient for i in question.rows]
    counts = Counter(question.labels.tolist())
    document = {
        "task": question.task.name,
        "title": question.task.title,
        "binary": question.task.binary,
        "split": split,
        "images": len(question.rows),
        "patients": len(set(patients)),
        "unlabelled": len(items) - len(question.rows),
        "classes": [{"name": name, "images": counts[k]} for k, name in enumerate(question.classes)],
        "absent": question.absent,
        "chance": 1 / len(counts) if counts else None,
        "bootstrap": {"resamples": config.bootstrap, "unit": "patient", "seed": seed},
        "prompts": {name: texts[0] for name, texts in zip(question.classes, question.texts, strict=True)},
        "prompt_variants": [len(texts) for texts in question.texts],
        "rows": [_row(question, answer, patients, config.bootstrap, seed) for answer in question.answers],
    }
    folder.mkdir(parents=True, exist_ok=True)
    _write_predictions(question, items, folder / "predictions.csv")
    write_json(folder / "metrics.json", document)
    return document


def _row(question: Question, answer: Answer, patients: list[str], resamples: int, seed: int) -> dict[str, Any]:
    measured = metrics.measure(question.labels, answer.scores, patients, question.task.binary, resamples, seed)
    return {
        "protocol": answer.protocol,
        "model": answer.model,
        "metrics": {name: asdict(estimate) for name, estimate in measured.items()},
        "confusion": metrics.confusion(question.labels, answer.scores).tolist(),
    }


def _write_predictions(question: Question, items: list[Item], path: Path) -> None:
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow(["protocol", "model", "image", "patient", "label", *question.classes])
    for answer in question.answers:
        for row, label, scores in zip(question.rows, question.labels, answer.scores, strict=True):
            item = items[row]
            shares = [f"{score:.6g}" for score in scores]
            facts = [item.key, item.study.patient, question.classes[label]]
            writer.writerow([answer.protocol, answer.model, *facts, *shares])
    write_aside(path, file.getvalue().encode())

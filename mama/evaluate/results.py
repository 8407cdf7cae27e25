"""What was measured, as files for a program and as a table for a person."""

from __future__ import annotations

import csv
import io
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mama.evaluate import metrics
from mama.evaluate.embeddings import Item
from mama.evaluate.task_data import Answer, Question
from mama.run.digests import write_json
from mama.settings.schema import Config
from shards.files import atomic_write

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
            mark = " *" if untaught_note(document) and row["protocol"] == "zero-shot" else ""
            lines.append((name, row["protocol"] + mark, row["model"], auc, accuracy, chance, *sizes))
        if not document["rows"]:
            lines.append((name, "no image with this label", "", "n/a", "n/a", "n/a", str(document["images"]), "0"))
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    notes = [f"* {name}: {note}" for name, document in results.items() if (note := untaught_note(document))]
    return "\n".join([table[0], "-" * len(table[0]), *table[1:], *notes])


def untaught_note(document: dict[str, Any]) -> str | None:
    """Why a task's zero-shot figures are of words that the model was never told; None where it was told them."""
    if not document.get("untaught"):
        return None
    names = ", ".join(document["untaught"])
    return f"no training text says what the prompts say of {names}, so zero-shot is not what the model was trained for"


def shown(estimate: dict[str, Any]) -> str:
    """An estimate as read by a person: "0.912 [0.880, 0.940]", or "n/a"."""
    if estimate["value"] is None:
        return "n/a"
    interval = f" [{estimate['low']:.3f}, {estimate['high']:.3f}]" if estimate["low"] is not None else ""
    return f"{estimate['value']:.3f}{interval}"


def document(question: Question, items: list[Item], split: str, config: Config) -> dict[str, Any]:
    """Measure the answers; `items` are all images of `split`."""
    patients = [items[i].study.patient for i in question.rows]
    counts = Counter(question.labels.tolist())
    return {
        "task": question.task.name,
        "title": question.task.title,
        "binary": question.task.binary,
        "split": split,
        "images": len(question.rows),
        "patients": len(set(patients)),
        "unlabelled": len(items) - len(question.rows),
        "classes": [{"name": name, "images": counts[k]} for k, name in enumerate(question.classes)],
        "absent": question.absent,
        "untaught": question.untaught,
        "chance": 1 / len(counts) if counts else None,
        "bootstrap": {"resamples": config.eval.bootstrap, "unit": "patient", "seed": config.seed},
        "prompts": {name: texts[0] for name, texts in zip(question.classes, question.texts, strict=True)},
        "prompt_variants": [len(texts) for texts in question.texts],
        "rows": [_row(question, answer, patients, config.eval.bootstrap, config.seed) for answer in question.answers],
    }


def write(
    found: Results,
    questions: list[Question],
    items: list[Item],
    retrieved: dict[str, Any],
    maps: NDArray[np.float32],
    folder: Path,
) -> None:
    """Every file of an evaluation; `maps` [e, gh, gw] are those of the examples of local alignment."""
    for name, measured in found.items():
        (folder / name).mkdir()
        write_json(folder / name / "metrics.json", measured)
    for question in questions:
        atomic_write(folder / question.task.name / "predictions.csv", _predictions(question, items).encode())
    (folder / "retrieval").mkdir()
    write_json(folder / "retrieval" / "examples.json", retrieved)
    packed = io.BytesIO()
    np.savez(packed, maps=maps)
    atomic_write(folder / "alignment" / "maps.npz", packed.getvalue())


def _row(question: Question, answer: Answer, patients: list[str], resamples: int, seed: int) -> dict[str, Any]:
    measured = metrics.measure(question.labels, answer.scores, patients, question.task.binary, resamples, seed)
    return {
        "protocol": answer.protocol,
        "model": answer.model,
        "metrics": {name: asdict(estimate) for name, estimate in measured.items()},
        "confusion": metrics.confusion(question.labels, answer.scores).tolist(),
    }


def _predictions(question: Question, items: list[Item]) -> str:
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow(["protocol", "model", "image", "patient", "label", *question.classes])
    for answer in question.answers:
        for row, label, scores in zip(question.rows, question.labels, answer.scores, strict=True):
            item = items[row]
            shares = [f"{score:.6g}" for score in scores]
            facts = [item.key, item.study.patient, question.classes[label]]
            writer.writerow([answer.protocol, answer.model, *facts, *shares])
    return file.getvalue()

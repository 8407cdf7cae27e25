"""The results of an evaluation: its files, and the table that `mama eval` prints."""

from __future__ import annotations

import csv
import io
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mama.data.held_out import Item
from mama.errors import ConfigError
from mama.evaluate import subgroups
from mama.evaluate.arrays import Float32s, Float64s, Ints
from mama.evaluate.class_prompts import prompts_digest
from mama.evaluate.fractions import label_of
from mama.evaluate.local_retrieval import NORMAL, OWN, TEXT
from mama.evaluate.measured_row import measured_row
from mama.evaluate.result_folders import METRICS
from mama.evaluate.task_data import TaskData
from mama.evaluate.tasks import RESERVED_TASKS, Task, Unit
from mama.evaluate.units import KEYS, Pool
from mama.evaluate.units import facts as unit_facts
from mama.run.files import write_json
from mama.settings.schema import Config
from shards.files import atomic_write

FACTS = ("protocol", "model", "image", "patient", "label")  # before the classes in a predictions.csv; or another unit

Results = dict[str, dict[str, Any]]  # metrics.json by task, and those of "alignment" and "retrieval"


def document(data: TaskData, items: list[Item], split: str, config: Config) -> dict[str, Any]:
    """The contents of a task's `metrics.json`; `items` are all images of `split`."""
    task = data.task
    patients = [item.study.patient for item in data.items]
    counts = Counter(data.labels.tolist())
    admitted = sum(task.admits(item.study, item.view) for item in items)
    return {
        "task": task.name,
        "title": task.title,
        "definition": {key: value for key, value in asdict(task).items() if key not in ("name", "title")},
        "binary": task.binary,
        "split": split,
        "unit": task.unit,
        "pool": config.eval.pool,
        "images": len(data.rows),
        "patients": len(set(patients)),
        "unlabelled": admitted - len(data.rows),
        "left_out": len(items) - admitted,
        "classes": [{"name": name, "images": counts[k]} for k, name in enumerate(data.classes)],
        "absent": data.absent,
        "untaught": data.unmentioned,
        "chance": 1 / len(counts) if counts else None,
        "bootstrap": {"resamples": config.eval.bootstrap, "unit": "patient", "seed": config.seed},
        "prompts": {name: texts[0] for name, texts in zip(data.classes, data.ensembles, strict=True)},
        "prompts_digest": prompts_digest(data.ensembles),
        "prompt_variants": [len(texts) for texts in data.ensembles],
        "prompt_sensitivity": data.sensitivity,
        "rows": [row for kind in scored_units(task, config) for row in _rows(data, kind, config)],
        "subgroups": subgroups.subgroups(data, config),
    }


def scored_units(task: Task, config: Config) -> list[Unit]:
    """Images, then the other units of `eval.units` and that of the task."""
    return [kind for kind in KEYS if kind in ("image", task.unit, *config.eval.units)]


def _rows(data: TaskData, kind: Unit, config: Config) -> list[dict[str, Any]]:
    """A row for each of the predictions, on units of one kind.

    Those with a share of the training labels are many, and are measured on images and on the task's unit alone.
    """
    units, val_units = data.units(kind), data.val_units(kind)
    pool, binary = config.eval.pool, data.task.binary
    rows = []
    for one in (one for one in data.predictions if one.whole or kind in ("image", data.task.unit)):
        val = one.val_scores
        rows.append(
            {
                "protocol": one.protocol,
                "model": one.model,
                "fraction": one.fraction,
                "draw": one.draw,
                "unit": kind,
                "pool": None if kind == "image" else pool,
                **unit_facts(units, data.classes),
                **measured_row(
                    units.labels,
                    units.pooled(one.scores, pool, binary),
                    units.patients,
                    binary,
                    None if val is None else (val_units.labels, val_units.pooled(val, pool, binary)),
                    config,
                ),
            }
        )
    return rows


def rows_of(document: dict[str, Any], *units: str) -> list[dict[str, Any]]:
    """The rows of a task's `metrics.json` on these units; those of an earlier release are of images."""
    return [row for row in document["rows"] if row.get("unit", "image") in units]


def write(
    results: Results, tasks: list[TaskData], items: list[Item], retrieved: dict[str, Any], maps: Float32s, folder: Path
) -> None:
    """Write every file of an evaluation; `maps` [e, gh, gw] are those of the local alignment examples."""
    for name, measured in results.items():
        (folder / name).mkdir()
        write_json(folder / name / METRICS, measured)
    for data in tasks:
        measured, own = results[data.task.name], folder / data.task.name
        for kind in dict.fromkeys(row["unit"] for row in measured["rows"]):
            atomic_write(own / predictions_file(kind), _predictions_csv(data, kind, measured["pool"]).encode())
        atomic_write(own / "subgroups.csv", subgroups.as_csv(measured["subgroups"]).encode())
    (folder / "retrieval").mkdir(exist_ok=True)
    write_json(folder / "retrieval" / "examples.json", retrieved)
    packed = io.BytesIO()
    np.savez(packed, maps=maps)
    atomic_write(folder / "alignment" / "maps.npz", packed.getvalue())


def predictions_file(unit: str) -> str:
    """The name of the file with the predictions of one kind of unit."""
    return "predictions.csv" if unit == "image" else f"predictions-{unit}.csv"


def _predictions_csv(data: TaskData, kind: Unit, pool: Pool) -> str:
    units = data.units(kind)
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    unit = "unit" if kind == "patient" else kind  # there is a column of the patients already
    writer.writerow([*(unit if name == "image" else name for name in FACTS), *data.classes])
    for one in data.predictions:
        pooled = units.pooled(one.scores, pool, data.task.binary)
        for key, patient, label, scores in zip(units.keys, units.patients, units.labels, pooled, strict=True):
            protocol = label_of(one.protocol, one.fraction, one.draw)
            # With all digits: a calibration by steps may be steep between two points.
            writer.writerow([protocol, one.model, key, patient, data.classes[label], *scores.tolist()])
    return file.getvalue()


@dataclass(frozen=True)
class Scored:
    """The predictions of one protocol with one model, sorted by image, or by breast and so on: n images, K classes."""

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
    """The main figures as text: for each task, protocol and model a line on images, and one on the task's unit."""
    head = ("task", "protocol", "model", "of", "AUC [95 %]", "bal. accuracy [95 %]", "n", "patients")
    lines = [head]
    of_tasks = {name: document for name, document in results.items() if name not in RESERVED_TASKS}
    for name, document in of_tasks.items():
        mark = " *" if unmentioned_note(document) else ""
        for row in shown_rows(document):
            figures = (format_estimate(row["metrics"][key]) for key in ("auc", "balanced_accuracy"))
            protocol = label_of(row["protocol"], row.get("fraction"), row.get("draw", 0))
            protocol += mark if row["protocol"] == "zero-shot" else ""
            sizes = str(row["n"]), str(row["patients"])
            lines.append((name, protocol, row["model"], row["unit"], *figures, *sizes))
        if not document["rows"]:
            lines.append((name, "no image to score", "", "", "n/a", "n/a", str(document["images"]), "0"))
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    notes = [f"* {name}: {note}" for name, document in of_tasks.items() if (note := unmentioned_note(document))]
    chances = [f"{document['chance']:.2f} {name}" for name, document in of_tasks.items() if document["chance"]]
    chance = [f"balanced accuracy of guessing: {', '.join(chances)}"] if chances else []
    return "\n".join(
        [table[0], "-" * len(table[0]), *table[1:], *chance, *notes, *localisation_lines(results.get("alignment"))]
    )


def shown_rows(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows on images and on the task's unit, side by side."""
    rows = rows_of(document, "image", document.get("unit", "image"))
    order = list(dict.fromkeys(map(_source, rows)))
    return sorted(rows, key=lambda row: order.index(_source(row)))


def is_whole(row: dict[str, Any]) -> bool:
    """Whether a row is of a protocol that had all training labels that it uses."""
    return row.get("fraction") in (None, 1.0) and not row.get("draw")


def _source(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(key) for key in ("protocol", "model", "fraction", "draw"))


def localisation_lines(document: dict[str, Any] | None) -> list[str]:
    """The figures of the trained model's local alignment, as far as there are any, and of boxes in files: lines."""
    if not document:
        return []
    lines = []
    for row in (row for row in document["rows"] if row["model"] == "trained"):
        hits, area = format_estimate(row["hit_rate"]), format_estimate(row["box_auc"])
        strict, chances = format_estimate(row["strict_hit_rate"]), (document["chance"], document["strict_chance"])
        chance, strict_chance = (f"(chance {one:.3f})" for one in chances)
        head = f"pointing at {document['findings']} findings: hits {hits} {chance}"
        lines.append(f"{head}, box AUC {area}")
        lines.append(f"in the box itself, without the patches beside it: hits {strict} {strict_chance}")
    for one in document["differences"]:
        gained = (format_estimate(one[key]) for key in ("hit_rate", "strict_hit_rate", "box_auc"))
        lines.append("trained - brightest: hits {}, strict {}, box AUC {}".format(*gained))
    lines += _local_retrieval_lines(document["local_retrieval"])
    detection = document["detection"]
    files = detection["files"]
    for row in (row for row in detection["rows"] if row["model"] in ("trained", *files)):
        at_one = next(one["sensitivity"] for one in row["froc"] if one["false_positives"] == 1)
        found, precision = format_estimate(at_one), format_estimate(row["ap"]["0.25"])
        head = "" if row["model"] == "trained" else f"{row['model']}, "
        head += f"finding {detection['lesions']} lesions: sensitivity {found} at 1 false mark an image"
        lines.append(f"{head}, AP (IoU 0.25) {precision}")
    if files and not detection["rows"]:
        lines.append(f"boxes of {', '.join(files)}: not measured, as {detection['reason']}")
    return lines


def _local_retrieval_lines(document: dict[str, Any]) -> list[str]:
    """The AUC of sentences against lesion-free images, and those that stand beside it; or why there is none."""
    if not document["targets"]:
        return []
    if not document["rows"]:
        return [f"sentences against lesion-free images: not measured, as {document['reason']}"]
    areas = {(row["model"], row["by"]): format_estimate(row["auc"]) for row in document["rows"]}
    counts = f"{document['targets']} sentences against {document['lesion_free']} lesion-free images"
    own, normal, untrained = (
        areas.get(key, "n/a") for key in (("trained", OWN), ("trained", NORMAL), ("untrained", OWN))
    )
    texts = areas["trained", TEXT], areas.get(("untrained", TEXT), "n/a")
    return [
        f"{counts}: AUC {own}",
        f"beside it: {NORMAL} {normal}, untrained {untrained}",
        f"{TEXT} by the global embeddings: {texts[0]}, untrained {texts[1]}",
    ]


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

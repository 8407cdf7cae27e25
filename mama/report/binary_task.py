"""The parts of the page for one binary task, from its predictions.csv and its rows on images."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mama.errors import ConfigError
from mama.evaluate import metrics
from mama.evaluate.arrays import Float64s
from mama.evaluate.provenance import Document
from mama.evaluate.results import Scored, format_estimate, predictions_file, read_predictions
from mama.report import figures
from mama.report.pictures import Pictures

ERRORS = 5  # that are shown of each protocol
Predictions = dict[tuple[str, str], Scored]  # by protocol and model


def predictions(task: Document, folder: Path) -> Predictions | None:
    """Those of every row of `task`, whose results are in `folder`; None if the file is missing or damaged."""
    file = folder / task["task"] / predictions_file("image")
    keys = [(row["protocol"], row["model"]) for row in task["rows"]]
    try:
        return {key: read_predictions(file, *key) for key in keys}
    except ConfigError:
        return None


def curves(task: Document, scored: Predictions | None) -> Document:
    """ROC and precision-recall curves by protocol, measured areas in their legends; no `panels` without `scored`."""
    protocols = dict.fromkeys(row["protocol"] for row in task["rows"]) if scored else {}
    of = {name: [row for row in task["rows"] if row["protocol"] == name] for name in protocols}
    return {"task": task, "panels": [_panel(name, rows, scored) for name, rows in of.items() if scored]}


def _panel(protocol: str, rows: list[Document], scored: Predictions) -> Document:
    found = [(row, scored[protocol, row["model"]]) for row in rows]
    rocs = [_curve(row, "auc", metrics.roc(one.labels, one.scores[:, 1])) for row, one in found]
    precisions = [
        _curve(row, "average_precision", metrics.precision_recall(one.labels, one.scores[:, 1])) for row, one in found
    ]
    positives = float(found[0][1].labels.mean())
    return {
        "protocol": protocol,
        "roc": figures.roc_curves(rocs, protocol),
        "precision_recall": figures.precision_recall_curves(precisions, protocol, positives),
    }


def _curve(row: Document, metric: str, rates: tuple[Float64s, Float64s]) -> Document:
    """`metric` in the legend; an earlier release did not measure each."""
    measured = row["metrics"].get(metric)
    label = f"{row['model']}: {format_estimate(measured)}" if measured else row["model"]
    return {"model": row["model"], "x": rates[0], "y": rates[1], "label": label}


def calibrations(task: Document) -> Document:
    """The rows of the trained model, each with its reliability diagram; None where an earlier release measured none."""
    rows = [row for row in task["rows"] if row["model"] == "trained"]
    return {"task": task, "rows": [{**row, "reliability": _reliability(row)} for row in rows]}


def _reliability(row: Document) -> str | None:
    measured = row.get("calibration")
    return figures.reliability_diagram(measured, row["protocol"]) if measured else None


def worst_errors(task: Document, scored: Predictions | None, pictures: Pictures | None) -> Document:
    """The errors of the trained model by protocol; no `rows` without `scored`."""
    rows = [row for row in task["rows"] if row["model"] == "trained"] if scored else []
    return {
        "task": task,
        "rows": [_errors(row, scored[row["protocol"], "trained"], pictures) for row in rows if scored],
    }


def _errors(row: Document, one: Scored, pictures: Pictures | None) -> Document:
    """Their measured number, and the images whose wrong class has the highest probability, one of a patient."""
    (_, false_positive), (false_negative, _) = row["confusion"]
    wrong = np.flatnonzero(one.scores.argmax(1) != one.labels)
    probability = one.scores[wrong, 1 - one.labels[wrong]]
    of_patient: dict[str, int] = {}
    for i in wrong[np.argsort(-probability, kind="stable")].tolist():
        of_patient.setdefault(one.patients[i], i)
    return {
        "protocol": row["protocol"],
        "wrong": false_positive + false_negative,
        "images": [_error(one, i, pictures) for i in list(of_patient.values())[:ERRORS]],
    }


def _error(one: Scored, i: int, pictures: Pictures | None) -> Document:
    truth, predicted = int(one.labels[i]), 1 - int(one.labels[i])
    return {
        "truth": one.classes[truth],
        "predicted": one.classes[predicted],
        "score": float(one.scores[i, predicted]),
        "picture": pictures.thumbnail(one.images[i]) if pictures else None,
        "facts": pictures.facts(one.images[i]) if pictures else [],
    }

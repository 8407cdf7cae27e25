"""The parts of the page for one binary task, from its predictions.csv and its rows on images."""

from __future__ import annotations

from pathlib import Path

from mama.errors import ConfigError
from mama.evaluate import metrics
from mama.evaluate.arrays import Float64s
from mama.evaluate.provenance import Document
from mama.evaluate.results import Scored, format_estimate, predictions_file, read_predictions
from mama.report import figures

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

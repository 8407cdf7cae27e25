"""Charts of the report as SVG, and the `data:` URI that embeds a file in the page."""

from __future__ import annotations

import base64
import io
from itertools import cycle
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Distinct also for readers with red-green colour blindness (Okabe and Ito 2008).
COLOURS = {
    "trained": "#0072b2",
    "untrained": "#8c8c8c",
    "31 intensity percentiles": "#e69f00",
    "brightest patch": "#e69f00",
    "random map": "#56b4e9",
}
FURTHER = [(colour, line) for line in ("-", "--", ":") for colour in ("#009e73", "#d55e00", "#cc79a7")]  # of others
CALIBRATIONS = {"uncalibrated": ("#0072b2", "o"), "temperature": ("#d55e00", "s"), "isotonic": ("#009e73", "^")}
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
INK, FAINT = "#22303c", "#d5dae0"
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#eceff2",
    "xtick.color": "#5a6772",
    "ytick.color": "#5a6772",
    "text.color": INK,
    "legend.frameon": False,
    "svg.hashsalt": "mama",
}
PANELS = {"loss": "loss/", "in-batch accuracy": "accuracy/", "learning rate": "lr/", "logit scale": "scale/"}


def training_curves(records: list[dict[str, float]], local_start: int) -> str:
    """Loss terms, in-batch accuracies, learning rates and logit scales over the steps of log.jsonl, as a `data:` URI.

    A dotted line marks `local_start`, the step from which the local term is part of the total.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 6), layout="constrained")
        for number, (title, prefix) in enumerate(PANELS.items()):
            axes = figure.add_subplot(2, 2, number + 1)
            logged = {name for record in records for name in record if name.startswith(prefix)}
            names = sorted(logged - {"scale/largest"})  # the cap would flatten the curves; the caption names it
            for colour, name in zip(SERIES, names, strict=False):
                points = [(record["step"], record[name]) for record in records if name in record]
                label = name.removeprefix(prefix).replace("_", " ")
                axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.6, label=label)
            if "loss/local" in names and 0 < local_start <= records[-1]["step"]:
                axes.axvline(local_start, color=INK, linewidth=0.8, linestyle=":")
                note = " the local term enters"
                axes.annotate(note, (local_start, 0.02), xycoords=("data", "axes fraction"), fontsize=8)
            axes.set(title=title, xlabel="step", xlim=(0, None), ylim=(0, 1.05 * axes.dataLim.y1 if names else None))
            if len(names) > 1:
                axes.legend(fontsize=8)
        return _svg(figure)


def roc_curves(curves: list[dict[str, Any]], title: str) -> str:
    """The ROC curves of one protocol as a `data:` URI.

    A curve is {model, x, y, label}: false and true positive rates as arrays from (0, 0) to (1, 1).
    """
    return _rates(curves, title, ("false positive rate", "true positive rate"), [0, 1], "default")


def precision_recall_curves(curves: list[dict[str, Any]], title: str, positives: float) -> str:
    """The precision-recall curves of one protocol as a `data:` URI; dashed: chance, the share of `positives`.

    A curve is {model, x, y, label}: recall and precision as arrays, as of `metrics.precision_recall`.
    """
    return _rates(curves, title, ("recall", "precision"), [positives, positives], "steps-pre")


def _rates(curves: list[dict[str, Any]], title: str, names: tuple[str, str], chance: list[float], style: str) -> str:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5, 5.2), layout="constrained")
        axes = figure.add_subplot()
        axes.plot([0, 1], chance, color=FAINT, linewidth=1, linestyle="--")
        for curve in curves:
            colour = COLOURS.get(curve["model"], INK)
            axes.plot(curve["x"], curve["y"], color=colour, linewidth=2, label=curve["label"], drawstyle=style)
        axes.set(title=title, xlabel=names[0], ylabel=names[1], aspect="equal")
        axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
        figure.legend(loc="outside lower center", fontsize=8)
        return _svg(figure)


def reliability_diagram(calibration: dict[str, Any], title: str) -> str:
    """The share of positives over the stated probability, bin by bin with intervals, as a `data:` URI.

    `calibration` as in a row of metrics.json; what could not be fitted is left out. Dashed: probabilities that mean
    what they say.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5, 5.2), layout="constrained")
        axes = figure.add_subplot()
        axes.plot([0, 1], [0, 1], color=FAINT, linewidth=1, linestyle="--")
        measured = {name: calibration[name]["curve"] for name in CALIBRATIONS if calibration[name]["curve"]}
        for name, curve in measured.items():
            colour, marker = CALIBRATIONS[name]
            stated, observed = [one["predicted"] for one in curve], [one["observed"] for one in curve]
            for one in curve:
                if one["low"] is not None:
                    axes.plot([one["predicted"]] * 2, [one["low"], one["high"]], color=colour, linewidth=1, alpha=0.5)
            axes.plot(stated, observed, color=colour, marker=marker, markersize=5, linewidth=1.6, label=name)
        axes.set(title=title, xlabel="stated probability", ylabel="share of positives", aspect="equal")
        axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
        if measured:
            figure.legend(loc="outside lower center", ncols=len(measured), fontsize=8)
        return _svg(figure)


def froc_curves(curves: list[dict[str, Any]]) -> str:
    """Sensitivity over false positives an image, on a scale of octaves, as a `data:` URI.

    A curve is {model, false_positives, sensitivity, label}, the rates as lists; where it ends with its last mark within
    the figure, there is a dot.
    """
    ticks = [1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4.4 + 0.18 * len(curves)), layout="constrained")
        axes = figure.add_subplot()
        further = cycle(FURTHER)
        for curve in curves:
            model, shares = curve["model"], curve["sensitivity"]
            colour, line = (COLOURS[model], "-") if model in COLOURS else next(further)
            rates = np.clip(curve["false_positives"], ticks[0], ticks[-1])
            axes.plot(rates, shares, line, color=colour, linewidth=2, label=curve["label"], drawstyle="steps-post")
            if rates[-1] < ticks[-1]:
                axes.plot(rates[-1:], shares[-1:], color=colour, marker="o", markersize=5, clip_on=False)
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{tick:g}" if tick >= 1 else f"1/{1 / tick:g}" for tick in ticks])
        axes.set(xlabel="false positives an image", xlim=(ticks[0], ticks[-1]))
        axes.set(ylabel="sensitivity", ylim=(-0.01, 1.01))
        figure.legend(loc="outside lower center", fontsize=8)
        return _svg(figure)


def confusion_matrix(counts: list[list[int]], classes: list[str], title: str) -> str:
    """Rows are the true class, columns the predicted one; the shade is the share of the row. A `data:` URI."""
    table = np.array(counts, dtype=float)
    totals = table.sum(1, keepdims=True)
    shares = np.divide(table, totals, out=np.zeros_like(table), where=totals > 0)
    side = 1.5 + 0.5 * len(classes)
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(side + 0.6, side), layout="constrained")
        axes: Axes = figure.add_subplot()
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for row, column in np.ndindex(*table.shape):
            colour = "white" if shares[row, column] > 0.55 else INK
            axes.text(column, row, f"{int(table[row, column])}", ha="center", va="center", color=colour, fontsize=9)
        axes.set_xticks(range(len(classes)), classes, rotation=45 if max(map(len, classes)) > 3 else 0, ha="center")
        axes.set_yticks(
            range(len(classes)), [f"{name} ({int(n)})" for name, n in zip(classes, totals[:, 0], strict=True)]
        )
        axes.set(title=title, xlabel="predicted", ylabel="true")
        axes.tick_params(length=0)
        return _svg(figure)


def forest_plot(rows: list[dict[str, Any]], overall: list[dict[str, Any]], unit: str) -> str:
    """AUC and interval of each subgroup, a colour for each protocol, beside those of all (dashed). A `data:` URI.

    `rows` and `overall` as in a task's metrics.json. A subgroup without an AUC keeps its line, and its size.
    """
    groups = list(dict.fromkeys((row["by"], row["group"], row["n"]) for row in rows))
    place = {group[:2]: number for number, group in enumerate(groups)}
    protocols = list(dict.fromkeys(row["protocol"] for row in overall))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 1.2 + 0.3 * len(groups)), layout="constrained")
        axes = figure.add_subplot()
        for number, (protocol, colour) in enumerate(zip(protocols, SERIES, strict=False)):
            of_all = next(row["metrics"]["auc"]["value"] for row in overall if row["protocol"] == protocol)
            if of_all is not None:
                axes.axvline(of_all, color=colour, linewidth=1, linestyle="--")
            aucs = [(place[row["by"], row["group"]], row["metrics"]["auc"]) for row in rows
                    if row["protocol"] == protocol and row["metrics"]["auc"]["value"] is not None]  # fmt: skip
            height = 0.2 * (number - (len(protocols) - 1) / 2)
            for y, auc in aucs:
                if auc["low"] is not None:
                    axes.plot([auc["low"], auc["high"]], [y + height] * 2, color=colour, linewidth=1.4)
            axes.plot(
                [auc["value"] for _, auc in aucs], [y + height for y, _ in aucs], "o", color=colour, label=protocol
            )
        names = [f"{by}: {group} ({n} {unit}{'s' * (n != 1)})" for by, group, n in groups]
        axes.set_yticks(range(len(groups)), names, fontsize=8)
        axes.set(xlabel="AUC [95 %]", xlim=(-0.01, 1.01), ylim=(len(groups) - 0.4, -0.6))
        figure.legend(loc="outside upper center", ncols=len(protocols), fontsize=8)
        return _svg(figure)


def data_uri(kind: str, content: bytes) -> str:
    """A file of the media type `kind` as a `data:` URI, so that the page holds it."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _svg(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return data_uri("image/svg+xml", buffer.getvalue())
